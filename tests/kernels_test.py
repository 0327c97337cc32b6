"""Kernels that are no losses, under the same kinds of unusual numbers: NaN, infinities, ranges, columns, lengths."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tiltjax import advantages
from tiltjax.losses import denoising, mle, penalties, policy_gradient, preference
from tiltjax.losses import process as process_losses
from tiltjax.ops import logspace, masked, order
from tiltjax.rewards import internal, shaping
from tiltjax.samplers import best_of_n, guarded, pessimism, resample
from tiltjax.tilt import divergence, f_divergence, overoptimisation, partition, tails, temperature, weights
from tiltjax.tilt import pessimism as pessimistic

NAN, INF = math.nan, math.inf
N = 32
REWARD = np.random.default_rng(0).normal(size=N).astype(np.float32)
SHARE = np.full(N, 1 / N, np.float32)
KL = np.linspace(0.1, 4, N, dtype=np.float32)
COLUMN = np.ones((4, 1), np.float32)
ROWS = np.random.default_rng(1).normal(size=(4, N)).astype(np.float32)
MASK = np.ones((4, N), bool)


@pytest.fixture
def users():
    """As in a user's process: nobody watches the annotations, and JAX promotes ranks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    with jax.numpy_rank_promotion("allow"):
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


# From N numbers and a mask to numbers that all depend on each of them.
ESTIMATES = {
    "tilt": lambda x, where: weights.tilt(x, beta=0.5, where=where).weights,
    "log_z": functools.partial(partition.log_partition, beta=0.5),
    "ess": lambda x, where: weights.tilt(x, beta=0.5, where=where).ess,
    "leave_one_out_log_partition": functools.partial(partition.leave_one_out_log_partition, beta=0.5),
    "jackknife": functools.partial(partition.jackknife_log_partition, beta=0.5),
    "delta": functools.partial(partition.delta_log_partition, beta=0.5),
    "in_batch": lambda x, where: partition.in_batch_log_partition(
        x[None], jnp.zeros((1, N)), beta=0.5, method="balance", ref_mixture_logp=jnp.zeros(N), where=where[None]
    ),
    "tilt_kl": functools.partial(divergence.tilt_kl, beta=0.5),
    "chi_squared": functools.partial(divergence.chi_squared, beta=0.5),
    "tilted_reward": functools.partial(divergence.tilted_reward, beta=0.5),
    "weights_kl": lambda x, where: divergence.weights_kl(jnp.abs(x), where=where),
    "f_divergence": lambda x, where: f_divergence.f_divergence(jnp.abs(x), where=where),
    "f_divergence_of_reference": lambda x, where: f_divergence.f_divergence(SHARE, jnp.abs(x), where=where),
    "f_divergence_tilt": lambda x, where: f_divergence.f_divergence_tilt(x, beta=0.5, where=where).weights,
    "beta_for_kl": functools.partial(temperature.beta_for_kl, kl=0.5),
    "beta_for_ess": functools.partial(temperature.beta_for_ess, ess=4.0),
    "pessimistic_weights": functools.partial(pessimistic.pessimistic_weights, beta=0.5),
    "pessimistic_threshold": functools.partial(pessimistic.pessimistic_threshold, beta=0.5),
    "pareto_k": lambda x, where: tails.pareto_k(x, where=where),
    "pareto_smooth": lambda x, where: tails.pareto_smooth(x, where=where).log_weights,
    "expected_max": functools.partial(order.expected_max, n=4),
    "over_optimisation": lambda x, where: overoptimisation.fit_overoptimisation(KL, x, where=where).r_squared,
    "over_optimisation_kl": lambda x, where: overoptimisation.fit_overoptimisation(jnp.abs(x), KL, where=where).b,
    "log_softmax": lambda x, where: logspace.log_softmax(x, where=where),
    "average": lambda x, where: masked.average(x, where).mean,
    "cap_weights": lambda x, where: guarded.cap_weights(jnp.where(where, jnp.abs(x), 0), cap=0.2),
    "leave_one_out": lambda x, where: advantages.leave_one_out(x, where),
    "group_normalised": lambda x, where: advantages.group_normalised(x, where),
    "batch_whitened": lambda x, where: advantages.batch_whitened(x, where),
    "token_mean": lambda x, where: internal.token_mean(x, where=where),
}


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.robustness(
    "Kernels", given="NaN in the rewards or weights of an estimate, where it is not masked", outcome="NaN, all of it"
)
def test_unmasked_nan_stays(name):
    run, where = jax.jit(lambda x, where: ESTIMATES[name](x, where=where)), np.arange(N) != 3
    clean = np.asarray(run(REWARD, where))
    assert np.isfinite(clean[where] if clean.shape == (N,) else clean).all()
    for place in (0, int(REWARD.argmin()), int(REWARD.argmax()), N - 1):
        value = np.asarray(run(np.where(np.arange(N) == place, NAN, REWARD).astype(np.float32), where))
        assert np.isnan(value[where] if value.shape == (N,) else value).all(), place
    np.testing.assert_array_equal(run(np.where(where, REWARD, NAN).astype(np.float32), where), clean)


