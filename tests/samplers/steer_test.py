import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy.special import log_softmax

from tests.grids import each_grid, mesh_over
from tiltjax.ops.schedule import linear_schedule
from tiltjax.samplers.steer import smc, steered_denoise

V, T = 3, 3
RNG = np.random.default_rng(0)
REF, OTHER = log_softmax(RNG.normal(size=(2, T, V, V)), -1)
"""Token laws of the reference and of another proposal: at step t after the previous token."""
REWARD = RNG.normal(size=(V,) * T)
BETA = 0.5


def enumerated():
    """Exact Z and the tilt of all completions; the first token follows token 0."""
    logp = np.zeros((V,) * T)
    for tokens in itertools.product(range(V), repeat=T):
        logp[tokens] = sum(REF[t, tokens[t - 1] if t else 0, tokens[t]] for t in range(T))
    weight = np.exp(logp + REWARD / BETA)
    return weight.sum(), weight / weight.sum()


def language_model(proposal):
    """``propose`` of a language model: the particle is its tokens."""

    def propose(keys, state, step):
        previous = jnp.where(step > 0, jnp.take(state["tokens"], step - 1, axis=1), 0)
        ref, drawn_from = (jnp.asarray(table)[step, previous] for table in (REF, proposal))
        token = jax.vmap(jax.random.categorical)(keys, drawn_from)
        pick = lambda logp: jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
        tokens = state["tokens"].at[:, step].set(token)
        return {"tokens": tokens, "even": token % 2 == 0}, pick(ref) - pick(drawn_from)

    return propose


def twist(state, step):
    tokens = state["tokens"]
    reward = jnp.asarray(REWARD)[tokens[:, 0], tokens[:, 1], tokens[:, 2]] / BETA
    return jnp.where(step == T - 1, reward, jnp.asarray(REWARD.mean(-1).mean(-1))[tokens[:, 0]] / BETA)


def start(count):
    return {"tokens": jnp.zeros((count, T), jnp.int32), "even": jnp.zeros(count, bool)}


@pytest.mark.parametrize(
    ("potential", "proposal", "every"), [("difference", REF, 1), ("max", OTHER, 2), ("sum", OTHER, 1)]
)
def test_z_is_unbiased_and_the_particles_are_the_tilt(potential, proposal, every):
    z, law = enumerated()
    runs, count = 1000, 24

    @jax.jit
    @jax.vmap
    def once(key):
        return smc(
            key,
            language_model(proposal),
            twist,
            start(count),
            num_steps=T,
            potential=potential,
            ess_threshold=0.95,
            every=every,
        )

    out = once(jax.random.split(jax.random.key(1), runs))
    ratio = np.exp(np.asarray(out.log_z, np.float64)) / z
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / np.sqrt(runs)
    # Weighted by its own Z-hat every run is unbiased: E[Z-hat sum_i w_i f(y_i)] = Z E_tilt f.
    weights = jax.nn.softmax(out.log_weights, axis=-1) * ratio[:, None] / runs
    counted = np.zeros((V,) * T)
    tokens = np.asarray(out.state["tokens"]).reshape(-1, T)
    np.add.at(counted, tuple(tokens.T), np.asarray(weights).ravel())
    assert np.abs(counted - law).sum() / 2 < 0.03
    assert np.asarray(out.resampled).any()
    assert not np.asarray(out.resampled)[:, -1].any()
    np.testing.assert_array_equal(out.state["even"].reshape(-1), tokens[:, -1] % 2 == 0)


def walk(keys, x, step):
    return x + jax.vmap(jax.random.normal)(keys), jnp.zeros(len(x))


def test_threshold_zero_is_importance_sampling_and_one_step_needs_no_choice():
    @jax.jit
    def run(key):
        return smc(key, walk, lambda x, step: 0.3 * x, jnp.zeros(50), num_steps=3, ess_threshold=0.0)

    out = run(jax.random.key(0))
    assert not out.resampled.any()
    np.testing.assert_allclose(out.log_weights, 0.3 * out.state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.log_z, np.log(np.mean(np.exp(0.3 * np.asarray(out.state)))), rtol=1e-4, atol=1e-6)
    weights = np.exp(np.asarray(out.log_weights, np.float64))
    np.testing.assert_allclose(out.ess[-1], weights.sum() ** 2 / (weights**2).sum(), rtol=1e-4)


