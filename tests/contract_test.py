"""Every loss of tiltjax.losses under the same properties: add a new loss to `CASES`."""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from scipy.special import log_expit, softmax

import tiltjax.losses
from tiltjax.losses import mle, preference

B, N = 8, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What the contract needs to know about one loss.

    Attributes:
      name: Of this case; a loss may have several.
      loss: The function.
      formula: The same in NumPy, from float64 arrays by the same names; its result in float64.
      arrays: Name -> axes of each array argument, in order: "B" one per prompt, "BN" one per candidate. The first is
        the one that is trained; integers are the name's concern in `draw`.
      options: Keyword arguments.
      keywords: Arrays that are passed by name.
      split: What ``axis_name`` splits: "candidates", "prompts", or None where the loss has no such argument.
      size: Candidates per prompt.
      per_candidate: Whether the loss is [B, N] rather than [B].
      exchangeable: Whether the order of the candidates is without meaning.
      rows_only: Whether a mask removes whole prompts only.
    """

    name: str
    loss: Callable[..., jax.Array]
    formula: Callable[..., np.ndarray]
    arrays: Mapping[str, str]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    split: str | None = None
    size: int = N
    per_candidate: bool = False
    exchangeable: bool = True
    rows_only: bool = False

    @property
    def trained(self) -> str:
        return next(iter(self.arrays))

    @property
    def floats(self) -> list[str]:
        return [name for name in self.arrays if name != "matched"]

    def draw(self, seed: int = 0, lead: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        """Arguments by name, and a mask "where"."""
        rng = np.random.default_rng(seed)
        shapes = {"B": (*lead, B), "BN": (*lead, B, self.size)}
        out = {}
        for name, axes in self.arrays.items():
            if name == "matched":
                out[name] = np.broadcast_to(np.arange(B, dtype=np.int32), shapes[axes])
            elif name.endswith("logp"):
                out[name] = (-3 * rng.gamma(2.0, size=shapes[axes])).astype(np.float32)
            else:
                x = rng.normal(size=shapes[axes]).astype(np.float32)
                out[name] = np.abs(x) if name == "weights" else x
        where = rng.random(shapes["BN"]) < 0.6
        where[..., 0] = True
        if self.rows_only:
            where = np.broadcast_to(rng.random((*lead, B, 1)) < 0.6, shapes["BN"])
        if "matched" in self.arrays:
            where = where | (np.arange(self.size) == out["matched"][..., None])
        return out | {"where": where}

    def __call__(self, inputs: Mapping[str, Any], **extra: Any) -> jax.Array:
        positional = [inputs[name] for name in self.arrays if name not in self.keywords]
        keywords = {name: inputs[name] for name in self.keywords if name in inputs}
        return self.loss(*positional, **keywords, where=inputs.get("where"), **self.options, **extra)


def tilted(reward, beta):
    return softmax(reward / beta, axis=-1)


def var_formula(logp, ref_logp, reward, matched, beta=0.3):
    weights = softmax(ref_logp + reward / beta, axis=-1)
    return -np.take_along_axis(weights, matched[..., None], -1)[..., 0] * logp


def dpo_formula(logp, ref_logp, beta=0.1, eps=0.0):
    ratio = logp - ref_logp
    margin = beta * (ratio[..., 0] - ratio[..., 1])
    return -(1 - eps) * log_expit(margin) - eps * log_expit(-margin)


CASES = [
    Case("sft", mle.sft_loss, lambda logp: -logp.mean(-1), {"logp": "BN"}, split="candidates"),
    Case(
        "weighted_mle",
        mle.weighted_mle_loss,
        lambda logp, weights: -(weights * logp).sum(-1),
        {"logp": "BN", "weights": "BN"},
        split="candidates",
    ),
    Case(
        "tilted_mle",
        mle.tilted_mle_loss,
        lambda logp, reward: -(tilted(reward, 0.3) * logp).sum(-1),
        {"logp": "BN", "reward": "BN"},
        {"beta": 0.3},
        split="candidates",
    ),
    Case(
        "var",
        mle.var_loss,
        var_formula,
        {"logp": "B", "ref_logp": "BN", "reward": "BN", "matched": "B"},
        {"beta": 0.3},
        keywords=("matched",),
        split="prompts",
        exchangeable=False,
    ),
    Case(
        "var_importance",
        mle.var_importance_loss,
        lambda logp, reward, log_z: -(np.exp(reward / 0.5 - log_z[..., None]) * logp).mean(-1),
        {"logp": "BN", "reward": "BN", "log_z": "B"},
        {"beta": 0.5},
        split="candidates",
    ),
    Case(
        "best_of_n_sft",
        mle.best_of_n_sft_loss,
        lambda logp, reward: -np.take_along_axis(logp, reward.argmax(-1)[..., None], -1)[..., 0],
        {"logp": "BN", "reward": "BN"},
        split="candidates",
    ),
    Case(
        "reward_weighted_regression",
        mle.reward_weighted_regression_loss,
        lambda logp, reward: -tilted(reward, 0.3) * reward.shape[-1] * logp,
        {"logp": "BN", "reward": "BN"},
        {"beta": 0.3},
        split="candidates",
        per_candidate=True,
    ),
    Case(
        "advantage_weighted_regression",
        mle.advantage_weighted_regression_loss,
        lambda logp, advantage: -np.minimum(np.exp(advantage / 0.3), 20) * logp,
        {"logp": "BN", "advantage": "BN"},
        {"beta": 0.3},
        per_candidate=True,
    ),
    Case(
        "dpo",
        preference.dpo_loss,
        dpo_formula,
        {"logp": "BN", "ref_logp": "BN"},
        {"beta": 0.1},
        size=2,
        exchangeable=False,
        rows_only=True,
    ),
    Case(
        "cdpo",
        preference.dpo_loss,
        functools.partial(dpo_formula, eps=0.2),
        {"logp": "BN", "ref_logp": "BN"},
        {"beta": 0.1, "label_smoothing": 0.2},
        size=2,
        exchangeable=False,
        rows_only=True,
    ),
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def unmasked(inputs):
    return {name: x for name, x in inputs.items() if name != "where"}


@functools.cache
def program(case):
    """``(floats, rest) -> ((sum, loss), gradients)``, compiled once per structure."""

    def total(floats, rest):
        value = case({**rest, **floats})
        return value.sum(), value

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def value_and_grads(case, inputs):
    """The loss and, of its sum, the gradient in every float argument."""
    floats = {name: inputs[name] for name in case.floats}
    rest = {name: x for name, x in inputs.items() if name not in floats}
    (_, value), grads = program(case)(floats, rest)
    return np.asarray(value), {name: np.asarray(x) for name, x in grads.items()}


def test_every_loss_is_here():
    found = set()
    for info in pkgutil.walk_packages(tiltjax.losses.__path__, "tiltjax.losses."):
        module = importlib.import_module(info.name)
        found |= {getattr(module, name) for name in module.__all__ if name.endswith("_loss")}
    missing = {loss.__name__ for loss in found - {case.loss for case in CASES}}
    assert not missing, f"add these losses to CASES: {sorted(missing)}"
    assert len({case.name for case in CASES}) == len(CASES)


@every_case
def test_is_the_float64_formula(case):
    inputs = unmasked(case.draw())
    wide = {name: x if name == "matched" else x.astype(np.float64) for name, x in inputs.items()}
    value = case(inputs)
    assert value.shape == ((B, case.size) if case.per_candidate else (B,))
    np.testing.assert_allclose(value, case.formula(**wide), rtol=1e-4, atol=1e-6)
    low = {name: x if name == "matched" else jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    wide = {name: np.asarray(x, x.dtype if name == "matched" else np.float64) for name, x in low.items()}
    value = case(low)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, case.formula(**wide), rtol=1e-4, atol=1e-6)


@every_case
def test_masked_is_sliced(case):
    inputs = case.draw()
    where = inputs["where"]
    value = np.asarray(case(inputs))
    wide = {name: x if name == "matched" else x.astype(np.float64) for name, x in unmasked(inputs).items()}
    for row in range(B):
        real = where[row]
        if not real.any():
            assert (value[row] == 0).all()
            continue
        sliced = {
            name: x[row : row + 1] if case.arrays[name] == "B" else x[row : row + 1, real] for name, x in wide.items()
        }
        if "matched" in sliced:
            sliced["matched"] = real.cumsum()[sliced["matched"]] - 1
        kept = value[row][real] if case.per_candidate else value[row]
        np.testing.assert_allclose(kept, case.formula(**sliced)[0], rtol=1e-4, atol=1e-6)
        if case.per_candidate:
            assert (value[row][~real] == 0).all()


@every_case
def test_masked_entries_may_be_nan(case):
    clean = case.draw()
    clean["where"] = np.array(clean["where"])
    clean["where"][0] = False
    dirty = dict(clean)
    for name in case.floats:
        masked = ~clean["where"] if case.arrays[name] == "BN" else ~clean["where"].any(-1)
        dirty[name] = np.where(masked, np.nan, clean[name]).astype(np.float32)
    value, grads = value_and_grads(case, dirty)
    expected, expected_grads = value_and_grads(case, clean)
    assert (value[0] == 0).all()
    np.testing.assert_array_equal(value, expected)
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, expected_grads[name], err_msg=name)
        assert (grad[0] == 0).all(), name
    assert (grads[case.trained][clean["where"].any(-1)] != 0).any()


@every_case
def test_extreme_inputs_are_finite(case):
    inputs = case.draw()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for name in case.floats:
            extremes = [-1e4, 0.0] if name.endswith("logp") else [0.0, 20.0] if name == "weights" else [-1e4, 1e4, 0.0]
            inputs[name] = rng.choice(np.float32(extremes), inputs[name].shape)
        value, grads = value_and_grads(case, inputs)
        assert np.isfinite(value).all()
        assert all(np.isfinite(grad).all() for grad in grads.values())


@every_case
def test_permuting_the_batch_permutes_the_loss(case):
    inputs = case.draw()
    rng = np.random.default_rng(3)
    order = rng.permutation(B)
    run = jax.jit(case)
    value = np.asarray(run(inputs))
    permuted = run({name: x[order] for name, x in inputs.items()})
    np.testing.assert_allclose(permuted, value[order], rtol=1e-6)
    if case.exchangeable:
        order = rng.permutation(case.size)
        axes = {**case.arrays, "where": "BN"}
        permuted = run({name: x[:, order] if axes[name] == "BN" else x for name, x in inputs.items()})
        np.testing.assert_allclose(permuted, value[:, order] if case.per_candidate else value, rtol=1e-5)


@every_case
def test_vmap_is_batch(case):
    inputs = case.draw(lead=(3,))
    batch = jax.jit(case)(inputs)
    np.testing.assert_allclose(batch, jax.jit(jax.vmap(case))(inputs), rtol=1e-6)
    one = jax.jit(case)({name: x[1] for name, x in inputs.items()})
    np.testing.assert_allclose(batch[1], one, rtol=1e-6)


@every_case
def test_prompts_over_eight_devices(case):
    inputs = {name: np.array(x) for name, x in case.draw().items()}
    extra = {}
    expected = np.asarray(case(inputs))  # Eager.
    np.testing.assert_allclose(jax.jit(case)(inputs), expected, rtol=1e-6)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = PartitionSpec("data")
    put = {name: jax.device_put(x, NamedSharding(mesh, rows)) for name, x in inputs.items()}
    np.testing.assert_allclose(jax.jit(case)(put), expected, rtol=1e-6)
    if case.split == "prompts":  # The default columns must be the ones that were given.
        extra = {"axis_name": "data"}
        inputs.pop("matched")
    run = functools.partial(case, **extra)
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows))(inputs)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    pmapped = jax.pmap(run, axis_name="data")({name: x[:, None] for name, x in inputs.items()})
    np.testing.assert_allclose(np.asarray(pmapped)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.split == "candidates"], ids=lambda case: case.name)
def test_candidates_over_eight_devices(case):
    """Values, and the gradient of one shared parameter by the rule "return the global value, then pmean"."""
    inputs = {name: np.array(x) for name, x in case.draw().items()}
    expected = np.asarray(case(inputs))

    def total(scale, inputs, axis_name=None):
        extra = {} if axis_name is None else {"axis_name": axis_name}
        value = case({**inputs, case.trained: scale * inputs[case.trained]}, **extra)
        mean = value.mean()
        if case.per_candidate and axis_name is not None:
            mean = jax.lax.pmean(mean, axis_name)
        return mean, value

    def step(scale, inputs):
        grad, value = jax.grad(total, has_aux=True)(scale, inputs, "n")
        return jax.lax.pmean(grad, "n"), value

    grad, _ = jax.jit(jax.grad(total, has_aux=True))(jnp.float32(1), inputs)
    split, whole = PartitionSpec(None, "n"), PartitionSpec()
    axes = {**case.arrays, "where": "BN"}
    specs = {name: split if axes[name] == "BN" else whole for name in inputs}
    mesh = Mesh(np.array(jax.devices()), ("n",))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(whole, specs), out_specs=(whole, split if case.per_candidate else whole)
    )
    mapped_grad, mapped_value = jax.jit(mapped)(jnp.float32(1), inputs)
    np.testing.assert_allclose(mapped_value, expected, rtol=1e-5)
    np.testing.assert_allclose(mapped_grad, grad, rtol=1e-5)

    shards = {
        name: np.moveaxis(x.reshape(B, 8, -1), 1, 0) if axes[name] == "BN" else np.broadcast_to(x, (8, B))
        for name, x in inputs.items()
    }
    pmapped_grad, pmapped_value = jax.pmap(step, axis_name="n", in_axes=(None, 0))(jnp.float32(1), shards)
    if case.per_candidate:
        pmapped_value = np.moveaxis(np.asarray(pmapped_value), 0, 1).reshape(B, case.size)
        np.testing.assert_allclose(pmapped_value, expected, rtol=1e-5)
    else:
        np.testing.assert_allclose(pmapped_value, np.broadcast_to(expected, (8, B)), rtol=1e-5)
    np.testing.assert_allclose(pmapped_grad, np.full(8, grad), rtol=1e-5)


@every_case
def test_gradients(case):
    """Right in the trained log-probability; nothing else receives any."""
    inputs = case.draw()
    rest = {name: x for name, x in inputs.items() if name != case.trained}
    run = jax.jit(lambda x: case({**rest, case.trained: x}))
    check_grads(run, (jnp.asarray(inputs[case.trained]),), order=1, modes=("rev",), atol=1e-2, rtol=1e-2, eps=1e-2)
    _, grads = value_and_grads(case, inputs)
    assert np.any(grads[case.trained] != 0)
    for name, grad in grads.items():
        assert name == case.trained or (grad == 0).all(), f"{name} receives gradient"