def test_nan_of_numbers_stays():
    nan = jnp.float32(NAN)
    for value in (
        temperature.beta_for_kl(REWARD, kl=nan),
        order.pass_at_k_bound(nan, jnp.float32(0.1), k=2),
        overoptimisation.peak_distance(alpha=1.0, b=nan),
        overoptimisation.peak_distance(alpha=nan, b=-1.0),
        divergence.candidates_needed(nan, kl=0.1),
        masked.Average(total=jnp.float32(1), count=nan).mean,
    ):
        assert np.isnan(value)


@pytest.mark.parametrize("method", resample.METHODS)
@pytest.mark.robustness(
    "Kernels", given="a weight that is NaN, in resampling", outcome="refused with its place; -1 where it is traced"
)
def test_resampling_of_nan(method, key):
    weights = jnp.array([[0.5, 0.5, 0.0], [0.2, NAN, 0.8]])
    with pytest.raises(ValueError, match=r"weights must be numbers, got NaN at \(1, 1\)"):
        resample.resample(key, weights, num=4, method=method)
    drawn = jax.jit(functools.partial(resample.resample, num=4, method=method))(key, weights)
    assert (drawn[1] == -1).all()
    assert ((drawn[0] == 0) | (drawn[0] == 1)).all()
    assert resample.counts(drawn, 3).sum(-1).tolist() == [4, 0]


@pytest.mark.robustness(
    "Kernels", given="the first candidate masked, the others' rewards -inf", outcome="a real candidate is chosen"
)
def test_a_masked_candidate_never_wins(key):
    reward, where = jnp.array([9.0, -INF, -INF]), jnp.array([False, True, True])
    assert int(best_of_n.best_of_n(reward, where=where)) == 1
    assert int(best_of_n.soft_best_of_n(key, reward, beta=1.0, where=where)) in (1, 2)
    assert float(mle.best_of_n_sft_loss(jnp.array([-1.0, -2.0, -3.0]), reward, where=where)) == 2.0
    chunks = reward[:, None], where[:, None]
    winner, _ = jax.lax.scan(
        lambda winner, chunk: (best_of_n.update(key, winner, chunk[0], beta=1.0, where=chunk[1]), None),
        best_of_n.init(),
        chunks,
    )
    assert int(winner.index) in (1, 2)
    assert int(best_of_n.best_of_n(jnp.array([NAN, -INF]))) == 1


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int32"])
@pytest.mark.usefixtures("users")
@pytest.mark.robustness("Kernels", given="lengths as unsigned integers", outcome="read as the numbers that they are")
def test_unsigned_lengths(dtype):
    length = np.array([10, 60, 90, 120], dtype)
    assert shaping.overlong_penalty(length, max_length=100, cache=40).tolist() == [0.0, 0.0, -0.75, -1.0]
    assert shaping.length_penalty(length, coefficient=0.5, target=60).tolist() == [-25.0, 0.0, -15.0, -30.0]
    assert shaping.length_penalty(length, coefficient=1.0, target=length[::-1]).tolist() == [
        -110.0,
        -30.0,
        -30.0,
        -110.0,
    ]


