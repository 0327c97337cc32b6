"""Methods whose target is a preference: self-play, and regressions on a difference of rewards."""

from tiltjax.losses import game, regression
from tiltjax.losses.policy_gradient import aggregate, reinforce_loss
from tiltjax.ops.masked import Average, average
from tiltjax.train.method import Batch, Method, ReferenceUpdate, View
from tiltjax.train.methods.labels import (
    best_and_worst,
    chain,
    every,
    judged,
    left_out,
    logp_of,
    per_completion,
    regularised,
    surrogate,
    win_rates,
    win_rates_against,
)
from tiltjax.types import Array, Numeric

__all__ = ["GAME"]

SWAMY = "Swamy et al., 2024, arXiv:2401.04056"


def _spin(logp: Array, batch: Batch, beta: Numeric) -> Array:
    return game.spin_loss(logp, logp_of(batch.old, batch), beta=beta, where=batch.where)


def _sppo(logp: Array, batch: Batch, beta: Numeric) -> Array:
    return regression.sppo_loss(logp, logp_of(batch.old, batch), batch.reward, beta=beta, where=batch.where)


def _dno(logp: Array, batch: Batch, beta: Numeric) -> Array:
    return game.dno_loss(logp, logp_of(batch.old, batch), batch.reward, beta=beta, where=batch.where)


def _inpo(logp: Array, batch: Batch, beta: Numeric) -> Array:
    # The paper keeps beta / eta at a third.
    old, ref = logp_of(batch.old, batch), logp_of(batch.ref, batch)
    return game.inpo_loss(logp, ref, old, beta=beta, eta=3 * beta, where=batch.where)


def _rebel(logp: Array, batch: Batch, beta: Numeric) -> Array:
    old = logp_of(batch.old, batch)
    return regression.rebel_loss(logp, old, batch.reward, beta=beta, scale="code", where=batch.where)


def _xpo(logp: Array, batch: Batch, beta: Numeric) -> Array:
    arrays = (logp, logp_of(batch.ref, batch), batch.source == 1)
    return game.xpo_loss(*arrays, beta=beta, alpha=1e-5, where=batch.where)


def _nash_md(view: View, batch: Batch, beta: Numeric) -> Average:
    values = game.nash_md_loss(view.token_logp, batch.ref.token_logp, batch.reward, batch.mask, beta=beta)
    return average(values, batch.where)


def _mpo(view: View, batch: Batch, beta: Numeric) -> Average:
    arrays = (view.token_logp, batch.ref.token_logp, batch.old.token_logp, batch.advantage, batch.mask)
    values = game.mpo_loss(*arrays, beta=beta, step_size=1.0)
    return aggregate(values, batch.mask, mode="seq_mean_token_sum", where=batch.where)


def _reinforce(token_logp, old_token_logp, advantage, mask):
    return reinforce_loss(token_logp, advantage, mask)


GAME = (
    Method("spin", "Chen et al., 2024, arXiv:2401.01335", per_completion(_spin, counts=every),
           (("data", 1), ("current", 1)), "demonstrations", rounds=4, reads_reference=False, learning_rate=5e-7),
    Method("sppo", "Wu et al., 2024, arXiv:2405.00675", per_completion(_sppo), (("current", 5),), "preference",
           label=chain(win_rates, best_and_worst), rounds=4, reads_reference=False, beta=1e-3, learning_rate=5e-7,
           units="preference", optimum="none"),
    Method("dno", "Rosset et al., 2024, arXiv:2404.03715", per_completion(_dno, counts=every), (("current", 4),),
           "preference", label=chain(win_rates, best_and_worst), rounds=4, reads_reference=False, units="preference",
           optimum="none"),
    Method("inpo", "Zhang et al., 2024, arXiv:2407.00617", per_completion(_inpo, counts=every), (("current", 2),),
           "preference", label=judged, rounds=4, beta=0.005, learning_rate=5e-7, units="preference",
           optimum="equilibrium"),
    Method("nash_md", "Munos et al., 2023, arXiv:2312.00886", _nash_md, (("current", 4), ("mixture", 4)),
           "preference", label=win_rates_against, zero_beta=True, units="preference", optimum="equilibrium"),
    Method("spo", SWAMY, surrogate(_reinforce, mode="seq_mean_token_sum"), (("current", 4), ("previous", 4)),
           "preference", label=chain(win_rates_against, regularised), advantage=left_out, zero_beta=True,
           units="preference", optimum="equilibrium"),
    Method("mpo", "Wang et al., 2024, arXiv:2410.16714", _mpo, (("current", 8),), "preference", label=win_rates,
           advantage=left_out, epochs=2, reference=ReferenceUpdate(every=16), zero_beta=True,
           units="preference", optimum="none"),
    Method("rebel", "Gao et al., 2024, arXiv:2404.16767", per_completion(_rebel, counts=every), (("current", 2),),
           rounds=4, reads_reference=False, beta=1.0, learning_rate=3e-7, optimum="none"),
    Method("xpo", "Xie et al., 2024, arXiv:2405.21046", per_completion(_xpo, counts=every),
           (("current", 1), ("reference", 1)), "preference", label=judged, learning_rate=5e-7),
)  # fmt: skip
"""SPIN, SPPO, DNO, INPO, Nash-MD, SPO, MPO, REBEL and XPO."""