def test_the_dead_stay_dead():
    """A particle of zero weight never comes back, whatever its later twists; if all are dead, Z is 0."""

    def first(keys, x, step):
        return x + jnp.where(step == 0, jax.vmap(jax.random.normal)(keys), 0.0), jnp.zeros(len(x))

    @jax.jit
    def run(below, threshold):
        alive = lambda x, step: jnp.where((x < below) & (step == 0), -jnp.inf, 0.1 * x)
        return smc(jax.random.key(0), first, alive, jnp.zeros(40), num_steps=3, ess_threshold=threshold)

    for below, threshold in ((0.0, 0.0), (0.0, 0.9), (100.0, 0.0), (100.0, 0.9)):
        out = run(below, threshold)
        dead = np.asarray(out.state) < below
        assert (np.asarray(out.log_weights)[dead] == -np.inf).all()
        assert not np.isnan(out.log_z)
        assert (float(out.log_z) == -np.inf) == (below == 100.0)
        assert dead.any() == (threshold == 0 or below == 100.0)


@each_grid
def test_particles_over_eight_devices_are_those_of_one(names):
    whole, split = PartitionSpec(), PartitionSpec(names)

    def run(key, state, axis_name=None):
        out = smc(
            key, language_model(OTHER), twist, state, num_steps=T, potential="max", ess_threshold=0.95,
            every=2, axis_name=axis_name,
        )  # fmt: skip
        return out.state, out.log_weights, out.log_z, out.ess, out.resampled

    out_specs = (split, split, whole, whole, whole)
    over = jax.shard_map(
        lambda k, s: run(k, s, names), mesh=mesh_over(names), in_specs=(whole, split), out_specs=out_specs
    )
    key = jax.random.key(5)
    alone, spread = jax.jit(run)(key, start(32)), jax.jit(over)(key, start(32))
    chex.assert_trees_all_equal(alone[0], spread[0])
    chex.assert_trees_all_close(alone[1:4], spread[1:4], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(alone[4], spread[4])
    assert np.asarray(alone[4]).any()


@pytest.mark.parametrize("proposal", ["reference", "twisted"])
def test_diffusion_is_steered_to_the_tilt(proposal):
    """N(0, 1) tilted by exp(x_0 / beta), by its soft value; Z is that of the chain, whose variance is a recursion."""
    schedule, beta = linear_schedule(40), 0.7
    alpha_bar = np.asarray(schedule, np.float64)
    variance = 1.0  # Of the reference chain itself, which the weights are relative to.
    for a, b in zip(alpha_bar[:0:-1], alpha_bar[-2::-1], strict=True):
        fresh = (1 - b) / (1 - a) * (1 - a / b)
        variance = (np.sqrt(b * a) + np.sqrt(max(1 - b - fresh, 0) * (1 - a))) ** 2 * variance + fresh

    def denoiser(x, a):
        return jnp.sqrt(1 - a) * x

    def value(x, a):
        return jnp.sqrt(a) * x[:, 0] + (1 - a) / (2 * beta)

    @jax.jit
    @jax.vmap
    def once(key):
        begin, run = jax.random.split(key)
        x = jax.random.normal(begin, (64, 1))
        out = steered_denoise(run, denoiser, x, schedule, value, beta=beta, proposal=proposal)
        return out.log_z, jnp.sum(jax.nn.softmax(out.log_weights) * out.state[:, 0]), jnp.min(out.ess)

    log_z, mean, ess = map(np.asarray, once(jax.random.split(jax.random.key(2), 150)))
    ratio = np.exp(log_z - variance / (2 * beta**2))
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / np.sqrt(150) + 0.002
    assert abs(mean.mean() - variance / beta) < 0.06
    if proposal == "twisted":
        assert ratio.std() < 0.2


def test_bad_options_are_named():
    run = lambda **options: smc(
        jax.random.key(0), walk, lambda x, step: x, jnp.zeros(4), **({"num_steps": 2} | options)
    )
    for options, message in (
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"ess_threshold": -0.5}, "ess_threshold must be at least 0, got -0.5"),
        ({"potential": "best"}, "potential must be one of difference, max, sum; got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    for options, message in (
        ({"beta": 0.0}, "beta must be a finite number above 0"),
        ({"beta": 1.0, "proposal": "greedy"}, "proposal must be one of reference, twisted; got 'greedy'"),
    ):
        with pytest.raises(ValueError, match=message):
            steered_denoise(
                jax.random.key(0),
                lambda x, a: x,
                jnp.zeros((4, 1)),
                linear_schedule(2),
                lambda x, a: x[:, 0],
                **options,
            )
