"""Sampling and scoring over many prompts: host loops around two jitted functions, resumable batch by batch."""

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from tqdm import tqdm

from tiltjax.data import candidates as batches
from tiltjax.data.candidates import Candidates
from tiltjax.models.transformer import Transformer
from tiltjax.ops.tokens import sequence_logp
from tiltjax.samplers.decode import Decoded, decode
from tiltjax.types import Array, Bool, Float, Int, PRNGKey

__all__ = ["collect", "make_sampler", "make_scorer", "score_all"]


def make_sampler(
    *,
    num_candidates: int,
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Callable[[PRNGKey, Transformer, Array, Array], Decoded]:
    """The jitted sampler: prefill once per prompt, then N candidates that share its keys and values.

    Args:
      num_candidates: N.
      max_tokens: T.
      eos_id: Token (or tokens) that end a completion.
      pad_id: Fills the rest.
      temperature: Softmax temperature; 0 is greedy.
      top_k: See `tiltjax.samplers.logits`.
      top_p: Likewise.

    Returns:
      ``(key, model, prompt [B, S], prompt_mask [B, S]) -> Decoded``.
    """

    @jax.jit
    def sampler(key: PRNGKey, model: Transformer, prompt: Int[Array, "B S"], prompt_mask: Bool[Array, "B S"]):
        model = model.cast(model.config.compute_dtype)
        logits, cache = model.prefill(prompt, prompt_mask, num_candidates=num_candidates, max_tokens=max_tokens)
        return decode(
            key,
            logits,
            cache,
            model.unstacked().decode_step,
            num_candidates=num_candidates,
            max_tokens=max_tokens,
            eos_id=eos_id,
            pad_id=pad_id,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    return sampler


def make_scorer() -> Callable[[Transformer, Candidates], Float[Array, "B N"]]:
    """The jitted scorer: log-probability of every whole completion, nats, ``(model, candidates) -> [B, N]``."""

    @jax.jit
    def scorer(model: Transformer, candidates: Candidates) -> Float[Array, "B N"]:
        stats = model.score(candidates.prompt, candidates.prompt_mask, candidates.completion)
        return sequence_logp(stats.logp, candidates.completion_mask)

    return scorer


def collect(
    key: PRNGKey,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Callable[..., Decoded],
    pad_id: int,
    batch_size: int,
    sharding: Sharding | None = None,
    directory: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    description: str = "sample",
) -> Candidates:
    """Draws N candidates of every prompt.

    Prompts go through in batches of one shape; batch i uses ``fold_in(key, i)``. With a ``directory`` every finished
    batch is kept there and taken from there next time, so a killed run samples nothing twice.

    Args:
      key: Typed key, consumed.
      model: The policy.
      prompts: Token ids of each prompt.
      sampler: From `make_sampler`.
      pad_id: Fills short prompts.
      batch_size: Prompts at a time.
      sharding: Where a batch of prompts goes; None leaves it on the default device.
      directory: Where batches are kept.
      fingerprint: Of tokenizer, policy and settings: a kept batch of another one is refused.
      description: Of the progress bar.

    Returns:
      `Candidates` of NumPy arrays, with ``old_token_logp`` at temperature 1.
    """
    tokens, mask = batches.pad(prompts, pad_id=pad_id)
    folder = None if directory is None else pathlib.Path(directory)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    parts = []
    starts = range(0, len(tokens), batch_size)
    with tqdm(total=len(tokens), desc=description, unit="prompt") as bar:
        for i, start in enumerate(starts):
            rows = np.arange(start, start + batch_size) % len(tokens)  # A short last batch is filled up, then cut.
            real = min(batch_size, len(tokens) - start)
            path = None if folder is None else folder / f"{i:05d}.npz"
            if path is not None and path.exists():
                part = batches.load(path, fingerprint=fingerprint)
            else:
                prompt, prompt_mask = jax.device_put((tokens[rows], mask[rows]), sharding)
                drawn = jax.device_get(sampler(jax.random.fold_in(key, i), model, prompt, prompt_mask))
                part = Candidates(
                    prompt=tokens[rows],
                    prompt_mask=mask[rows],
                    completion=drawn.completion,
                    completion_mask=drawn.completion_mask,
                    old_token_logp=drawn.token_logp,
                )
                part = batches.take(part, slice(0, real))
                if path is not None:
                    batches.save(path, part, fingerprint=fingerprint)
            parts.append(part)
            bar.update(real)
    return batches.concatenate(parts)


def score_all(
    model: Transformer,
    candidates: Candidates,
    *,
    batch_size: int,
    scorer: Callable[[Transformer, Candidates], Float[Array, "B N"]] | None = None,
    sharding: Sharding | None = None,
    description: str = "score",
) -> Float[Array, "B N"]:
    """Log-probability of every completion under ``model``, batch by batch.

    Args:
      model: Any policy.
      candidates: B prompts with N completions each.
      batch_size: Prompts at a time.
      scorer: From `make_scorer`, to share its compilation between calls.
      sharding: Where a batch goes.
      description: Of the progress bar.

    Returns:
      Nats, NumPy ``[B, N]``.
    """
    scorer = scorer or make_scorer()
    bare = Candidates(**{f: getattr(candidates, f) for f in ("prompt", "prompt_mask", "completion", "completion_mask")})
    total, out = len(bare.prompt), []
    with tqdm(total=total, desc=description, unit="prompt") as bar:
        for start in range(0, total, batch_size):
            part = batches.take(bare, np.arange(start, start + batch_size) % total)
            real = min(batch_size, total - start)
            out.append(np.asarray(jnp.asarray(scorer(model, jax.device_put(part, sharding))))[:real])
            bar.update(real)
    return np.concatenate(out)
