"""A class-conditional diffusion transformer: noisy image, noise level and label in, noise out."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tiltjax.models.attention import KeyValue, attention
from tiltjax.models.layers import Linear
from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.ops.schedule import to_noise
from tiltjax.types import Array, Bool, Float, Int, Numeric, PRNGKey

__all__ = ["Denoiser", "DenoiserBlock", "DenoiserConfig", "drop_label", "position_features"]

_MAX_LOG_SNR = 20.0
_FREQUENCIES = 64


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The shape of a diffusion transformer.

    Attributes:
      image_size: Height and width in pixels.
      channels: Of a pixel.
      patch: Height and width of a patch, which is one position of the transformer; divides ``image_size``.
      features: D, width of the residual stream; a multiple of 4 and of ``num_heads``.
      num_layers: How many blocks.
      num_heads: Attention heads.
      mlp_features: Width of the hidden layer of the MLP.
      num_classes: Labels; one more row, the last, is that of no label. 0 for a model that knows no labels.
      prediction: What the network's output stands for: one of "noise", "clean" (the image, x0) and "velocity" (v).
      compute_dtype: Operand type of the matrix products; sums, norms and softmax are float32 or wider.
      remat: Whether the backward pass recomputes each block from its input.
    """

    image_size: int = 8
    channels: int = 1
    patch: int = 2
    features: int = 96
    num_layers: int = 4
    num_heads: int = 4
    mlp_features: int = 384
    num_classes: int = 10
    prediction: str = "velocity"
    compute_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        check_choice("prediction", self.prediction, ("noise", "clean", "velocity"))
        for name in ("image_size", "channels", "patch", "num_layers", "num_heads", "mlp_features"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("num_classes", self.num_classes, 0)
        if self.image_size % self.patch:
            raise ValueError(f"patch must divide image_size={self.image_size}, got {self.patch}")
        if self.features % 4 or self.features % self.num_heads:
            raise ValueError(f"features must be a multiple of 4 and of num_heads={self.num_heads}, got {self.features}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, self.channels


class DenoiserBlock(nnx.Module):
    """Attention and MLP, each scaled, shifted and gated by the noise level and the label.

    `Denoiser` holds all blocks as one, stacked along a leading axis.
    """

    def __init__(self, key: PRNGKey, config: DenoiserConfig):
        D, keys, narrow = config.features, jax.random.split(key, 4), config.features**-0.5
        # Zero: every gate is closed at the start, and the block is the identity.
        self.modulation = Linear(keys[0], D, 6 * D, bias=True, std=0.0)
        self.query_key_value = Linear(keys[0], D, 3 * D, bias=True, std=narrow)
        self.out = Linear(keys[1], D, D, bias=True, std=narrow)
        self.up = Linear(keys[2], D, config.mlp_features, bias=True, std=narrow)
        self.down = Linear(keys[3], config.mlp_features, D, bias=True, std=config.mlp_features**-0.5)
        self.config = config

    def __call__(self, x: Float[Array, "R L D"], condition: Float[Array, "R D"]) -> Float[Array, "R L D"]:
        """The residual stream after this block; ``condition`` is the same for all positions of an image."""
        c, dtype = self.config, self.config.compute_dtype
        parts = jnp.split(self.modulation(condition, dtype)[:, None], 6, axis=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        R, L, D = x.shape

        def heads(y: Array) -> Array:
            return jnp.swapaxes(y.reshape(R, 1, L, c.num_heads, D // c.num_heads), 2, 3)

        q, k, v = jnp.split(self.query_key_value(_standardise(x) * (1 + scale) + shift, dtype), 3, axis=-1)
        sees = jnp.ones((L, L), bool)
        attended = attention(heads(q), KeyValue(key=heads(k), value=heads(v)), sees, dtype=dtype)
        x = x + gate * self.out(jnp.swapaxes(attended, 2, 3).reshape(R, L, D), dtype)
        hidden = jax.nn.gelu(self.up(_standardise(x) * (1 + mlp_scale) + mlp_shift, dtype), approximate=True)
        return x + mlp_gate * self.down(hidden, dtype)


class Denoiser(nnx.Module):
    """A diffusion transformer with adaptive layer norms that start at zero.

    A pytree of float32 parameters: `jax.jit`, `jax.grad` and optax take it as it is. Called, it predicts the noise,
    whatever it was trained to predict; ``functools.partial(model, label=label)`` is a denoiser for the samplers.

    Attributes:
      patches: Embedding of patches.
      position: Fixed sine and cosine features of the patches' places, ``[L, D]``.
      level: First layer on the features of the noise level.
      level_out: Second layer.
      label: Embedding of labels ``[num_classes + 1, D]``, the last row for no label.
      blocks: One `DenoiserBlock` whose arrays have a leading axis of ``num_layers``.
      modulation: Scale and shift before the output.
      out: Projection to pixels; zero at the start, as ``modulation`` is.
      config: `DenoiserConfig`, static.

    Example:
      >>> model = jax.eval_shape(lambda key: Denoiser(key, DenoiserConfig()), jax.random.key(0))
      >>> sum(x.size for x in jax.tree.leaves(model))
      711556

    References:
      Peebles, Xie, 2022, arXiv:2212.09748.
    """

    def __init__(self, key: PRNGKey, config: DenoiserConfig):
        c, keys, D = config, jax.random.split(key, 5), config.features
        pixels = c.patch**2 * c.channels
        self.patches = Linear(keys[0], pixels, D, bias=True, std=pixels**-0.5)
        self.level = Linear(keys[1], 2 * _FREQUENCIES, D, bias=True, std=(2 * _FREQUENCIES) ** -0.5)
        self.level_out = Linear(keys[2], D, D, bias=True, std=D**-0.5)
        self.label = nnx.Param(jax.random.normal(keys[3], (c.num_classes + 1, D)) * 0.02)
        self.blocks: Any = jax.vmap(lambda k: DenoiserBlock(k, c))(jax.random.split(keys[4], c.num_layers))
        self.modulation = Linear(keys[0], D, 2 * D, bias=True, std=0.0)
        self.out = Linear(keys[0], D, pixels, bias=True, std=0.0)
        self.config = c

    def __call__(
        self, x: Float[Array, "*batch H W C"], alpha_bar: Numeric | Float[Array, "*batch"], *, label: Any = None
    ) -> Float[Array, "*batch H W C"]:
        """The predicted noise.

        Args:
          x: Noisy images ``sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise``.
          alpha_bar: Share of the signal's variance, in (0, 1); one for all images, or one each.
          label: Integers ``[*batch]`` (or one for all) in ``[0, num_classes]``, of which the last is no label; None
            is no label for all.

        Returns:
          The noise, whatever the network's own parameterisation is.
        """
        alpha_bar = jnp.broadcast_to(jnp.asarray(alpha_bar, jnp.float32), x.shape[:-3])
        output = self.output(x, alpha_bar, label=label)
        return to_noise(x, output, alpha_bar, kind=self.config.prediction)

    def output(
        self, x: Float[Array, "*batch H W C"], alpha_bar: Numeric | Float[Array, "*batch"], *, label: Any = None
    ) -> Float[Array, "*batch H W C"]:
        """What the network predicts, in its own parameterisation: the argument of the losses; see `__call__`."""
        c = self.config
        batch = x.shape[:-3]
        rows = x.reshape(-1, *c.shape)
        alpha_bar = jnp.broadcast_to(jnp.asarray(alpha_bar, jnp.float32), batch).reshape(-1)
        label = jnp.broadcast_to(c.num_classes if label is None else label, batch).reshape(-1)
        dtype = c.compute_dtype
        position = jnp.asarray(position_features(c.image_size // c.patch, c.features))
        h = self.patches(_patchify(rows, c.patch), dtype) + position[None]
        level = self.level_out(jax.nn.silu(self.level(_level_features(alpha_bar), dtype)), dtype)
        condition = jax.nn.silu(level + self.label[...][label])

        def layer(h: Array, block: DenoiserBlock) -> tuple[Array, None]:
            return block(h, condition), None

        h, _ = jax.lax.scan(jax.checkpoint(layer) if c.remat else layer, h, self.blocks)
        shift, scale = jnp.split(self.modulation(condition, dtype)[:, None], 2, axis=-1)
        pixels = self.out(_standardise(h) * (1 + scale) + shift, dtype)
        return _unpatchify(pixels, c).reshape(x.shape)


def drop_label(key: PRNGKey, label: Int[Array, "*batch"], *, rate: Numeric, num_classes: int) -> Int[Array, "*batch"]:
    """Labels of which a share is replaced by no label, so that one network learns both scores of its guidance.

    Args:
      key: Consumed.
      label: In ``[0, num_classes)``.
      rate: Share that is dropped, in [0, 1].
      num_classes: The label that means none.

    Returns:
      Labels in ``[0, num_classes]``.

    References:
      Ho, Salimans, 2022, arXiv:2207.12598, Algorithm 1.
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate!r}")
    dropped: Bool[Array, "*batch"] = jax.random.bernoulli(key, rate, label.shape)
    return jnp.where(dropped, num_classes, label)


def position_features(side: int, features: int) -> np.ndarray:
    """Sines and cosines of the row and the column of each patch of a square, ``[side ** 2, features]``.

    Args:
      side: Patches per row.
      features: A multiple of 4: half for the row, half for the column.
    """
    frequency = 10000.0 ** (-np.arange(features // 4) / (features // 4))
    angle = np.arange(side)[:, None] * frequency
    one = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    both = np.broadcast_to(one[:, None], (side, side, features // 2)), np.broadcast_to(one, (side, side, features // 2))
    return np.concatenate(both, axis=-1).reshape(side**2, features).astype(np.float32)


def _level_features(alpha_bar: Float[Array, " R"]) -> Float[Array, "R F"]:
    """Sines and cosines of the log signal-to-noise ratio, from one turn over its whole range to fine ones."""
    log_snr = jnp.clip(jax.scipy.special.logit(alpha_bar), -_MAX_LOG_SNR, _MAX_LOG_SNR)
    frequency = jnp.exp(jnp.linspace(math.log(math.pi / (2 * _MAX_LOG_SNR)), math.log(4.0), _FREQUENCIES))
    angle = log_snr[:, None] * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _standardise(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Layer norm without parameters: scale and shift come from the condition."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _patchify(x: Float[Array, "R H W C"], patch: int) -> Float[Array, "R L P"]:
    R, H, W, C = x.shape
    x = x.reshape(R, H // patch, patch, W // patch, patch, C)
    return jnp.moveaxis(x, 2, 3).reshape(R, (H // patch) * (W // patch), patch * patch * C)


def _unpatchify(x: Float[Array, "R L P"], config: DenoiserConfig) -> Float[Array, "R H W C"]:
    side, patch = config.image_size // config.patch, config.patch
    x = x.reshape(-1, side, side, patch, patch, config.channels)
    return jnp.moveaxis(x, 3, 2).reshape(-1, *config.shape)
