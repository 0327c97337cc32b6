import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy.stats import binom

from tiltjax.advantages import (
    batch_whitened,
    gae,
    greedy_baseline,
    group_normalised,
    leave_one_out,
    prime_advantage,
    reinforce_pp_advantage,
    reward_to_go,
    token_reward,
)

RNG = np.random.default_rng(0)
B, N, T = 8, 8, 6
REWARD = RNG.normal(size=(B, N)).astype(np.float32)
WHERE = RNG.random((B, N)) < 0.6
WHERE[:, 0] = True
WHERE[0] = False
WHERE[1, 1:] = False
TOKEN_REWARD, VALUE, TOKEN_KL = RNG.normal(size=(3, B, N, T)).astype(np.float32)
MASK = RNG.random((B, N, T)) < 0.7  # With holes, and some completions empty.
MASK[2, :3] = False

GROUPS = {
    "leave_one_out": lambda r, w=None, **k: leave_one_out(r, w, **k),
    "std": lambda r, w=None, **k: group_normalised(r, w, **k),
    "population": lambda r, w=None, **k: group_normalised(r, w, ddof=0, eps=1e-6, **k),
    "variance": lambda r, w=None, **k: group_normalised(r, w, scale="variance", ddof=0, eps=0.01, **k),
    "none": lambda r, w=None, **k: group_normalised(r, w, scale="none", **k),
}


def group_formula(name, r):
    mean = r.mean()
    return {
        "leave_one_out": np.array([x - np.delete(r, i).mean() if len(r) > 1 else 0 for i, x in enumerate(r)]),
        "std": (r - mean) / (r.std(ddof=1) + 1e-4) if len(r) > 1 else np.zeros(1),
        "population": (r - mean) / (r.std() + 1e-6),
        "variance": (r - mean) / np.sqrt(r.var() + 0.01),
        "none": r - mean,
    }[name]


def gae_formula(reward, value, gamma, lam):
    delta = reward + gamma * np.append(value[1:], 0) - value
    powers = (gamma * lam) ** np.arange(len(reward))
    return np.array([delta[t:] @ powers[: len(reward) - t] for t in range(len(reward))])


def every_group(reward, where, axis_name=None):
    return {name: run(reward, where, axis_name=axis_name) for name, run in GROUPS.items()}


EVERY_GROUP = jax.jit(every_group)


def test_groups_are_the_float64_formula_of_the_real_candidates():
    dirty = np.where(WHERE, REWARD, np.float32(np.nan))
    for name, out in EVERY_GROUP(dirty, WHERE).items():
        out = np.asarray(out)
        for row in range(B):
            if WHERE[row].any():
                expected = group_formula(name, REWARD[row][WHERE[row]].astype(np.float64))
                np.testing.assert_allclose(out[row][WHERE[row]], expected, rtol=1e-4, atol=1e-6, err_msg=name)
            assert (out[row][~WHERE[row]] == 0).all(), name


def test_equal_rewards_give_exactly_zero():
    equal = np.full((B, N), [[0.1], [1e4 / 3]] * 4, np.float32)
    for name, out in EVERY_GROUP(equal, np.arange(B * N).reshape(B, N) % 5 != 3).items():
        np.testing.assert_array_equal(out, np.zeros((B, N)), err_msg=name)


def test_candidates_over_eight_devices():
    mesh, spec = Mesh(np.array(jax.devices()), ("n",)), PartitionSpec(None, "n")
    run = functools.partial(every_group, axis_name="n")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(REWARD, WHERE)
    chex.assert_trees_all_close(sharded, EVERY_GROUP(REWARD, WHERE), rtol=1e-5, atol=1e-6)


def test_identities_of_the_group():
    n = N / (N - 1)
    out = EVERY_GROUP(REWARD, np.ones((B, N), bool))
    one_out = np.asarray(out["leave_one_out"])
    np.testing.assert_allclose(one_out, n * np.asarray(out["none"]), rtol=1e-5)
    np.testing.assert_allclose(one_out.sum(-1), np.zeros(B), atol=1e-5)
    np.testing.assert_allclose(leave_one_out(REWARD), one_out, rtol=1e-6)


