"""One GPU, Pythia-1.4B's shape in bfloat16: training, decoding, soft best-of-N, and what log-probabilities cost.

    python -m benchmarks.gpu                 # an H100 or H200; pip install 'jax[cuda12]'; about five minutes
    python -m benchmarks.gpu --shape=tiny    # anywhere

| figure | what it is | goal |
| --- | --- | --- |
| MFU | useful operations of a training step (6 per parameter and token, attention added, recomputation not) per second, over the datasheet's peak | 50 % |
| roofline | time that reading weights, prompt keys and own keys takes at the datasheet's bandwidth (or computing takes, if that is longer), over the time of a decoding step | 60 % |
| log-probabilities | time of `token_logp` over that of the matrix product inside it | |

Where the device is not in the table of datasheets, peak and bandwidth are measured. Rows go to ``results/gpu.jsonl``
with the device's name.
"""  # noqa: E501

import argparse
import dataclasses
import datetime
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import harness
from tiltjax.data.candidates import Candidates
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.ops.tokens import dot, token_logp
from tiltjax.samplers.best_of_n import soft_best_of_n
from tiltjax.train.hardware import compilation_cache, return_memory_after_compiling
from tiltjax.train.objectives import sft_objective
from tiltjax.train.rollout import make_sampler
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

__all__ = ["CHIPS", "SIZES", "Size", "main"]

CHIPS = {
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
}
"""Dense bfloat16 operations and bytes per second: NVIDIA's datasheets of the H100 (SXM and PCIe) and the H200."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
      config: Of the model.
      sequences: Of a training step.
      length: Tokens of each, half of them prompt.
      S: Tokens of a prompt to decode from.
      T: Tokens to decode.
      ns: Candidates that share it.
      positions: For the log-probabilities.
      matrix: Side of the matrices that the peak is measured with.
    """

    config: TransformerConfig
    sequences: int
    length: int
    S: int
    T: int
    ns: tuple[int, ...]
    positions: int
    matrix: int


_PYTHIA = TransformerConfig(
    family="gpt_neox", vocab_size=50304, features=2048, num_layers=24, num_heads=16, num_kv_heads=16, head_dim=128,
    mlp_features=8192, norm="layer", activation="gelu", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
    rotary_dim=32, parallel_residual=True, tied=False, compute_dtype="bfloat16", remat="dots", attention="auto",
)  # fmt: skip
_TINY = dataclasses.replace(
    _PYTHIA, vocab_size=96, features=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_features=32,
    rotary_dim=4, compute_dtype="float32", remat="none",
)  # fmt: skip

SIZES = {
    "pythia-1.4b": Size(_PYTHIA, 8, 1024, 512, 128, (1, 16, 256), 8192, 8192),
    "tiny": Size(_TINY, 2, 8, 5, 8, (4,), 16, 64),
}
"""By name; "tiny" is for the tests."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures everything, a row each; returns the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--shape", default="pythia-1.4b", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for the timed calls of a measurement")
    parser.add_argument("--run", default=f"{datetime.datetime.now():%Y%m%d-%H%M%S}", help="name of the run")
    given = parser.parse_args(argv)
    size, device = SIZES[given.shape], jax.devices()[0]
    compilation_cache()
    return_memory_after_compiling()

    def seconds(call: Callable[[], Any]) -> float:
        watch = harness.measure(call, repeats=given.repeats, budget=given.budget, compiles=True)
        return statistics.median(lap[0] for lap in watch.laps[1:])

    peak, bandwidth, source = _limits(device.device_kind, size)
    common = {"measure": "gpu", "device": device.device_kind, "shape": given.shape, "run": given.run}
    common |= {"peak_tflops": round(peak / 1e12, 3), "bandwidth_gbs": round(bandwidth / 1e9, 1), "limits": source}
    rows = []
    for found in (*_training(size, seconds, peak), *_decoding(size, seconds, peak, bandwidth), *_logp(size, seconds)):
        rows.append(harness.emit("gpu", {**common, **found}))
    return rows


def layer_parameters(config: TransformerConfig) -> int:
    """Of one block's matrices."""
    c = config
    attention = 2 * c.features * c.head_dim * (c.num_heads + c.num_kv_heads)
    return attention + (3 if c.gated else 2) * c.features * c.mlp_features


def _limits(kind: str, size: Size) -> tuple[float, float, str]:
    """Peak operations and bytes per second, and where they come from."""
    for name, (peak, bandwidth) in CHIPS.items():
        if all(word in kind for word in name.split()):
            return peak, bandwidth, f"datasheet of the {name}"
    a = jnp.ones((size.matrix, size.matrix), size.config.compute_dtype)
    product = jax.jit(lambda a: dot(a, a, a.dtype))
    peak = 1e9 * harness.gemm_gflops(lambda: product(a).block_until_ready(), size.matrix, seconds=0.1)
    total, x = jax.jit(jnp.sum), jnp.ones(size.matrix**2 * 4)
    watch = harness.measure(lambda: total(x).block_until_ready(), repeats=5, budget=5.0, compiles=True)
    return peak, x.nbytes / statistics.median(lap[0] for lap in watch.laps[1:]), "measured"


