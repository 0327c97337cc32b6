"""Every per-token loss under the same properties, then what is special to each."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.special import log_softmax

from tiltjax.advantages import group_normalised, leave_one_out
from tiltjax.losses import policy_gradient
from tiltjax.losses.penalties import full_vocabulary_kl, kl_k2
from tiltjax.losses.policy_gradient import (
    aggregate,
    cispo_loss,
    gspo_loss,
    mdloo_loss,
    mdpo_loss,
    ppo_clip_loss,
    reinforce_loss,
    value_loss,
)

B, N, T = 8, 3, 5
MODES = {"seq_mean_token_mean": None, "token_mean": None, "seq_mean_token_sum": None, "dr_grpo": 7}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A loss, and the same in NumPy for the real tokens of one completion; the first array is trained."""

    loss: Callable[..., jax.Array]
    formula: Callable[..., np.ndarray]
    arrays: tuple[str, ...] = ("logp", "old", "advantage")
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    surrogate: bool = False  # The gradient is not the value's: a weight depends on the trained array.
    kl: bool = False

    def draw(self, seed=0):
        rng = np.random.default_rng(seed)
        logp = -rng.gamma(2.0, size=(B, N, T))
        out = {
            "logp": logp,
            "old": logp + 0.4 * rng.normal(size=logp.shape),
            "advantage": rng.normal(size=(B, N)),
            "token_advantage": rng.normal(size=(B, N, T)),
            "value": rng.normal(size=(B, N, T)),
            "returns": rng.normal(size=(B, N, T)),
            "kl": rng.random((B, N, T)),
        }
        out["old_value"] = out["value"] + 0.4 * rng.normal(size=(B, N, T))
        mask = rng.random((B, N, T)) < 0.6
        mask[0] = False
        mask[1, 1] = False
        names = (*self.arrays, *(("kl",) if self.kl else ()))
        return {name: out[name].astype(np.float32) for name in names} | {"mask": mask}

    def __call__(self, inputs):
        extra = {"token_kl": inputs["kl"]} if self.kl else {}
        return self.loss(*(inputs[name] for name in self.arrays), inputs["mask"], **extra, **self.options)


def clipped(ratio, advantage, low, high, dual=np.inf):
    loss = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 1 - low, 1 + high))
    return np.where(advantage < 0, np.minimum(loss, -advantage * dual), loss)


def ppo(logp, old, advantage, low=0.2, high=0.2, dual=np.inf):
    return clipped(np.exp(logp - old), advantage, low, high, dual)


def value_formula(value, old, returns):
    bound = old + np.clip(value - old, -0.3, 0.3)
    return np.maximum((value - returns) ** 2, (bound - returns) ** 2) / 2


def k3_corrected(lr):
    return np.exp(lr) * (np.expm1(-lr) + lr)


def gspo(logp, old, advantage):
    return clipped(np.exp((logp - old).mean()), advantage, 0.1, 0.15) + np.zeros_like(logp)


def mdpo(logp, old, advantage, kl=None, low=None, high=None):
    ratio = np.exp(logp - old)
    surrogate = -ratio * advantage if low is None else clipped(ratio, advantage, low, high)
    return surrogate + 0.3 * (k3_corrected(logp - old) if kl is None else kl)


def mdloo(logp, old, advantage, kl=None, low=None, high=None):
    lr = (logp - old).sum()
    surrogate = -np.exp(lr) * advantage if low is None else clipped(np.exp(lr), advantage, low, high)
    n = len(logp)
    return surrogate / n + 0.3 * (k3_corrected(lr) / n + np.zeros(n) if kl is None else kl)


