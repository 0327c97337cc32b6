"""Reward models of seven kinds: what each reads off a model, the loss of its labels, and the reward it becomes.

    kind         reads                                     learns from             log-odds of a comparison
    global       a head at the last token                  comparisons             r_0 - r_1
    local        beta log pi, without a reference          comparisons             r_0 - r_1
    dpo          beta (log pi - log ref)                   comparisons             r_0 - r_1
    outcome      a head at the last token                  right or wrong          r_0 - r_1, as log-odds of being right
    process      a head at the last token of every step    right or wrong steps    that of the aggregated steps
    preference   two heads at the last token               comparisons             `preference_logits`, cycles included
    cost         a head at the last token                  comparisons and harm    c_1 - c_0; the reward is -c

Every number here is of one batch of `Labelled`; the loss is averaged by `tiltjax.train.step.train_step`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tiltjax.data.candidates import Candidates, token_mask
from tiltjax.losses import preference, reward_model
from tiltjax.losses.process import aggregate_steps
from tiltjax.models import lora
from tiltjax.models.heads import RewardModel, preference_logits
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.ops.masked import as_float, average, masked_mean
from tiltjax.ops.tokens import sequence_logp
from tiltjax.types import Array, Bool, Float, Int, Params, PRNGKey

__all__ = [
    "AGGREGATES",
    "KINDS",
    "LIKELIHOOD",
    "WITH_MARGIN",
    "Labelled",
    "Reading",
    "RewardSpec",
    "make_reader",
    "make_reward",
    "new_model",
    "read",
    "reward_objective",
    "step_ends",
]

KINDS = ("global", "local", "dpo", "outcome", "process", "preference", "cost")
"""What a reward model can be."""

LIKELIHOOD = ("local", "dpo")
"""Kinds that read a policy's likelihood, and need no head."""

AGGREGATES = ("last", "min", "mean")
"""How the scores of steps become one."""

WITH_MARGIN = ("global", "preference")
"""Kinds whose loss takes a margin."""


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """What a trained model means; kept beside it.

    Attributes:
      kind: One of `KINDS`.
      beta: Reward units per nat, of the kinds that read a likelihood.
      offset: Subtracted from every reward, so that those of the training completions average 0.
      reference: Of kind "dpo": the policy that the log-ratio is taken to, as on the command line.
      step_tokens: Of kind "process": a step ends after every so many tokens; 0 for steps that end by ``separators``.
      separators: Of kind "process": tokens that end a step. The last real token always does.
      aggregate: Of kind "process": how the scores of steps become one, of `AGGREGATES`.
    """

    kind: str
    beta: float = 1.0
    offset: float = 0.0
    reference: str = ""
    step_tokens: int = 0
    separators: tuple[int, ...] = ()
    aggregate: str = "last"

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_positive("beta", self.beta)
        check_at_least("step_tokens", self.step_tokens, 0)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Labelled:
    """Candidates and what is known about them; every array has a leading axis of prompts.

    Attributes:
      candidates: B prompts with N completions; ``ref_logp`` for kind "dpo".
      pair: Comparisons: places in ``[0, N)`` of the chosen and of the rejected one, ``[B, P, 2]``.
      pair_where: True for real comparisons, ``[B, P]``.
      label: Whether a completion is right (of kind "cost": harmful), ``[B, N]``.
      margin: Of kinds "global" and "preference": by how much the chosen one of a comparison should lead, >= 0, reward
        units, ``[B, P]``. None is 0.
      step_label: 1 or 0 where a good or a bad step ends, -100 elsewhere, ``[B, N, T]``.
    """

    candidates: Candidates
    pair: Int[Array, "B P 2"] | None = None
    pair_where: Bool[Array, "B P"] | None = None
    label: Bool[Array, "B N"] | None = None
    margin: Float[Array, "B P"] | None = None
    step_label: Int[Array, "B N T"] | None = None


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Reading:
    """What a model says about a batch, held to its labels.

    Attributes:
      reward: Higher is better, the offset not subtracted, ``[B, N]``.
      loss: What is trained, per prompt, nats, ``[B]``.
      nll: Of the labels of the kind, per label, nats, ``[B]``; without centring and margin.
      accuracy: Share of labels that the model would have given, ties counted as wrong, ``[B]``.
      where: True for prompts that have a label, ``[B]``.
    """

    reward: Float[Array, "B N"]
    loss: Float[Array, " B"]
    nll: Float[Array, " B"]
    accuracy: Float[Array, " B"]
    where: Bool[Array, " B"]


