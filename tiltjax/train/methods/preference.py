"""Methods on comparisons: every pairwise loss, offline and online, and the losses on single or ranked completions."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.data.candidates import token_mask
from tiltjax.losses import binary, preference
from tiltjax.ops.masked import Average, average
from tiltjax.train.method import Batch, Loss, Method, ReferenceUpdate, View
from tiltjax.train.methods.labels import (
    balanced,
    best_and_worst,
    desirable,
    every,
    judged,
    lengths,
    logp_of,
    per_completion,
    ranked,
)
from tiltjax.types import Array, Numeric

__all__ = ["PAIRWISE", "PREFERENCE"]

RAFAILOV = "Rafailov et al., 2023, arXiv:2305.18290"


def _pairwise(
    loss: Callable[..., Array],
    paper: str,
    paper_beta: float,
    *,
    ref: bool = True,
    length: bool = False,
    beta: bool = True,
) -> tuple[Loss, str, float, bool]:
    def kernel(logp: Array, batch: Batch, strength: Numeric) -> Array:
        arrays = [logp, *([logp_of(batch.ref, batch)] if ref else []), *([lengths(batch)] if length else [])]
        return loss(*arrays, **({"beta": strength} if beta else {}), where=batch.where)

    return per_completion(kernel, counts=every), paper, paper_beta, ref


def _nca_pair(logp, ref_logp, *, beta, where):
    return binary.nca_pair_loss(logp, ref_logp, beta=beta, where=where)


def _bco_pair(logp, ref_logp, *, beta, where):
    desired = jnp.broadcast_to(jnp.array([[True, False]]), logp.shape)
    return jnp.sum(binary.bco_loss(logp, ref_logp, desired, jnp.zeros(()), beta=beta, where=where), axis=-1)


def _ld_dpo(view: View, batch: Batch, beta: Numeric) -> Average:
    mask = token_mask(batch.candidates)
    ours, theirs = (
        preference.length_desensitised_logp(x, mask, alpha=0.5) for x in (view.token_logp, batch.ref.token_logp)
    )
    return average(preference.dpo_loss(ours, theirs, beta=beta, where=batch.where), jnp.all(batch.where, axis=-1))


_p = functools.partial

PAIRWISE: dict[str, tuple[Loss, str, float, bool]] = {
    "dpo": _pairwise(preference.dpo_loss, RAFAILOV, 0.1),
    "cdpo": _pairwise(_p(preference.dpo_loss, label_smoothing=0.1), "Mitchell, 2023, Eq. 3", 0.1),
    "robust_dpo": _pairwise(_p(preference.robust_dpo_loss, label_smoothing=0.1),
                            "Chowdhury et al., 2024, arXiv:2403.00409", 0.1),
    "ipo": _pairwise(_p(preference.ipo_loss, length_average=False), "Azar et al., 2023, arXiv:2310.12036", 0.1),
    "hinge": _pairwise(preference.hinge_loss, "Liu et al., 2023, arXiv:2309.06657", 0.1),
    "slic": _pairwise(preference.slic_loss, "Zhao et al., 2023, arXiv:2305.10425", 0.1, ref=False, beta=False),
    "f_dpo_forward_kl": _pairwise(_p(preference.dpo_loss, divergence="forward_kl"),
                                  "Wang et al., 2023, arXiv:2309.16240", 0.1),
    "f_dpo_js": _pairwise(_p(preference.dpo_loss, divergence="js"), "Wang et al., 2023, arXiv:2309.16240", 0.1),
    "f_dpo_alpha": _pairwise(_p(preference.dpo_loss, divergence="alpha", alpha=0.5),
                             "Wang et al., 2023, arXiv:2309.16240", 0.1),
    "chi_po": _pairwise(preference.chi_po_loss, "Huang et al., 2024, arXiv:2407.13399", 0.1),
    "dpo_nll": _pairwise(preference.dpo_nll_loss, "Pang et al., 2024, arXiv:2404.19733", 0.1, length=True),
    "dpop": _pairwise(preference.dpop_loss, "Pal et al., 2024, arXiv:2402.13228", 0.3),
    "simpo": _pairwise(_p(preference.simpo_loss, gamma=0.5),
                       "Meng et al., 2024, arXiv:2405.14734", 2.0, ref=False, length=True),
    "cpo": _pairwise(preference.cpo_loss, "Xu et al., 2024, arXiv:2401.08417", 0.1, ref=False),
    "orpo": _pairwise(preference.orpo_loss,
                      "Hong et al., 2024, arXiv:2403.07691", 0.1, ref=False, length=True, beta=False),
    "exo": _pairwise(_p(preference.exo_loss, label_smoothing=1e-3), "Ji et al., 2024, arXiv:2402.00856", 0.1),
    "nca_pair": _pairwise(_nca_pair, "Chen et al., 2024, arXiv:2402.05369", 0.1),
    "bco_pair": _pairwise(_bco_pair, "Jung et al., 2024, arXiv:2404.04656", 0.1),
    "apo_zero": _pairwise(preference.apo_zero_loss, "D'Oosterlinck et al., 2024, arXiv:2408.06266", 0.1),
    "apo_down": _pairwise(preference.apo_down_loss, "D'Oosterlinck et al., 2024, arXiv:2408.06266", 0.1),
    "aot": _pairwise(preference.aot_loss, "Melnyk et al., 2024, arXiv:2406.05882", 0.1),
    "discopop": _pairwise(preference.discopop_loss, "Lu et al., 2024, arXiv:2406.08414", 0.05),
    "ld_dpo": (_ld_dpo, "Liu et al., 2024, arXiv:2409.06411", 0.1, True),
}  # fmt: skip
"""Name of every pairwise loss: the loss, its paper, the paper's beta, and whether it reads the reference. Each makes
two records, offline and online."""

_WITHOUT_BETA = ("slic", "orpo")
_TILTS = ("dpo",)  # The others tend to another tilt, or to none: each loss says which.


def _ranked(logp: Array, batch: Batch, beta: Numeric) -> Array:
    return preference.plackett_luce_dpo_loss(logp, logp_of(batch.ref, batch), beta=beta, where=batch.where)


def _info_nca(logp: Array, batch: Batch, beta: Numeric) -> Array:
    return binary.info_nca_loss(logp, logp_of(batch.ref, batch), batch.reward, beta=1.0, alpha=beta, where=batch.where)


def _nca(logp: Array, batch: Batch, beta: Numeric) -> Array:
    return binary.nca_loss(logp, logp_of(batch.ref, batch), batch.reward, beta=1.0, alpha=beta, where=batch.where)


def _kto(logp: Array, batch: Batch, beta: Numeric) -> Array:
    ratio = jax.lax.stop_gradient(logp - logp_of(batch.ref, batch))
    ref_logp, good = logp_of(batch.ref, batch)[:, 0], batch.reward[:, 0] > 0
    # The loss is a multiple of its lambda, so the weight of the example's class may be put on afterwards.
    loss = binary.kto_loss(logp[:, 0], ref_logp, good, ratio[:, 1], beta=beta, where=batch.where[:, 0])
    assert batch.advantage is not None
    return batch.advantage[:, 0] * loss


def _dpo_from_sampler(logp: Array, batch: Batch, beta: Numeric) -> Array:
    return preference.dpo_loss(logp, logp_of(batch.old, batch), beta=beta, where=batch.where)


def _margins(view: View, batch: Batch, beta: Numeric) -> dict[str, Average]:
    """Of pairs: the margin of the chosen in implicit reward (reward units), and how often it is above 0."""
    implicit = preference.implicit_reward(logp_of(view, batch), logp_of(batch.ref, batch), beta=beta)
    margin, where = implicit[:, 0] - implicit[:, 1], every(batch.where)
    return {"margin": average(margin, where), "accuracy": average((margin > 0).astype(margin.dtype), where)}


def _offline(name: str) -> Method:
    loss, paper, beta, ref = PAIRWISE[name]
    return Method(name, paper, loss, (("initial", 2),), "preference", label=judged, rounds=1, beta=beta,
                  reads_reference=ref, reads_old=False, measures=_margins if ref else None, learning_rate=1e-6,
                  optimum="tilt" if name in _TILTS else "none", zero_beta=name in _WITHOUT_BETA,
                  units="preference" if name == "ipo" else "reward")  # fmt: skip


def _online(name: str) -> Method:
    return dataclasses.replace(
        _offline(name), name=f"online_{name}", draw=(("current", 2),), rounds=None, reads_old=True
    )


_DPO = _offline("dpo")

PREFERENCE = (
    *map(_offline, PAIRWISE),
    *map(_online, PAIRWISE),
    # One drawing from the policy that training begins with, which is the reference: section B.1.1 and Table 3.
    dataclasses.replace(_DPO, name="dpo_best_worst", paper="Swamy et al., 2025, arXiv:2503.01067",
                        draw=(("initial", 25),), label=best_and_worst, temperature=0.1, beta=0.05, learning_rate=3e-7,
                        optimum="none"),
    # The paper draws three times, this record anew for every mini-batch; the reference is whoever drew.
    Method("online_dpo_best_worst", "Yuan et al., 2024, arXiv:2401.10020",
           per_completion(_dpo_from_sampler, counts=every), (("current", 4),), "preference",
           label=best_and_worst, reads_reference=False, learning_rate=1e-6, optimum="none"),
    Method("plackett_luce", RAFAILOV, per_completion(_ranked), (("initial", 4),), "preference", label=ranked,
           rounds=1, reads_old=False, learning_rate=1e-6),
    Method("nca", "Chen et al., 2024, arXiv:2402.05369", per_completion(_nca), (("initial", 4),), rounds=1,
           reads_old=False, learning_rate=5e-6),
    Method("info_nca", "Chen et al., 2024, arXiv:2402.05369", per_completion(_info_nca), (("initial", 4),), rounds=1,
           reads_old=False, learning_rate=5e-6),
    Method("online_info_nca", "Chen et al., 2024, arXiv:2402.05369", per_completion(_info_nca), (("current", 4),),
           learning_rate=5e-6),
    Method("kto", "Ethayarajh et al., 2024, arXiv:2402.01306", per_completion(_kto), (("initial", 1),), "binary",
           label=desirable, advantage=balanced, rounds=1, cross=2, reads_old=False, learning_rate=5e-6,
           optimum="none"),
    Method("online_kto", "Ethayarajh et al., 2024, arXiv:2402.01306", per_completion(_kto), (("current", 1),),
           "binary", label=desirable, advantage=balanced, cross=2, learning_rate=5e-6, optimum="none"),
    dataclasses.replace(_DPO, name="tr_dpo_soft", paper="Gorbatovski et al., 2024, arXiv:2404.09656", rounds=16,
                        reads_old=True, reference=ReferenceUpdate(every=1, alpha=0.6), optimum="none"),
    dataclasses.replace(_DPO, name="tr_dpo_hard", paper="Gorbatovski et al., 2024, arXiv:2404.09656", rounds=16,
                        reads_old=True, reference=ReferenceUpdate(every=4), optimum="none"),
)  # fmt: skip
"""DPO and its kin, KTO, NCA, rankings, and the reference that follows."""
