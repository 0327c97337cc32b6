"""Where models meet losses: ``kernel(logp, candidates)`` becomes the loss function of a train step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tiltjax.data.candidates import Candidates, learned, token_mask
from tiltjax.data.packing import Sequences
from tiltjax.losses import mle, preference
from tiltjax.models.lora import combine
from tiltjax.ops.masked import Average, average, masked_mean
from tiltjax.ops.tokens import sequence_logp
from tiltjax.tilt.partition import leave_one_out_log_partition
from tiltjax.types import Array, Bool, Float, Int, Params, PRNGKey

__all__ = [
    "Kernel",
    "VarBatch",
    "candidate_weights",
    "likelihood_objective",
    "method_kernel",
    "packed_objective",
    "sft_objective",
    "var_objective",
]

Kernel = Callable[[Float[Array, "B N"], Candidates], tuple[Float[Array, " B"], Mapping[str, Float[Array, " B"]]]]
"""``(logp, candidates) -> (loss per prompt, metrics per prompt)``."""


def method_kernel(method: str, *, beta: float) -> Kernel:
    """The kernel of a method that needs log-probabilities, rewards and reference log-probabilities only.

    Args:
      method: "sft" (resampled candidates, all alike), "tilted_mle", "best_of_n_sft", "var_importance", or "dpo" (the
        two candidates are chosen and rejected).
      beta: Strength of the KL term, reward units.

    Returns:
      `Kernel`.

    Raises:
      ValueError: If the method is unknown.
    """

    def sft(logp, batch):
        return mle.sft_loss(logp, where=batch.where), {}

    def tilted_mle(logp, batch):
        return mle.tilted_mle_loss(logp, batch.reward, beta=beta, where=batch.where), {}

    def best_of_n_sft(logp, batch):
        return mle.best_of_n_sft_loss(logp, batch.reward, where=batch.where), {}

    def var_importance(logp, batch):
        # log Z from the other candidates: a weight and its normaliser are independent.
        log_z = leave_one_out_log_partition(batch.reward, beta=beta, where=batch.where)
        where = None if batch.where is None else batch.where[..., None]
        values = mle.var_importance_loss(logp[..., None], batch.reward[..., None], log_z, beta=beta, where=where)
        return masked_mean(values, batch.where), {}

    def dpo(logp, batch):
        chosen, rejected = jnp.moveaxis(preference.implicit_reward(logp, batch.ref_logp, beta=beta), -1, 0)
        metrics = {"margin": chosen - rejected, "accuracy": jnp.asarray(chosen > rejected, logp.dtype)}
        return preference.dpo_loss(logp, batch.ref_logp, beta=beta, where=batch.where), metrics

    kernels = {k.__name__: k for k in (sft, tilted_mle, best_of_n_sft, dpo, var_importance)}
    if method not in kernels:
        raise ValueError(f"method must be one of {', '.join(kernels)}; got {method!r}")
    return kernels[method]


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


def candidate_weights(kernel: Kernel, batch: Candidates) -> Float[Array, "B N"]:
    r"""What a likelihood method weighs each candidate by.

    .. math:: w_{bn} = -\frac{\partial \mathcal L_b}{\partial \log \pi(y_{bn})}, \qquad
              \mathcal L_b = -\sum_n w_{bn} \log \pi(y_{bn})

    Args:
      kernel: Linear in the log-probabilities: of "sft", "tilted_mle", "best_of_n_sft" or "var_importance".
      batch: Candidates with what the kernel reads of them.

    Returns:
      Weights; 0 of what is masked.

    Raises:
      ValueError: If the kernel is not linear.
    """
    batch = _counting(batch)

    def loss(logp):
        return jnp.sum(kernel(logp, batch)[0])

    zeros = jnp.zeros(batch.completion.shape[:2])
    apart = -jnp.arange(zeros.size, dtype=zeros.dtype).reshape(zeros.shape)
    weights, elsewhere = (jax.grad(loss)(logp) for logp in (zeros, apart))
    if not jnp.allclose(weights, elsewhere):
        raise ValueError("kernel must be linear in the log-probabilities, such as that of sft; this one is not")
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


@chex.dataclass(frozen=True, mappable_dataclass=False)
class VarBatch:
    """A mini-batch for VAR as printed: every completion of the batch scored under every prompt of it.

    Attributes:
      candidates: B prompts with N completions each.
      ref_logp: ``[B, N, B]``: entry [i, n, j] is candidate n of prompt j under prompt i, nats.
      reward: Likewise, reward units.
      own: ``[B]``: the ``j`` that is prompt i itself, whatever part of the mini-batch a device or microbatch holds.
      where: Which of them count, ``[B, N, B]``; None means all.
    """

    candidates: Candidates
    ref_logp: Float[Array, "B N M"]
    reward: Float[Array, "B N M"]
    own: Int[Array, " B"]
    where: Bool[Array, "B N M"] | None = None


def var_objective(*, beta: float, temperature: float = 1.0) -> Callable:
    """VAR as printed (in-batch log Z, the reference inside the weight), one mini-batch per candidate index.

    Args:
      beta: Strength of the KL term, reward units.
      temperature: As in `likelihood_objective`.

    Returns:
      A `tiltjax.train.step.LossFn` on `VarBatch`; logs the mean weight and its distance from 1, which is SFT.
    """

    def loss_fn(params: Params, frozen: Params, batch: VarBatch, key: PRNGKey):
        logp = _logp(params, frozen, batch.candidates, temperature).T
        cross = (jnp.moveaxis(batch.ref_logp, 1, 0), jnp.moveaxis(batch.reward, 1, 0))
        where = None if batch.where is None else jnp.moveaxis(batch.where, 1, 0)
        own = jnp.broadcast_to(batch.own, logp.shape)
        values = mle.var_loss(logp, *cross, beta=beta, matched=own, where=where)
        weights = mle.var_weights(*cross, beta=beta, matched=own, where=where)
        real = None if where is None else jnp.take_along_axis(where, own[..., None], axis=-1)[..., 0]
        measured = {"weight": weights, "weight_below_1": jnp.abs(weights - 1), "logp": logp}
        return average(values, real), {name: average(value, real) for name, value in measured.items()}

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
