"""Low-rank adapters as PEFT writes them, read as what they make of the tensors of their base model."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiltjax.files import ADAPTER, read_json
from tiltjax.models.families import BASE_PREFIX, FAMILY_TABLES, TensorSource
from tiltjax.models.fields import Fields
from tiltjax.models.tensor_files import open_file

__all__ = ["AdaptedTensor", "adapted_tensors"]

_TENSORS = "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")

_READ = (
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type",
    "r", "rank_pattern", "target_modules", "use_rslora",
)  # fmt: skip
_NO_MATTER = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
"""Options of training, or of what only matters beside another option that is refused."""

_NOT_LINEAR = tuple(
    table[module] for table in FAMILY_TABLES.values() for module in ("embedding", "position_embedding", "head")
    if module in table
)  # fmt: skip
"""What "all-linear" leaves out."""


@dataclasses.dataclass(frozen=True)
class AdaptedTensor:
    """``W + scale B A``, of which a slice is computed when it is asked for.

    Attributes:
      base: W, ``[out, in]``, or ``[in, out]`` where ``transposed``.
      a: ``[r, in]``, float32.
      b: ``[out, r]``, float32.
      scale: ``alpha / r``, or ``alpha / sqrt(r)``.
      transposed: Whether the base model keeps its matrices as ``[in, out]``, as GPT-2 does.
    """

    base: TensorSource
    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return tuple(self.base.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads one slice per axis, in float32."""
        rows, columns = index
        out, into = (columns, rows) if self.transposed else (rows, columns)
        change = self.b[out] @ self.a[:, into] * np.float32(self.scale)
        return self.base[index].astype(np.float32) + (change.T if self.transposed else change)


