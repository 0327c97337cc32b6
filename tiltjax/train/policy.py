"""A `Transformer` as the policy of `tiltjax.train.method`: how its candidates are drawn, and what it says about them.

Parameters are the whole model, or, with ``frozen``, the trained part of `tiltjax.models.lora.partition`: then the
reference, the initial and the previous policy cost no more memory than their adapters.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tiltjax.data.candidates import Candidates, learned, token_mask
from tiltjax.losses.game import geometric_mixture_logits
from tiltjax.losses.penalties import kl_k1, kl_k2, kl_k3
from tiltjax.models.lora import combine, is_adapter, merge
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_choice
from tiltjax.ops.masked import Average, average, masked_sum
from tiltjax.ops.tokens import token_logp
from tiltjax.samplers.decode import Decoded, decode
from tiltjax.train import rounds
from tiltjax.train.method import SOURCES, Batch, Method, Players, Sample, View, ViewFn
from tiltjax.train.rollout import make_sampler, narrow
from tiltjax.types import Numeric, Params, PRNGKey

__all__ = ["at_work", "kl_along_prefixes", "model_objective", "model_sample", "model_view", "with_critics"]


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


def model_view(
    *, frozen: Params = None, temperature: float = 1.0, chunk: int = 3072, rows: int | None = None
) -> ViewFn:
    """How a `Transformer` sees candidates.

    Args:
      frozen: The other half of `tiltjax.models.lora.partition`, or None. Under `jax.jit` it is an argument of the
        compiled function from which this is called, lest a model become a constant of the program.
      temperature: At which candidates are drawn. Where a filter drew them, they say what it left
        (`Candidates.support`): log-probabilities are those of the law that drew, of whichever policy is asked. The set
        of tokens is the sampler's throughout, so a drawn token has a probability under every policy, and the gradient
        of a policy that just drew is that of its law.
      chunk: Vocabulary entries per step of `tiltjax.ops.tokens.token_logp`.
      rows: Most prompts at a time, to save memory: a batch that is a multiple of it goes through in parts. None is all.

    Returns:
      `ViewFn`; with values where the parameters are those of `with_critics`.
    """

    def look(params: Params, candidates: Candidates) -> View:
        model = _model(params, frozen)
        hidden = model.hidden(candidates.prompt, candidates.prompt_mask, candidates.completion)
        options: dict[str, Any] = {"temperature": temperature, "chunk": chunk, "dtype": model.config.compute_dtype}
        stats = token_logp(hidden, model.projection(), candidates.completion, support=candidates.support, **options)
        value = None
        if isinstance(params, dict):
            critic = params["critic"]
            value = hidden @ critic["kernel"] + critic["bias"].reshape(1, 1, 1, -1)
        return View(token_logp=stats.logp, entropy=stats.entropy, self_certainty=stats.self_certainty, value=value)

    def view(params: Params, candidates: Candidates) -> View:
        B = len(candidates.prompt)
        if rows is None or rows >= B or B % rows:
            return look(params, candidates)
        # Every part takes its rows from all of the batch, so that a batch that is split over devices stays where it is.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(rows, B // rows, *x.shape[1:]), 0, 1), candidates)
        seen = jax.lax.map(functools.partial(look, params), parts)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(B, *x.shape[2:]), seen)

    return view


def model_objective(method: Method, *, beta: Numeric) -> Callable:
    """The loss function of a train step of a `Transformer` on a `tiltjax.train.method.Batch`.

    Args:
      method: The record.
      beta: Strength of the KL term, as of `Method.own_beta`; may be traced.

    Returns:
      A `tiltjax.train.step.LossFn`, with the metrics of `tiltjax.train.rounds.objective`.
    """

    def loss_fn(params: Params, frozen: Params, batch: Batch, key: PRNGKey):
        view = model_view(frozen=frozen, temperature=method.temperature)
        return rounds.objective(method, view=view, beta=beta)(params, frozen, batch, key)

    return loss_fn


def at_work(players: Players, sources: Collection[str], *, frozen: Params = None) -> Players:
    """Merges adapters and casts weights once, for all draws of a round.

    Args:
      players: Policies.
      sources: Who is going to write, of `tiltjax.train.method.SOURCES`.
      frozen: As in `model_view`.

    Returns:
      The players that write as whole models without critics, their adapters merged and their matrices in the type
      that they are multiplied in; the others as they are. The candidates are the same up to that rounding.
    """
    ready = functools.partial(_ready, frozen=frozen)
    names = {"previous", "reference", "initial"} & {*sources, *(["reference"] if "mixture" in sources else [])}
    changes: dict[str, Any] = {name: ready(getattr(players, name)) for name in sorted(names)}
    if {"current", "greedy", "mixture"} & set(sources):
        changes["state"] = dataclasses.replace(players.state, params=ready(players.state.params))
    return dataclasses.replace(players, **changes)


def _ready(params: Params, frozen: Params) -> Transformer:
    model = _model(params, frozen)
    adapted = any(is_adapter(path) for path, _ in jax.tree_util.tree_leaves_with_path(model))
    return narrow(_merged(model) if adapted else model)


_merged = jax.jit(merge)


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
    slots: int | None = None,
    mesh: Mesh | None = None,
    written: Callable[[PRNGKey, str, Candidates, int], Candidates] | None = None,
) -> Sample:
    """How the candidates of a `Transformer` are drawn, by any player.

    Args:
      max_tokens: T.
      eos_id: Token (or tokens) that end a completion.
      pad_id: Fills the rest.
      frozen: As in `model_view`; None for the players of `at_work`.
      temperature: Softmax temperature.
      top_k: See `tiltjax.samplers.logits`.
      top_p: Likewise.
      mixture: Share of the reference in the source "mixture", token by token.
      slots: Candidates at a time, of all sources but "mixture"; see `tiltjax.train.rollout.make_sampler`.
      mesh: Likewise.
      written: ``(key, source, prompts, num) -> Candidates`` for the sources "data" and "corpus".

    Returns:
      `Sample`, one compilation per source and number, for calls from the host or under a trace. ``old_token_logp`` is
      that of the distribution that was drawn from, filters included, and ``support`` what they left. Raises ValueError
      for a source that is unknown, and for data where ``written`` is None.
    """
    shape: dict[str, Any] = {"max_tokens": max_tokens, "eos_id": eos_id, "pad_id": pad_id}
    filters: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    @functools.cache
    def alone(num: int, greedy: bool) -> Callable[..., Decoded]:
        how = {"temperature": 0.0} if greedy else filters
        return make_sampler(num_candidates=num, slots=slots, mesh=mesh, **shape, **how)

    @functools.partial(jax.jit, static_argnames="num")
    def mixed(key, models, prompt, prompt_mask, *, num):
        models = [model.cast(model.config.compute_dtype) for model in models]
        begun = [model.prefill(prompt, prompt_mask, num_candidates=num, max_tokens=max_tokens) for model in models]
        models = [model.unstacked(len(prompt) * num) for model in models]

        def step(token, caches):
            stepped = [model.decode_step(token, cache) for model, cache in zip(models, caches, strict=True)]
            logits, caches = zip(*stepped, strict=True)
            return geometric_mixture_logits(*logits, mixture=mixture), caches

        logits, caches = zip(*begun, strict=True)
        first = geometric_mixture_logits(*logits, mixture=mixture)
        return decode(key, first, caches, step, num_candidates=num, **shape, **filters)

    def sample(key: PRNGKey, players: Players, source: str, prompts: Candidates, num: int) -> Candidates:
        check_choice("source", source, SOURCES)
        if source in ("data", "corpus"):
            if written is None:
                raise ValueError(f"written must be given for the source {source!r}, got None")
            return written(key, source, prompts, num)
        others = {"previous": players.previous, "reference": players.reference, "initial": players.initial}
        model = _model(others.get(source, players.state.params), frozen)
        asked = (prompts.prompt, prompts.prompt_mask)
        if source == "mixture":
            drawn = mixed(key, [model, _model(players.reference, frozen)], *asked, num=num)
        else:
            drawn = alone(num, source == "greedy")(key, model, *asked)
        return Candidates(
            prompt=prompts.prompt,
            prompt_mask=prompts.prompt_mask,
            completion=drawn.completion,
            completion_mask=drawn.completion_mask,
            old_token_logp=drawn.sampled_token_logp,
            support=drawn.support,
        )

    return sample


def kl_along_prefixes(
    params: Params, ref_params: Params, candidates: Candidates, *, frozen: Params = None, temperature: float = 1.0
) -> dict[str, Average]:
    r"""KL of the policy to the reference per completion: exact at every sampled prefix, and its estimators beside it.

    .. math:: \sum_t \mathrm{KL}\left( \pi(\cdot | y_{<t}) \,\|\, p_\text{ref}(\cdot | y_{<t}) \right)

    over the tokens of a completion that are learned from, the whole vocabulary at each. On completions of the policy
    its mean is the KL of whole completions, as is that of ``k1`` and ``k3``, with less noise.

    Args:
      params: The policy's.
      ref_params: The reference's.
      candidates: Drawn by the policy.
      frozen: As in `model_view`.
      temperature: Of both.

    Returns:
      ``kl`` and the sums over tokens ``k1``, ``k2`` and ``k3``, nats per completion, over the candidates that count.
    """
    mask, where = token_mask(candidates), learned(candidates)
    mask = mask if where is None else mask & where[..., None]
    asked = (candidates.prompt, candidates.prompt_mask, candidates.completion)
    models = [_model(p, frozen) for p in (params, ref_params)]
    ours, theirs = ((model.hidden(*asked), model.projection()) for model in models)
    options: dict[str, Any] = {"temperature": temperature, "dtype": models[0].config.compute_dtype}
    stats = token_logp(*ours, candidates.completion, reference=theirs, support=candidates.support, **options)
    assert stats.kl is not None
    each = {
        "kl": jnp.where(mask, stats.kl, 0),
        "k1": kl_k1(stats.logp, stats.ref_logp, mask),
        "k2": kl_k2(stats.logp, stats.ref_logp, mask),
        "k3": kl_k3(stats.logp, stats.ref_logp, mask),
    }
    real = jnp.any(mask, axis=-1)
    return {name: average(masked_sum(value, mask), real) for name, value in each.items()}
