"""Every figure here is also had by enumeration, by a binomial sum, or in closed form."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import binom

from tiltjax.exact import bandit
from tiltjax.tilt.divergence import soft_best_of_n_kl_bound
from tiltjax.tilt.weights import tilt

REF = np.array([0.30, 0.25, 0.20, 0.15, 0.07, 0.03])
REWARD = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
RNG = np.random.default_rng(11)


def six_arms(*arrays):
    """Worlds of fewer arms, of which the rest are impossible: all run the same programs."""
    return tuple(np.pad(np.asarray(x, float), (0, 6 - len(x))) for x in arrays)


# Worlds to enumerate: the standard one, one with ties and an impossible arm, and two at random.
WORLDS = {
    "standard": (REF, REWARD),
    "ties": six_arms([0.1, 0.2, 0.0, 0.4, 0.3], [1.0, -2.0, 7.0, 1.0, 0.5]),
    "random": six_arms(RNG.dirichlet(np.ones(4)), RNG.normal(size=4)),
    "skewed": six_arms([1e-6, 0.9, 0.1 - 1e-6], [3.0, -1.0, 0.0]),
}

soft_law = jax.jit(bandit.soft_best_of_n_law)
hard_law = jax.jit(bandit.best_of_n_law)
z_law = jax.jit(bandit.log_partition_law)
tilted, log_partition = jax.jit(bandit.tilted), jax.jit(bandit.log_partition)
chi_squared, expansion = jax.jit(bandit.chi_squared), jax.jit(bandit.expansion)
weigh = jax.jit(tilt)
kl, total_variation, win_rate = jax.jit(bandit.kl), jax.jit(bandit.total_variation), jax.jit(bandit.win_rate)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def world(name):
    return WORLDS[name]


def two_arms(p, gain=1.0):
    return six_arms([1 - p, p], [0.0, gain])


def draws(ref, n):
    """All n-tuples of possible arms and their chances."""
    arms = np.flatnonzero(ref > 0)
    tuples = np.array(list(itertools.product(arms, repeat=n)))
    return tuples, ref[tuples].prod(-1)


def enumerated_soft(ref, reward, n, beta):
    tuples, chance = draws(ref, n)
    weights = softmax(reward[tuples] / beta, -1) * chance[:, None]
    return np.bincount(tuples.ravel(), weights.ravel(), minlength=len(ref))


def enumerated_hard(ref, reward, n):
    tuples, chance = draws(ref, n)
    best = reward[tuples] == reward[tuples].max(-1, keepdims=True)
    weights = best / best.sum(-1, keepdims=True) * chance[:, None]
    return np.bincount(tuples.ravel(), weights.ravel(), minlength=len(ref))


def enumerated_log_z(ref, reward, n, beta):
    tuples, chance = draws(ref, n)
    return chance @ (logsumexp(reward[tuples] / beta, -1) - np.log(n))


@pytest.mark.usefixtures("x64")
class TestTilt:
    @pytest.mark.parametrize("name", WORLDS)
    @pytest.mark.parametrize("beta", [0.02, 0.5, 3.0, 1e3])
    def test_is_its_definition(self, name, beta):
        ref, reward = WORLDS[name]
        possible = ref > 0
        x = np.where(possible, reward, 0) / beta
        log_z = logsumexp(x, b=ref)
        target = ref * np.exp(x - log_z)
        w = np.exp(x - log_z)[possible]
        np.testing.assert_allclose(log_partition(*world(name), beta=beta), log_z, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(tilted(*world(name), beta=beta), target, rtol=1e-12)
        chi2 = ref[possible] @ (w - 1) ** 2
        np.testing.assert_allclose(chi_squared(*world(name), beta=beta), chi2, rtol=1e-9)
        out = expansion(*world(name), beta=beta)
        # 1 + chi2 is the mean of w under p*.
        spread = w - target[possible] @ w
        rounding = 1e-14 * w.max()
        np.testing.assert_allclose(out.tv, 0.5 * target[possible] @ np.abs(spread), rtol=1e-9, atol=rounding)
        np.testing.assert_allclose(out.kl, 0.5 * target[possible] @ spread**2, rtol=1e-9, atol=rounding**2)

    def test_gibbs_identity_and_optimality(self):
        ref, reward = world("standard")
        target = tilted(ref, reward, beta=0.3)
        for p in RNG.dirichlet(np.ones(6), size=5):
            gain = p @ REWARD - 0.3 * kl(p, ref)
            best = 0.3 * log_partition(ref, reward, beta=0.3)
            np.testing.assert_allclose(gain, best - 0.3 * kl(p, target), rtol=1e-12, atol=1e-13)

    def test_a_softmax_without_the_reference_is_not_the_tilt(self):
        # What is left when candidates are de-duplicated before the softmax.
        p = softmax(REWARD / 0.5)
        away = total_variation(p, tilted(*world("standard"), beta=0.5))
        np.testing.assert_allclose(away, 0.345, atol=5e-4)

    @pytest.mark.parametrize(("name", "tol"), [("two-point", 1e-12), ("uniform", 1e-6), ("gaussian", 1e-9)])
    def test_chi_squared_of_reward_laws(self, name, tol):
        for a in (0.5, 1.0, 2.0) if name == "gaussian" else (1.0, 4.0, 20.0):
            if name == "two-point":
                p = 1 / (1 + np.exp(a))
                (ref, reward), expected = two_arms(p, a), np.sinh(a / 2) ** 2
            elif name == "uniform":
                ref, reward = np.full(20_000, 1 / 20_000), a * (np.arange(20_000) + 0.5) / 20_000
                expected = a / 2 / np.tanh(a / 2) - 1
            else:
                grid = np.linspace(-12, 16, 20_000)
                ref, reward, expected = softmax(-(grid**2) / 2), a * grid, np.exp(a * a) - 1
            found = chi_squared(ref, reward, beta=1.0)
            np.testing.assert_allclose(found, expected, rtol=tol)
        np.testing.assert_allclose(4 / 2 / np.tanh(2) - 1, 1.0746, atol=5e-5)


@pytest.mark.usefixtures("x64")
class TestHardBestOfN:
    @pytest.mark.parametrize("name", WORLDS)
    @pytest.mark.parametrize("n", [1, 2, 3, 6])
    def test_is_the_enumeration(self, name, n):
        np.testing.assert_allclose(hard_law(*world(name), n=n), enumerated_hard(*WORLDS[name], n), rtol=1e-12)

    def test_kl_and_win_rate_of_the_standard_world(self):
        ref, reward = world("standard")
        laws = {n: hard_law(ref, reward, n=n) for n in (2, 4, 16, 64, 4096)}
        found = [float(kl(p, ref)) for p in laws.values()]
        np.testing.assert_allclose(found, [0.171271, 0.608925, 1.759677, 2.968985, 3.506558], atol=6e-7)
        np.testing.assert_allclose(found[-1], -np.log(0.03), atol=1e-6)
        found = [float(win_rate(laws[n], ref, reward)) for n in (2, 4, 16, 64)]
        np.testing.assert_allclose(found, [0.657605, 0.790377, 0.932134, 0.977752], atol=6e-7)

    def test_without_ties_the_bounds_are_attained(self):
        ref, reward = np.full(100_000, 1e-5), RNG.permutation(100_000) / 7.0
        expected = {2: 0.1931472, 4: 0.6362944, 16: 1.8350887, 64: 3.1745081}
        for n, value in expected.items():
            law = np.asarray(hard_law(ref, reward, n=n))
            np.testing.assert_allclose(kl(law, ref), value, atol=1e-6)
            np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
            np.testing.assert_allclose(win_rate(law, ref, reward), n / (n + 1), atol=1e-5)
        assert round(16 / 17, 6) == 0.941176

    @pytest.mark.parametrize("n", [1, 3, 50, 10**6])
    def test_with_ties_kl_is_below_the_bound(self, n):
        for name in WORLDS:
            ref = world(name)[0]
            assert float(kl(hard_law(*world(name), n=n), ref)) <= np.log(n) - (n - 1) / n + 1e-12

    @pytest.mark.parametrize("p", [1e-6, 0.01, 0.4])
    def test_a_binary_verifier(self, p):
        for n in (1, 7, 1000, 10**6):
            law = np.asarray(hard_law(*two_arms(p), n=n))
            np.testing.assert_allclose(law[1], -np.expm1(n * np.log1p(-p)), rtol=1e-12)
            np.testing.assert_allclose(law[0], np.exp(n * np.log1p(-p)), rtol=1e-9)


@pytest.mark.usefixtures("x64")
class TestSoftBestOfN:
    @pytest.mark.parametrize("name", WORLDS)
    @pytest.mark.parametrize("n", [1, 2, 3, 5])
    def test_is_the_enumeration(self, name, n):
        for beta in (0.03, 0.2, 1.0, 7.0, 1e3):
            law = soft_law(*world(name), n=n, beta=beta)
            np.testing.assert_allclose(law, enumerated_soft(*WORLDS[name], n, beta), rtol=1e-11, atol=1e-13)

    @pytest.mark.parametrize("n", [2, 40, 1000, 10**6])
    @pytest.mark.parametrize("p", [0.3, 1e-3])
    def test_two_arms_are_a_binomial_sum(self, n, p):
        # Only how many of the n draws are the better arm matters.
        centre, width = n * p, 40 * (n * p) ** 0.5 + 60
        k = np.arange(max(0, int(centre - width)), min(n, int(centre + width)) + 1)
        chance = binom.pmf(k, n, p)
        for beta in (0.05, 1.0, 20.0, 1e3):
            w = np.exp(1 / beta)
            expected = chance @ (k * w / (k * w + n - k))
            law = np.asarray(soft_law(*two_arms(p), n=n, beta=beta))
            # The binomial probabilities themselves are good to n times rounding.
            np.testing.assert_allclose(law[1], expected, rtol=1e-12 + 1e-15 * n)

    @pytest.mark.parametrize("name", WORLDS)
    def test_limits(self, name):
        ref, reward = world(name)
        for n in (1, 2, 7, 64, 10**6):
            for beta in (1e-3, 1e-5):
                np.testing.assert_allclose(
                    soft_law(ref, reward, n=n, beta=beta), hard_law(ref, reward, n=n), atol=1e-12
                )
            np.testing.assert_allclose(soft_law(ref, reward, n=n, beta=1e14), ref, atol=1e-12)
        for beta in (0.1, 1.0, 1e3):
            np.testing.assert_allclose(soft_law(ref, reward, n=1, beta=beta), ref, rtol=1e-13)
            target = tilted(ref, reward, beta=beta)
            away = float(total_variation(soft_law(ref, reward, n=10**9, beta=beta), target))
            np.testing.assert_allclose(away, 0, atol=1e-12 + 2e-9 * float(expansion(ref, reward, beta=beta).tv))

    @pytest.mark.parametrize("n", [1, 3, 64, 4096, 10**6])
    def test_is_a_law_for_any_beta(self, n):
        for name in WORLDS:
            for beta in (1e-3, 0.02, 1.0, 1e3):
                law = np.asarray(soft_law(*world(name), n=n, beta=beta))
                assert law.min() >= 0
                np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)

    def test_large_supports(self):
        reward, ref = np.tile(RNG.normal(size=3000), 2), RNG.dirichlet(np.ones(3000))
        law = np.asarray(soft_law(np.pad(ref, (0, 3000)), reward, n=500, beta=0.3))
        np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
        # Splitting every arm in two changes nothing.
        halves = np.asarray(soft_law(np.tile(ref / 2, 2), reward, n=500, beta=0.3))
        np.testing.assert_allclose(halves[:3000] + halves[3000:], law[:3000], rtol=1e-11)

    @pytest.mark.parametrize(
        ("top", "beta", "chi2", "n_tv", "c1", "n2_kl", "c2", "tv_64", "kl_64"),
        [
            (1, 1.0, 0.09199, 0.13882, 0.13882, 0.05784, 0.05784, 2.165e-3, 1.406e-5),
            (1, 0.5, 0.4367, 0.34828, 0.34827, 0.37971, 0.37976, 5.447e-3, 9.196e-5),
            (1, 0.2, 3.992, 1.8814, 1.8808, 8.8797, 8.8698, 2.961e-2, 2.284e-3),
            (4, 1.0, 2.324, 1.1727, 1.1723, 4.0113, 4.0101, 1.862e-2, 9.90e-4),
            (4, 0.5, 11.06, 4.0339, 4.0205, 33.77, 33.553, 7.553e-2, 1.19e-2),
            (4, 0.2, 29.58, 1.2962, 1.2777, 20.57, 20.03, 0.1402, 0.137),
        ],
    )
    def test_expansion_of_the_standard_world(self, top, beta, chi2, n_tv, c1, n2_kl, c2, tv_64, kl_64):
        ref, reward = world("standard")
        reward = top * reward
        target, constants = np.asarray(tilted(ref, reward, beta=beta)), expansion(ref, reward, beta=beta)
        constants = jax.tree.map(np.asarray, constants)
        printed = (chi_squared(ref, reward, beta=beta), constants.tv, constants.kl)
        np.testing.assert_allclose(printed, (chi2, c1, c2), rtol=5e-4)
        far = soft_law(ref, reward, n=4096, beta=beta)
        np.testing.assert_allclose(total_variation(far, target), n_tv / 4096, rtol=1e-3)
        np.testing.assert_allclose(total_variation(far, target), constants.tv / 4096, rtol=0.03)
        for divergence in (kl(far, target), kl(target, far)):
            np.testing.assert_allclose(divergence, n2_kl / 4096**2, rtol=4e-3)
            np.testing.assert_allclose(divergence, constants.kl / 4096**2, rtol=0.06)
        near = soft_law(ref, reward, n=64, beta=beta)
        np.testing.assert_allclose(total_variation(near, target), tv_64, rtol=1e-3)
        np.testing.assert_allclose(kl(near, target), kl_64, rtol=5e-3)
        if (top, beta) == (4, 0.2):
            np.testing.assert_allclose(kl(target, near), 0.0896, rtol=1e-3)

    @pytest.mark.parametrize("name", WORLDS)
    def test_expansion_elsewhere(self, name):
        # Richardson in 1/N: what N (P_N / p* - 1), N TV and N^2 KL tend to.
        ref, reward = world(name)
        beta, target = 0.8, tilted(ref, reward, beta=0.8)
        constants = expansion(ref, reward, beta=beta)
        scale = 1 + float(chi_squared(ref, reward, beta=beta)) * (100 if name == "skewed" else 1)
        small, large = int(2000 * scale), int(4000 * scale)
        laws = {n: soft_law(ref, reward, n=n, beta=beta) for n in (small, large)}
        for measure, power, constant in (
            (total_variation, 1, constants.tv),
            (kl, 2, constants.kl),
            (lambda p, q: kl(q, p), 2, constants.kl),
        ):
            a, b = (n**power * float(measure(laws[n], target)) for n in (small, large))
            np.testing.assert_allclose(2 * b - a, constant, rtol=1e-3)

    def test_rates(self):
        ref, reward = world("standard")
        target = tilted(ref, reward, beta=0.5)
        n = np.array([64, 256, 1024, 4096, 16384])
        laws = [soft_law(ref, reward, n=int(m), beta=0.5) for m in n]
        slope = lambda values: np.polyfit(np.log(n), np.log(np.array(values, float)), 1)[0]
        assert abs(slope([total_variation(p, target) for p in laws]) + 1.000) < 2e-3
        assert abs(slope([kl(p, target) for p in laws]) + 1.999) < 5e-3

    def test_bounds(self):
        for name, beta, n in itertools.product(WORLDS, (0.1, 0.5, 2.0), (1, 2, 8, 100, 5000)):
            ref, reward = world(name)
            law, target = soft_law(ref, reward, n=n, beta=beta), tilted(ref, reward, beta=beta)
            chi2 = float(chi_squared(ref, reward, beta=beta))
            span = np.ptp(WORLDS[name][1][WORLDS[name][0] > 0])
            gap = float(kl(target, law))
            assert gap <= np.log1p(chi2 / n) + 1e-12
            assert chi2 <= np.sinh(span / beta / 2) ** 2 * (1 + 1e-12)
            bound = float(soft_best_of_n_kl_bound(n, reward_range=float(span), beta=beta))
            assert float(kl(law, ref)) <= bound + 1e-12

    @pytest.mark.parametrize("a", [8.0, 12.0])
    def test_worst_case_collapses_on_candidates_over_one_plus_chi2(self, a):
        # The two-point law that attains sinh^2(a / 2); n is not small, so its rounding does not show.
        p = 1 / (1 + np.exp(a))
        ref, reward = two_arms(p, a)
        target = tilted(ref, reward, beta=1.0)
        needed = 1 + np.sinh(a / 2) ** 2
        for m, expected in ((1, 0.265), (10, 5.8e-3), (100, 5.1e-5)):
            law = soft_law(ref, reward, n=round(m * needed), beta=1.0)
            np.testing.assert_allclose(kl(target, law), expected, rtol=0.015)

    def test_forward_derivative(self):
        ref, reward = world("ties")
        law = lambda beta: soft_law(ref, reward, n=8, beta=beta)
        above, below = (np.asarray(law(0.6 + step)) for step in (1e-5, -1e-5))
        slope = jax.jit(lambda b: jax.jvp(law, (b,), (jnp.ones_like(b),))[1])(0.6)
        np.testing.assert_allclose(slope, (above - below) / 2e-5, rtol=1e-6, atol=1e-9)


def test_a_simulated_sampler_follows_the_law():
    rng = np.random.default_rng(0)
    arms = rng.choice(6, p=REF, size=(200_000, 16))
    noisy = REWARD[arms] / 0.2 + rng.gumbel(size=arms.shape)
    counts = np.bincount(np.take_along_axis(arms, noisy.argmax(-1)[:, None], -1)[:, 0], minlength=6)
    with jax.enable_x64(True):
        expected = 200_000 * np.asarray(soft_law(REF, REWARD, n=16, beta=0.2))
    assert ((counts - expected) ** 2 / expected).sum() < 25


@pytest.mark.usefixtures("x64")
class TestLogPartitionLaw:
    @pytest.mark.parametrize("name", WORLDS)
    @pytest.mark.parametrize("n", [1, 2, 3, 5])
    def test_is_the_enumeration(self, name, n):
        for beta in (1e-3, 0.03, 0.5, 4.0, 1e3):
            law = z_law(*world(name), n=n, beta=beta)
            expected = enumerated_log_z(*WORLDS[name], n, beta)
            log_z = float(log_partition(*world(name), beta=beta))
            np.testing.assert_allclose(law.mean, expected, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(law.bias, expected - log_z, rtol=1e-11, atol=1e-13 * max(1, abs(log_z)))

    @pytest.mark.parametrize(
        ("beta", "n", "bias"),
        [
            (1.0, 16, -2.857149e-3),
            (1.0, 256, -1.796044e-4),
            (0.2, 16, -0.1266301),
            (0.2, 64, -0.03160152),
            (0.2, 1024, -1.951163e-3),
        ],
    )
    def test_bias_of_the_standard_world(self, beta, n, bias):
        np.testing.assert_allclose(z_law(*world("standard"), n=n, beta=beta).bias, bias, rtol=5e-7)

    @pytest.mark.parametrize("n", [40, 1000, 10**6])
    def test_two_arms_are_a_binomial_sum(self, n):
        p, beta = 0.02, 0.25
        k = np.arange(min(n, 20_000 + 40 * 141) + 1)
        chance, w = binom.pmf(k, n, p), np.exp(1 / beta)
        z = 1 + p * (w - 1)
        # E log(Z_n / Z) with log1p of the relative error, less its mean 0.
        error = (1 + k / n * (w - 1)) / z - 1
        expected = chance @ (np.log1p(error) - error)
        law = z_law(*two_arms(p), n=n, beta=beta)
        np.testing.assert_allclose(law.bias, expected, rtol=1e-11 + 1e-14 * n)

    def test_jackknife(self):
        ref, reward = world("standard")
        jackknife = lambda n, beta: (
            n * float(z_law(ref, reward, n=n, beta=beta).bias)
            - (n - 1) * float(z_law(ref, reward, n=n - 1, beta=beta).bias)
        )
        np.testing.assert_allclose(jackknife(16, 1.0), -1.93e-5, rtol=2e-3)
        np.testing.assert_allclose(jackknife(16, 0.2), -3.74e-3, rtol=2e-3)
        # Leading order -(m3 / 3 - 3 chi2^2 / 4) / n^2.
        w = REF * np.exp(REWARD)
        w = w / w.sum() / REF
        chi2, m3 = REF @ (w - 1) ** 2, REF @ (w - 1) ** 3
        np.testing.assert_allclose(1000**2 * jackknife(1000, 1.0), -(m3 / 3 - 0.75 * chi2**2), rtol=5e-3)

    @pytest.mark.parametrize("name", ["standard", "ties", "random"])
    def test_expansion_in_one_over_n(self, name):
        ref, reward = WORLDS[name]
        beta = 0.7
        w = np.exp(np.where(ref > 0, reward, 0) / beta)
        w = w / (ref @ w)
        chi2, m3 = ref @ (w - 1) ** 2, ref @ (w - 1) ** 3
        second = [n**2 * (float(z_law(*world(name), n=n, beta=beta).bias) + chi2 / 2 / n) for n in (2000, 4000)]
        np.testing.assert_allclose(2 * second[1] - second[0], m3 / 3 - 0.75 * chi2**2, rtol=2e-3)

    def test_is_never_positive_and_vanishes_when_nothing_is_tilted(self):
        for name, n, beta in itertools.product(WORLDS, (1, 30, 10**6), (1e-3, 0.1, 1.0, 1e3)):
            assert float(z_law(*world(name), n=n, beta=beta).bias) <= 0
        law = z_law(*six_arms([0.5, 0.5], [3.0, 3.0]), n=4, beta=0.5)
        np.testing.assert_allclose((law.mean, law.bias), (6.0, 0.0), atol=1e-14)


@pytest.mark.parametrize(("beta", "chi2"), [(1.0, 0.0920), (0.2, 3.992)])
def test_estimators_follow_their_asymptotic_laws(beta, chi2):
    arms = np.random.default_rng(2).choice(6, p=REF, size=(20_000, 256))
    out = weigh(np.float32(REWARD[arms]), beta=beta)
    log_z = np.asarray(out.log_z, np.float64)
    np.testing.assert_allclose(256 * np.var(log_z), chi2, rtol=0.06)
    np.testing.assert_allclose(np.asarray(out.ess).mean() / 256, 1 / (1 + chi2), rtol=0.03)
    with jax.enable_x64(True):
        law = z_law(REF, REWARD, n=256, beta=beta)
    assert abs(log_z.mean() - float(law.mean)) < 4 * (chi2 / 256 / 20_000) ** 0.5


@pytest.mark.usefixtures("x64")
class TestDivergences:
    def test_are_their_definitions(self):
        p, q = RNG.dirichlet(np.ones(9), size=(2, 4))
        np.testing.assert_allclose(kl(p, q), (p * np.log(p / q)).sum(-1), rtol=1e-12)
        np.testing.assert_allclose(total_variation(p, q), np.abs(p - q).sum(-1) / 2, rtol=1e-13)

    def test_zeros(self):
        p, q = six_arms([0.5, 0.5, 0.0], [0.25, 0.25, 0.5])
        np.testing.assert_allclose(kl(p, q), np.log(2), rtol=1e-14)
        assert float(kl(q, p)) == np.inf
        assert float(kl(p, p)) == 0

    def test_keeps_its_digits_between_close_laws(self):
        direction = np.array([1.0, -2.0, 0.5, 0.5, 0.25, -0.25])
        p = np.array([0.1, 0.3, 0.2, 0.2, 0.1, 0.1])
        for size in (1e-3, 1e-5, 1e-7):
            found = kl(p, p + size * direction)
            np.testing.assert_allclose(found, size**2 * (direction**2 / p).sum() / 2, rtol=40 * size + 1e-7)

    def test_win_rate_is_the_double_sum(self):
        for name in WORLDS:
            reward = WORLDS[name][1]
            p, q = RNG.dirichlet(np.ones(len(reward)), size=2)
            beats = (reward[:, None] > reward) + 0.5 * (reward[:, None] == reward)
            np.testing.assert_allclose(win_rate(p, q, reward), p @ beats @ q, rtol=1e-13)


# Prompts' observed candidates as worlds: float32, batched.
CANDIDATES = np.full((2, 64), 1 / 64, np.float32), RNG.normal(size=(2, 64)).astype(np.float32) + 3
CANDIDATES[1][0] = np.round(CANDIDATES[1][0])


@pytest.mark.parametrize("beta", [1e-3, 0.1, 3.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 32, 10**6])
def test_every_law_in_float32(n, beta):
    def laws(ref, reward):
        soft = soft_law(ref, reward, n=n, beta=beta)
        out = soft, hard_law(ref, reward, n=n), z_law(ref, reward, n=n, beta=beta).bias, kl(soft, ref)
        return [np.asarray(x) for x in out]

    narrow = laws(*CANDIDATES)
    with jax.enable_x64(True):
        wide = laws(*(x.astype(np.float64) for x in CANDIDATES))
    for a, b in zip(narrow[:3], wide[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(narrow[3], wide[3], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(*((x[0] * CANDIDATES[1]).sum(-1) for x in (narrow, wide)), rtol=1e-5)


@pytest.mark.usefixtures("x64")
class TestTransformations:
    functions = (
        functools.partial(bandit.soft_best_of_n_law, n=12),
        functools.partial(bandit.log_partition_law, n=12),
        bandit.tilted,
        bandit.log_partition,
        bandit.chi_squared,
        bandit.expansion,
    )

    def test_leading_dimensions_vmap_and_a_beta_per_row_agree(self):
        ref, reward = RNG.dirichlet(np.ones(5), size=(2, 3)), RNG.normal(size=(2, 3, 5))
        beta = RNG.uniform(0.1, 2, size=(2, 3))
        call = lambda p, r, b: [f(p, r, beta=b) for f in self.functions]
        both = jax.jit(lambda *x: (call(*x), jax.vmap(jax.vmap(call))(*x)))
        chex.assert_trees_all_close(*both(ref, reward, beta), rtol=1e-12)

    def test_n_and_beta_may_be_traced_and_mapped(self):
        ref, reward = world("ties")
        n, beta = np.array([1, 2, 5, 64]), np.array([0.1, 0.5, 1.0, 2.0])
        laws = lambda n, b: (
            soft_law(ref, reward, n=n, beta=b),
            hard_law(ref, reward, n=n),
            z_law(ref, reward, n=n, beta=b).mean,
        )
        mapped = [np.asarray(x) for x in jax.jit(jax.vmap(laws))(n, beta)]
        for i, (m, b) in enumerate(zip(n.tolist(), beta.tolist(), strict=True)):
            for together, alone in zip(mapped, laws(m, b), strict=True):
                np.testing.assert_allclose(together[i], alone, rtol=1e-12)

    def test_an_impossible_arm_is_never_read(self):
        ref, reward = world("ties")
        unknown = np.where(ref > 0, reward, np.nan)
        compiled = functools.partial(soft_law, n=12), functools.partial(z_law, n=12), functools.partial(hard_law, n=3)
        for function in (*compiled, tilted, log_partition, chi_squared, expansion):
            options = {} if function is compiled[2] else {"beta": 0.4}
            found, known = (function(ref, r, **options) for r in (unknown, reward))
            chex.assert_trees_all_close(found, known, rtol=1e-12)
            for x in jax.tree.leaves(found):
                assert x.ndim == 0 or (np.asarray(x)[ref == 0] == 0).all()


def test_bad_options_are_named():
    ref, reward = jnp.asarray([0.5, 0.5]), jnp.asarray([0.0, 1.0])
    with pytest.raises(ValueError, match="n must be a finite number above 0, got 0"):
        bandit.best_of_n_law(ref, reward, n=0)
    for function in (bandit.soft_best_of_n_law, bandit.log_partition_law):
        with pytest.raises(ValueError, match="n must be a finite number above 0, got -3"):
            function(ref, reward, n=-3, beta=1.0)
        with pytest.raises(ValueError, match=r"beta must be a finite number above 0, got 0.0"):
            function(ref, reward, n=3, beta=0.0)
    for function in (bandit.tilted, bandit.log_partition, bandit.chi_squared, bandit.expansion):
        with pytest.raises(ValueError, match=r"beta must be a finite number above 0, got -1.0"):
            function(ref, reward, beta=-1.0)
