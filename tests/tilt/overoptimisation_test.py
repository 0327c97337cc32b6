import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.optimize import brentq, minimize_scalar

from tiltjax.exact import bandit
from tiltjax.tilt.overoptimisation import best_of_n_curve, fit_overoptimisation, peak_distance, rl_curve

RNG = np.random.default_rng(0)
CURVES = {"best_of_n": best_of_n_curve, "rl": rl_curve}


def hackable_world(arms=1500):
    """True and proxy rewards of arms of equal mass: Gaussian error, but for 2% that the proxy overrates."""
    rng = np.random.default_rng(1)
    gold = rng.normal(size=arms)
    proxy = gold + 0.5 * rng.normal(size=arms)
    hackable = rng.permutation(arms)[: arms // 50]
    gold[hackable], proxy[hackable] = -3, 3.5 + 0.5 * rng.normal(size=len(hackable))
    return np.full(arms, 1 / arms), gold - gold.mean(), proxy


class FitTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters("best_of_n", "rl")
    def test_recovers_the_coefficients_of_real_points(self, form):
        alpha, b = np.float32([1.5, 0.4, 2.0]), np.float32([0.3, -0.1, 1.1])
        kl = RNG.uniform(1e-3, 9, size=(3, 12)).astype(np.float32)
        where = RNG.random((3, 12)) < 0.7
        curve = CURVES[form]
        reward = np.array(curve(jnp.sqrt(kl), alpha=np.tile(alpha[:, None], 12), b=np.tile(b[:, None], 12)))
        kl[:, 3], reward[:, 3], where[:, 3] = 0, 0.7, True  # The reference itself, mismeasured: of no account.
        dirty = [np.where(where, x, np.nan).astype(np.float32) for x in (kl, reward)]
        fit = self.variant(lambda k, r, w: fit_overoptimisation(k, r, form=form, where=w))(*dirty, where)
        np.testing.assert_allclose(fit.alpha, alpha, rtol=1e-4)
        np.testing.assert_allclose(fit.b, b, rtol=1e-4)
        np.testing.assert_allclose(fit.r_squared, 1, atol=1e-5)
        peak = {"best_of_n": alpha / (2 * b), "rl": np.exp(alpha / b - 1)}[form] ** 2
        np.testing.assert_allclose(fit.peak_kl, np.where(b > 0, peak, np.inf), rtol=1e-3)

    @chex.variants(with_jit=True)
    @parameterized.parameters("best_of_n", "rl")
    def test_noise_is_fitted_by_least_squares(self, form):
        kl, reward = RNG.uniform(0.1, 6, size=(2, 30)), RNG.normal(size=(2, 30))
        d = np.sqrt(kl)
        fit = self.variant(lambda k, r: fit_overoptimisation(k, r, form=form))(np.float32(kl), np.float32(reward))
        for row in range(2):
            second = d[row] * (d[row] if form == "best_of_n" else np.log(d[row]))
            features = np.stack([d[row], -second], axis=1)
            exact, residual, *_ = np.linalg.lstsq(features, reward[row])
            np.testing.assert_allclose([fit.alpha[row], fit.b[row]], exact, rtol=1e-4, atol=1e-5)
            share = 1 - residual[0] / ((reward[row] - reward[row].mean()) ** 2).sum()
            np.testing.assert_allclose(fit.r_squared[row], share, rtol=1e-4, atol=1e-5)


def test_rows_that_determine_nothing():
    kl = np.float32([[1, 2, 3], [4, 4, 4], [0, 0, 0], [2, 2, 5]])
    where = np.array([[False] * 3, [True] * 3, [True] * 3, [True, True, False]])

    def total(kl, reward):
        fit = fit_overoptimisation(kl, reward, where=where)
        return jnp.sum(fit.alpha + fit.b + fit.r_squared), fit

    reward = np.where(where, 3.0, np.nan).astype(np.float32)
    gradient, fit = jax.jit(jax.grad(total, (0, 1), has_aux=True))(kl, reward)
    np.testing.assert_allclose(fit.alpha, [0, 1.5, 0, 3 / np.sqrt(2)], rtol=1e-6)
    np.testing.assert_array_equal(fit.b, np.zeros(4))
    np.testing.assert_array_equal(fit.r_squared, np.zeros(4))
    np.testing.assert_array_equal(fit.peak_kl, [0, np.inf, 0, np.inf])
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
@pytest.mark.parametrize(("alpha", "b"), [(1.0, 0.4), (0.3, 1.2)])
def test_peak_is_where_the_curve_is_highest(form, alpha, b):
    curve = {"best_of_n": lambda d: d * (alpha - b * d), "rl": lambda d: d * (alpha - b * np.log(d))}[form]
    found = minimize_scalar(lambda d: -curve(d), bounds=(1e-6, 20), method="bounded", options={"xatol": 1e-10}).x
    np.testing.assert_allclose(peak_distance(alpha=alpha, b=b, form=form), found, rtol=1e-4)
    np.testing.assert_allclose(CURVES[form](jnp.float32(found), alpha=alpha, b=b), curve(found), rtol=1e-5)


def test_curves_without_a_peak():
    alpha, b = jnp.asarray([1.0, -1.0, -1.0, 0.0, 1.0]), jnp.asarray([-0.5, 0.5, -0.5, 0.0, 0.0])
    inf = np.inf
    np.testing.assert_allclose(peak_distance(alpha=alpha, b=b), [inf, 0, inf, 0, inf])
    np.testing.assert_allclose(peak_distance(alpha=alpha, b=b, form="rl"), [inf, np.exp(-3), inf, 0, inf], rtol=1e-6)
    assert float(rl_curve(jnp.float32(0), alpha=1.0, b=1.0)) == 0


def test_best_of_n_over_optimises_hackable_arms_along_its_law():
    ref, gold, proxy = hackable_world()
    sizes = 2 ** np.arange(10)
    with jax.enable_x64(True):
        law = jax.jit(lambda n: bandit.best_of_n_law(ref, proxy, n=n))
        laws = np.array([law(n) for n in sizes])
        kl, reward = np.asarray(bandit.kl(laws, np.tile(ref, (10, 1)))), laws @ gold
        fit, rl = (fit_overoptimisation(kl, reward, form=form) for form in ("best_of_n", "rl"))
    assert abs(reward[0]) < 1e-12  # One draw is the reference.
    top = int(reward.argmax())
    assert 0 < top < 5
    assert (np.diff(reward[: top + 1]) > 0).all()
    assert (np.diff(reward[top:]) < 0).all()
    assert reward[top] > 0.5
    assert reward[-1] < -2
    assert float(fit.r_squared) > 0.95
    assert float(fit.r_squared) > float(rl.r_squared)
    assert kl[1] < float(fit.peak_kl) < kl[top]  # Early: the long fall outweighs the rise.


def test_true_reward_of_a_tilt_peaks_where_it_stops_covarying_with_the_proxy():
    ref, gold, proxy = hackable_world()

    def law(eta):
        mass = ref * np.exp(eta * (proxy - proxy.max()))
        return mass / mass.sum()

    def covariance(eta):
        p = law(eta)
        return p @ (gold * proxy) - (p @ gold) * (p @ proxy)

    peak = brentq(covariance, 0.01, 3, xtol=1e-12)
    etas = np.concatenate([[peak], np.linspace(0.05, 4, 40)])

    def at(eta):
        p = bandit.tilted(ref, proxy, beta=1 / eta)
        return p @ gold, bandit.kl(p, ref)

    with jax.enable_x64(True):
        out = jax.jit(jax.vmap(lambda eta: jax.jvp(at, (eta,), (1.0,))))(etas)
    (reward, kl), (slope, kl_slope) = jax.tree.map(np.asarray, out)
    np.testing.assert_allclose(slope, [covariance(eta) for eta in etas], atol=1e-10)
    variance = np.array([law(eta) @ proxy**2 - (law(eta) @ proxy) ** 2 for eta in etas])
    np.testing.assert_allclose(kl_slope, etas * variance, rtol=1e-8)
    assert abs(slope[0]) < 1e-10
    assert reward[0] > reward[1:].max() > 0.1
    assert reward[-1] < -1.5
    assert 0.05 < kl[0] < 1.5


def test_a_bad_form_is_named():
    one = jnp.ones(3)
    for call in (
        lambda: fit_overoptimisation(one, one, form="sft"),
        lambda: peak_distance(alpha=1.0, b=1.0, form="sft"),
    ):
        with pytest.raises(ValueError, match="form must be one of best_of_n, rl; got 'sft'"):
            call()