POPULATION = jax.jit(functools.partial(group_normalised, ddof=0, eps=0.0))


@pytest.mark.parametrize(("G", "p", "expected"), [(8, 0.1, 2.0949), (64, 0.1, 2.9293), (8, 0.5, 0.9278)])
def test_finite_groups_of_binary_rewards(G, p, expected):
    """E[A | r = 1] falls short of the population's sqrt((1 - p) / p); the mean advantage is 0."""
    k = np.arange(G)
    alike = (k <= k[:, None]).astype(np.float32)  # k of the others are like the first candidate.
    up, down = np.asarray(POPULATION(np.stack([alike, 1 - alike])))[..., 0]
    up, down = binom.pmf(k, G - 1, p) @ up, binom.pmf(k, G - 1, 1 - p) @ down
    np.testing.assert_allclose(up, expected, atol=2e-4)
    np.testing.assert_allclose(p * up + (1 - p) * down, 0, atol=1e-5)


run_gae = jax.jit(gae)
run_to_go = jax.jit(reward_to_go)
run_prime = jax.jit(prime_advantage, static_argnames=("baseline", "scale", "whiten"))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.9, 0.0)])
def test_gae_is_the_sum_over_the_real_tokens(gamma, lam):
    dirty = [np.where(MASK, x, np.float32(np.nan)) for x in (TOKEN_REWARD, VALUE)]
    advantage, returns = (np.asarray(x) for x in run_gae(*dirty, MASK, gamma=gamma, lam=lam))
    for i in np.ndindex(B, N):
        reward, value = (x[i][MASK[i]].astype(np.float64) for x in (TOKEN_REWARD, VALUE))
        expected = gae_formula(reward, value, gamma, lam)
        np.testing.assert_allclose(advantage[i][MASK[i]], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(returns[i][MASK[i]], expected + value, rtol=1e-4, atol=1e-5)
    assert (advantage[~MASK] == 0).all()
    assert (returns[~MASK] == 0).all()


def test_token_reward_sums_to_the_penalised_reward():
    dirty = np.where(MASK, TOKEN_KL, np.float32(np.nan))
    out = np.asarray(jax.jit(token_reward)(REWARD, dirty, MASK, beta=0.3))
    kl = np.where(MASK, TOKEN_KL, 0).astype(np.float64)
    real = MASK.any(-1)
    np.testing.assert_allclose(out.sum(-1), np.where(real, REWARD - 0.3 * kl.sum(-1), 0), atol=1e-5)
    last = np.where(MASK, np.arange(T), -1).max(-1, keepdims=True)
    np.testing.assert_allclose(out, np.where(np.arange(T) == last, REWARD[..., None], 0) * MASK - 0.3 * kl, atol=1e-6)


def test_gae_ends():
    """lam = 1 is the reward-to-go less the value; lam = 0 the one-step error."""
    monte_carlo, returns = run_gae(TOKEN_REWARD, VALUE, MASK, gamma=0.8, lam=1.0)
    to_go = np.asarray(run_to_go(TOKEN_REWARD, MASK, gamma=0.8))
    np.testing.assert_allclose(monte_carlo, np.where(MASK, to_go - VALUE, 0), atol=1e-5)
    np.testing.assert_allclose(returns, to_go, atol=1e-5)
    full = np.ones((B, N, T), bool)
    one_step, _ = run_gae(TOKEN_REWARD, VALUE, full, gamma=0.8, lam=0.0)
    after = np.concatenate([VALUE[..., 1:], np.zeros((B, N, 1))], -1)
    np.testing.assert_allclose(one_step, TOKEN_REWARD + 0.8 * after - VALUE, atol=1e-5)
    plain = np.cumsum(TOKEN_REWARD[..., ::-1], -1)[..., ::-1]
    np.testing.assert_allclose(run_to_go(TOKEN_REWARD, full, gamma=1.0), plain, atol=1e-5)


def test_batch_whitened_over_eight_devices():
    real = TOKEN_REWARD[MASK].astype(np.float64)
    expected = np.where(MASK, (TOKEN_REWARD - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8), 0)
    dirty = np.where(MASK, TOKEN_REWARD, np.float32(np.nan))
    whiten = jax.jit(batch_whitened)
    np.testing.assert_allclose(whiten(dirty, MASK), expected, atol=1e-5)
    mesh, spec = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    run = lambda a, m: batch_whitened(a, m, axis_name="data")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(dirty, MASK)
    np.testing.assert_allclose(sharded, expected, atol=1e-5)
    np.testing.assert_allclose(jax.pmap(run, axis_name="data")(dirty, MASK), expected, atol=1e-5)
    np.testing.assert_array_equal(whiten(np.full((3, 5), 0.1, np.float32), eps=0.0), np.zeros((3, 5)))


def test_reinforce_pp_over_eight_devices():
    kl = np.where(MASK, TOKEN_KL, 0).astype(np.float64)
    last = np.where(MASK, np.arange(T), -1).max(-1, keepdims=True)
    reward = np.where(np.arange(T) == last, REWARD[..., None], 0) - 0.3 * kl
    to_go = np.cumsum(reward[..., ::-1], -1)[..., ::-1]
    expected = np.where(MASK, (to_go - to_go[MASK].mean()) / np.sqrt(to_go[MASK].var(ddof=1) + 1e-8), 0)
    found = jax.jit(reinforce_pp_advantage)(REWARD, TOKEN_KL, MASK, beta=0.3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    mesh, spec = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    run = lambda *x: reinforce_pp_advantage(*x, beta=0.3, axis_name="data")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
    np.testing.assert_allclose(sharded(REWARD, TOKEN_KL, MASK), expected, atol=1e-5)


def test_greedy_baseline():
    greedy = RNG.normal(size=B).astype(np.float32)
    out = jax.jit(greedy_baseline)(np.where(WHERE, REWARD, np.float32(np.nan)), greedy, WHERE)
    np.testing.assert_allclose(out, np.where(WHERE, REWARD - greedy[:, None], 0), rtol=1e-6)


@pytest.mark.parametrize("baseline", ["paper", "code"])
def test_prime(baseline):
    """Against loops over the candidates and tokens that are real."""
    dirty = np.where(MASK, TOKEN_REWARD, np.float32(np.nan))
    out = np.asarray(run_prime(dirty, REWARD, MASK, gamma=0.9, baseline=baseline))
    for row in range(B):
        real = [i for i in range(N) if MASK[row, i].any()]
        tokens = {i: TOKEN_REWARD[row, i][MASK[row, i]].astype(np.float64) for i in real}
        n = len(real)
        for i in real:
            outcome = REWARD[row, i] - np.mean([REWARD[row, j] for j in real if j != i])
            if baseline == "paper":
                bracket = tokens[i] - np.mean([tokens[j].mean() for j in real if j != i])
            else:
                bracket = tokens[i] * n / (n - 1) - sum(tokens[j].mean() for j in real) / (n - 1)
            length = len(tokens[i])
            process = [bracket[t:] @ 0.9 ** np.arange(length - t) for t in range(length)]
            np.testing.assert_allclose(out[row, i][MASK[row, i]], np.array(process) + outcome, rtol=1e-4, atol=1e-5)
    assert (out[~MASK] == 0).all()
    alone = np.zeros((B, N, T), bool)
    alone[:, 1, :3] = True
    np.testing.assert_array_equal(run_prime(dirty, REWARD, alone, gamma=0.9, baseline=baseline), np.zeros((B, N, T)))


def test_prime_of_one_token_has_one_baseline():
    one = np.arange(T) == np.zeros((B, N, 1))
    both = [run_prime(TOKEN_REWARD, REWARD, one, gamma=0.9, baseline=b) for b in ("paper", "code")]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_prime_of_the_official_code_over_eight_devices():
    """Scaled by the largest reward-to-go of all devices, and whitened over all of their tokens."""
    rewards = np.where(MASK, TOKEN_REWARD, 0).astype(np.float64)
    largest = np.abs(np.cumsum(rewards[..., ::-1], -1)[..., ::-1])[MASK].max()
    scaled = np.asarray(run_prime(TOKEN_REWARD / np.float32(largest + 1e-6), REWARD, MASK, gamma=1.0, baseline="code"))
    real = scaled[MASK].astype(np.float64)
    whitened = np.where(MASK, (scaled - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8), 0)
    arrays = np.where(MASK, TOKEN_REWARD, np.float32(np.nan)), REWARD, MASK
    mesh, spec = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    for options, expected in (({}, scaled), ({"whiten": True}, whitened)):
        options |= {"baseline": "code", "scale": "batch_max"}
        np.testing.assert_allclose(run_prime(*arrays, **options), expected, rtol=1e-4, atol=1e-5)
        run = lambda *x, options=options: prime_advantage(*x, **options, axis_name="data")
        sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))(*arrays)
        np.testing.assert_allclose(sharded, expected, rtol=1e-4, atol=1e-5)
    nothing = run_prime(TOKEN_REWARD, REWARD, np.zeros_like(MASK), baseline="code", scale="batch_max", whiten=True)
    np.testing.assert_array_equal(nothing, np.zeros_like(TOKEN_REWARD))


