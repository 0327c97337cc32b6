"""A `Transformer` as the policy of `tiltjax.train.method`: how its candidates are drawn, and what it says about them.

Parameters are the whole model, or, with ``frozen``, the trained part of `tiltjax.models.lora.partition`: then the
reference, the initial and the previous policy cost no more memory than their adapters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tiltjax.data.candidates import Candidates
from tiltjax.losses.game import geometric_mixture_logits
from tiltjax.losses.penalties import kl_k1, kl_k2, kl_k3
from tiltjax.models.lora import combine
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_choice
from tiltjax.ops.masked import Average, average, masked_sum
from tiltjax.ops.tokens import chunked_kl, token_logp
from tiltjax.samplers.decode import decode
from tiltjax.train.method import SOURCES, Players, Sample, View, ViewFn
from tiltjax.types import Array, Params, PRNGKey

__all__ = ["kl_along_prefixes", "model_sample", "model_view", "with_critics"]


def with_critics(model: Params, *, features: int, num: int = 1) -> dict[str, Params]:
    """Parameters of a policy with critics that read its last hidden state, for actor-critic methods.

    Args:
      model: The policy.
      features: Width of its hidden state.
      num: How many critics: 1 for PPO, 2 for Safe RLHF.

    Returns:
      ``{"model", "critic"}``; the critics start at 0.
    """
    return {"model": model, "critic": {"kernel": jnp.zeros((features, num)), "bias": jnp.zeros(num)}}


def _model(params: Params, frozen: Params) -> Transformer:
    trained = params["model"] if isinstance(params, dict) else params
    return trained if frozen is None else combine(trained, frozen)


def model_view(*, frozen: Params = None, temperature: float = 1.0, chunk: int = 8192) -> ViewFn:
    """How a `Transformer` sees candidates.

    Args:
      frozen: The other half of `tiltjax.models.lora.partition`, or None.
      temperature: At which candidates are drawn: log-probabilities are those of the distribution that was sampled.
      chunk: Vocabulary entries per step of `tiltjax.ops.tokens.token_logp`.

    Returns:
      `ViewFn`; with values where the parameters are those of `with_critics`.
    """

    def view(params: Params, candidates: Candidates) -> View:
        model = _model(params, frozen)
        hidden = model.hidden(candidates.prompt, candidates.prompt_mask, candidates.completion)
        options: dict[str, Any] = {"temperature": temperature, "chunk": chunk, "dtype": model.config.compute_dtype}
        stats = token_logp(hidden, model.projection(), candidates.completion, **options)
        value = None
        if isinstance(params, dict):
            critic = params["critic"]
            value = hidden @ critic["kernel"] + critic["bias"].reshape(1, 1, 1, -1)
        return View(token_logp=stats.logp, entropy=stats.entropy, self_certainty=stats.self_certainty, value=value)

    return view


def model_sample(
    *,
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    frozen: Params = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    mixture: float = 0.5,
    written: Callable[[PRNGKey, str, Candidates, int], Candidates] | None = None,
) -> Sample:
    """How the candidates of a `Transformer` are drawn, by any player.

    Args:
      max_tokens: T.
      eos_id: Token (or tokens) that end a completion.
      pad_id: Fills the rest.
      frozen: As in `model_view`.
      temperature: Softmax temperature.
      top_k: See `tiltjax.samplers.logits`.
      top_p: Likewise.
      mixture: Share of the reference in the source "mixture", token by token.
      written: ``(key, source, prompts, num) -> Candidates`` for the sources "data" and "corpus".

    Returns:
      `Sample`, one compilation per source and number, for calls from the host or under a trace. ``old_token_logp`` is
      that of the distribution that was drawn from, filters included. Raises ValueError for a source that is unknown,
      and for data where ``written`` is None.
    """
    shape: dict[str, Any] = {"max_tokens": max_tokens, "eos_id": eos_id, "pad_id": pad_id}
    filters: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    @functools.partial(jax.jit, static_argnames=("num", "greedy", "mixed"))
    def run(key, params, other, prompt, prompt_mask, *, num, greedy, mixed):
        models = [_model(p, frozen) for p in ((params, other) if mixed else (params,))]
        room = {"num_candidates": num, "max_tokens": max_tokens}
        begun = [model.prefill(prompt, prompt_mask, **room) for model in models]
        models = [model.unstacked() for model in models]

        def blend(logits: list[Array]) -> Array:
            return geometric_mixture_logits(*logits, mixture=mixture) if mixed else logits[0]

        def step(token, caches):
            stepped = [model.decode_step(token, cache) for model, cache in zip(models, caches, strict=True)]
            return blend([logits for logits, _ in stepped]), tuple(cache for _, cache in stepped)

        first, caches = blend([logits for logits, _ in begun]), tuple(cache for _, cache in begun)
        how = {"temperature": 0.0} if greedy else filters
        return decode(key, first, caches, step, num_candidates=num, **shape, **how)

    def sample(key: PRNGKey, players: Players, source: str, prompts: Candidates, num: int) -> Candidates:
        check_choice("source", source, SOURCES)
        if source in ("data", "corpus"):
            if written is None:
                raise ValueError(f"written must be given for the source {source!r}, got None")
            return written(key, source, prompts, num)
        others = {"previous": players.previous, "reference": players.reference, "initial": players.initial}
        mixed = source == "mixture"
        params = others.get(source, players.state.params)
        other = players.reference if mixed else None
        how = {"num": num, "greedy": source == "greedy", "mixed": mixed}
        drawn = run(key, params, other, prompts.prompt, prompts.prompt_mask, **how)
        return Candidates(
            prompt=prompts.prompt,
            prompt_mask=prompts.prompt_mask,
            completion=drawn.completion,
            completion_mask=drawn.completion_mask,
            old_token_logp=drawn.sampled_token_logp,
        )

    return sample


def kl_along_prefixes(
    params: Params, ref_params: Params, candidates: Candidates, *, frozen: Params = None, temperature: float = 1.0
) -> dict[str, Average]:
    r"""KL of the policy to the reference per completion: exact at every sampled prefix, and its estimators beside it.

    .. math:: \sum_t \mathrm{KL}\left( \pi(\cdot | y_{<t}) \,\|\, p_\text{ref}(\cdot | y_{<t}) \right)

    over the real tokens of a completion, the whole vocabulary at each. On completions of the policy its mean is the KL
    of whole completions, as is that of ``k1`` and ``k3``, with less noise.

    Args:
      params: The policy's.
      ref_params: The reference's.
      candidates: Drawn by the policy.
      frozen: As in `model_view`.
      temperature: Of both.

    Returns:
      ``kl`` and the sums over tokens ``k1``, ``k2`` and ``k3``, nats per completion, over the candidates that count.
    """
    mask = candidates.completion_mask
    if candidates.where is not None:
        mask = mask & candidates.where[..., None]
    asked = (candidates.prompt, candidates.prompt_mask, candidates.completion)
    models = [_model(p, frozen) for p in (params, ref_params)]
    states = [(model.hidden(*asked), model.projection()) for model in models]
    options: dict[str, Any] = {"temperature": temperature, "dtype": models[0].config.compute_dtype}
    ours, theirs = (token_logp(*state, candidates.completion, **options).logp for state in states)
    exact = jnp.where(mask, chunked_kl(*states[0], *states[1], **options), 0)
    each = {
        "kl": exact,
        "k1": kl_k1(ours, theirs, mask),
        "k2": kl_k2(ours, theirs, mask),
        "k3": kl_k3(ours, theirs, mask),
    }
    real = jnp.any(mask, axis=-1)
    return {name: average(masked_sum(value, mask), real) for name, value in each.items()}
