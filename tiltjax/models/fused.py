"""Attention by the platform's fused kernels: the prompt's block and the completions' own, merged by log-sum-exp.

Each block is one fused call that never stores its scores. The backward pass gives every block the normaliser and the
output of the whole, so it needs no gradient of a log-sum-exp, which the kernels do not have.
`tiltjax.models.attention.attention` is the reference that tests hold this to.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from tiltjax.models.attention import KeyValue
from tiltjax.models.config import ATTENTION
from tiltjax.models.flash import flash_backward, flash_forward
from tiltjax.ops.checks import check_choice
from tiltjax.ops.collectives import parts_known
from tiltjax.types import Array, Dtype, Float, Int

__all__ = ["IMPLEMENTATIONS", "choose", "fused_attention", "merge_attention"]

IMPLEMENTATIONS = ("cudnn", "pallas", "xla")
"""Who runs the attention: cuDNN on a GPU, Pallas on a TPU, or XLA anywhere."""

_BACKWARD = "_dot_product_attention_bwd_p_wrapper"


def choose(attention: str, *, head_dim: int, window: int | None, dtype: Dtype) -> str | None:
    """Which implementation a setting means on this machine.

    Args:
      attention: "plain", "fused", or "auto": fused where the platform, the shapes and the types permit it.
      head_dim: Width of one head.
      window: Of a sliding window, or None.
      dtype: Operand type of the matrix products.

    Returns:
      "cudnn" on NVIDIA GPUs; "pallas" on TPUs (`tiltjax.models.flash`); "xla", the same algorithm from plain parts,
      where "fused" is asked for elsewhere; None for the plain path.

    Raises:
      ValueError: If "fused" is asked for and cannot be had; the message says why.
    """
    check_choice("attention", attention, ATTENTION)
    if attention == "plain":
        return None
    implementation, unfit = _PLATFORMS.get(jax.default_backend(), ("xla", lambda head_dim, dtype: None))
    if implementation == "xla" and attention == "auto":
        return None
    reason = "a sliding window is not supported" if window is not None else unfit(head_dim, dtype)
    if reason is None:
        return implementation
    if attention == "fused":
        raise ValueError(f"attention='fused' is not possible here: {reason}")
    return None


def merge_attention(
    out_a: Float[Array, "*batch d"],
    lse_a: Float[Array, "*batch"],
    out_b: Float[Array, "*batch d"],
    lse_b: Float[Array, "*batch"],
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch"]]:
    r"""Attention over two disjoint sets of keys from the attention over each.

    .. math:: \ell = \log(e^{\ell_a} + e^{\ell_b}), \qquad o = e^{\ell_a - \ell} o_a + e^{\ell_b - \ell} o_b

    Args:
      out_a: What the queries took from the first set.
      lse_a: Log of the sum of the exponentials of their scores there, nats; -inf where they saw nothing.
      out_b: From the second set.
      lse_b: Likewise.

    Returns:
      Output and log-sum-exp of the union, float32 or wider; 0 and -inf where neither set was seen.

    References:
      Dao, 2023, arXiv:2307.08691, section 3.1.1 (the log-sum-exp of a block).
    """
    lse = jnp.logaddexp(lse_a, lse_b)
    shift = jnp.where(lse == -jnp.inf, 0, lse)
    parts = [
        jnp.where((part == -jnp.inf)[..., None], 0, jnp.exp(part - shift)[..., None] * out)
        for out, part in ((out_a, lse_a), (out_b, lse_b))
    ]
    return parts[0] + parts[1], lse


def fused_attention(
    query: Float[Array, "B N H T d"],
    own: KeyValue,
    prefix: KeyValue | None = None,
    prefix_length: Int[Array, " B"] | None = None,
    *,
    implementation: str,
    dtype: Dtype = jnp.float32,
) -> Float[Array, "B N H T d"]:
    """Causal attention of N completions over their own tokens and a shared, right-padded prompt.

    Args:
      query: H heads, a multiple of the K heads of the keys; consecutive queries share a key head.
      own: Keys and values of the completions themselves, ``[B, N, K, T, d]``.
      prefix: Keys and values of the prompt, ``[B, K, S, d]``, or None.
      prefix_length: How many of its S positions are real, at least 1.
      implementation: One of `IMPLEMENTATIONS`.
      dtype: Operand type of the matrix products.

    Returns:
      The attended values, float32 or wider.

    Raises:
      ValueError: If ``implementation`` is unknown.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    B, N, H, T, d = query.shape
    wide = jnp.promote_types(dtype, jnp.float32)
    dtype = wide if implementation == "xla" else dtype

    def rows(x):
        """``[B, N, heads, T, d] -> [B N, T, heads, d]``."""
        return jnp.swapaxes(x.astype(dtype), -2, -3).reshape(-1, x.shape[-2], x.shape[-3], d)

    blocks: list[tuple[Array, Array, Array | None]] = [(rows(own.key), rows(own.value), None)]
    if prefix is not None:
        key, value = (jnp.swapaxes(x.astype(dtype), -2, -3) for x in (prefix.key, prefix.value))
        blocks.append((key, value, jnp.asarray(prefix_length, jnp.int32)))
    out = _attend(implementation, rows(query), tuple(blocks))
    return jnp.swapaxes(out.reshape(B, N, T, H, d), -2, -3).astype(wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(implementation, query, blocks):
    return _attend_fwd(implementation, query, blocks)[0]


def _attend_fwd(implementation, query, blocks):
    """``query [B N, T, H, d]``; a block is keys, values ``[X, U, K, d]``, lengths ``[X]`` (None: causal, X = B N)."""
    forward, _ = _KERNELS[implementation]
    parts = []
    for key, value, length in blocks:
        out, lse = forward(_on(query, key), key, value, length)
        parts.append((out.reshape(query.shape).astype(lse.dtype), lse.reshape(query.shape[:-1])))
    out, lse = functools.reduce(lambda a, b: merge_attention(*a, *b), parts)
    out = out.astype(query.dtype)
    return out, (query, blocks, out, lse)


def _attend_bwd(implementation, saved, grad):
    query, blocks, out, lse = saved
    _, backward = _KERNELS[implementation]
    grad_query, grad_blocks = jnp.zeros(query.shape, lse.dtype), []
    for key, value, length in blocks:
        # With the normaliser and output of all blocks, the gradient of one block is its part of the whole.
        parts = (_on(x, key) for x in (out, lse, grad.astype(query.dtype)))
        dq, dk, dv = backward(_on(query, key), key, value, length, *parts)
        grad_query += dq.reshape(query.shape).astype(lse.dtype)
        grad_blocks.append((dk.astype(key.dtype), dv.astype(value.dtype), None))
    return grad_query.astype(query.dtype), tuple(grad_blocks)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _on(x: Array, key: Array) -> Array:
    """The queries as rows of ``key``: all N completions of a prompt stand in one row where the key is the prompt's."""
    return x.reshape(key.shape[0], -1, *x.shape[2:])


def _xla_forward(query, key, value, length):
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=length is None,
        key_value_seq_lengths=length,
        implementation="xla",
        return_residual=True,
    )


