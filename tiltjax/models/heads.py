"""Scalar heads on a transformer: one value per token.

The backbone is any `tiltjax.models.transformer.Transformer`, adapters included. On disk it is a Hugging Face directory
as `tiltjax.models.pretrained.save` writes it, with the heads in two small files beside.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tiltjax.files import read_json, write_json
from tiltjax.models import lora, pretrained
from tiltjax.models.fields import Fields
from tiltjax.models.tensor_files import write_tensors
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_at_least
from tiltjax.types import Array, Bool, Dtype, Float, Int

__all__ = ["RewardModel", "is_trainable", "load", "preference_logits", "save"]

_TENSORS, _SHAPE = "reward_head.safetensors", "reward_head.json"


class RewardModel(nnx.Module):
    """A backbone and H scalar heads that read its normalised last hidden states.

    The heads begin at 0, so an untrained model is indifferent. A pytree: `jax.jit`, `jax.grad` and optax take it as it
    is; `tiltjax.train.sharding` splits the backbone by its names and leaves the heads whole.

    Attributes:
      backbone: `tiltjax.models.transformer.Transformer`; its vocabulary projection is not used.
      kernel: ``[D, H]``, float32.
      bias: ``[H]``, float32.

    Example:
      >>> from tiltjax.models.config import TransformerConfig
      >>> model = RewardModel(Transformer(jax.random.key(0), TransformerConfig(vocab_size=32)))
      >>> prompt, completion = jnp.ones((1, 3), int), jnp.ones((1, 4, 5), int)
      >>> jax.eval_shape(model.reward, prompt, prompt > 0, completion, completion > 0).shape
      (1, 4)
    """

    def __init__(self, backbone: Transformer, *, num_heads: int = 1):
        check_at_least("num_heads", num_heads, 1)
        self.backbone = backbone
        self.kernel = nnx.Param(jnp.zeros((backbone.config.features, num_heads)))
        self.bias = nnx.Param(jnp.zeros(num_heads))

    def scores(
        self, prompt: Int[Array, "B S"], prompt_mask: Bool[Array, "B S"], completion: Int[Array, "B N T"]
    ) -> Float[Array, "B N T H"]:
        """What the heads say after every completion token.

        Args:
          prompt: Right-padded prompt tokens.
          prompt_mask: True on real prompt tokens; at least one per prompt.
          completion: N right-padded completions of each prompt; what stands in the padding moves no real position.

        Returns:
          Entry ``t`` has read the prompt and the tokens up to and with ``t``; mask the padding before use.
        """
        # The backbone's states stand before the tokens: with one token more, the last T stand behind the first T.
        longer = jnp.pad(completion, ((0, 0), (0, 0), (0, 1)))
        hidden = self.backbone.hidden(prompt, prompt_mask, longer)[:, :, 1:]
        return hidden @ self.kernel[...] + self.bias[...].reshape(1, 1, 1, -1)

    def last(
        self,
        prompt: Int[Array, "B S"],
        prompt_mask: Bool[Array, "B S"],
        completion: Int[Array, "B N T"],
        completion_mask: Bool[Array, "B N T"],
    ) -> Float[Array, "B N H"]:
        """What the heads say after the last real token of every completion; 0 where it has none.

        Args:
          prompt: As in `scores`.
          prompt_mask: As in `scores`.
          completion: As in `scores`.
          completion_mask: True on real tokens, the end token included.

        Returns:
          One number per head.
        """
        scores = self.scores(prompt, prompt_mask, completion)
        end = jnp.where(completion_mask, jnp.arange(completion_mask.shape[-1]).reshape(1, 1, -1), 0)
        at = jnp.take_along_axis(scores, jnp.max(end, axis=-1)[..., None, None], axis=2)[:, :, 0]
        return jnp.where(jnp.any(completion_mask, axis=-1)[..., None], at, 0)

    def reward(
        self,
        prompt: Int[Array, "B S"],
        prompt_mask: Bool[Array, "B S"],
        completion: Int[Array, "B N T"],
        completion_mask: Bool[Array, "B N T"],
    ) -> Float[Array, "B N"]:
        """The first head after the last real token: the reward of whole completions, in reward units.

        Args:
          prompt: As in `scores`.
          prompt_mask: As in `scores`.
          completion: As in `scores`.
          completion_mask: As in `last`.

        Returns:
          One reward per candidate; 0 for a completion without a real token.
        """
        return self.last(prompt, prompt_mask, completion, completion_mask)[..., 0]


def is_trainable(path: tuple) -> bool:
    """Whether a parameter path (of `jax.tree_util`) leads into a head or an adapter, for `tiltjax.models.lora`."""
    return lora.is_adapter(path) or not any(getattr(k, "name", None) == "backbone" for k in path)


def preference_logits(embedding: Float[Array, "*batch N 2"]) -> Float[Array, "*batch N N"]:
    r"""Log-odds that one completion is preferred to another, which need not come from a reward.

    .. math:: \ell_{ij} = b_i (1 + a_j) - (1 + a_i)\, b_j, \qquad v = (a, b)

    Antisymmetric, so :math:`P(i \succ j) + P(j \succ i) = 1`, and able to express cycles. With ``a`` = 0, where the
    heads of a `RewardModel` begin, it is Bradley-Terry with the reward ``b``; at 0 it has a gradient, which a product
    of two heads alone has not.

    Args:
      embedding: ``(a, b)`` of every completion, such as `RewardModel.last` of a model with two heads.

    Returns:
      Nats; entry ``[i, j]`` is above 0 where ``i`` is preferred to ``j``.

    Example:
      >>> rock, paper, scissors = [-1.0, 1.0], [-1.8660254, -0.5], [-0.1339746, -0.5]  # at 120 degrees of each other
      >>> logits = preference_logits(jnp.array([rock, paper, scissors]))
      >>> bool(logits[1, 0] > 0), bool(logits[2, 1] > 0), bool(logits[0, 2] > 0)
      (True, True, True)

    References:
      Zhang et al., 2024, arXiv:2410.02197 (the skew-symmetric form, here around Bradley-Terry).
    """
    one, reward = 1 + embedding[..., 0], embedding[..., 1]
    product = reward[..., :, None] * one[..., None, :]
    return product - jnp.swapaxes(product, -1, -2)


def save(
    model: RewardModel,
    directory: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes the backbone as `tiltjax.models.pretrained.save` does, adapters merged, and the heads beside it.

    Args:
      model: The model.
      directory: Where to; must not exist yet, or be empty.
      source: See `tiltjax.models.pretrained.save`.
      tokenizer: Likewise.
      overwrite: Likewise.

    Raises:
      FileExistsError: If ``directory`` holds something already (and, with ``overwrite``, something other than a model).
      ValueError: If a parameter is not finite.
    """
    tensors = {name: np.asarray(getattr(model, name)[...]) for name in ("bias", "kernel")}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ValueError(f"the {name} of the heads is not finite; the model is not written")
    pretrained.save(model.backbone, directory, source=source, tokenizer=tokenizer, overwrite=overwrite)
    if jax.process_index() == 0:
        folder = Path(directory)
        write_tensors(folder / f"{_TENSORS}.part", tensors)
        os.replace(folder / f"{_TENSORS}.part", folder / _TENSORS)
        features, heads = tensors["kernel"].shape
        write_json(folder / _SHAPE, {"features": features, "num_heads": heads})


