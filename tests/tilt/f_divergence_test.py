import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy.optimize import minimize

from tiltjax.tilt.divergence import chi_squared, tilt_kl
from tiltjax.tilt.f_divergence import DIVERGENCES, divergence_link, f_divergence, f_divergence_tilt
from tiltjax.tilt.pessimism import pessimistic_threshold, pessimistic_weights
from tiltjax.tilt.weights import tilt

# f, f' and 1 / f'', in float64 NumPy.
FORMULAS = {
    ("reverse_kl", 0.5): (lambda u: u * np.log(u), np.log, lambda u: u),
    ("forward_kl", 0.5): (lambda u: -np.log(u), lambda u: 1 - 1 / u, lambda u: u**2),
    ("js", 0.5): (
        lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
        lambda u: np.log(2 * u / (1 + u)),
        lambda u: u * (1 + u),
    ),
    ("alpha", 0.3): (
        lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
        lambda u: (1 - u**-0.3) / 0.3,
        lambda u: u**1.3,
    ),
    ("alpha", 0.8): (
        lambda u: (u**0.2 - 0.2 * u - 0.8) / (0.8 * -0.2),
        lambda u: (1 - u**-0.8) / 0.8,
        lambda u: u**1.8,
    ),
    ("chi_squared", 0.5): (lambda u: (u - 1) ** 2 / 2, lambda u: u - 1, lambda u: 1.0 * (u > 0)),
    ("mixed_chi_squared", 0.5): (
        lambda u: (u - 1) ** 2 / 2 + u * np.log(u),
        lambda u: u - 1 + np.log(u),
        lambda u: u / (1 + u),
    ),
}
every_divergence = pytest.mark.parametrize(("divergence", "alpha"), list(FORMULAS))
RNG = np.random.default_rng(0)
REWARD = RNG.normal(size=(5, 7))
REF = RNG.dirichlet(np.ones(7), size=5)
BETA = np.array([0.03, 0.2, 0.7, 3.0, 200.0])


@functools.partial(jax.jit, static_argnums=6)
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def pull_back(reward, beta, ref, cotangent, slope, alpha, divergence):
    out = f_divergence_tilt(reward, ref, beta=beta, divergence=divergence, alpha=alpha)
    return jnp.sum(cotangent * out.weights) + jnp.sum(slope * out.lam), out


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.grad, has_aux=True)
def slope_and_value(weights, ref, alpha, divergence):
    value = f_divergence(weights, ref, divergence=divergence, alpha=alpha)
    return value.sum(), value


def numeric_optimum(reward, ref, beta, f, derivative):
    """A general-purpose optimiser on the simplex, ``p = z^2 / |z|^2``, from the reference."""

    def loss(z):
        p = z * z / (z @ z)
        slope = beta * derivative(p / ref) - reward
        return beta * (ref * f(p / ref)).sum() - p @ reward, 2 * z / (z @ z) * (slope - p @ slope)

    z = minimize(loss, np.sqrt(ref), jac=True, method="BFGS", options={"gtol": 1e-13, "maxiter": 2000}).x
    return z * z / (z @ z)


