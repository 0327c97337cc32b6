"""Methods that imitate: likelihood with weights that are never negative."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tiltjax.advantages import leave_one_out
from tiltjax.losses import mle
from tiltjax.ops.masked import Average, average, masked_mean
from tiltjax.samplers.resample import resample
from tiltjax.tilt.partition import leave_one_out_log_partition
from tiltjax.tilt.weights import tilt
from tiltjax.train.method import Batch, Method, Round, View
from tiltjax.train.methods.labels import chosen, implied, logp_of, own, per_completion, select
from tiltjax.types import Array, Numeric

__all__ = ["LIKELIHOOD", "resampled"]

JIAO = "Jiao, Chen, Li, 2025, arXiv:2509.04372"
DU = "Du et al., 2025, arXiv:2502.11026"


def sft(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """Every candidate alike."""
    return mle.sft_loss(logp, where=batch.where)


def tilted(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """Weights of the tilt."""
    return mle.tilted_mle_loss(logp, batch.reward, beta=beta, where=batch.where)


def best(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """The best candidate only."""
    return mle.best_of_n_sft_loss(logp, batch.reward, where=batch.where)


def right(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """Candidates above their prompt's mean reward, alike."""
    mean = jnp.mean(batch.reward, axis=-1, keepdims=True)
    weights = (batch.where & (batch.reward > mean)).astype(logp.dtype)
    return mle.weighted_mle_loss(logp, weights, where=batch.where) / jnp.maximum(jnp.sum(weights, axis=-1), 1)


def var_importance(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """Importance weights, with log Z from the other candidates of the prompt."""
    log_z = leave_one_out_log_partition(batch.reward, beta=beta, where=batch.where)
    pairs = (logp[..., None], batch.reward[..., None], log_z)
    return masked_mean(mle.var_importance_loss(*pairs, beta=beta, where=batch.where[..., None]), batch.where)


def var(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """As printed: the weight of the prompt's own completion among those of the mini-batch."""
    first, ref_logp = jnp.zeros(logp.shape[:1], jnp.int32), logp_of(batch.ref, batch)
    return mle.var_loss(logp[:, 0], ref_logp, batch.reward, beta=beta, matched=first, where=batch.where)


def var_measures(view: View, batch: Batch, beta: Numeric) -> dict[str, Average]:
    """The weights of `var` and how far they are from 1, where it is SFT."""
    where = own(batch.where)
    matched = jnp.zeros(where.shape, jnp.int32)
    weights = mle.var_weights(logp_of(batch.ref, batch), batch.reward, beta=beta, matched=matched, where=batch.where)
    return {"weight": average(weights, where), "weight_below_1": average(jnp.abs(weights - 1), where)}


def resampled(method: Method, num: int) -> Method:
    """The record that fits what resampling by the weights of the tilt leaves, every candidate alike.

    Its loss has the mean of ``method``'s, with more noise, and ``num`` candidates in place of N to compute.

    Args:
      method: A record of the tilt that weighs all candidates, such as ``tilted_mle``.
      num: Candidates per prompt, drawn with replacement.

    Returns:
      The record under the same name.
    """

    def label(now: Round, batch: Batch) -> Batch:
        weights = tilt(batch.reward, beta=now.beta, where=batch.where).weights
        return select(batch, resample(now.key, weights, num=num))

    return dataclasses.replace(method, loss=per_completion(sft), label=label)


def rwr(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """Normalised over the whole batch."""
    flat = (x.reshape(-1) for x in (logp, batch.reward))
    where = batch.where.reshape(-1)
    return mle.reward_weighted_regression_loss(*flat, beta=beta, where=where).reshape(logp.shape)


def awr(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """The value of a prompt is the mean of its other candidates."""
    advantage, where = jax.lax.stop_gradient(leave_one_out(batch.reward, batch.where)), batch.where
    return masked_mean(mle.advantage_weighted_regression_loss(logp, advantage, beta=beta, where=where), where)


OFFLINE = (("initial", 16),)
ONLINE = (("current", 16),)

_ONCE: dict[str, Any] = {"rounds": 1, "reads_reference": False, "reads_old": False}
"""Of records that weigh candidates of the reference or demonstrations, and ask no policy about them."""

LIKELIHOOD = (
    Method("sft", "Ouyang et al., 2022, arXiv:2203.02155", per_completion(sft), (("data", 1),), "demonstrations",
           zero_beta=True, linear=True, learning_rate=2e-5, **_ONCE),
    Method("preferred_ft", "Rafailov et al., 2023, arXiv:2305.18290", per_completion(sft), (("initial", 2),),
           "preference", label=chosen, zero_beta=True, linear=True, learning_rate=1e-6, optimum="none", **_ONCE),
    Method("tilted_mle", JIAO, per_completion(tilted), OFFLINE, linear=True, **_ONCE),
    Method("iterated_tilted_mle", JIAO, per_completion(tilted), ONLINE, label=implied, rounds=4),
    Method("online_tilted_mle", JIAO, per_completion(tilted), ONLINE, label=implied),
    Method("var_importance", DU, per_completion(var_importance), OFFLINE, linear=True, learning_rate=1e-6, **_ONCE),
    Method("iterated_var_importance", DU, per_completion(var_importance), ONLINE, label=implied, rounds=4,
           learning_rate=1e-6),
    Method("online_var_importance", DU, per_completion(var_importance), ONLINE, label=implied, learning_rate=1e-6),
    Method("var", DU, per_completion(var, counts=own), (("initial", 1),), cross=8, learning_rate=1e-6, optimum="none",
           measures=var_measures, **_ONCE | {"reads_reference": True}),
    Method("best_of_n_sft", "Dong et al., 2023, arXiv:2304.06767", per_completion(best), OFFLINE, zero_beta=True,
           linear=True, optimum="none", **_ONCE),
    Method("raft", "Dong et al., 2023, arXiv:2304.06767", per_completion(best), ONLINE, rounds=8,
           reads_reference=False, zero_beta=True, optimum="none", learning_rate=2e-5),
    Method("expert_iteration", "Singh et al., 2023, arXiv:2312.06585", per_completion(right), ONLINE, rounds=4,
           reads_reference=False, zero_beta=True, optimum="none"),
    Method("rwr", "Peters, Schaal, 2007, ICML", per_completion(rwr), OFFLINE, couples_prompts=True, **_ONCE),
    Method("awr", "Peng et al., 2019, arXiv:1910.00177", per_completion(awr), OFFLINE, linear=True, beta=0.05, **_ONCE),
)  # fmt: skip
"""SFT, on the chosen of pairs as well, weighted maximum likelihood and rejection sampling, each at its own pace."""
