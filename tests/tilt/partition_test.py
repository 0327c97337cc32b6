import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import Mesh, PartitionSpec
from scipy.special import logsumexp

from tests.grids import each_grid, mesh_over
from tiltjax.tilt.partition import (
    RunningPartition,
    delta_log_partition,
    in_batch_log_partition,
    jackknife_log_partition,
    leave_one_out_log_partition,
    log_partition,
)

RNG = np.random.default_rng(0)
REWARD = RNG.normal(size=(5, 16)).astype(np.float32)
WHERE = RNG.random((5, 16)) < 0.6
WHERE[4] = np.arange(16) == 3
DIRTY = np.where(WHERE, REWARD, RNG.choice([np.nan, np.inf, -np.inf, 1e30], size=REWARD.shape)).astype(np.float32)
ESTIMATORS = {
    "plain": log_partition,
    "jackknife": jackknife_log_partition,
    "delta": delta_log_partition,
    "leave_one_out": leave_one_out_log_partition,
}


COMPILED = {name: jax.jit(estimator) for name, estimator in ESTIMATORS.items()}  # One program for every beta.


def reference(name, row, beta):
    """Each estimator of one row in float64, from its definition."""
    x = row.astype(np.float64) / beta
    N = len(x)
    plain = logsumexp(x) - np.log(N)
    others = np.array([logsumexp(np.delete(x, i)) - np.log(N - 1) if N > 1 else 0.0 for i in range(N)])
    w = np.exp(x - logsumexp(x))
    return {
        "plain": plain,
        "jackknife": N * plain - (N - 1) * others.mean(),
        "delta": plain + (np.square(w).sum() - 1 / N) / 2,
        "leave_one_out": others,
    }[name]


class EstimatorsTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(*ESTIMATORS)
    def test_is_its_definition(self, name):
        estimate = self.variant(lambda r, beta: ESTIMATORS[name](r, beta=beta))
        for beta in (0.05, 1.0, 30.0):
            out = estimate(jnp.asarray(REWARD), jnp.float32(beta))
            np.testing.assert_allclose(out, [reference(name, row, beta) for row in REWARD], rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True)
    @parameterized.parameters(*ESTIMATORS)
    def test_masked_is_sliced(self, name):
        out = self.variant(lambda r, w: ESTIMATORS[name](r, beta=0.3, where=w))(jnp.asarray(DIRTY), jnp.asarray(WHERE))
        for row in range(5):
            expected = reference(name, REWARD[row][WHERE[row]], 0.3)
            real = out[row][WHERE[row]] if name == "leave_one_out" else out[row]
            np.testing.assert_allclose(real, expected, rtol=1e-5, atol=1e-6)
        if name == "leave_one_out":
            np.testing.assert_array_equal(np.asarray(out)[~WHERE], 0)


