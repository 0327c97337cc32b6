import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from tests.compiled import compiled
from tests.losses.tabular import minimiser, ordered_pairs
from tiltjax.losses.preference import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    slic_loss,
)

(
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    slic_loss,
) = map(
    compiled,
    (
        aot_loss,
        aot_unpaired_loss,
        apo_down_loss,
        apo_zero_loss,
        discopop_loss,
        dpo_loss,
        exo_loss,
        hinge_loss,
        ipo_loss,
        slic_loss,
    ),
)

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(8, 2))).astype(np.float32)
REF_LOGP = (LOGP + RNG.normal(size=(8, 2))).astype(np.float32)
LENGTH = RNG.integers(1, 20, size=(8, 2)).astype(np.int32)


def of_margin(loss, **options):
    """The loss as a function of the gap of log-ratios alone."""
    return lambda gap: float(loss(jnp.asarray([gap, 0.0], jnp.float32), jnp.zeros(2), **options))


class IPOTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_margin_is_one_over_two_beta(self):
        slope = jax.grad(lambda x: ipo_loss(x, REF_LOGP, beta=0.1, length_average=False).sum())
        at = REF_LOGP + np.float32([5.0, 0.0])
        np.testing.assert_allclose(self.variant(slope)(jnp.asarray(at)), np.zeros((8, 2)), atol=2e-5)

    @chex.variants(with_jit=True)
    def test_average_is_the_sum_at_length_one(self):
        average = self.variant(lambda n: ipo_loss(LOGP, REF_LOGP, n, beta=0.1, length_average=True))
        total = ipo_loss(LOGP, REF_LOGP, beta=0.1, length_average=False)
        np.testing.assert_allclose(average(jnp.ones((8, 2), jnp.int32)), total, rtol=1e-6)
        np.testing.assert_array_equal(average(LENGTH), average(LENGTH.astype(np.float32)))
        scaled = ipo_loss(LOGP / LENGTH, REF_LOGP / LENGTH, beta=0.1, length_average=False)
        np.testing.assert_allclose(average(LENGTH), scaled, rtol=1e-4)


def test_ipo_fits_the_tilt_of_the_win_rate():
    # Pairs from mu, any preferences at all: pi is p_ref exp(E_mu P(y > y') / beta).
    arms, beta = 5, 0.3
    rng = np.random.default_rng(1)
    ref, mu, pairs = rng.dirichlet(np.ones(arms)), rng.dirichlet(3 * np.ones(arms)), ordered_pairs(arms)
    wins = rng.random((arms, arms))
    wins = wins / (wins + wins.T)
    mass = (mu[:, None] * mu * wins)[pairs[:, 0], pairs[:, 1]]
    loss = lambda logp: jnp.sum(mass * ipo_loss(logp[pairs], np.log(ref)[pairs], beta=beta, length_average=False))
    expected = ref * np.exp(wins @ mu / beta)
    np.testing.assert_allclose(minimiser(loss, ref), expected / expected.sum(), atol=1e-9)


def test_ipo_average_needs_lengths():
    with pytest.raises(ValueError, match="length must be given with length_average=True, got None"):
        ipo_loss(LOGP, REF_LOGP, beta=0.1, length_average=True)
    with pytest.raises(TypeError, match="length_average"):
        ipo_loss(LOGP, REF_LOGP, beta=0.1)


def test_hinge_has_no_gradient_where_the_margin_is_met():
    logp = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])  # Beyond, at and before 1 / beta.
    value, grad = jax.vmap(jax.value_and_grad(lambda x: hinge_loss(x, jnp.zeros(2), beta=0.5)))(logp)
    np.testing.assert_array_equal(value, [0.0, 0.0, 0.5])
    np.testing.assert_array_equal(grad, [[0, 0], [0, 0], [-0.5, 0.5]])


def test_slic_imitates_its_target():
    target = jnp.asarray(RNG.normal(size=8), jnp.float32)
    grads = jax.grad(lambda x, t: slic_loss(x, t, margin=1.0, nll_weight=0.25).sum(), argnums=(0, 1))
    pull = np.where(LOGP[:, 0] - LOGP[:, 1] < 1, 1.0, 0.0)
    ours, theirs = grads(jnp.asarray(LOGP), target)
    np.testing.assert_allclose(ours, np.stack([-pull, pull], -1))
    np.testing.assert_allclose(theirs, np.full(8, -0.25))
    chosen = slic_loss(LOGP, LOGP[:, 0], nll_weight=0.25)
    np.testing.assert_array_equal(slic_loss(LOGP, nll_weight=0.25), chosen)
    where = np.ones((8, 2), bool)
    where[3, 1] = False
    out = slic_loss(LOGP, target.at[3].set(jnp.nan), where=where)
    assert float(out[3]) == 0


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_exo_is_zero_at_the_smoothed_label(eps):
    loss = of_margin(exo_loss, beta=1.0, label_smoothing=eps)
    best = np.log((1 - eps) / eps)
    np.testing.assert_allclose(loss(best), 0, atol=1e-6)
    assert min(loss(best + 0.1), loss(best - 0.1)) > 1e-5
    # A share p of labels against 1 - p: a geometric mean of the two targets.
    mixed = lambda m: 0.7 * loss(m) + 0.3 * loss(-m)
    found = minimize_scalar(mixed, bounds=(-8, 8), method="bounded", options={"xatol": 1e-4}).x
    np.testing.assert_allclose(found, 0.4 * best, atol=5e-3)