@pytest.mark.parametrize("unit", [1e20, 1.0, 1e-20])
@pytest.mark.robustness(
    "Kernels",
    given="rewards of size 1e20 or 1e-20, normalised per group",
    outcome="the advantages of size 1 that they have",
)
def test_spreads_beyond_the_range_of_a_variance(unit):
    reward = (unit * REWARD).astype(np.float32)
    expected = (REWARD - REWARD.mean()) / REWARD.std(ddof=1)
    for scale in ("std", "variance"):
        np.testing.assert_allclose(advantages.group_normalised(reward, scale=scale, eps=0.0), expected, rtol=1e-4)
    np.testing.assert_allclose(advantages.batch_whitened(reward, eps=0.0), expected, rtol=1e-4)
    np.testing.assert_allclose(masked.masked_std(reward, ddof=1), unit * REWARD.std(ddof=1), rtol=1e-5)
    value = np.asarray(advantages.group_normalised(reward, eps=1e-4))
    np.testing.assert_allclose(value, unit * (REWARD - REWARD.mean()) / (unit * REWARD.std(ddof=1) + 1e-4), rtol=1e-4)


@pytest.mark.robustness("Kernels", given="completions of no token at all (T = 0)", outcome="advantages of that shape")
def test_no_tokens():
    nothing, mask = jnp.zeros((2, 3, 0)), jnp.zeros((2, 3, 0), bool)
    advantage, returns = advantages.gae(nothing, nothing, mask)
    assert advantage.shape == returns.shape == (2, 3, 0)
    assert advantages.reward_to_go(nothing, mask).shape == (2, 3, 0)
    assert advantages.token_reward(jnp.ones((2, 3)), nothing, mask, beta=0.1).shape == (2, 3, 0)
    assert advantages.prime_advantage(nothing, jnp.ones((2, 3)), mask).shape == (2, 3, 0)
    assert float(policy_gradient.aggregate(nothing, mask, mode="seq_mean_token_mean").mean) == 0.0


@pytest.mark.usefixtures("users")
@pytest.mark.robustness(
    "Kernels", given="whole numbers beyond 2^24 as rewards", outcome="float64 where it is enabled, else refused"
)
def test_whole_numbers_do_not_tie():
    reward = np.array([2**24, 2**24 + 1], np.int64)
    with jax.enable_x64(True):
        assert int(best_of_n.best_of_n(jnp.asarray(reward))) == 1
        assert weights.tilt(jnp.asarray(reward), beta=1.0).weights[1] > 0.7
    with pytest.raises(ValueError, match="integers must be exact in float32, got 16777217"):
        best_of_n.best_of_n(reward)
    assert masked.as_float(np.array([3, 2**24])).dtype == jnp.float32