@each_grid
def test_candidates_over_eight_devices(names):
    mesh = mesh_over(names)
    dominated = DIRTY.copy()
    dominated[1, np.flatnonzero(WHERE[1])[2]] = 40.0
    tied = dominated.copy()
    tied[1, np.flatnonzero(WHERE[1])[-1]] = 40.0
    spec = PartitionSpec(None, names)

    def every(r, w, axis_name=None):
        return {name: f(r, beta=0.3, where=w, axis_name=axis_name) for name, f in ESTIMATORS.items()}

    mapped = functools.partial(every, axis_name=names)
    out_specs = {name: spec if name == "leave_one_out" else PartitionSpec() for name in ESTIMATORS}
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(spec, spec), out_specs=out_specs))
    pmapped = jax.pmap(mapped, axis_name="n") if names == "n" else None

    def split(x):
        return np.asarray(x).reshape(5, 8, 2).swapaxes(0, 1)

    whole = jax.jit(every)
    for reward in (DIRTY, dominated, tied):
        expected = whole(reward, WHERE)
        chex.assert_trees_all_close(sharded(reward, WHERE), expected, rtol=1e-5, atol=1e-6)
        if pmapped is None:
            continue
        for name, out in pmapped(split(reward), split(WHERE)).items():
            wanted = split(expected[name]) if name == "leave_one_out" else np.tile(expected[name], (8, 1))
            np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_no_candidate_gives_zero_and_zero_gradient():
    nothing, bad = np.zeros((2, 4), bool), np.full((2, 4), np.nan, np.float32)

    def both(estimator, reward):
        return jax.value_and_grad(lambda r: estimator(r, beta=0.5, where=nothing).sum())(reward)

    for value, grad in jax.jit(lambda r: [both(f, r) for f in ESTIMATORS.values()])(bad):
        assert float(value) == 0
        np.testing.assert_array_equal(grad, np.zeros((2, 4)))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_shifts_with_the_reward_and_takes_a_beta_per_prompt(name):
    beta = np.float32([0.1, 0.3, 1.0, 3.0, 10.0])
    out = np.asarray(COMPILED[name](REWARD, beta=beta))
    alone = [COMPILED[name](r, beta=float(b)) for r, b in zip(REWARD, beta, strict=True)]
    chex.assert_trees_all_close(out, np.stack(alone), rtol=1e-5)
    vmapped = jax.jit(jax.vmap(lambda r, b: ESTIMATORS[name](r, beta=b)))(REWARD, beta)
    chex.assert_trees_all_close(out, vmapped, rtol=1e-5)
    shifted = COMPILED[name](REWARD + 4, beta=beta)
    offset = 4 / beta
    np.testing.assert_allclose(shifted, out + (offset[:, None] if out.ndim == 2 else offset), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_does_not_overflow(name):
    reward = np.float32([1e4, 1e4 - 1, 9e3, -1e4])
    total = lambda r: ((out := ESTIMATORS[name](r, beta=1.0)).sum(), out)
    grad, out = jax.jit(jax.grad(total, has_aux=True))(reward)
    np.testing.assert_allclose(out, reference(name, reward, 1.0), rtol=1e-6)
    assert np.isfinite(grad).all()


def test_a_dominating_candidate_is_left_out_without_loss():
    row = np.array([0.3, -0.2, 0.1, 60.0], np.float32)
    out = leave_one_out_log_partition(jnp.asarray(row), beta=1.0)
    np.testing.assert_allclose(out, reference("leave_one_out", row, 1.0), rtol=1e-6)
    # 60 of the 64 nats are the dominating candidate's: subtraction would leave -inf.
    assert abs(float(out[3]) - (logsumexp(row[:3]) - np.log(3))) < 1e-6
    tied = leave_one_out_log_partition(jnp.asarray([5.0, 5.0, -90.0]), beta=1.0)
    np.testing.assert_allclose(tied, [5 - np.log(2), 5 - np.log(2), 5.0], rtol=1e-6)
    # Gradient: the softmax over the others.
    grad = jax.grad(lambda r: leave_one_out_log_partition(r, beta=1.0)[3])(jnp.asarray(row))
    np.testing.assert_allclose(grad, np.append(np.exp(row[:3] - logsumexp(row[:3])), 0), rtol=1e-5)


def test_the_jackknife_keeps_its_digits_at_large_n():
    reward = np.random.default_rng(3).normal(size=100_000).astype(np.float32)
    x = reward.astype(np.float64)
    total = np.exp(x).sum()
    N = len(x)
    others = np.log((total - np.exp(x)) / (N - 1))
    expected = N * np.log(total / N) - (N - 1) * others.mean()
    correction = expected - np.log(total / N)
    out = jackknife_log_partition(jnp.asarray(reward), beta=1.0) - log_partition(jnp.asarray(reward), beta=1.0)
    assert correction > 5e-6
    np.testing.assert_allclose(out, correction, atol=5e-7)  # N times float32's rounding is 6e-3


def test_biases_are_the_documented_ones(every_draw, truth):
    """The mean of every estimator over all possible draws, against its printed expansion."""
    beta = 0.5
    t = truth(beta)
    chi2, m3 = t["chi2"], t["m3"]
    c = m3 / 3 - 3 * chi2**2 / 4
    bias = {name: {} for name in ESTIMATORS}
    with jax.enable_x64(True):
        for N in (30, 60):
            reward, chance = every_draw(N)
            for name in ESTIMATORS:
                value = np.asarray(COMPILED[name](reward, beta=beta))
                bias[name][N] = chance @ (value.mean(-1) if value.ndim == 2 else value) - t["log_z"]
    second = {"plain": c, "jackknife": -c, "delta": 3 * chi2**2 / 4 - chi2 / 2 - 2 * m3 / 3}
    for name, constant in second.items():
        first = -chi2 / 2 if name == "plain" else 0.0
        rest = {N: N**2 * (b - first / N) for N, b in bias[name].items()}
        # Richardson removes the 1/N of what is left.
        np.testing.assert_allclose(2 * rest[60] - rest[30], constant, rtol=0.03, err_msg=name)
    # The others of N are a plain estimate from N - 1.
    np.testing.assert_allclose(bias["leave_one_out"][60] * 59, -chi2 / 2, rtol=0.02)
    assert abs(bias["jackknife"][30]) < 0.1 * abs(bias["plain"][30])
    assert abs(bias["delta"][30]) < 0.1 * abs(bias["plain"][30])


def test_lognormal_biases():
    """sd 0.8, N = 16: plain -chi2 / 2N = -0.0280 to first order, -0.0285 in full; the corrections remove most of it."""
    reward = 0.8 * np.random.default_rng(5).normal(size=(200_000, 16)).astype(np.float32)
    means = {n: float(np.mean(COMPILED[n](reward, beta=1.0)) - 0.32) for n in ("plain", "jackknife", "delta")}
    for name, expected in {"plain": -0.0285, "jackknife": -0.0032, "delta": -0.0070}.items():
        assert abs(means[name] - expected) < 4 * 0.23 / 200_000**0.5, (name, means)


class RunningTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_parts_are_the_whole_in_any_order(self):
        cuts = np.split(np.arange(16), [3, 4, 11])
        add = self.variant(lambda run, r, w: run.update(r, beta=0.3, where=w))
        for order in list(itertools.permutations(cuts))[::7]:
            running = RunningPartition.empty((5,))
            for part in order:
                running = add(running, jnp.asarray(DIRTY[:, part]), jnp.asarray(WHERE[:, part]))
            expected = [reference("plain", r[w], 0.3) for r, w in zip(REWARD, WHERE, strict=True)]
            np.testing.assert_allclose(running.log_z, expected, rtol=1e-5, atol=1e-6)


def test_a_running_partition_streams_a_million_candidates():
    beta, chunks = 0.25, 64
    keys = jax.random.split(jax.random.key(0), chunks)

    def step(running, key):
        return running.update(jax.random.normal(key, (16384,)), beta=beta), None

    running, _ = jax.jit(lambda ks: jax.lax.scan(step, RunningPartition.empty(), ks))(keys)
    x = np.concatenate([jax.random.normal(k, (16384,)) for k in keys]).astype(np.float64) / beta
    np.testing.assert_allclose(running.log_z, logsumexp(x) - np.log(len(x)), rtol=1e-6)
    np.testing.assert_allclose(running.ess, np.exp(2 * logsumexp(x) - logsumexp(2 * x)), rtol=1e-4)


def test_running_partitions_merge_and_start_from_nothing():
    empty = RunningPartition.empty()
    assert (float(empty.log_z), float(empty.ess)) == (0, 0)
    a, b = (empty.update(jnp.asarray(REWARD[0][s]), beta=0.1) for s in (slice(0, 5), slice(5, 16)))
    merged = a.merge(b).merge(empty)
    np.testing.assert_allclose(merged.log_z, reference("plain", REWARD[0], 0.1), rtol=1e-6)


@each_grid
def test_running_partition_over_devices(names):
    def streamed(r):
        running = RunningPartition.empty((5,))
        for part in jnp.split(r, 2, axis=-1):
            running = running.update(part, beta=0.3, axis_name=names)
        return running.log_z, running.ess

    sharded = jax.shard_map(
        streamed, mesh=mesh_over(names), in_specs=PartitionSpec(None, names), out_specs=PartitionSpec()
    )
    whole = RunningPartition.empty((5,)).update(jnp.asarray(REWARD), beta=0.3)
    chex.assert_trees_all_close(jax.jit(sharded)(REWARD), (whole.log_z, whole.ess), rtol=1e-5)


# Five prompts over eight completions: every expectation is a sum.
PROMPTS, ARMS, LAM = 5, 8, 0.5
WORLD = np.random.default_rng(7)
REF = WORLD.dirichlet(np.full(ARMS, 0.5), size=PROMPTS)
WORLD_REWARD = WORLD.normal(size=(PROMPTS, ARMS))
TRUE_Z = (REF * np.exp(WORLD_REWARD / LAM)).sum(1)


in_batch = jax.jit(in_batch_log_partition, static_argnames="method")


def expected_in_batch_z(method):
    """E Z-hat, one completion per prompt: by linearity, prompt k's completion runs over all arms, the others held."""
    total = np.zeros(PROMPTS)
    fixed = [0] * PROMPTS
    base = in_batch_z(fixed, method)
    for k in range(PROMPTS):
        for y in range(ARMS):
            drawn = list(fixed)
            drawn[k] = y
            total += REF[k, y] * (in_batch_z(drawn, method) - base)
    return total + base


def in_batch_z(drawn, method):
    log_z = in_batch(np.log(REF)[:, drawn], WORLD_REWARD[:, drawn], beta=LAM, method=method)
    return np.exp(np.asarray(log_z))


def test_in_batch_expectations():
    with jax.enable_x64(True):
        found = {m: expected_in_batch_z(m) for m in ("sum", "mean", "balance")}
    np.testing.assert_allclose(found["balance"], TRUE_Z, rtol=1e-12)
    truncated = PROMPTS * (REF.mean(0) * REF * np.exp(WORLD_REWARD / LAM)).sum(1)
    np.testing.assert_allclose(found["sum"], truncated, rtol=1e-12)
    np.testing.assert_allclose(found["mean"], truncated / PROMPTS, rtol=1e-12)
    assert np.abs(found["sum"] / TRUE_Z - 1).max() > 0.2


def test_in_batch_with_unequal_completions_per_prompt():
    # Prompts 0, 0, 1: the mixture the columns come from is (2 ref_0 + ref_1) / 3.
    mixture = (2 * REF[0] + REF[1]) / 3
    total = np.zeros(2)
    with jax.enable_x64(True):
        for drawn in itertools.product(range(ARMS), repeat=3):
            chance = REF[0, drawn[0]] * REF[0, drawn[1]] * REF[1, drawn[2]]
            total += chance * _unequal(np.array(drawn), np.log(mixture))
    np.testing.assert_allclose(total, TRUE_Z[:2], rtol=1e-10)


@functools.cache
def _unequal_kernel():
    kernel = functools.partial(in_batch_log_partition, beta=LAM, method="balance")
    return jax.jit(lambda logp, r, mix: jnp.exp(kernel(logp, r, ref_mixture_logp=mix)))


def _unequal(drawn, log_mixture):
    return np.asarray(_unequal_kernel()(np.log(REF)[:2, drawn], WORLD_REWARD[:2, drawn], log_mixture[drawn]))


def test_in_batch_with_disjoint_supports_is_each_prompts_own():
    ref_logp = jnp.where(jnp.eye(4, dtype=bool), -30.0, -jnp.inf)
    reward = jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)
    printed = in_batch_log_partition(ref_logp, reward, beta=0.1, method="sum")
    # The printed weight ref exp(r / beta) / Z of a prompt's own completion: 1, whatever the reward.
    np.testing.assert_allclose(jnp.exp(-30 + jnp.diag(reward) / 0.1 - printed), np.ones(4), rtol=1e-5)
    balanced = in_batch_log_partition(ref_logp, reward, beta=0.1, method="balance")
    np.testing.assert_allclose(balanced, jnp.diag(reward) / 0.1, rtol=1e-5)
    impossible = in_batch_log_partition(ref_logp.at[2].set(-jnp.inf), reward, beta=0.1, method="balance")
    assert np.isfinite(np.asarray(impossible)[[0, 1, 3]]).all()
    assert float(impossible[2]) == -np.inf