def test_anchors_pull_each_completion_by_itself():
    grad = lambda loss: np.asarray(jax.grad(lambda x: loss(x, REF_LOGP, beta=0.5).sum())(jnp.asarray(LOGP)))
    slope = 0.5 * expit(0.5 * (LOGP - REF_LOGP)) * expit(-0.5 * (LOGP - REF_LOGP))
    np.testing.assert_allclose(grad(apo_zero_loss), slope * [-1, 1], rtol=1e-4)
    ratio = LOGP - REF_LOGP
    margin = 0.5 * (ratio[:, 0] - ratio[:, 1])
    pair = 0.5 * expit(margin) * expit(-margin)
    np.testing.assert_allclose(grad(apo_down_loss), np.stack([slope[:, 0] - pair, pair], -1), rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(apo_zero_loss(LOGP, LOGP, beta=0.5), np.ones(8))
    np.testing.assert_array_equal(apo_down_loss(LOGP, LOGP, beta=0.5), np.ones(8))


def test_discopop_is_logistic_below_and_exponential_above():
    loss = of_margin(discopop_loss, beta=1.0)
    np.testing.assert_allclose(loss(-3.0), -log_expit(-3.0), rtol=1e-6)
    np.testing.assert_allclose(loss(3.0), np.exp(-3.0), rtol=1e-6)
    np.testing.assert_allclose(loss(0.0), 0.5 * np.log(2) + 0.5, rtol=1e-6)
    grid = np.linspace(-0.4, 0.4, 81)
    values = np.array([loss(m) for m in grid])
    turns = grid[1:-1][np.diff(np.sign(np.diff(values))) != 0]
    assert len(turns) == 2
    assert -0.3 < turns[0] < 0 < turns[1] < 0.2


class AOTTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_only_the_distributions_count(self):
        order = RNG.permutation(8)
        paired = self.variant(lambda logp, ref: aot_loss(logp, ref, beta=0.3))
        np.testing.assert_allclose(paired(LOGP, REF_LOGP), paired(LOGP, REF_LOGP[order]), rtol=1e-6)
        mixed = lambda x: np.stack([x[:, 0], x[order, 1]], -1)
        unpaired = self.variant(lambda logp, ref: aot_unpaired_loss(logp, ref, beta=0.3))
        np.testing.assert_allclose(unpaired(LOGP, REF_LOGP), unpaired(mixed(LOGP), mixed(REF_LOGP)), rtol=1e-6)

    @chex.variants(with_jit=True)
    def test_ranks_are_among_real_pairs(self):
        where = np.ones((8, 2), bool)
        where[[1, 4], [0, 1]] = False
        kept = where.all(-1)
        for loss in (aot_loss, aot_unpaired_loss):
            run = self.variant(functools.partial(loss, beta=0.3))
            dirty = np.where(where, LOGP, np.nan)
            expected = np.zeros(8)
            expected[kept] = loss(LOGP[kept], REF_LOGP[kept], beta=0.3)
            np.testing.assert_allclose(run(dirty, REF_LOGP, where=where), expected, rtol=1e-6)


def test_aot_of_equal_order_is_dpo():
    # Gaps that already rise together are compared pair by pair.
    gaps = np.sort(RNG.normal(size=(2, 8)), axis=-1).astype(np.float32)
    logp, ref = (np.stack([x, np.zeros_like(x)], -1) for x in gaps)
    np.testing.assert_allclose(
        aot_loss(logp, ref, beta=0.3, label_smoothing=0.1),
        dpo_loss(logp, ref, beta=0.3, label_smoothing=0.1),
        rtol=1e-5,
    )


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_aot_gradients_cross_devices(loss):
    def total(scale, logp, ref, axis_name=None):
        mean = loss(scale * logp, ref, beta=0.3, axis_name=axis_name).mean()
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

    expected = jax.grad(total)(jnp.float32(1), LOGP, REF_LOGP)
    step = lambda *args: jax.lax.pmean(jax.grad(total)(*args, "data"), "data")
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(whole, rows, rows), out_specs=whole))
    np.testing.assert_allclose(sharded(jnp.float32(1), LOGP, REF_LOGP), expected, rtol=1e-5)
    pmapped = jax.pmap(step, axis_name="data", in_axes=(None, 0, 0))
    np.testing.assert_allclose(
        pmapped(jnp.float32(1), LOGP[:, None], REF_LOGP[:, None]), np.full(8, expected), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: exo_loss(LOGP, REF_LOGP, beta=0.1, label_smoothing=0.0),
            r"label_smoothing must lie in \(0, 0.5\), got",
        ),
        (
            lambda: aot_loss(LOGP, REF_LOGP, beta=0.1, label_smoothing=0.5),
            r"label_smoothing must lie in \[0, 0.5\), got",
        ),
        (lambda: slic_loss(LOGP, margin=-1.0), "margin must be at least 0, got -1.0"),
        (lambda: discopop_loss(LOGP, REF_LOGP, beta=0.1, tau=0.0), "tau must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