def _xla_backward(query, key, value, length, out, lse, grad):
    X, L, H, d = query.shape
    K = key.shape[2]
    q, o, g = (x.reshape(X, L, K, H // K, d) for x in (query, out, grad))
    scores = jnp.einsum("xlkgd,xukd->xkglu", q, key) * d**-0.5
    place = jnp.arange(key.shape[1])
    seen = place[None] <= jnp.arange(L)[:, None] if length is None else (place[None] < length[:, None])[:, None]
    seen = jnp.broadcast_to(seen, (X, L, len(place)))[:, None, None]
    norm = jnp.moveaxis(lse.reshape(X, L, K, H // K), 1, -1)[..., None]
    p = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0) - norm), 0)
    delta = jnp.moveaxis(jnp.sum(g * o, -1), 1, -1)[..., None]
    ds = p * (jnp.einsum("xlkgd,xukd->xkglu", g, value) - delta) * d**-0.5
    dq = jnp.einsum("xkglu,xukd->xlkgd", ds, key).reshape(query.shape)
    return dq, jnp.einsum("xkglu,xlkgd->xukd", ds, q), jnp.einsum("xkglu,xlkgd->xukd", p, g)


def _kernels() -> Any:
    """The part of JAX that calls cuDNN: `jax.nn` rounds its log-sum-exp to bfloat16 and stops its gradient."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _cudnn_forward(query, key, value, length):
    kernels = _kernels()
    queries = None if length is None else jnp.full(length.shape, query.shape[1], jnp.int32)
    mask = kernels.MaskType.CAUSAL if length is None else kernels.MaskType.PADDING
    out, lse = kernels.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=queries,
        kv_seqlen=length,
        scale=query.shape[-1] ** -0.5,
        mask_type=mask,
        return_residual=True,
    )
    return out, jnp.swapaxes(lse, 1, 2)


def _cudnn_backward(query, key, value, length, out, lse, grad):
    kernels = _kernels()
    unused = jnp.zeros(0, query.dtype)
    lengths = (unused, unused) if length is None else (jnp.full(length.shape, query.shape[1], jnp.int32), length)
    mask = kernels.MaskType.CAUSAL if length is None else kernels.MaskType.PADDING
    options = {
        "scale": query.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": mask,
        "layout": kernels.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    operands = (query, key, value, unused, *lengths, *(unused,) * 4, jnp.swapaxes(lse, 1, 2), out, grad)
    return getattr(kernels, _BACKWARD).bind(*operands, **options)[:3]


def _unfit_tpu(head_dim: int, dtype: Dtype) -> str | None:
    """Why the TPU kernels cannot do it, or None."""
    if jnp.dtype(dtype).name not in ("bfloat16", "float32"):
        return f"the TPU kernels take bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if head_dim > 256:
        return f"the TPU kernels need a head_dim up to 256, got {head_dim}"
    if not parts_known():
        return "of several devices the TPU kernels must know the mesh (jax.sharding.use_abstract_mesh) or be mapped"
    return None


def _unfit_gpu(head_dim: int, dtype: Dtype) -> str | None:
    """Why cuDNN cannot do it, or None."""
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"cuDNN needs a head_dim that is a multiple of 8 up to 128, got {head_dim}"
    try:
        kernels = _kernels()
        kernels.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"JAX {jax.__version__} does not find cuDNN ({error})"
    known = inspect.signature(getattr(kernels, "dot_product_attention", len)).parameters
    if not hasattr(kernels, _BACKWARD) or not {"q_seqlen", "kv_seqlen", "mask_type", "return_residual"} <= set(known):
        return f"the cuDNN calls of JAX {jax.__version__} are not those of 0.10"
    return None


_KERNELS: dict[str, Any] = {
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "pallas": (flash_forward, flash_backward),
    "xla": (_xla_forward, _xla_backward),
}

_PLATFORMS: dict[str, Any] = {"gpu": ("cudnn", _unfit_gpu), "tpu": ("pallas", _unfit_tpu)}