def adapted_tensors(directory: Path, family: str, base: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    r"""The tensors of a base model that an adapter changes, changed.

    .. math:: W' = W + \frac{\alpha}{r} B A, \qquad \text{with } \sqrt r \text{ for } r \text{ where use\_rslora}

    Args:
      directory: Has ``adapter_config.json`` and ``adapter_model.safetensors``.
      family: Of the base model.
      base: Its tensors by name.

    Returns:
      The changed ones, by name.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If an option is not supported, or the tensors are not those that the options speak of; the message
        names it.
    """
    path, file = directory / ADAPTER, directory / _TENSORS
    if not file.is_file():
        pickled = " (pickled weights are not read)" if (directory / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{file}: no such file{pickled}")
    try:
        options = _Options.read(read_json(path))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    try:
        pairs = _pairs(dict(open_file(file)))
        names = {module: _name_in(base, family, module) for module in pairs}
        _check_targets(options, family, base, {names[module].removesuffix(".weight") for module in pairs})
        return {
            names[module]: _adapted(base[names[module]], *pair, options, module, transposed=family == "gpt2")
            for module, pair in pairs.items()
        }
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Options:
    """What an ``adapter_config.json`` says of the function that the adapter computes."""

    rank: int
    alpha: float
    square_root: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: Callable[[str], bool]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "_Options":
        fields = Fields(values, "an adapter's configuration")
        kind = fields.text("peft_type")
        if kind != "LORA":
            raise ValueError(f"peft_type must be LORA, got {kind!r}")
        for name, value in values.items():
            if value and name not in (*_READ, *_NO_MATTER):
                raise ValueError(f"{name}={value!r} is not supported; merge the adapter with the program that made it")
        if (bias := fields.text("bias", "none")) != "none":
            raise ValueError(f"bias={bias!r} is not supported; merge the adapter with the program that made it")
        start = values.get("init_lora_weights", True)
        if start not in (True, False, None, "gaussian", "eva", "orthogonal"):
            raise ValueError(f"init_lora_weights={start!r} changes the base model too, and is not supported")
        ranks, alphas = fields.group("rank_pattern"), fields.group("alpha_pattern")
        return cls(
            rank=fields.integer("r"),
            alpha=fields.positive("lora_alpha"),
            square_root=fields.flag("use_rslora", False),
            ranks={pattern: ranks.integer(pattern) for pattern in ranks.values},
            alphas={pattern: alphas.positive(pattern) for pattern in alphas.values},
            targets=_targets(fields),
        )

    def scale(self, module: str, rank: int) -> float:
        """Factor of ``B A``, whose rank must be as configured."""
        wanted = _by_pattern(self.ranks, module, self.rank)
        if rank != wanted:
            raise ValueError(f"the adapter of {module} has rank {rank}, {ADAPTER} says {wanted}")
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.square_root else rank)


def _by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches."""
    for pattern, value in values.items():
        whole = pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
        if re.match(whole, module):
            return value
    return default


def _targets(fields: Fields) -> Callable[[str], bool]:
    """Whether an adapter's configuration names a module."""
    named, excepted = (_named(fields, name) for name in ("target_modules", "exclude_modules"))
    layers = fields.values.get("layers_to_transform")
    if isinstance(layers, list) and not layers:
        layers = None
    wanted = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(isinstance(layer, int) for layer in wanted):
        raise ValueError(f"layers_to_transform must be an integer, a list of integers or null, got {layers!r}")

    def targets(module: str) -> bool:
        layer = re.search(r"\.(\d+)\.", module)
        here = layers is None or (layer is not None and int(layer[1]) in wanted)
        return here and named(module) and not excepted(module)

    return targets


def _named(fields: Fields, field: str) -> Callable[[str], bool]:
    value = fields.values.get(field)
    if isinstance(value, str):
        if value == "all-linear":
            return lambda module: not module.endswith(_NOT_LINEAR)
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise ValueError(f"{field} is not a regular expression ({error}): {value!r}") from None
        return lambda module: pattern.fullmatch(module) is not None
    names = fields.texts(field) if field == "target_modules" else fields.texts(field, None, null=True) or []
    return lambda module: module in names or module.endswith(tuple(f".{name}" for name in names))


def _pairs(tensors: Mapping[str, TensorSource]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of every adapted module."""
    found: dict[str, dict[str, TensorSource]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            raise ValueError(f"the tensor {name} is not one of a pair of low-rank matrices, and is not supported")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError("holds no tensors")
    pairs = {}
    for module, pair in found.items():
        if missing := {"A", "B"} - set(pair):
            raise ValueError(f"the tensor lora_{missing.pop()} of {module} is missing")
        a, b = (pair[part][:, :].astype(np.float32) for part in "AB")
        for part, value in (("A", a), ("B", b)):
            if not np.isfinite(value).all():
                raise ValueError(f"the tensor lora_{part} of {module} holds values that are not finite")
        pairs[module] = (a, b)
    return pairs


def _name_in(base: Mapping[str, TensorSource], family: str, module: str) -> str:
    prefix = BASE_PREFIX[family]
    for name in (module, prefix + module, module.removeprefix(prefix)):
        if f"{name}.weight" in base:
            return f"{name}.weight"
    raise ValueError(f"adapts {module}, which the base model does not have")


def _check_targets(options: _Options, family: str, base: Mapping[str, TensorSource], adapted: set[str]) -> None:
    """What was adapted must be what the configuration names, or part of the adapter is lost."""
    prefix = BASE_PREFIX[family]
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        if len(tensor.shape) != 2 or module == name:
            continue
        wanted = any(options.targets(spelling) for spelling in {module, prefix + module, module.removeprefix(prefix)})
        if wanted != (module in adapted):
            says = "names" if wanted else "does not name"
            raise ValueError(f"{'has no' if wanted else 'has an'} adapter of {module}, which {ADAPTER} {says}")


def _adapted(
    base: TensorSource, a: np.ndarray, b: np.ndarray, options: _Options, module: str, *, transposed: bool
) -> AdaptedTensor:
    into, out = (base.shape if transposed else reversed(base.shape)) if len(base.shape) == 2 else (None, None)
    if a.shape[1] != into or b.shape[0] != out or a.shape[0] != b.shape[1]:
        shapes = f"A {a.shape} and B {b.shape}"
        raise ValueError(f"the adapter of {module} has {shapes}, its base has a weight of shape {tuple(base.shape)}")
    return AdaptedTensor(base, a, b, options.scale(module, a.shape[0]), transposed)