def new_model(spec: RewardSpec, backbone: Transformer) -> Transformer | RewardModel:
    """The untrained model of a kind: the backbone itself, or one or two heads on it.

    Args:
      spec: What it is to mean.
      backbone: A policy, with adapters or without.

    Returns:
      The model; its heads are 0.
    """
    if spec.kind in LIKELIHOOD:
        return backbone
    return RewardModel(backbone, num_heads=2 if spec.kind == "preference" else 1)


def step_ends(spec: RewardSpec, completion: Int[Array, "B N T"], mask: Bool[Array, "B N T"]) -> Bool[Array, "B N T"]:
    """Where a step of a completion ends.

    Args:
      spec: By tokens or by separators.
      completion: Tokens.
      mask: True on real tokens.

    Returns:
      True at the last token of every step, the last real token included.
    """
    T = completion.shape[-1]
    place = jnp.arange(T).reshape(1, 1, T)
    ends = place == jnp.sum(mask, axis=-1, keepdims=True) - 1
    if spec.step_tokens:
        ends |= (place + 1) % spec.step_tokens == 0
    if spec.separators:
        ends |= jnp.isin(completion, jnp.array(spec.separators))
    return ends & mask


def make_reward(spec: RewardSpec) -> Callable[[Any, Candidates], Float[Array, "B N"]]:
    """``(model, candidates) -> reward``, jitted.

    Args:
      spec: What the model means.

    Returns:
      A function whose result is what `Reading` calls ``reward``. Of kind "dpo" the reference's part is left out where
      the candidates have no ``ref_logp``; of kind "preference" it is the mean log-odds against the N candidates of the
      prompt, itself among them, which under Bradley-Terry is the reward less the mean of the N.
    """
    return jax.jit(lambda model, candidates: _reward(spec, _outputs(spec, model, candidates), candidates))


def make_reader(spec: RewardSpec) -> Callable[[Any, Labelled], Reading]:
    """``(model, batch) -> Reading``, jitted.

    Args:
      spec: What the model means.
    """
    return jax.jit(lambda model, batch: read(spec, model, batch))


def read(spec: RewardSpec, model: Any, batch: Labelled, *, centring: float = 0.0) -> Reading:
    """One forward pass: the rewards of a batch, and the loss, likelihood and accuracy of its labels.

    Args:
      spec: What the model means.
      model: From `new_model`, trained or not.
      batch: With the labels of its kind: comparisons, ``label``, or ``step_label``.
      centring: Of kind "global", see `tiltjax.losses.reward_model.bradley_terry_loss`.

    Returns:
      `Reading`.

    Raises:
      ValueError: If the labels of the kind, or of kind "dpo" the reference's log-probabilities, are not there.
    """
    outputs = _outputs(spec, model, batch.candidates)
    reward = _reward(spec, outputs, batch.candidates)
    if spec.kind == "process":
        wanted = _given(spec, "step_label", batch.step_label)
        label, where = reward_model.labelled_steps(wanted)
        nll = reward_model.process_loss(outputs, label, where=where)
        right = masked_mean(as_float((outputs > 0) == (label > 0)), where)
        return _reading(reward, nll, nll, right, jnp.any(where, axis=-1))
    if spec.kind == "outcome":
        right = _given(spec, "label", batch.label)
        nll = reward_model.outcome_loss(outputs, right)
        real = jnp.full(right.shape, True) if batch.candidates.where is None else batch.candidates.where
        return _reading(reward, nll, nll, as_float((outputs > 0) == right), real)
    pair, real = _given(spec, "pair", batch.pair), _given(spec, "pair_where", batch.pair_where)
    both = jnp.stack([real, real], axis=-1)
    if spec.kind == "preference":
        logits = jax.vmap(lambda x, at: x[at[:, 0], at[:, 1]])(preference_logits(outputs), pair)
        against = jnp.stack([logits, jnp.zeros_like(logits)], axis=-1)
        nll = reward_model.bradley_terry_loss(against, where=both)
        loss = reward_model.bradley_terry_loss(against, margin=batch.margin, where=both)
        return _reading(reward, loss, nll, as_float(logits > 0), real)
    chosen = jax.vmap(lambda x, at: x[at])(outputs, pair)
    rewards = jax.vmap(lambda x, at: x[at])(reward, pair)
    nll = reward_model.bradley_terry_loss(rewards, where=both)
    if spec.kind == "local":
        loss = preference.local_reward_loss(chosen, beta=spec.beta, where=both)
    elif spec.kind == "dpo":
        ref_logp = jax.vmap(lambda x, at: x[at])(_given(spec, "ref_logp", batch.candidates.ref_logp), pair)
        loss = preference.dpo_loss(chosen, ref_logp, beta=spec.beta, where=both)
    elif spec.kind == "cost":
        harmful = jax.vmap(lambda x, at: x[at])(_given(spec, "label", batch.label), pair)
        loss = reward_model.cost_model_loss(chosen, harmful, where=both)
    else:
        loss = reward_model.bradley_terry_loss(chosen, margin=batch.margin, centring=centring, where=both)
    return _reading(reward, loss, nll, as_float(rewards[..., 0] > rewards[..., 1]), real)