@every_divergence
def test_is_the_optimum_and_its_derivatives_are_those_of_the_implicit_function(divergence, alpha):
    f, derivative, inverse_curvature = FORMULAS[divergence, alpha]
    cotangent, slope = RNG.normal(size=REWARD.shape), RNG.normal(size=5)
    with jax.enable_x64(True):
        step = 1e-6 * REF * RNG.normal(size=REF.shape)  # Of the reference, no longer normalised.
        call = lambda ref: pull_back(REWARD, BETA, ref, cotangent, slope, alpha, divergence)
        (_, out), gradients = call(REF)
        moved = float(call(REF + step)[0][0] - call(REF - step)[0][0])
    (gradient, beta_gradient, ref_gradient), weights, lam = jax.tree.map(np.asarray, (gradients, out.weights, out.lam))
    ratio, kept = weights / REF, weights > 0
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-14)

    # Stationary where it is positive, and not worth a visit elsewhere.
    link = derivative(np.where(kept, ratio, 1))
    scale = np.maximum(BETA * np.abs(link).max(-1), 1)[:, None]
    error = BETA[:, None] * link - (REWARD - lam[:, None])
    assert np.abs(np.where(kept, error / scale, 0)).max() < 1e-12
    assert kept.all() == (divergence != "chi_squared")
    assert (REWARD - lam[:, None] + BETA[:, None])[~kept].max(initial=-np.inf) <= 0

    # The best point a general-purpose optimiser finds.
    for row in (1, 2, 3):
        found = numeric_optimum(REWARD[row], REF[row], BETA[row], f, derivative)
        np.testing.assert_allclose(weights[row], found, atol=1e-8)

    # d pi_i = h_i (d r_i - d lam) / beta, with h = ref / f'' and d lam = sum h d r / sum h.
    h = REF * inverse_curvature(ratio)
    mean = (h * cotangent).sum(-1, keepdims=True) / h.sum(-1, keepdims=True)
    exact = h / BETA[:, None] * (cotangent - mean) + h / h.sum(-1, keepdims=True) * slope[:, None]
    np.testing.assert_allclose(gradient, exact, rtol=1e-8, atol=1e-10)
    # (r - lam) / beta is fixed but for lam: beta acts on the weights as a reward of -(r - lam) / beta would.
    force = np.where(kept, -(REWARD - lam[:, None]) / BETA[:, None], 0)
    np.testing.assert_allclose(beta_gradient, (exact * force).sum(-1), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(2 * np.sum(ref_gradient * step), moved, rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_masks_extremes_and_shifts(divergence):
    rng = np.random.default_rng(1)
    reward = rng.normal(size=(7, 9)).astype(np.float32)
    where = rng.random((7, 9)) < 0.7
    where[3], where[1:3] = False, True
    reward[1] = [1e4, -1e4, 0, 1e4, 9999, 1, -1, -1e4, 5]
    reward[2] = 3.0
    reward[4] += 1e5
    dirty = np.where(where, reward, rng.choice([np.nan, np.inf, -np.inf, 1e30], size=(7, 9))).astype(np.float32)
    beta = np.float32([0.5, 0.01, 1, 1, 0.3, 1e-30, 1e30])

    def value(reward, where, beta):
        out = f_divergence_tilt(reward, beta=beta, divergence=divergence, where=where)
        return jnp.sum(jnp.arange(9) * out.weights.sum(0)), out

    gradient, out = jax.jit(jax.grad(value, has_aux=True))(dirty, where, beta)
    chex.assert_tree_all_finite((gradient, out))
    assert not np.asarray(gradient)[~where].any()
    np.testing.assert_array_equal(out.weights[3], np.zeros(9))
    assert float(out.lam[3]) == 0
    np.testing.assert_allclose(out.weights[1, ::3], [0.5, 0.5, 0], atol=1e-3)
    np.testing.assert_allclose(out.weights[2], np.full(9, 1 / 9), rtol=1e-6)
    assert float(out.lam[2]) == 3
    # Stationary in float64 over the real candidates alone, where beta is moderate.
    derivative = FORMULAS.get((divergence, 0.5), (None, lambda u: 2 * (1 - u**-0.5)))[1]
    for row in (0, 4):
        weights = np.asarray(out.weights[row], np.float64)[where[row]]
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
        kept = weights > 0
        lam = reward[row].astype(np.float64)[where[row]][kept] - beta[row] * derivative(weights[kept] * len(weights))
        np.testing.assert_allclose(lam, float(out.lam[row]), rtol=1e-7, atol=2e-6)
    np.testing.assert_allclose(out.weights[6][where[6]], 1 / where[6].sum(), rtol=1e-6)
    assert float(out.weights[5].max()) > 0.9999


def test_reverse_kl_is_the_tilt():
    reward = REWARD.astype(np.float32)
    where = RNG.random(reward.shape) < 0.8

    @jax.jit
    def three(r, w):
        return (
            tilt(r, beta=0.3, where=w),
            f_divergence_tilt(r, beta=0.3, where=w),
            f_divergence_tilt(r, beta=0.3, where=w, divergence="alpha", alpha=1e-6),
        )

    same, out, near = three(reward, where)
    np.testing.assert_array_equal(out.weights, same.weights)
    np.testing.assert_allclose(out.lam, 0.3 * same.log_z, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(near.weights, same.weights, rtol=1e-4)


def test_chi_squared_is_pessimism_and_a_reference_is_a_number_of_copies():
    copies = np.array([1, 3, 2, 1])
    reward = RNG.normal(size=(3, 4)).astype(np.float32)
    spread = np.repeat(reward, copies, axis=-1)

    @jax.jit
    def both(beta):
        ref = np.broadcast_to(np.float32(copies), (3, 4))
        out = f_divergence_tilt(reward, ref, beta=beta, divergence="chi_squared")
        return out, pessimistic_weights(spread, beta=beta) / 7, pessimistic_threshold(spread, beta=beta)

    for beta in (0.1, 0.5):
        merged, weights, threshold = both(beta)
        np.testing.assert_allclose(
            merged.weights, np.add.reduceat(np.asarray(weights), [0, 1, 4, 6], axis=-1), atol=1e-6
        )
        np.testing.assert_allclose(merged.lam - beta, threshold, atol=1e-6)


def test_an_outside_normaliser_depends_on_the_origin_of_the_rewards():
    ref = np.array([0.30, 0.25, 0.20, 0.15, 0.07, 0.03])
    reward, beta = np.linspace(0, 1, 6), 0.55

    def outside(reward):
        mass = ref * (1 - 0.5 * reward / beta) ** -2
        return mass / mass.sum()

    with jax.enable_x64(True):
        both = np.stack([reward, reward - 9])
        out = jax.jit(lambda r: f_divergence_tilt(r, np.stack([ref, ref]), beta=beta, divergence="alpha"))(both)
    (inside, moved), (lam, moved_lam) = np.asarray(out.weights), np.asarray(out.lam)
    np.testing.assert_allclose(inside, moved, atol=1e-13)
    np.testing.assert_allclose(lam - 9, moved_lam, atol=1e-13)
    distance = lambda p, q: 0.5 * np.abs(p - q).sum()
    assert distance(outside(reward), outside(reward - 9)) > 0.4
    assert distance(outside(reward), inside) > 0.3
    np.testing.assert_allclose(outside(reward - lam), inside, atol=1e-13)  # At no other origin.


@every_divergence
def test_value_against_float64_and_its_derivative_is_the_link(divergence, alpha):
    f, derivative, _ = FORMULAS[divergence, alpha]
    weights = RNG.dirichlet(np.ones(7), size=5)
    exact = (REF * f(weights / REF)).sum(-1)
    single = slope_and_value(np.float32(weights), np.float32(3 * REF), alpha, divergence)[1]
    np.testing.assert_allclose(single, exact, rtol=1e-5)
    close = REF * (1 + 1e-5 * (weights / REF - 1))  # f = f''(1) / 2 (u - 1)^2 up to a relative 1e-5.
    with jax.enable_x64(True):
        gradient, value = slope_and_value(weights, 3 * REF, alpha, divergence)
        near = slope_and_value(close, REF, alpha, divergence)[1]
        link = np.asarray(divergence_link(np.log(weights / REF), divergence=divergence, alpha=alpha))
    np.testing.assert_allclose(value, exact, rtol=1e-12)
    second = derivative(1 + 1e-6) / 1e-6 / 2 * (REF * (close / REF - 1) ** 2).sum(-1)
    np.testing.assert_allclose(near, second, rtol=1e-3)
    # Along differences, as the constant in f' cancels for weights that sum to 1.
    np.testing.assert_allclose(np.diff(gradient), np.diff(link), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(link, derivative(weights / REF), rtol=1e-9, atol=1e-12)


def test_candidates_that_only_one_side_has():
    one, other = jnp.asarray([0.0, 0.4, 0.6]), jnp.asarray([0.5, 0.5, 0.0])
    limits = {"reverse_kl": np.inf, "forward_kl": np.inf, "chi_squared": np.inf, "mixed_chi_squared": np.inf}
    limits["js"] = 0.5 * np.log(2) + 0.6 * np.log(2) + 0.5 * FORMULAS["js", 0.5][0](0.8)
    limits["alpha"] = (np.sqrt(0.4 * 0.5) - 1) / (0.5 * -0.5)
    found = jax.jit(lambda p, q: {d: f_divergence(p, q, divergence=d) for d in limits})(one, other)
    for divergence, value in limits.items():
        np.testing.assert_allclose(found[divergence], value, rtol=1e-6)
    # A finite limit at 0: half the ratios less 1, squared; and no gradient there.
    value = jax.jit(jax.value_and_grad(lambda w: f_divergence(w, divergence="chi_squared")))
    np.testing.assert_allclose(value(one)[0], (1 + 0.2**2 + 0.8**2) / 6, rtol=1e-6)
    np.testing.assert_allclose(value(one)[1], [0, 0.2, 0.8], rtol=1e-6)


def test_value_of_the_tilt_under_a_mask():
    reward, where = REWARD.astype(np.float32), RNG.random(REWARD.shape) < 0.6
    where[4] = False

    @jax.jit
    def pairs(reward, where):
        weights = jnp.where(where, tilt(reward, beta=0.7, where=where).weights, jnp.nan)
        return (
            (f_divergence(weights, where=where), tilt_kl(reward, beta=0.7, where=where)),
            (
                2 * f_divergence(weights, divergence="chi_squared", where=where),
                chi_squared(reward, beta=0.7, where=where),
            ),
            (f_divergence(weights[4], divergence="forward_kl", where=where[4]), 0.0),
        )

    for found, value in pairs(reward, where):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-7)


def test_candidates_over_eight_devices():
    reward, where = RNG.normal(size=(4, 16)).astype(np.float32), RNG.random((4, 16)) < 0.8
    spec, whole = PartitionSpec(None, "n"), PartitionSpec()

    def both(reward, where, axis_name=None):
        options = {"divergence": "js", "where": where, "axis_name": axis_name}
        out = f_divergence_tilt(reward, beta=0.3, **options)
        return out.weights, out.lam, f_divergence(out.weights, **options)

    sharded = jax.shard_map(
        lambda r, w: both(r, w, "n"),
        mesh=Mesh(np.array(jax.devices()), ("n",)),
        in_specs=(spec, spec),
        out_specs=(spec, whole, whole),
    )
    chex.assert_trees_all_close(jax.jit(sharded)(reward, where), jax.jit(both)(reward, where), rtol=1e-5, atol=1e-7)


class FDivergenceTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_variants(self):
        reward = jnp.asarray(REWARD, jnp.float32)
        tilted = jax.vmap(lambda r: f_divergence_tilt(r, beta=0.3, divergence="forward_kl"))
        out = self.variant(lambda r: tilted(r[None]))(reward[0])
        # 1 / (N w) is affine in the reward.
        inverse = 1 / (7 * np.asarray(out.weights[0], np.float64))
        np.testing.assert_allclose(inverse, 1 - (REWARD[0] - float(out.lam[0])) / 0.3, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be a finite number above 0, got 0.0"),
        ({"beta": 1.0, "divergence": "total_variation"}, "divergence must be one of alpha, chi_squared, forward_kl"),
        ({"beta": 1.0, "divergence": "alpha", "alpha": 1.5}, r"alpha must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        f_divergence_tilt(jnp.zeros(3), **options)
    if "beta" not in message:
        with pytest.raises(ValueError, match=message):
            f_divergence(jnp.ones(1), **{k: v for k, v in options.items() if k != "beta"})