COLUMNS = {
    "tilt": lambda c: weights.tilt(ROWS, beta=c),
    "log_partition": lambda c: partition.log_partition(ROWS, beta=c),
    "leave_one_out_log_partition": lambda c: partition.leave_one_out_log_partition(ROWS, beta=c),
    "in_batch": lambda c: partition.in_batch_log_partition(ROWS, ROWS, beta=c, method="mean"),
    "tilt_kl": lambda c: divergence.tilt_kl(ROWS, beta=c),
    "tilted_reward": lambda c: divergence.tilted_reward(ROWS, beta=c),
    "f_divergence_tilt": lambda c: f_divergence.f_divergence_tilt(ROWS, beta=c),
    "pessimistic_weights": lambda c: pessimistic.pessimistic_weights(ROWS, beta=c),
    "beta_for_kl": lambda c: temperature.beta_for_kl(ROWS, kl=c),
    "beta_for_ess": lambda c: temperature.beta_for_ess(ROWS, ess=c),
    "best_of_n": lambda c: best_of_n.soft_best_of_n(jax.random.key(0), ROWS, beta=c),
    "pessimism_beta": lambda c: pessimism.inference_time_pessimism(jax.random.key(0), ROWS, beta=c, reward_max=2.0),
    "pessimism_max": lambda c: pessimism.inference_time_pessimism(jax.random.key(0), ROWS, beta=1.0, reward_max=c),
    "greedy_baseline": lambda c: advantages.greedy_baseline(ROWS, c),
    "token_reward": lambda c: advantages.token_reward(c, ROWS, MASK, beta=0.1),
    "length_penalty": lambda c: shaping.length_penalty(np.arange(4), coefficient=1.0, target=c.astype(int)),
    "slic": lambda c: preference.slic_loss(ROWS[:, :2], c),
    "orpo": lambda c: preference.orpo_loss(ROWS[:, :2], np.ones((4, 2)), c),
    "bound": lambda c: divergence.soft_best_of_n_kl_bound(c[:, 0], reward_range=c, beta=1.0),
    "curve": lambda c: overoptimisation.best_of_n_curve(c[:, 0], alpha=c, b=1.0),
    "pass_at_k_bound": lambda c: order.pass_at_k_bound(c[:, 0] / 2, c / 8, k=2),
    "reinforce": lambda c: policy_gradient.reinforce_loss(ROWS[:, None], c[..., None], MASK[:, None]),
    "advantage": lambda c: policy_gradient.ppo_clip_loss(ROWS[:, None], ROWS[:, None], c[:, 0], MASK[:, None]),
    "gspo": lambda c: policy_gradient.gspo_loss(ROWS[:, None], ROWS[:, None], c[:, 0], MASK[:, None]),
    "kl_k1": lambda c: penalties.kl_k1(ROWS, c, MASK),
    "mask": lambda c: masked.masked_mean(ROWS, c > 0),
    "process_reward": lambda c: process_losses.implicit_process_reward(ROWS, c, beta=0.1),
    "denoising": lambda c: denoising.denoising_loss(*[ROWS[..., None]] * 3, c / 2),
    "transition": lambda c: denoising.transition_kl(ROWS, ROWS, c),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.usefixtures("users")
def test_columns_are_refused(name):
    with pytest.raises((ValueError, AssertionError), match=r"must be a number|one shape|not equal|shape"):
        COLUMNS[name](COLUMN)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights.tilt(REWARD, beta=np.float32(-1)), "beta must be a finite number above 0, got -1.0"),
        (lambda: advantages.gae(ROWS, ROWS, MASK, lam=np.float32(2)), r"lam must lie in \[0, 1\], got 2.0"),
        (lambda: advantages.gae(ROWS, ROWS, MASK, gamma=np.float64(0)), r"gamma must lie in \(0, 1\], got 0.0"),
        (lambda: temperature.beta_for_ess(REWARD, ess=np.float32(0.5)), "ess must be at least 1.0, got 0.5"),
        (
            lambda: shaping.overlong_penalty(np.arange(3), max_length=np.int64(0)),
            "max_length must be at least 1, got 0",
        ),
        (lambda: resample.resample(jax.random.key(0), SHARE, num=np.int32(0)), "num must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("users")
def test_numpy_scalars_are_looked_at(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_python_numbers_do_not_widen():
    token = np.zeros((2, 3), np.float32)
    calls = (
        lambda: advantages.token_reward(token[:, 0], token, token == 0, beta=0.1),
        lambda: advantages.group_normalised(REWARD),
        lambda: advantages.group_normalised(REWARD, scale="variance"),
        lambda: advantages.gae(ROWS, ROWS, MASK, gamma=0.9)[0],
        lambda: overoptimisation.rl_curve(KL, alpha=1.0, b=0.5),
        lambda: order.expected_max(REWARD, n=4),
        lambda: shaping.length_penalty(np.arange(3), coefficient=0.5, target=2),
        lambda: weights.tilt(REWARD, beta=0.1).log_z,
        lambda: f_divergence.f_divergence_tilt(REWARD, beta=0.1, divergence="alpha", alpha=0.3).weights,
        lambda: temperature.beta_for_kl(REWARD, kl=0.5),
        lambda: policy_gradient.ppo_clip_loss(ROWS[None], ROWS[None], ROWS[None], MASK[None], dual_clip=3.0),
    )
    with jax.enable_x64(True):
        for call in calls:
            assert jax.eval_shape(call).dtype == jnp.float32
