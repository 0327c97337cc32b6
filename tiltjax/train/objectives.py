"""Where models meet losses: ``kernel(logp, candidates)`` becomes the loss function of a train step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tiltjax.data.candidates import Candidates, learned, token_mask
from tiltjax.data.packing import Sequences
from tiltjax.models.lora import combine
from tiltjax.ops.masked import Average, average, masked_mean
from tiltjax.ops.tokens import sequence_logp
from tiltjax.train.method import Batch, Method, View
from tiltjax.types import Array, Bool, Float, Numeric, Params, PRNGKey

__all__ = [
    "Kernel",
    "candidate_weights",
    "likelihood_objective",
    "packed_objective",
    "sft_objective",
]

Kernel = Callable[[Float[Array, "B N"], Candidates], tuple[Float[Array, " B"], Mapping[str, Float[Array, " B"]]]]
"""``(logp, candidates) -> (loss per prompt, metrics per prompt)``."""


def likelihood_objective(kernel: Kernel, *, temperature: float = 1.0) -> Callable:
    """A `tiltjax.train.step.LossFn` from a kernel on sequence log-probabilities.

    Args:
      kernel: Its values are averaged over prompts.
      temperature: At which the policy's log-probabilities are taken: that at which the candidates were drawn. What a
        filter left to their sampler (`Candidates.support`) restricts the policy too.

    Returns:
      ``(params, frozen, candidates, key) -> (Average, metrics)``; ``frozen`` is the other half of
      `tiltjax.models.lora.partition`, or None.
    """

    def loss_fn(params: Params, frozen: Params, batch: Candidates, key: PRNGKey):
        batch = _counting(batch)
        logp = _logp(params, frozen, batch, temperature)
        values, metrics = kernel(logp, batch)
        real = _real(batch)
        metrics = {**metrics, "logp": masked_mean(logp, batch.where)}
        return average(values, real), {name: average(value, real) for name, value in metrics.items()}

    return loss_fn


def candidate_weights(method: Method, batch: Batch, *, beta: Numeric) -> Float[Array, "B N"]:
    r"""What a record that is linear in the log-probabilities weighs each candidate by.

    .. math:: w_{bn} = -\frac{\partial \mathcal L}{\partial \log \pi(y_{bn})}, \qquad
              \mathcal L = -\sum_{bn} w_{bn} \log \pi(y_{bn})

    Args:
      method: A record whose `Method.linear` is True.
      batch: Labelled candidates.
      beta: Strength of the KL term, as of `Method.own_beta`.

    Returns:
      Weights of the sum over prompts; 0 of what does not count.

    Raises:
      ValueError: If the loss is not linear.
    """
    mask = token_mask(batch.candidates)
    first = mask & (jnp.cumsum(mask, axis=-1) == 1)

    def loss(logp):
        token_logp = jnp.where(first, logp[..., None], 0.0)  # A completion's whole log-probability is on one token.
        zeros = jnp.zeros_like(token_logp)
        return method.loss(View(token_logp=token_logp, entropy=zeros, self_certainty=zeros), batch, beta).total

    zeros = jnp.zeros(mask.shape[:2])
    apart = -jnp.arange(zeros.size, dtype=zeros.dtype).reshape(zeros.shape)
    weights, elsewhere = (jax.grad(loss)(logp) for logp in (zeros, apart))
    if not method.linear or not jnp.allclose(weights, elsewhere):
        raise ValueError(f"method must be linear in the log-probabilities, such as sft; {method.name} is not")
    return -weights


def packed_objective(*, temperature: float = 1.0) -> Callable:
    r"""The loss of a likelihood method, per prompt, on packed sequences.

    .. math:: \mathcal L = -\frac{1}{B} \sum_{bn} w_{bn} \log \pi(y_{bn} \mid x_b)

    On what `tiltjax.data.packing.pack_sequences` makes of candidates and their `candidate_weights`, loss and gradient
    are those of `likelihood_objective` on the candidates, if no filter drew them.

    Args:
      temperature: At which the policy's log-probabilities are taken.

    Returns:
      ``(params, frozen, sequences, key) -> (Average, metrics)``, as of `likelihood_objective`. The metric ``logp`` is
      the mean by the weights: of the candidates that count.
    """

    def loss_fn(params: Params, frozen: Params, batch: Sequences, key: PRNGKey):
        model = params if frozen is None else combine(params, frozen)
        logp = model.score_sequences(batch.token, batch.segment, temperature=temperature).logp
        weight = batch.weight[:, 1:]
        total, prompts = jnp.sum(jnp.where(weight != 0, weight * logp, 0)), jnp.sum(batch.count)
        return Average(total=-total, count=prompts), {"logp": Average(total=total, count=jnp.sum(batch.mass))}

    return loss_fn


def sft_objective() -> Callable:
    """Supervised fine-tuning averaged over tokens: ``-sum logp / number of completion tokens`` of the whole batch."""

    def loss_fn(params: Params, frozen: Params, batch: Candidates, key: PRNGKey):
        mask, where = token_mask(batch), learned(batch)
        mask = mask if where is None else mask & where[..., None]
        return average(-_token_logp(params, frozen, batch, 1.0), mask), {}

    return loss_fn


def _logp(params: Params, frozen: Params, batch: Candidates, temperature: float) -> Float[Array, "B N"]:
    return sequence_logp(_token_logp(params, frozen, batch, temperature), token_mask(batch))


def _token_logp(params: Params, frozen: Params, batch: Candidates, temperature: float) -> Float[Array, "B N T"]:
    model = params if frozen is None else combine(params, frozen)
    law: dict[str, Any] = {"temperature": temperature, "support": batch.support}
    return model.score(batch.prompt, batch.prompt_mask, batch.completion, **law).logp


def _counting(batch: Candidates) -> Candidates:
    """Only the candidates with a token to learn from count."""
    return dataclasses.replace(batch, where=learned(batch))


def _real(batch: Candidates) -> Bool[Array, " B"] | None:
    return None if batch.where is None else jnp.any(batch.where, axis=-1)
