"""Methods that imitate: likelihood with weights that are never negative."""

import jax
import jax.numpy as jnp

from tiltjax.advantages import leave_one_out
from tiltjax.losses import mle
from tiltjax.tilt.partition import leave_one_out_log_partition
from tiltjax.train.method import Batch, Method
from tiltjax.train.methods.labels import chosen, implied, logp_of, own, per_completion
from tiltjax.types import Array, Numeric

__all__ = ["LIKELIHOOD"]

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
    return mle.var_importance_loss(*pairs, beta=beta, where=batch.where[..., None])


def var(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """As printed: the weight of the prompt's own completion among those of the mini-batch."""
    first, ref_logp = jnp.zeros(logp.shape[:1], jnp.int32), logp_of(batch.ref, batch)
    return mle.var_loss(logp[:, 0], ref_logp, batch.reward, beta=beta, matched=first, where=batch.where)


def rwr(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """Normalised over the whole batch."""
    flat = (x.reshape(-1) for x in (logp, batch.reward))
    where = batch.where.reshape(-1)
    return mle.reward_weighted_regression_loss(*flat, beta=beta, where=where).reshape(logp.shape)


def awr(logp: Array, batch: Batch, beta: Numeric) -> Array:
    """The value of a prompt is the mean of its other candidates."""
    advantage = leave_one_out(batch.reward, batch.where)
    return mle.advantage_weighted_regression_loss(logp, jax.lax.stop_gradient(advantage), beta=beta, where=batch.where)


OFFLINE = (("initial", 16),)
ONLINE = (("current", 16),)

LIKELIHOOD = (
    Method("sft", "Ouyang et al., 2022, arXiv:2203.02155", per_completion(sft), (("data", 1),), "demonstrations",
           rounds=1, reads_reference=False, zero_beta=True, learning_rate=2e-5),
    Method("preferred_ft", "Rafailov et al., 2023, arXiv:2305.18290", per_completion(sft), (("initial", 2),),
           "preference", label=chosen, rounds=1, reads_reference=False, zero_beta=True, learning_rate=1e-6,
           optimum="none"),
    Method("tilted_mle_offline", JIAO, per_completion(tilted), OFFLINE, rounds=1, reads_reference=False),
    Method("tilted_mle_iterated", JIAO, per_completion(tilted), ONLINE, label=implied, rounds=4),
    Method("tilted_mle", JIAO, per_completion(tilted), ONLINE, label=implied),
    Method("var_offline", DU, per_completion(var_importance), OFFLINE, rounds=1, reads_reference=False,
           learning_rate=1e-6),
    Method("var_iterated", DU, per_completion(var_importance), ONLINE, label=implied, rounds=4, learning_rate=1e-6),
    Method("var", DU, per_completion(var_importance), ONLINE, label=implied, learning_rate=1e-6),
    Method("var_printed", DU, per_completion(var, counts=own), (("initial", 1),), rounds=1, cross=8, learning_rate=1e-6,
           optimum="none"),
    Method("best_of_n_sft", "Dong et al., 2023, arXiv:2304.06767", per_completion(best), OFFLINE, rounds=1,
           reads_reference=False, zero_beta=True, optimum="none"),
    Method("raft", "Dong et al., 2023, arXiv:2304.06767", per_completion(best), ONLINE, rounds=8,
           reads_reference=False, zero_beta=True, optimum="none", learning_rate=2e-5),
    Method("expert_iteration", "Singh et al., 2023, arXiv:2312.06585", per_completion(right), ONLINE, rounds=4,
           reads_reference=False, zero_beta=True, optimum="none"),
    Method("rwr", "Peters, Schaal, 2007, ICML", per_completion(rwr), OFFLINE, rounds=1, reads_reference=False),
    Method("awr", "Peng et al., 2019, arXiv:1910.00177", per_completion(awr), OFFLINE, rounds=1, reads_reference=False,
           beta=0.05),
)  # fmt: skip
"""SFT, on the chosen of pairs as well, weighted maximum likelihood and rejection sampling, each at its own pace."""