TOKENS = {
    "gae": lambda *x: sum(gae(*x)),
    "reward_to_go": lambda r, v, m: reward_to_go(r + v, m),
    "token_reward": lambda r, v, m: token_reward(r[..., 0], v, m, beta=0.1),
    "reinforce_pp": lambda r, v, m: reinforce_pp_advantage(r[..., 0], v, m, beta=0.1),
    "whitened": lambda r, v, m: batch_whitened(r + v, m),
    "prime": lambda r, v, m: prime_advantage(r, v[..., 0], m),
}


def test_no_gradient_and_finite_at_extremes():
    rng = np.random.default_rng(5)
    arrays = rng.choice(np.float32([-1e4, 0, 1e4]), (2, B, N, T))

    def totals(x):
        values = {name: run(*x, MASK).sum() for name, run in TOKENS.items()}
        return sum(values.values()), values

    grads, values = jax.jit(jax.grad(totals, has_aux=True))(arrays)
    chex.assert_tree_all_finite(values)
    np.testing.assert_array_equal(grads, np.zeros_like(arrays))


def test_groups_carry_no_gradient():
    total = lambda r: sum(jnp.square(out).sum() for out in every_group(r, WHERE).values())
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(REWARD), np.zeros((B, N)))


def test_bad_options_are_named():
    reward = np.zeros((2, 3), np.float32)
    mask = np.ones((2, 3), bool)
    for call, message in (
        (lambda: leave_one_out(reward[:, :1]), "reward must have at least 2 candidates per prompt, got 1"),
        (lambda: group_normalised(reward[:, :1]), "reward must have at least 2 candidates per prompt, got 1"),
        (lambda: group_normalised(reward, scale="batch"), "scale must be one of none, std, variance; got 'batch'"),
        (lambda: group_normalised(reward, ddof=2), "ddof must be 0 or 1, got 2"),
        (lambda: group_normalised(reward, eps=-1.0), "eps must be at least 0, got -1.0"),
        (lambda: gae(reward, reward, mask, gamma=1.5), r"gamma must lie in \(0, 1\], got 1.5"),
        (lambda: gae(reward, reward, mask, lam=-0.1), r"lam must lie in \[0, 1\], got -0.1"),
        (lambda: token_reward(reward[:, 0], reward, mask, beta=-1), "beta must be at least 0, got -1"),
        (lambda: prime_advantage(reward, reward[0, :2], mask, baseline="x"), "baseline must be one of code, paper"),
        (lambda: prime_advantage(reward, reward[0, :2], mask, scale="max"), "scale must be one of batch_max, none"),
        (lambda: batch_whitened(reward, eps=-1), "eps must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
