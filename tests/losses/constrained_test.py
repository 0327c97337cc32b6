import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from tiltjax.advantages import gae
from tiltjax.losses.constrained import combined_advantage, init_multiplier, ptx_loss, update_multiplier

RNG = np.random.default_rng(0)
COST = RNG.normal(0.3, 1.0, size=(6, 8)).astype(np.float32)  # Six steps of eight completions.
WHERE = RNG.random((6, 8)) < 0.6


class MultiplierTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_follows_the_mean_cost_of_the_last_completions(self):
        step = self.variant(lambda s, c, w: update_multiplier(s, c, w, learning_rate=0.5, threshold=0.1))
        state, seen, log_multiplier = init_multiplier(0.8, window=11), [], np.log(0.8)
        for cost, where in zip(COST, WHERE, strict=True):
            state = step(state, np.where(where, cost, np.nan), where)
            seen = (seen + list(cost[where].astype(np.float64)))[-11:]
            log_multiplier = min(log_multiplier + 0.5 * np.exp(log_multiplier) * (np.mean(seen) - 0.1), np.log(5))
            np.testing.assert_allclose(state.log_multiplier, log_multiplier, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(state.cost[state.seen], seen, rtol=1e-6)
        assert len(seen) == 11

    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(0.01, 1.0, 5.0)
    def test_combined_advantage(self, multiplier):
        reward, cost = RNG.normal(size=(2, 8, 3)).astype(np.float32)
        run = self.variant(lambda a, c: combined_advantage(a, c, log_multiplier=np.log(multiplier)))
        expected = (reward.astype(np.float64) - multiplier * cost) / (1 + multiplier)
        np.testing.assert_allclose(run(reward, cost), expected, rtol=1e-5, atol=1e-6)


def test_is_gradient_ascent_of_the_lagrangian_in_log_space():
    ascent = jax.grad(lambda log_multiplier: jnp.exp(log_multiplier) * (COST[0].mean() - 0.1))(jnp.log(2.0))
    state = update_multiplier(init_multiplier(2.0), COST[0], learning_rate=0.3, threshold=0.1)
    np.testing.assert_allclose(state.log_multiplier, jnp.log(2.0) + 0.3 * ascent, rtol=1e-6)


def test_the_multiplier_is_bounded_and_waits_for_a_cost():
    state = init_multiplier(1.0, window=4)
    chex.assert_trees_all_equal(update_multiplier(state, COST[0], np.zeros(8, bool), threshold=-3.0), state)
    high = update_multiplier(state, np.full(3, 1e4, np.float32), max_multiplier=5.0)
    np.testing.assert_allclose(jnp.exp(high.log_multiplier), 5, rtol=1e-6)
    low = update_multiplier(state, np.full(3, -1e4, np.float32))
    assert np.isfinite(low.log_multiplier)
    assert low.log_multiplier < -100


def test_the_multiplier_is_the_same_on_eight_devices():
    """Each device keeps its own window; the mean is over all of them."""
    mesh, rows = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    state = init_multiplier(1.0, window=2)

    def run(cost, where):
        return update_multiplier(state, cost, where, axis_name="data").log_multiplier

    cost, where = COST.T, WHERE.T  # [devices, completions]
    last = np.concatenate([row[real][-2:] for row, real in zip(cost, where, strict=True)]).astype(np.float64)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec())
    np.testing.assert_allclose(jax.jit(mapped)(cost, where), 0.1 * last.mean(), rtol=1e-5)
    np.testing.assert_allclose(jax.pmap(run, axis_name="data")(cost, where), np.full(8, 0.1 * last.mean()), rtol=1e-5)


def test_the_kl_of_both_streams_adds_up_to_beta():
    """-beta k1 in the reward and +beta k1 in the cost: their combination has -beta k1, whatever the multiplier."""
    reward, cost, kl, zero = *RNG.normal(size=(3, 4, 6)).astype(np.float32), np.zeros((4, 6), np.float32)
    mask = np.arange(6) < np.array([[6], [3], [1], [0]])
    advantage = lambda x: gae(x, zero, mask, lam=0.9)[0]
    both = combined_advantage(advantage(reward - 0.2 * kl), advantage(cost + 0.2 * kl), log_multiplier=0.7)
    plain = combined_advantage(advantage(reward), advantage(cost), log_multiplier=0.7)
    np.testing.assert_allclose(both, plain - 0.2 * advantage(kl), atol=1e-5)


def test_advantage_and_multiplier_carry_no_gradient():
    grads = jax.grad(lambda *x: combined_advantage(*x[:2], log_multiplier=x[2]).sum(), argnums=(0, 1, 2))
    assert all((np.asarray(g) == 0).all() for g in grads(jnp.ones(3), jnp.ones(3), jnp.float32(0.3)))
    grad = jax.grad(lambda c: update_multiplier(init_multiplier(), c).log_multiplier)(jnp.asarray(COST[0]))
    np.testing.assert_array_equal(grad, np.zeros(8))


def test_ptx_is_the_negative_log_likelihood_of_the_real_tokens():
    token_logp = -RNG.gamma(2.0, size=(4, 6)).astype(np.float32)
    mask = RNG.random((4, 6)) < 0.6
    dirty = jnp.asarray(np.where(mask, token_logp, np.nan))
    loss = lambda x: ptx_loss(x, mask, coefficient=27.8)
    np.testing.assert_allclose(loss(dirty), np.where(mask, -27.8 * token_logp, 0), rtol=1e-6)
    grad = jax.grad(lambda x: loss(x).sum())(dirty)
    np.testing.assert_allclose(grad, np.where(mask, -27.8, 0), rtol=1e-6)
    check_grads(loss, (jnp.asarray(token_logp),), order=1, modes=("rev",), rtol=1e-2)


def test_bad_options_are_named():
    state = init_multiplier()
    for call, message in (
        (lambda: init_multiplier(0.0), "multiplier must be a finite number above 0, got 0.0"),
        (lambda: init_multiplier(window=0), "window must be at least 1, got 0"),
        (lambda: update_multiplier(state, COST[0], learning_rate=0), "learning_rate must be a finite number above 0"),
        (lambda: update_multiplier(state, COST[0], max_multiplier=-1.0), "max_multiplier must be a finite number"),
        (lambda: ptx_loss(COST, WHERE, coefficient=-1), "coefficient must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