@pytest.mark.parametrize("method", ["sum", "mean", "balance"])
def test_in_batch_masked_is_sliced(method):
    logp, reward = np.log(REF).astype(np.float32), WORLD_REWARD.astype(np.float32)
    rows, columns = np.array([1, 1, 0, 1, 1], bool), np.array([1, 1, 1, 0, 1, 0, 1, 1], bool)
    where = rows[:, None] & columns
    dirty = [np.where(where, x, np.float32(np.nan)) for x in (logp, reward)]
    kernel = functools.partial(in_batch_log_partition, beta=LAM, method=method, where=where)
    total = lambda a, b: ((out := kernel(a, b)).sum(), out)
    grads, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(*dirty)
    sliced = [x[rows][:, columns] for x in (logp, reward)]
    np.testing.assert_allclose(out[rows], in_batch(*sliced, beta=LAM, method=method), rtol=1e-5)
    assert float(out[2]) == 0
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("method", ["sum", "mean", "balance"])
def test_in_batch_rows_over_eight_devices(method):
    logp = np.log(np.random.default_rng(1).dirichlet(np.ones(12), size=16)).astype(np.float32)
    reward = np.random.default_rng(2).normal(size=(16, 12)).astype(np.float32)
    where = np.ones((16, 12), bool)
    where[13:], where[:, 5] = False, False
    kernel = functools.partial(in_batch_log_partition, beta=0.2, method=method)
    expected = in_batch(logp, reward, beta=0.2, method=method, where=where)
    mapped = lambda a, b, w: kernel(a, b, where=w, axis_name="d")
    mesh, spec = Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d")
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
    np.testing.assert_allclose(sharded(logp, reward, where), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["sum", "mean", "balance"])
def test_in_batch_does_not_overflow(method):
    out = in_batch(np.full((2, 2), -900.0, np.float32), jnp.asarray([[1e4, 0], [-1e4, 1e4]]), beta=1.0, method=method)
    base = {"sum": -900, "mean": -900 - np.log(2), "balance": -np.log(2)}[method]
    np.testing.assert_allclose(out, [1e4 + base, 1e4 + base], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf")])
def test_bad_options_are_named(beta):
    calls = [functools.partial(f, jnp.zeros(3)) for f in ESTIMATORS.values()]
    calls += [functools.partial(RunningPartition.empty().update, jnp.zeros(3))]
    calls += [functools.partial(in_batch_log_partition, jnp.zeros((2, 2)), jnp.zeros((2, 2)), method="sum")]
    for call in calls:
        with pytest.raises(ValueError, match="beta must be a finite number above 0, got"):
            call(beta=beta)
    with pytest.raises(ValueError, match="method must be one of balance, mean, sum; got 'max'"):
        in_batch_log_partition(jnp.zeros((2, 2)), jnp.zeros((2, 2)), beta=1.0, method="max")
