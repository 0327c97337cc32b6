"""Every figure is also had by a formula in p itself, by enumeration, or by running the map."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, softmax

from tests.losses.tabular import minimiser
from tiltjax.advantages import greedy_baseline, group_normalised, leave_one_out
from tiltjax.exact import bandit, grpo

POPULATION = functools.partial(group_normalised, ddof=0, eps=0.0)
CENTRED = functools.partial(group_normalised, scale="none")

success_map = jax.jit(grpo.success_map, static_argnames=("scale", "kl_to"))
success_slope = jax.jit(grpo.success_slope, static_argnames=("scale", "kl_to"))
orbit = jax.jit(grpo.orbit, static_argnames=("steps", "scale", "kl_to"))
lyapunov_exponent = jax.jit(grpo.lyapunov_exponent, static_argnames=("steps", "burn_in"))
uniqueness_beta = jax.jit(grpo.uniqueness_beta)
find = jax.jit(jax.vmap(lambda ref, beta, eps: grpo.fixed_points(ref, beta=beta, eps=eps)))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def h(p, ref, beta, eps):
    return 1 / (1 + (1 - ref) / ref * np.exp(-1 / (beta * np.sqrt(p * (1 - p) + eps))))


class TestMap:
    p, ref = np.linspace(0.02, 0.98, 25), np.linspace(0.9, 0.01, 25)

    def test_formulas(self):
        options = dict(beta=0.7, eps=0.01)
        np.testing.assert_allclose(success_map(self.p, self.ref, **options), h(self.p, self.ref, **options))
        previous = success_map(self.p, self.ref, **options, kl_to="previous")
        np.testing.assert_allclose(previous, h(self.p, self.p, **options))
        constant = success_map(self.p, self.ref, **options, scale="none")
        np.testing.assert_allclose(constant, expit(logit(self.ref) + 1 / 0.7))
        assert (np.asarray(success_map(self.p, self.ref, **options)) > self.ref).all()
        # The ends, and no eps: certainty goes to certainty.
        np.testing.assert_allclose(success_map(np.array([0.0, 1.0]), 0.1, **options), h(0.0, 0.1, **options))
        assert success_map(np.array([0.0, 1.0]), 0.1, beta=1.0, eps=0.0).tolist() == [1, 1]

    @pytest.mark.parametrize("scale", ["variance", "none"])
    @pytest.mark.parametrize("kl_to", ["reference", "previous"])
    def test_slope(self, scale, kl_to):
        options = dict(beta=0.7, eps=0.01, scale=scale, kl_to=kl_to)
        grad = jax.jit(jax.grad(lambda p: success_map(p, self.ref, **options).sum()))(self.p)
        np.testing.assert_allclose(success_slope(self.p, self.ref, **options), grad, rtol=1e-11, atol=1e-15)

    def test_is_the_tilt_by_the_advantages_and_the_optimum_of_the_round(self):
        ref, old = softmax([0.3, -1.0, 0.5, 0.0, 1.2]), softmax([0.0, 0.4, -0.5, 1.0, 0.2])
        reward, beta, eps = np.array([0.0, 1.0, 1.0, 0.0, 0.0]), 0.8, 0.01
        advantage = (reward - old @ reward) / np.sqrt(old @ reward * (1 - old @ reward) + eps)
        expected = h(old @ reward, ref @ reward, beta, eps)
        tilted = np.asarray(jax.jit(bandit.tilted)(ref, advantage, beta=beta))
        np.testing.assert_allclose(tilted @ reward, expected, rtol=1e-14)
        loss = lambda logp: jnp.exp(logp) @ (beta * (logp - np.log(ref)) - advantage)
        np.testing.assert_allclose(minimiser(loss, ref) @ reward, expected, atol=1e-8)

    def test_orbits(self):
        starts, ref = np.array([0.05, 0.3, 0.6]), 0.1
        path = np.asarray(orbit(starts, ref, beta=1.0, eps=0.01, steps=60))
        np.testing.assert_allclose(path[1:], h(path[:-1], ref, 1.0, 0.01), rtol=1e-13)
        np.testing.assert_allclose(path[-1], 0.44418212, atol=1e-8)
        grows = np.asarray(orbit(starts, ref, beta=3.0, eps=0.01, steps=15, kl_to="previous"))
        assert (np.diff(grows, axis=0) > 0).all()
        at_once = np.asarray(orbit(starts, ref, beta=1.0, eps=0.0, steps=3, scale="none"))
        np.testing.assert_allclose(at_once[1:], expit(logit(ref) + 1), rtol=1e-14)


class TestFixedPoints:
    def test_known(self):
        found = find(np.array([0.1, 0.3, 0.5]), np.array([1.0, 2.0, 5.0]), np.full(3, 0.01))
        expected = [[0.44418212, 0.98549775, 0.99947411], [0.53380971, 0, 0], [0.59863561, 0, 0]]
        np.testing.assert_allclose(found.p, expected, atol=1e-8)
        np.testing.assert_array_equal(found.where, np.array(expected) > 0)
        np.testing.assert_array_equal(found.stable, [[True, False, True], [True, False, False], [True, False, False]])
        for row, beta in enumerate((1.0, 2.0, 5.0)):
            slope = success_slope(np.asarray(found.p)[row, 0], [0.1, 0.3, 0.5][row], beta=beta, eps=0.01)
            np.testing.assert_allclose(np.asarray(found.slope)[row, 0], slope, rtol=1e-12)

    def test_none_is_missed_and_none_is_below_the_reference(self):
        ref, beta, eps = (
            x.ravel()
            for x in np.meshgrid(
                [1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999],
                [0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 3.0, 10.0],
                [0.01, 0.1],
            )
        )
        found = find(ref, beta, eps)
        where, x = np.asarray(found.where), np.asarray(found.logit)
        points = np.linspace(-12, 120, 100_001)
        counts = []
        for r, b, e, mine in zip(ref, beta, eps, np.sort(np.where(where, x, np.inf)), strict=True):
            miss = logit(r) + 1 / (b * np.sqrt(expit(points) * expit(-points) + e)) - points
            turns = points[:-1][np.sign(miss[1:]) != np.sign(miss[:-1])]
            counts.append(len(turns))
            np.testing.assert_allclose(mine[: len(turns)], turns, atol=2e-3)
        np.testing.assert_array_equal(where.sum(-1), counts)
        assert set(counts) == {1, 3}
        assert (np.where(where, x, np.inf) > logit(ref)[:, None]).all()
        unique = beta >= np.asarray(jax.vmap(uniqueness_beta)(eps))
        assert unique.any()
        assert (where.sum(-1)[unique] == 1).all()
        # Exact to rounding, with the slope of the formula where p is away from 1.
        p = np.asarray(found.p)
        again = h(p, ref[:, None], beta[:, None], eps[:, None])
        np.testing.assert_allclose(again[where], p[where], rtol=1e-10)
        slope = again * (1 - again) * (2 * p - 1) / (2 * beta[:, None] * (p * (1 - p) + eps[:, None]) ** 1.5)
        np.testing.assert_allclose(np.asarray(found.slope)[where], slope[where], rtol=1e-5, atol=1e-12)
        # Neighbours stay where, and only where, the slope is below 1.
        near = expit(np.where(where, x, 0) + 1e-4)
        near = h(h(near, ref[:, None], beta[:, None], eps[:, None]), ref[:, None], beta[:, None], eps[:, None])
        inner = where & (np.abs(x) < 8)
        closer = np.abs(logit(near[inner]) - x[inner]) < 1e-4
        np.testing.assert_array_equal(closer, np.asarray(found.stable)[inner])

    def test_uniqueness(self):
        for eps in (1e-4, 0.01, 0.3):
            rise = lambda log_v, eps=eps: (
                -np.exp(log_v) * np.sqrt(1 - 4 * np.exp(log_v)) / (2 * (np.exp(log_v) + eps) ** 1.5)
            )
            largest = -minimize_scalar(rise, bounds=(-20, np.log(0.25)), method="bounded", options={"xatol": 1e-9}).fun
            np.testing.assert_allclose(uniqueness_beta(eps), largest, rtol=1e-12)
        # A fixed point at the inflection repels below it, and so has one on either side.
        variance = 0.02 / 1.12
        steepest = logit((1 + np.sqrt(1 - 4 * variance)) / 2)
        beta = np.array([0.99, 0.5, 1.01]) * float(uniqueness_beta(0.01))
        ref = expit(steepest - 1 / (beta * np.sqrt(variance + 0.01)))
        assert np.asarray(find(ref, beta, np.full(3, 0.01)).where).sum(-1).tolist() == [3, 3, 1]

    def test_tiny_eps_is_finite(self):
        found = find(np.array([0.2, 0.2, 0.9]), np.array([0.5, 5.0, 5.0]), np.full(3, 1e-12))
        assert np.isfinite(found.logit).all()
        # Certainty attracts, and where beta is large something below it does too.
        assert np.asarray(found.where).sum(-1).tolist() == [1, 3, 3]
        assert np.asarray(found.p)[np.arange(3), [0, 2, 2]].tolist() == [1, 1, 1]


class TestCyclesAndChaos:
    def test_attracting_cycle(self):
        options = dict(beta=0.68129, eps=0.01)
        found = grpo.two_cycles(1e-6, **options)
        np.testing.assert_allclose(found.p, [[2.3e-5, 0.69968]], rtol=1e-2)
        np.testing.assert_allclose(h(found.p, 1e-6, **options), found.p[:, ::-1], rtol=1e-8)
        assert found.stable.tolist() == [True]
        slopes = success_slope(found.p, 1e-6, **options)
        np.testing.assert_allclose(found.slope, np.asarray(slopes).prod(-1), rtol=1e-6)
        last = np.sort(np.asarray(orbit(0.3, 1e-6, **options, steps=200))[-2:])
        np.testing.assert_allclose(last, found.p[0], rtol=1e-10)
        rate = lyapunov_exponent(0.3, 1e-6, **options, steps=1000)
        np.testing.assert_allclose(rate, np.log(np.abs(found.slope[0])) / 2, rtol=1e-8)
        assert not np.asarray(find(np.full(3, 1e-6), np.full(3, 0.68129), np.full(3, 0.01)).stable).any()

    def test_no_cycle_where_a_fixed_point_attracts_all(self):
        assert grpo.two_cycles(0.3, beta=2.0, eps=0.01).p.shape == (0, 2)
        found = find(np.full(3, 0.3), np.full(3, 2.0), np.full(3, 0.01))
        rate = lyapunov_exponent(0.3, 0.3, beta=2.0, eps=0.01, steps=100)
        np.testing.assert_allclose(rate, np.log(np.asarray(found.slope)[0, 0]), rtol=1e-8)

    def test_chaos(self):
        options = dict(beta=0.50714, eps=0.01)
        starts = np.array([0.2, 0.3, 0.3 + 1e-9, 0.6])
        rates = lyapunov_exponent(starts, 1e-6, **options, steps=20_000)
        np.testing.assert_allclose(rates, 0.44, atol=0.02)
        path = np.asarray(orbit(starts, 1e-6, **options, steps=300))
        apart = np.abs(logit(path[:, 1]) - logit(path[:, 2]))
        assert apart[0] < 1e-8
        assert apart[100:].max() > 1


class TestFiniteGroups:
    @pytest.mark.parametrize(("size", "p", "expected"), [(8, 0.1, 2.0949), (64, 0.1, 2.9293), (8, 0.5, 0.9278)])
    def test_rare_success_counts_less_than_in_a_large_group(self, size, p, expected):
        success, failure = jax.jit(lambda p: grpo.expected_advantage(p, POPULATION, size=size))(p)
        np.testing.assert_allclose(success, expected, atol=5e-5)
        np.testing.assert_allclose(p * success + (1 - p) * failure, 0, atol=1e-14)
        assert success < np.sqrt((1 - p) / p)

    @pytest.mark.parametrize("advantage", [POPULATION, group_normalised, CENTRED, leave_one_out])
    def test_is_the_mean_over_all_groups(self, advantage):
        p, size = np.array([0.1, 0.7]), 4
        groups = np.array(list(itertools.product([0.0, 1.0], repeat=size)))
        values = np.asarray(jax.jit(advantage)(groups))
        chance = np.prod(np.where(groups == 1, p[:, None, None], 1 - p[:, None, None]), -1)
        won = groups[:, 0] == 1
        success, failure = jax.jit(lambda p: grpo.expected_advantage(p, advantage, size=size))(p)
        np.testing.assert_allclose(success, chance[:, won] @ values[won, 0] / p, rtol=1e-12)
        np.testing.assert_allclose(failure, chance[:, ~won] @ values[~won, 0] / (1 - p), rtol=1e-12)

    def test_of_the_map_is_the_large_group(self):
        advantage = functools.partial(group_normalised, scale="variance", ddof=0, eps=0.01)
        success, failure = jax.jit(lambda p: grpo.expected_advantage(p, advantage, size=1000))(0.3)
        np.testing.assert_allclose([success, failure], np.array([0.7, -0.3]) / np.sqrt(0.22), rtol=2e-3)


class TestExpectedGradient:
    logits, reward = np.array([0.3, -0.2, 0.7]), np.array([1.0, 0.0, 0.4])

    def gradient(self, advantage, size):
        run = lambda logits, reward: grpo.expected_gradient(logits, reward, advantage, size=size)
        return np.asarray(jax.jit(run)(self.logits, self.reward))

    @property
    def truth(self):
        policy = softmax(self.logits)
        return policy * (self.reward - policy @ self.reward)

    def test_leave_one_out_and_greedy_are_unbiased(self):
        found = self.gradient(leave_one_out, 4)
        np.testing.assert_allclose(found, self.truth, atol=1e-16)
        greedy = self.reward[np.argmax(self.logits)]
        remax = lambda r: greedy_baseline(r, jnp.full(r.shape[:-1], greedy))
        for size in (1, 3):
            found = self.gradient(remax, size)
            np.testing.assert_allclose(found, self.truth, atol=1e-16)

    @pytest.mark.parametrize("size", [2, 5])
    def test_the_mean_baseline_shrinks_it(self, size):
        found = self.gradient(CENTRED, size)
        np.testing.assert_allclose(found, (size - 1) / size * self.truth, atol=1e-16)

    def test_the_standard_deviation_turns_it(self):
        policy, reward = softmax(self.logits), self.reward
        total = np.zeros(3)
        for group in itertools.product(range(3), repeat=3):
            r = reward[list(group)]
            advantage = (r - r.mean()) / r.std() if np.ptp(r) > 0 else np.zeros(3)
            scores = np.eye(3)[list(group)] - policy
            total += policy[list(group)].prod() * advantage @ scores / 3
        found = np.asarray(self.gradient(POPULATION, 3))
        np.testing.assert_allclose(found, total, atol=1e-15)
        cosine = found @ self.truth / np.linalg.norm(found) / np.linalg.norm(self.truth)
        assert cosine < 1 - 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grpo.success_map(0.5, 0.5, beta=0.0, eps=0.1), "beta must be a finite number above 0, got 0.0"),
        (lambda: grpo.success_map(0.5, 0.5, beta=1.0, eps=-0.1), "eps must be at least 0, got -0.1"),
        (lambda: grpo.success_map(0.5, 1.0, beta=1.0, eps=0.1), r"ref must lie in \(0, 1\), got 1.0"),
        (lambda: grpo.success_map(0.5, 0.5, beta=1.0, eps=0.1, scale="std"), "scale must be one of none, variance"),
        (lambda: grpo.success_map(0.5, 0.5, beta=1.0, eps=0.1, kl_to="old"), "kl_to must be one of previous, ref"),
        (lambda: grpo.fixed_points(0.5, beta=1.0, eps=0.0), "eps must be a finite number above 0, got 0.0"),
        (lambda: grpo.orbit(0.5, 0.5, beta=1.0, eps=0.1, steps=0), "steps must be at least 1, got 0"),
        (lambda: grpo.expected_advantage(0.5, POPULATION, size=0), "size must be at least 1, got 0"),
        (lambda: grpo.expected_gradient(jnp.zeros(3), jnp.zeros(3), POPULATION, size=40), "size must leave at most"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