def _training(size: Size, seconds: Callable, peak: float):
    c, half = size.config, size.length // 2
    tokens = jax.random.randint(jax.random.key(1), (size.sequences, size.length), 0, c.vocab_size)
    batch = Candidates(
        prompt=tokens[:, :half],
        prompt_mask=jnp.ones((size.sequences, half), bool),
        completion=tokens[:, None, half:],
        completion_mask=jnp.ones((size.sequences, 1, size.length - half), bool),
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-5))
    step = jax.jit(functools.partial(train_step, loss_fn=sft_objective(), tx=tx), donate_argnums=0)
    state, key = init_state(jax.jit(Transformer, static_argnums=1)(jax.random.key(0), c), tx), jax.random.key(2)

    def advance():
        nonlocal state
        state, scalars = step(state, batch, key)
        return jax.block_until_ready((state, scalars))

    took = seconds(advance)
    positions = size.sequences * (size.length - 1)
    layer = 2 * layer_parameters(c) + 4 * c.num_heads * c.head_dim * size.length / 2
    head = 2 * c.features * c.vocab_size * size.sequences * (size.length - half)
    flops = 3 * (c.num_layers * layer * positions + head)
    text = f"training step, {size.sequences} x {size.length} tokens, the second half counted"
    yield _row(text, took, f"MFU {flops / took / peak:.1%}", "50%", mfu=flops / took / peak, gflop=flops / 1e9)


def _decoding(size: Size, seconds: Callable, peak: float, bandwidth: float):
    c = size.config
    model = jax.jit(lambda key: Transformer(key, c).cast(c.compute_dtype))(jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (1, size.S), 0, c.vocab_size)
    mask, key, took = jnp.ones(prompt.shape, bool), jax.random.key(3), {}
    width = jnp.dtype(c.compute_dtype).itemsize
    for n in size.ns:
        for T in (size.T // 2, size.T):
            sampler = make_sampler(num_candidates=n, max_tokens=T, eos_id=-1, pad_id=0)
            took[T] = seconds(lambda sampler=sampler: jax.block_until_ready(sampler(key, model, prompt, mask)))
        # The prompt's share and every fixed cost are in both.
        step = (took[size.T] - took[size.T // 2]) / (size.T - size.T // 2)
        weights = c.num_layers * layer_parameters(c) + c.vocab_size * c.features
        place = 2 * c.num_kv_heads * c.head_dim * c.num_layers
        read = width * (weights + place * (size.S + n * 3 * size.T / 4))
        flops = 2 * weights * n + 4 * c.num_heads * c.head_dim * c.num_layers * n * (size.S + 3 * size.T / 4)
        bound = "memory" if read / bandwidth > flops / peak else "compute"
        text = f"decoding step, {n} candidates of a prompt of {size.S}"
        if step <= 0:
            yield _row(text, step, "too short to be told from noise", "60%", gbytes=read / 1e9)
            continue
        share = max(read / bandwidth, flops / peak) / step
        yield _row(text, step, f"{share:.1%} of the roofline ({bound})", "60%", roofline=share, gbytes=read / 1e9)

    # The last sampler, of the most candidates at full length, once more.
    def best(sampler=sampler, n=n):
        drawn = sampler(key, model, prompt, mask)
        reward = jnp.mean(drawn.completion % 2 == 0, axis=-1, dtype=jnp.float32)
        return jax.block_until_ready(soft_best_of_n(key, reward, beta=0.1))

    whole = seconds(best)
    text = f"soft best-of-{n}, prompt of {size.S}, {size.T} tokens each"
    yield _row(text, whole, f"{n * size.T / whole:,.0f} tokens/s", "", tokens_per_second=n * size.T / whole)


def _logp(size: Size, seconds: Callable):
    c, M = size.config, size.positions
    hidden = jax.random.normal(jax.random.key(4), (M, c.features), c.compute_dtype)
    head = jax.random.normal(jax.random.key(5), (c.vocab_size, c.features), c.compute_dtype) * c.features**-0.5
    token = jax.random.randint(jax.random.key(6), (M,), 0, c.vocab_size)
    product = jax.jit(lambda h, w: dot(h, w, c.compute_dtype))
    forward = jax.jit(lambda h, w: token_logp(h, w, token).logp)
    gradient = jax.jit(jax.grad(lambda h, w: token_logp(h, w, token).logp.sum(), argnums=(0, 1)))
    base, fwd, bwd = (seconds(functools.partial(_wait, f, hidden, head)) for f in (product, forward, gradient))
    text = f"log-probabilities of {M} positions, vocabulary of {c.vocab_size}"
    yield _row(text, fwd, f"{fwd / base:.2f} x the product", "", over_product=fwd / base, product_seconds=base)
    text += ", with their gradient"  # Recomputed logits and two more products.
    yield _row(text, bwd, f"{bwd / base / 4:.2f} x four products", "", over_four_products=bwd / base / 4)


def _wait(function: Callable, *arguments: Any) -> Any:
    return jax.block_until_ready(function(*arguments))


def _row(text: str, seconds: float, figure: str, goal: str, **numbers: float) -> dict[str, Any]:
    rounded = {name: round(value, 5) for name, value in numbers.items()}
    return {"text": text, "seconds": round(seconds, 7), "figure": figure, "goal": goal, **rounded}


if __name__ == "__main__":
    main()