def load(
    directory: str | os.PathLike,
    *,
    dtype: Dtype = "float32",
    compute_dtype: str | None = None,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> RewardModel:
    """Reads what `save` wrote.

    Args:
      directory: Of the model.
      dtype: Of the backbone's parameters.
      compute_dtype: Operand type of its matrix products; None means ``dtype``.
      sharding: See `tiltjax.models.pretrained.load`; paths of the backbone begin with its own names.

    Returns:
      The model.

    Raises:
      FileNotFoundError: If the directory, the backbone or the heads are missing.
      ValueError: If a file is truncated, or the heads do not fit the backbone.
    """
    folder = Path(directory)
    shape = read_json(folder / _SHAPE)
    if not (folder / _TENSORS).is_file():
        raise FileNotFoundError(f"{folder / _TENSORS}: no such file")
    try:
        tensors = load_file(folder / _TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / _TENSORS}: truncated or not a safetensors file ({error})") from None
    backbone = pretrained.load(folder, dtype=dtype, compute_dtype=compute_dtype, sharding=sharding)
    try:
        heads = Fields(shape, "the heads").integer("num_heads")
    except ValueError as error:
        raise ValueError(f"{folder / _SHAPE}: {error}") from None
    wanted = {"bias": (heads,), "kernel": (backbone.config.features, heads)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != wanted:
        raise ValueError(f"{folder / _TENSORS}: has tensors {found}, the model needs {wanted}")
    model = RewardModel(backbone, num_heads=heads)
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{folder / _TENSORS}: the tensor {name} is not finite")
        place = None if sharding is None else sharding(name, value.shape)
        setattr(model, name, nnx.Param(jax.device_put(value, place)))
    return model