BY_TOKEN = ("logp", "old", "token_advantage")
CASES = {
    "reinforce": Case(reinforce_loss, lambda logp, a: -a * logp, ("logp", "token_advantage")),
    "ppo": Case(ppo_clip_loss, ppo, BY_TOKEN),
    "dapo": Case(
        ppo_clip_loss,
        functools.partial(ppo, low=0.1, high=0.28, dual=1.5),
        options={"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5},
    ),
    "value": Case(value_loss, value_formula, ("value", "old_value", "returns"), {"clip": 0.3}),
    "value_plain": Case(
        value_loss, lambda v, o, r: (v - r) ** 2 / 2, ("value", "old_value", "returns"), {"clip": None}
    ),
    "gspo": Case(gspo_loss, gspo, options={"clip_low": 0.1, "clip_high": 0.15}),
    "cispo": Case(
        cispo_loss,
        lambda logp, old, a: -np.minimum(np.exp(logp - old), 1.3) * a * logp,
        options={"max_ratio": 1.3},
        surrogate=True,
    ),
    "mdpo": Case(mdpo_loss, mdpo, BY_TOKEN, {"beta": 0.3}),
    "mdpo_exact_clip": Case(
        mdpo_loss, functools.partial(mdpo, low=0.2, high=0.3), options={"beta": 0.3, "clip": (0.2, 0.3)}, kl=True
    ),
    "mdloo": Case(mdloo_loss, mdloo, options={"beta": 0.3}),
    "mdloo_exact_clip": Case(
        mdloo_loss, functools.partial(mdloo, low=0.2, high=0.3), options={"beta": 0.3, "clip": (0.2, 0.3)}, kl=True
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

# For the contract test of every loss: the losses whose contract is here.
COVERED = {case.loss for case in CASES.values()}


@functools.cache
def program(case):
    def total(floats, mask, slope):
        value = case({**floats, "mask": mask})
        return jnp.sum(slope * value), value

    return jax.jit(jax.value_and_grad(total, has_aux=True))


EVEN = np.ones((B, N, T), np.float32)


def value_and_grads(case, inputs, slope=EVEN):
    (_, value), grads = program(case)({k: v for k, v in inputs.items() if k != "mask"}, inputs["mask"], slope)
    return np.asarray(value), {name: np.asarray(x) for name, x in grads.items()}


def test_every_loss_is_here():
    named = {getattr(policy_gradient, name) for name in policy_gradient.__all__ if name.endswith("_loss")}
    assert named == COVERED


@every_case
def test_is_the_float64_formula_of_the_real_tokens(case):
    for dtype in (jnp.float32, jnp.bfloat16):
        inputs = case.draw()
        inputs = {name: x if name == "mask" else jnp.asarray(x, dtype) for name, x in inputs.items()}
        value, mask = value_and_grads(case, inputs)[0], inputs["mask"]
        wide = {name: np.asarray(x, np.float64) for name, x in inputs.items() if name != "mask"}
        assert value.shape == (B, N, T)
        assert value.dtype == np.float32
        for i in np.ndindex(B, N):
            if mask[i].any():
                few = [x[i] if x.ndim == 2 else x[i][mask[i]] for x in wide.values()]
                np.testing.assert_allclose(value[i][mask[i]], case.formula(*few), rtol=1e-4, atol=1e-6)
        assert (value[~mask] == 0).all()


@every_case
def test_gradients_and_padding(case):
    """NaN in padding changes nothing; only the trained array (and a KL that is passed in) receives gradient."""
    inputs = case.draw()
    mask, dirty = inputs["mask"], {}
    for name, x in inputs.items():
        real = mask if x.ndim == 3 else mask.any(-1)
        dirty[name] = x if name == "mask" else np.where(real, x, np.nan).astype(np.float32)
    value, grads = value_and_grads(case, dirty)
    clean_value, clean_grads = value_and_grads(case, inputs)
    np.testing.assert_array_equal(value, clean_value)
    chex.assert_trees_all_equal(grads, clean_grads)
    trained = grads.pop(case.arrays[0])
    assert (trained[~mask] == 0).all()
    assert (trained[mask] != 0).any()
    if case.kl:
        np.testing.assert_allclose(grads.pop("kl"), 0.3 * mask, rtol=1e-6)
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("case", [c for c in CASES.values() if not c.surrogate], ids=lambda c: c.loss.__name__)
def test_gradient_is_that_of_the_value(case):
    rng, name = np.random.default_rng(6), case.arrays[0]
    slope, along = rng.normal(size=(2, B, N, T))
    inputs = {name: x if name == "mask" else x.astype(np.float64) for name, x in case.draw().items()}
    with jax.enable_x64(True):
        _, grads = value_and_grads(case, inputs, slope)
        ends = (value_and_grads(case, inputs | {name: inputs[name] + step * along}, slope)[0] for step in (1e-6, -1e-6))
        up, down = ends
    np.testing.assert_allclose(np.sum(grads[name] * along), np.sum(slope * (up - down)) / 2e-6, rtol=1e-5)


@every_case
def test_extreme_inputs_are_finite(case):
    inputs, rng = case.draw(), np.random.default_rng(4)
    for name, x in inputs.items():
        if name != "mask":
            inputs[name] = rng.choice(np.float32([-1e4, 0] if name in ("logp", "old") else [-1e4, 0, 1e4]), x.shape)
    value, grads = value_and_grads(case, inputs)
    assert np.isfinite(value).all()
    assert all(np.isfinite(grad).all() for grad in grads.values())


@every_case
def test_one_answer_on_every_arrangement(case):
    """Permuted, and sharded, by vmap and by shard_map."""
    inputs = case.draw()
    expected, _ = value_and_grads(case, inputs)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    order, candidates = np.random.default_rng(3).permutation(B), np.array([2, 0, 1])
    permuted, _ = value_and_grads(case, {name: x[order][:, candidates] for name, x in inputs.items()})
    close(permuted, expected[order][:, candidates])
    mesh, rows = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    sharded = jax.shard_map(case, mesh=mesh, in_specs=rows, out_specs=rows)
    run = jax.jit(lambda x: (case(x), jax.vmap(case)(x), sharded(x)))
    for found in run(jax.device_put(inputs, NamedSharding(mesh, rows))):
        close(found, expected)


ON_POLICY = {
    "ppo": lambda x, old, a, m: ppo_clip_loss(x, old, a, m, dual_clip=3.0),
    "cispo": lambda x, old, a, m: cispo_loss(x, old, a, m, max_ratio=2.0),
    "mdpo": lambda x, old, a, m: mdpo_loss(x, old, a, m, beta=0.3),
    "gspo": gspo_loss,
    "mdloo": lambda x, old, a, m: mdloo_loss(x, old, a, m, beta=0.3),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_the_first_step_is_reinforce(name):
    """The ratio is exactly 1, no clip acts, and the gradient is that of the plain policy gradient."""
    inputs = CASES["ppo"].draw() | CASES["dapo"].draw()
    logp, advantage, mask = inputs["logp"], inputs["advantage"], inputs["mask"]
    # GSPO's ratio is a mean over the tokens of a completion, MDLOO's a sum.
    mode = {"gspo": "seq_mean_token_mean"}.get(name, "seq_mean_token_sum")

    @jax.jit
    def gradients(logp):
        losses = ON_POLICY[name], lambda x, old, a, m: reinforce_loss(x, a, m)
        total = lambda x, loss: aggregate(loss(x, logp, advantage, mask), mask, mode=mode).mean
        return [jax.grad(total)(logp, loss) for loss in losses]

    ours, plain = gradients(logp)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-8)
    if name == "ppo":
        value = ppo_clip_loss(logp, logp, advantage, mask)
        np.testing.assert_array_equal(value, np.where(mask, -advantage[..., None], 0))


def test_ppo_has_no_gradient_exactly_where_it_is_clipped():
    ratio = np.float32([1.25, 0.5, 1.1, 0.75, 1.5, 2.5, 0.9])[:, None]
    advantage = np.float32([1, 1, 1, -1, -1, -1, -1])[:, None]
    slope = [0, -0.5, -1.1, 0, 1.5, 0, 0.9]
    loss = lambda x: ppo_clip_loss(x, np.zeros_like(ratio), advantage, ratio > 0, dual_clip=2.0).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(np.log(ratio))[:, 0], slope, rtol=1e-5, atol=0)


def test_a_clipped_value_has_no_gradient():
    loss = lambda v: value_loss(v, np.zeros(3, np.float32), np.float32([2, 2, -2]), np.ones(3, bool)).sum()
    grad = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(grad(np.float32([0.5, 0.1, 0.5])), [0, -1.9, 2.5], rtol=1e-6)


def test_gspo_clips_whole_completions():
    logp, old = np.float32([[[0.5, -0.1], [0.1, -0.1]]]), np.zeros((1, 2, 2), np.float32)
    loss = lambda x: gspo_loss(x, old, np.ones((1, 2), np.float32), old == 0).sum()
    grad = np.asarray(jax.jit(jax.grad(loss))(logp))
    np.testing.assert_array_equal(grad[0, 0], [0, 0])
    np.testing.assert_allclose(grad[0, 1], [-1, -1], rtol=1e-6)


def test_cispo_keeps_the_gradient_of_every_token():
    inputs = CASES["cispo"].draw()
    _, grads = value_and_grads(CASES["cispo"], inputs)
    ratio = np.exp(inputs["logp"].astype(np.float64) - inputs["old"])
    expected = np.where(inputs["mask"], -np.minimum(ratio, 1.3) * inputs["advantage"][..., None], 0)
    np.testing.assert_allclose(grads["logp"], expected, rtol=1e-4)
    assert (ratio[inputs["mask"]] > 1.3).any()


def every_mode(values, mask, axis=None):
    return {mode: aggregate(values, mask, mode=mode, max_length=L).psum(axis) for mode, L in MODES.items()}


def test_aggregate_is_the_formula_and_exact_under_microbatching():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(B, N, T)).astype(np.float32), rng.random((B, N, T)) < 0.6
    mask[0, 0] = mask[2:4] = False
    run = jax.jit(every_mode)
    whole = run(np.where(mask, values, np.float32(np.nan)), mask)
    rows = [values[i][mask[i]].astype(np.float64) for i in np.ndindex(B, N) if mask[i].any()]
    expected = {
        "seq_mean_token_mean": np.mean([row.mean() for row in rows]),
        "token_mean": np.concatenate(rows).mean(),
        "seq_mean_token_sum": np.mean([row.sum() for row in rows]),
        "dr_grpo": np.concatenate(rows).sum() / (len(rows) * 7),
    }
    for mode, value in expected.items():
        np.testing.assert_allclose(whole[mode].total / whole[mode].count, value, rtol=1e-5)
    parts = [jax.tree.map(np.asarray, run(values[i : i + 2], mask[i : i + 2])) for i in range(0, B, 2)]
    chex.assert_trees_all_close(jax.tree.map(lambda *x: sum(x), *parts), whole, rtol=1e-5, atol=1e-6)


def test_aggregate_over_eight_devices_and_over_nothing():
    inputs = CASES["ppo"].draw()
    means = lambda v, m, axis=None: {mode: average.mean for mode, average in every_mode(v, m, axis).items()}
    mesh, rows = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    sharded = jax.shard_map(lambda v, m: means(v, m, "data"), mesh=mesh, in_specs=rows, out_specs=PartitionSpec())
    whole, split = jax.jit(lambda v, m: (means(v, m), sharded(v, m)))(inputs["logp"], inputs["mask"])
    chex.assert_trees_all_close(split, whole, rtol=1e-6)
    gradients = jax.jit(lambda v, m: (means(v, m), jax.jacrev(means)(v, m)))
    nothing = gradients(np.full((2, 1, 3), np.nan, np.float32), np.zeros((2, 1, 3), bool))
    chex.assert_trees_all_equal(nothing, jax.tree.map(np.zeros_like, nothing))


def test_a_completion_out_of_the_loss_may_still_divide_it():
    values, mask = np.ones((1, 2, 3), np.float32), np.array([[[True] * 3, [False] * 3]])
    run = jax.jit(aggregate, static_argnames="mode")
    ratio = lambda average: float(average.total) / float(average.count)
    assert ratio(run(values, mask, mode="seq_mean_token_mean")) == 1
    assert ratio(run(values, mask, mode="seq_mean_token_mean", where=np.ones((1, 2), bool))) == 0.5
    half = run(values, values > 0, mode="token_mean", where=np.array([[True, False]]))
    assert (float(half.total), float(half.count)) == (3, 3)


@pytest.mark.parametrize("G", [2, 4])
def test_expected_gradients_by_enumeration(G):
    """Over all groups of G draws from three arms: leave-one-out is unbiased, the group mean shrinks by (G - 1) / G."""
    reward = np.array([0.0, 0.5, 2.0])
    groups = np.array(list(itertools.product(range(3), repeat=G)))
    mask = np.ones((*groups.shape, 1), bool)

    @jax.jit
    def gradients(logits):
        chance = jax.lax.stop_gradient(jnp.prod(jax.nn.softmax(logits)[groups], -1))

        def loss(logits, advantage):
            logp = jax.nn.log_softmax(logits)[groups][..., None]
            return jnp.sum(chance * reinforce_loss(logp, advantage, mask).sum(-1).mean(-1))

        each = leave_one_out(reward[groups]), group_normalised(reward[groups], scale="none")
        truth = -jax.grad(lambda z: jax.nn.softmax(z) @ reward)(logits)
        return truth, *(jax.grad(loss)(logits, advantage) for advantage in each)

    with jax.enable_x64(True):
        truth, unbiased, mean = (np.asarray(x) for x in gradients(np.array([0.3, -0.2, 0.1])))
    np.testing.assert_allclose(unbiased, truth, atol=1e-14)
    np.testing.assert_allclose(mean, truth * (G - 1) / G, atol=1e-14)


@pytest.mark.parametrize("kl", ["exact", "sampled"])
@pytest.mark.parametrize("loss", [mdpo_loss, mdloo_loss])
def test_mirror_descent_climbs_to_the_tilt(loss, kl):
    """Over all samples of the old policy, the gradient is 0 at ``old exp(A / beta) / Z`` and nowhere else (convex)."""
    advantage, beta = np.array([0.0, 0.5, -0.4, 0.2]), 0.4
    old_logits, mask = np.array([0.5, -0.3, 0.2, 0.0]), np.ones((4, 1), bool)
    old = log_softmax(old_logits)

    def expected(logits):
        exact = jnp.broadcast_to(full_vocabulary_kl(logits, old_logits), (4, 1)) if kl == "exact" else None
        logp = jax.nn.log_softmax(logits)[:, None]
        return jnp.exp(old) @ loss(logp, old[:, None], advantage, mask, beta=beta, token_kl=exact)[:, 0]

    slope = jax.jit(jax.grad(expected))
    with jax.enable_x64(True):
        at_the_tilt, first = slope(old + advantage / beta), slope(old_logits)  # At first the KL does not act yet.
    np.testing.assert_allclose(at_the_tilt, np.zeros(4), atol=1e-14)
    np.testing.assert_allclose(first, -np.exp(old) * (advantage - np.exp(old) @ advantage), atol=1e-14)


def test_reinforce_with_k2_stops_at_the_tilt():
    """The stationary point of the policy gradient with a KL penalty, by enumeration: its gradient is 0 there."""
    reward, beta = np.array([0.0, 0.5, 2.0]), 0.7
    ref = log_softmax([0.3, -0.2, 0.1])

    @jax.jit
    def gradient(logits):
        chance = jax.lax.stop_gradient(jax.nn.softmax(logits))

        def loss(z):
            logp = jax.nn.log_softmax(z)[:, None]
            pull = reinforce_loss(logp, reward, np.ones((3, 1), bool)) + beta * kl_k2(logp, ref[:, None])
            return chance @ pull[:, 0]

        return jax.grad(loss)(logits)

    with jax.enable_x64(True):
        stops, starts = gradient(ref + reward / beta), gradient(ref)
    np.testing.assert_allclose(stops, np.zeros(3), atol=1e-14)
    assert np.abs(np.asarray(starts)).max() > 0.1


def test_bad_options_are_named():
    x, a, mask = np.zeros((1, 2), np.float32), np.zeros(1, np.float32), np.ones((1, 2), bool)
    for call, message in (
        (lambda: aggregate(x, mask, mode="mean"), "mode must be one of dr_grpo, seq_mean_token_mean"),
        (lambda: aggregate(x, mask, mode="dr_grpo"), "max_length must be given for mode dr_grpo and for no other"),
        (lambda: aggregate(x, mask, mode="token_mean", max_length=3), "max_length must be given for mode dr_grpo"),
        (lambda: aggregate(x, mask, mode="dr_grpo", max_length=0), "max_length must be at least 1, got 0"),
        (lambda: ppo_clip_loss(x, x, a, mask, clip_low=1.5), r"clip_low must lie in \(0, 1\], got 1.5"),
        (lambda: ppo_clip_loss(x, x, a, mask, clip_high=0), "clip_high must be a finite number above 0, got 0"),
        (lambda: ppo_clip_loss(x, x, a, mask, dual_clip=1.0), "dual_clip must be above 1, got 1.0"),
        (lambda: gspo_loss(x, x, a, mask, clip_low=0.0), r"clip_low must lie in \(0, 1\], got 0.0"),
        (lambda: cispo_loss(x, x, a, mask, max_ratio=-1), "max_ratio must be a finite number above 0, got -1"),
        (lambda: mdpo_loss(x, x, a, mask, beta=0), "beta must be a finite number above 0, got 0"),
        (lambda: mdloo_loss(x, x, a, mask, beta=1, clip=(0.2, -1)), r"clip\[1\] must be a finite number above 0"),
        (lambda: value_loss(x, x, x, mask, clip=0), "clip must be a finite number above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