def reward_objective(spec: RewardSpec, *, centring: float = 0.0) -> Callable:
    """A `tiltjax.train.step.LossFn` on `Labelled`: the mean over prompts of the mean over a prompt's labels.

    Args:
      spec: What the model means.
      centring: See `read`.

    Returns:
      ``(params, frozen, batch, key) -> (Average, metrics)``; ``frozen`` is the other half of
      `tiltjax.models.lora.partition` by `tiltjax.models.heads.is_trainable`, or None.
    """

    def loss_fn(params: Params, frozen: Params, batch: Labelled, key: PRNGKey):
        model = params if frozen is None else lora.combine(params, frozen)
        out = read(spec, model, batch, centring=centring)
        reward = masked_mean(out.reward, batch.candidates.where)
        metrics = {"nll": average(out.nll, out.where), "accuracy": average(out.accuracy, out.where)}
        return average(out.loss, out.where), {**metrics, "reward": average(reward, out.where)}

    return loss_fn


def _outputs(spec: RewardSpec, model: Any, batch: Candidates) -> Array:
    """Log-probabilities ``[B, N]``, scores of every token ``[B, N, T]``, or after the last one."""
    asked = (batch.prompt, batch.prompt_mask, batch.completion)
    if spec.kind in LIKELIHOOD:
        return sequence_logp(model.score(*asked).logp, token_mask(batch))
    if spec.kind == "process":
        return model.scores(*asked)[..., 0]
    if spec.kind == "preference":
        return model.last(*asked, batch.completion_mask)
    return model.reward(*asked, batch.completion_mask)


def _reward(spec: RewardSpec, outputs: Array, batch: Candidates) -> Array:
    if spec.kind == "process":
        ends = step_ends(spec, batch.completion, batch.completion_mask)
        return aggregate_steps(outputs, mode=spec.aggregate, where=ends)
    if spec.kind == "preference":
        logits = preference_logits(outputs)
        where = None if batch.where is None else jnp.broadcast_to(batch.where[:, None], logits.shape)
        return masked_mean(logits, where)
    if spec.kind == "cost":
        return -outputs
    if spec.kind == "dpo" and batch.ref_logp is not None:
        return spec.beta * (outputs - batch.ref_logp)
    return spec.beta * outputs if spec.kind in LIKELIHOOD else outputs


def _reading(reward: Array, loss: Array, nll: Array, right: Array, where: Array) -> Reading:
    """From one value per label ``[B, labels]``."""
    means = (masked_mean(x, where) for x in (loss, nll, right))
    return Reading(reward=reward, **dict(zip(("loss", "nll", "accuracy"), means, strict=True)), where=where.any(-1))


def _given(spec: RewardSpec, name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"{name} must be given for a reward model of kind {spec.kind!r}, got None")
    return value
