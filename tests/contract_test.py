"""Every loss of tiltjax.losses under the same properties: add a new loss to `CASES`."""

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.special import expit, log_expit, logsumexp, softmax

import tiltjax.losses
from tests.losses import denoising_test, game_test, policy_gradient_test
from tiltjax.losses import binary, constrained, game, mle, preference, process, regression, reward_model

B, N, T = 8, 16, 3
BOOLEAN = ("correct", "desirable", "harmful")
LABELS = {*BOOLEAN, "from_reference"}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What the contract needs to know about one loss.

    Attributes:
      name: Of this case; a loss may have several.
      loss: The function.
      formula: The same in NumPy, from float64 arrays by the same names; its result in float64.
      arrays: Name -> axes of each array argument, in order: "B" one per prompt, "BN" one per candidate, "BNT" one per
        step, "BM" one per candidate but never masked. The first is the one that is trained; which are no floats is the
        name's concern in `draw`.
      options: Keyword arguments.
      keywords: Arrays that are passed by name.
      split: What ``axis_name`` splits: "candidates", "prompts", or None where the loss has no such argument.
      size: Candidates per prompt.
      per_candidate: Whether the loss is [B, N] rather than [B].
      exchangeable: Whether the order of the candidates is without meaning.
      rows_only: Whether a mask removes whole prompts only.
      over_batch: Whether a prompt's loss depends on the other prompts of the batch; such losses never see a lone row.
    """

    name: str
    loss: Callable[..., jax.Array]
    formula: Callable[..., np.ndarray]
    arrays: Mapping[str, str]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    split: str | None = None
    size: int = N
    per_candidate: bool = False
    exchangeable: bool = True
    rows_only: bool = False
    over_batch: bool = False

    @property
    def trained(self) -> str:
        return next(iter(self.arrays))

    @property
    def floats(self) -> list[str]:
        return [name for name in self.arrays if name not in ("matched", "from_reference", "length", *BOOLEAN)]

    @property
    def masked(self) -> str:
        """Axes of the mask."""
        return "BNT" if "BNT" in self.arrays.values() else "BN"

    def draw(self, seed: int = 0, lead: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        """Arguments by name, and a mask "where"."""
        rng = np.random.default_rng(seed)
        shapes = {"B": (*lead, B), "BN": (*lead, B, self.size), "BM": (*lead, B, self.size)}
        shapes["BNT"] = (*shapes["BN"], T)
        out = {}
        for name, axes in self.arrays.items():
            if name == "matched":
                out[name] = np.broadcast_to(np.arange(B, dtype=np.int32), shapes[axes])
            elif name == "length":
                out[name] = rng.integers(1, 9, size=shapes[axes], dtype=np.int32)
            elif name in BOOLEAN:
                out[name] = rng.random(shapes[axes]) < 0.5
            elif name == "from_reference":
                out[name] = np.arange(self.size) == rng.integers(self.size, size=shapes[axes][:-1])[..., None]
            elif name.endswith("_rate") or name == "label":
                out[name] = rng.random(shapes[axes], np.float32)
            elif name == "ref_logp" and axes == self.arrays[self.trained]:
                out[name] = (out[self.trained] + rng.normal(size=shapes[axes])).astype(np.float32)
            elif name.endswith("logp"):
                out[name] = (-3 * rng.gamma(2.0, size=shapes[axes])).astype(np.float32)
            else:
                x = rng.normal(size=shapes[axes]).astype(np.float32)
                out[name] = np.abs(x) if name == "weights" else x
        where = rng.random(shapes[self.masked]) < 0.6
        where[..., 0] = True
        if self.rows_only:
            where = np.broadcast_to(rng.random((*lead, B, 1)) < 0.6, shapes["BN"])
        if self.masked == "BNT":  # Both segments have the same steps, so that a prompt can be sliced.
            where = np.broadcast_to(where[..., :1, :], where.shape)
        if "matched" in self.arrays:
            where = where | (np.arange(self.size) == out["matched"][..., None])
        return out | {"where": where}

    def __call__(self, inputs: Mapping[str, Any], **extra: Any) -> jax.Array:
        positional = [inputs[name] for name in self.arrays if name not in self.keywords]
        keywords = {name: inputs[name] for name in self.keywords if name in inputs}
        return self.loss(*positional, **keywords, where=inputs.get("where"), **self.options, **extra)


def tilted(reward, beta):
    return softmax(reward / beta, axis=-1)


def var_formula(logp, ref_logp, reward, matched, beta=0.3):
    weights = softmax(ref_logp + reward / beta, axis=-1)
    return -np.take_along_axis(weights, matched[..., None], -1)[..., 0] * logp


def dpo_formula(logp, ref_logp, beta=0.1, eps=0.0):
    ratio = logp - ref_logp
    margin = beta * (ratio[..., 0] - ratio[..., 1])
    return -(1 - eps) * log_expit(margin) - eps * log_expit(-margin)


CASES = [
    Case("sft", mle.sft_loss, lambda logp: -logp.mean(-1), {"logp": "BN"}, split="candidates"),
    Case(
        "weighted_mle",
        mle.weighted_mle_loss,
        lambda logp, weights: -(weights * logp).sum(-1),
        {"logp": "BN", "weights": "BN"},
        split="candidates",
    ),
    Case(
        "tilted_mle",
        mle.tilted_mle_loss,
        lambda logp, reward: -(tilted(reward, 0.3) * logp).sum(-1),
        {"logp": "BN", "reward": "BN"},
        {"beta": 0.3},
        split="candidates",
    ),
    Case(
        "var",
        mle.var_loss,
        var_formula,
        {"logp": "B", "ref_logp": "BN", "reward": "BN", "matched": "B"},
        {"beta": 0.3},
        keywords=("matched",),
        split="prompts",
        exchangeable=False,
    ),
    Case(
        "var_importance",
        mle.var_importance_loss,
        lambda logp, reward, log_z: -(np.exp(reward / 0.5 - log_z[..., None]) * logp).mean(-1),
        {"logp": "BN", "reward": "BN", "log_z": "B"},
        {"beta": 0.5},
        split="candidates",
    ),
    Case(
        "best_of_n_sft",
        mle.best_of_n_sft_loss,
        lambda logp, reward: -np.take_along_axis(logp, reward.argmax(-1)[..., None], -1)[..., 0],
        {"logp": "BN", "reward": "BN"},
        split="candidates",
    ),
    Case(
        "reward_weighted_regression",
        mle.reward_weighted_regression_loss,
        lambda logp, reward: -tilted(reward, 0.3) * reward.shape[-1] * logp,
        {"logp": "BN", "reward": "BN"},
        {"beta": 0.3},
        split="candidates",
        per_candidate=True,
    ),
    Case(
        "advantage_weighted_regression",
        mle.advantage_weighted_regression_loss,
        lambda logp, advantage: -np.minimum(np.exp(advantage / 0.3), 20) * logp,
        {"logp": "BN", "advantage": "BN"},
        {"beta": 0.3},
        per_candidate=True,
    ),
    Case(
        "dpo",
        preference.dpo_loss,
        dpo_formula,
        {"logp": "BN", "ref_logp": "BN"},
        {"beta": 0.1},
        size=2,
        exchangeable=False,
        rows_only=True,
    ),
    Case(
        "cdpo",
        preference.dpo_loss,
        functools.partial(dpo_formula, eps=0.2),
        {"logp": "BN", "ref_logp": "BN"},
        {"beta": 0.1, "label_smoothing": 0.2},
        size=2,
        exchangeable=False,
        rows_only=True,
    ),
]


def gap(x):
    return x[..., 0] - x[..., 1]


def ratio_gap(logp, ref_logp):
    return gap(logp - ref_logp)


def chi_po_formula(logp, ref_logp, bound=np.inf):
    ratio = logp - ref_logp
    return -log_expit(np.clip(0.1 * gap(np.exp(ratio) + ratio), -2 * bound, 2 * bound))


def link_formula(link):
    return lambda logp, ref_logp: -log_expit(0.1 * gap(link(logp - ref_logp)))


def exo_formula(logp, ref_logp, eps=0.1):
    m = 0.5 * ratio_gap(logp, ref_logp)
    return expit(m) * (log_expit(m) - np.log(1 - eps)) + expit(-m) * (log_expit(-m) - np.log(eps))


def discopop_formula(logp, ref_logp):
    m = 0.1 * ratio_gap(logp, ref_logp)
    return (1 - expit(m / 0.05)) * -log_expit(m) + expit(m / 0.05) * np.exp(-m)


def aot_formula(ours, theirs):
    """Ours against theirs of the same rank, at our place."""
    out = np.empty_like(ours)
    out[np.argsort(ours)] = -log_expit(0.1 * (np.sort(ours) - np.sort(theirs)))
    return out


def orpo_formula(logp, length):
    q = logp / length
    return -q[..., 0] - 0.1 * log_expit(gap(q - np.log1p(-np.exp(q))))


def plackett_luce_formula(logp, ref_logp):
    score = 0.3 * (logp - ref_logp)
    ranks = range(score.shape[-1])
    return -sum(score[..., k] - logsumexp(score[..., k:], axis=-1) for k in ranks)


def ipl_formula(q, next_value, label):
    reward = q - 0.9 * next_value
    margin = gap(reward.sum(-1))
    return -label * log_expit(margin) - (1 - label) * log_expit(-margin) + 0.5 * np.square(reward).mean((-1, -2))


def kto_formula(logp, ref_logp, desirable, mismatched_log_ratio):
    point = np.maximum(mismatched_log_ratio.mean(-1, keepdims=True), 0)
    gain = expit(0.1 * np.where(desirable, 1, -1) * (logp - ref_logp - point))
    return np.where(desirable, 1.3, 0.7) * (1 - gain)


def bco_formula(logp, ref_logp, desirable, shift):
    return -log_expit(np.where(desirable, 1, -1) * (0.5 * (logp - ref_logp) - shift[..., None]))


def nca_formula(logp, ref_logp, reward):
    r = 0.5 * (logp - ref_logp)
    return -(tilted(reward, 0.3) * log_expit(r)).sum(-1) - log_expit(-r).mean(-1)


def nca_pair_formula(logp, ref_logp):
    r = 0.5 * (logp - ref_logp)
    return -log_expit(r[..., 0]) - log_expit(-r).mean(-1)


def info_nca_formula(logp, ref_logp, reward):
    return -(tilted(reward, 0.3) * np.log(softmax(0.5 * (logp - ref_logp), -1))).sum(-1)


def bernoulli(logit, correct):
    """Cross-entropy of labels that may be shares."""
    return -(1.0 * correct) * log_expit(logit) - (1.0 - correct) * log_expit(-logit)


def bradley_terry_formula(reward, margin=0.0, label=1.0, centring=0.0):
    one, other = log_expit(gap(reward) - margin), log_expit(-gap(reward) - margin)
    return -label * one - (1 - label) * other + centring * np.square(reward.sum(-1))


def cost_formula(cost, harmful):
    return -log_expit(-gap(cost)) - log_expit(np.where(harmful, 1, -1) * cost).sum(-1)


def implicit_dpo_formula(logp, ref_logp, correct):
    r, out = 0.3 * (logp - ref_logp), np.zeros(len(logp))
    for row, good in enumerate(correct):
        if good.any() and not good.all():
            out[row] = -log_expit(r[row, good][:, None] - r[row, ~good]).mean()
    return out


def implicit_nca_formula(logp, ref_logp, correct):
    r = 0.5 * (logp - ref_logp)
    drawn = np.where(correct, log_expit(r), 0).sum(-1) / np.maximum(correct.sum(-1), 1)
    return -drawn - log_expit(-r).mean(-1)


def pair_case(name, loss, formula, options, arrays=("logp", "ref_logp"), **more):
    return Case(
        name, loss, formula, dict.fromkeys(arrays, "BN"), options, size=2, rows_only=True, exchangeable=False, **more
    )


PAIR_CASES = [
    pair_case(
        "dpo_forward_kl",
        preference.dpo_loss,
        link_formula(lambda a: -np.exp(-a)),
        {"beta": 0.1, "divergence": "forward_kl"},
    ),
    pair_case("dpo_js", preference.dpo_loss, link_formula(log_expit), {"beta": 0.1, "divergence": "js"}),
    pair_case(
        "dpo_alpha",
        preference.dpo_loss,
        link_formula(lambda a: -np.exp(-0.3 * a) / 0.3),
        {"beta": 0.1, "divergence": "alpha", "alpha": 0.3},
    ),
    pair_case(
        "robust_dpo",
        preference.robust_dpo_loss,
        lambda logp, ref_logp: (
            (-0.8 * log_expit(0.1 * ratio_gap(logp, ref_logp)) + 0.2 * log_expit(-0.1 * ratio_gap(logp, ref_logp)))
            / 0.6
        ),
        {"beta": 0.1, "label_smoothing": 0.2},
    ),
    pair_case("chi_po", preference.chi_po_loss, chi_po_formula, {"beta": 0.1}),
    pair_case(
        "chi_po_clipped",
        preference.chi_po_loss,
        functools.partial(chi_po_formula, bound=0.2),
        {"beta": 0.1, "reward_bound": 0.2},
    ),
    pair_case(
        "dpop",
        preference.dpop_loss,
        lambda logp, ref_logp: (
            -log_expit(0.3 * (ratio_gap(logp, ref_logp) - 5 * np.maximum(0, (ref_logp - logp)[..., 0])))
        ),
        {"beta": 0.3, "penalty": 5.0},
    ),
    pair_case(
        "dpo_nll",
        preference.dpo_nll_loss,
        lambda logp, ref_logp, length: dpo_formula(logp, ref_logp) - (logp / length)[..., 0],
        {"beta": 0.1},
        ("logp", "ref_logp", "length"),
    ),
    pair_case(
        "ipo",
        preference.ipo_loss,
        lambda logp, ref_logp: np.square(ratio_gap(logp, ref_logp) - 5),
        {"beta": 0.1, "length_average": False},
    ),
    pair_case(
        "ipo_average",
        preference.ipo_loss,
        lambda logp, ref_logp, length: np.square(gap((logp - ref_logp) / length) - 5),
        {"beta": 0.1, "length_average": True},
        ("logp", "ref_logp", "length"),
    ),
    pair_case(
        "hinge",
        preference.hinge_loss,
        lambda logp, ref_logp: np.maximum(0, 1 - 0.5 * ratio_gap(logp, ref_logp)),
        {"beta": 0.5},
    ),
    pair_case(
        "slic", preference.slic_loss, lambda logp: np.maximum(0, 1 - gap(logp)) - 0.1 * logp[..., 0], {}, ("logp",)
    ),
    pair_case("exo", preference.exo_loss, exo_formula, {"beta": 0.5, "label_smoothing": 0.1}),
    pair_case(
        "apo_zero",
        preference.apo_zero_loss,
        lambda logp, ref_logp: 1 + gap(-expit(0.1 * (logp - ref_logp))),
        {"beta": 0.1},
    ),
    pair_case(
        "apo_down",
        preference.apo_down_loss,
        lambda logp, ref_logp: expit(0.1 * (logp - ref_logp))[..., 0] + 1 - expit(0.1 * ratio_gap(logp, ref_logp)),
        {"beta": 0.1},
    ),
    pair_case("discopop", preference.discopop_loss, discopop_formula, {"beta": 0.1}),
    pair_case(
        "aot",
        preference.aot_loss,
        lambda logp, ref_logp: aot_formula(gap(logp), gap(ref_logp)),
        {"beta": 0.1},
        split="prompts",
        over_batch=True,
    ),
    pair_case(
        "aot_unpaired",
        preference.aot_unpaired_loss,
        lambda logp, ref_logp: aot_formula(*np.moveaxis(logp - ref_logp, -1, 0)),
        {"beta": 0.1},
        split="prompts",
        over_batch=True,
    ),
    pair_case(
        "simpo",
        preference.simpo_loss,
        lambda logp, length: -log_expit(2 * gap(logp / length) - 0.5),
        {"beta": 2.0, "gamma": 0.5},
        ("logp", "length"),
    ),
    pair_case(
        "cpo", preference.cpo_loss, lambda logp: -log_expit(0.1 * gap(logp)) - logp[..., 0], {"beta": 0.1}, ("logp",)
    ),
    pair_case("orpo", preference.orpo_loss, orpo_formula, {}, ("logp", "length")),
    pair_case(
        "local_reward",
        preference.local_reward_loss,
        lambda logp: -log_expit(gap(logp) / 53),
        {"beta": 1 / 53},
        ("logp",),
    ),
    pair_case("nca_pair", binary.nca_pair_loss, nca_pair_formula, {"beta": 0.5}),
    pair_case(
        "rebel",
        regression.rebel_loss,
        lambda logp, ref_logp, reward: np.square(0.2 * ratio_gap(logp, ref_logp) - gap(reward)),
        {"beta": 0.2, "scale": "paper"},
        ("logp", "ref_logp", "reward"),
    ),
    pair_case(
        "rebel_code",
        regression.rebel_loss,
        lambda logp, ref_logp, reward: np.square(ratio_gap(logp, ref_logp) - 5 * gap(reward)),
        {"beta": 0.2, "scale": "code"},
        ("logp", "ref_logp", "reward"),
    ),
]


def inpo_formula(logp, ref_logp, old_logp):
    return np.square(gap(logp) - 0.4 * gap(ref_logp) - 0.6 * gap(old_logp) - 1 / (2 * 0.25))


def dno_formula(logp, ref_logp, win_rate):
    p, d = expit(gap(win_rate)), 0.1 * ratio_gap(logp, ref_logp)
    return -p * log_expit(d) - (1 - p) * log_expit(-d)


GAME_CASES = [
    pair_case("spin", game.spin_loss, dpo_formula, {"beta": 0.1}),
    pair_case(
        "spin_linear",
        game.spin_loss,
        lambda logp, ref_logp: -0.1 * ratio_gap(logp, ref_logp),
        {"beta": 0.1, "link": "linear"},
    ),
    pair_case(
        "spin_hinge",
        game.spin_loss,
        lambda logp, ref_logp: np.maximum(0, 1 - 0.5 * ratio_gap(logp, ref_logp)),
        {"beta": 0.5, "link": "hinge"},
    ),
    pair_case("dno", game.dno_loss, dno_formula, {"beta": 0.1}, ("logp", "ref_logp", "win_rate")),
    pair_case("inpo", game.inpo_loss, inpo_formula, {"beta": 0.1, "eta": 0.25}, ("logp", "ref_logp", "old_logp")),
    pair_case(
        "xpo",
        game.xpo_loss,
        lambda logp, ref_logp, from_reference: (
            dpo_formula(logp, ref_logp) + 0.05 * np.where(from_reference, logp, 0).sum(-1)
        ),
        {"beta": 0.1, "alpha": 0.05},
        ("logp", "ref_logp", "from_reference"),
    ),
]

OTHER_CASES = [
    Case(
        "plackett_luce_dpo",
        preference.plackett_luce_dpo_loss,
        plackett_luce_formula,
        {"logp": "BN", "ref_logp": "BN"},
        {"beta": 0.3},
        size=4,
        exchangeable=False,
    ),
    Case(
        "ipl",
        preference.ipl_loss,
        ipl_formula,
        {"q": "BNT", "next_value": "BNT", "label": "B"},
        {"discount": 0.9, "penalty": 0.5},
        size=2,
        exchangeable=False,
    ),
    Case(
        "kto",
        binary.kto_loss,
        kto_formula,
        {"logp": "BN", "ref_logp": "BN", "desirable": "BN", "mismatched_log_ratio": "BM"},
        {"beta": 0.1, "lambda_desirable": 1.3, "lambda_undesirable": 0.7},
        split="candidates",
        per_candidate=True,
    ),
    Case(
        "bco",
        binary.bco_loss,
        bco_formula,
        {"logp": "BN", "ref_logp": "BN", "desirable": "BN", "shift": "B"},
        {"beta": 0.5},
        per_candidate=True,
    ),
    Case(
        "nca",
        binary.nca_loss,
        nca_formula,
        {"logp": "BN", "ref_logp": "BN", "reward": "BN"},
        {"beta": 0.5, "alpha": 0.3},
        split="candidates",
    ),
    Case(
        "info_nca",
        binary.info_nca_loss,
        info_nca_formula,
        {"logp": "BN", "ref_logp": "BN", "reward": "BN"},
        {"beta": 0.5, "alpha": 0.3},
        split="candidates",
    ),
    Case(
        "sppo",
        regression.sppo_loss,
        lambda logp, ref_logp, win_rate: np.square(logp - ref_logp - (win_rate - 0.5) / 0.1),
        {"logp": "BN", "ref_logp": "BN", "win_rate": "BN"},
        {"beta": 0.1},
        per_candidate=True,
    ),
    Case(
        "log_ratio_regression",
        regression.log_ratio_regression_loss,
        lambda logp, ref_logp, reward, log_z: np.square(logp - ref_logp - (reward / 0.3 - log_z[..., None])),
        {"logp": "BN", "ref_logp": "BN", "reward": "BN", "log_z": "B"},
        {"beta": 0.3},
        per_candidate=True,
    ),
]

REWARD_MODEL_CASES = [
    pair_case("bradley_terry", reward_model.bradley_terry_loss, bradley_terry_formula, {}, ("reward",)),
    Case(
        "bradley_terry_shares",
        reward_model.bradley_terry_loss,
        functools.partial(bradley_terry_formula, centring=0.1),
        {"reward": "BN", "margin": "B", "label": "B"},
        {"centring": 0.1},
        keywords=("margin", "label"),
        size=2,
        rows_only=True,
        exchangeable=False,
    ),
    Case(
        "plackett_luce",
        reward_model.plackett_luce_loss,
        lambda reward: plackett_luce_formula(reward / 0.3, 0.0),
        {"reward": "BN"},
        size=4,
        exchangeable=False,
    ),
    Case("outcome", reward_model.outcome_loss, bernoulli, {"logit": "BN", "correct": "BN"}, per_candidate=True),
    Case(
        "process",
        reward_model.process_loss,
        lambda step_logit, label: bernoulli(step_logit, label).mean(-1),
        {"step_logit": "BN", "label": "BN"},
    ),
    pair_case("cost_model", reward_model.cost_model_loss, cost_formula, {}, ("cost", "harmful")),
    Case(
        "implicit_prm_ce",
        process.implicit_prm_ce_loss,
        lambda logp, ref_logp, correct: bernoulli(0.3 * (logp - ref_logp) + 0.2, correct),
        {"logp": "BN", "ref_logp": "BN", "correct": "BN"},
        {"beta": 0.3, "bias": 0.2},
        per_candidate=True,
    ),
    Case(
        "implicit_prm_dpo",
        process.implicit_prm_dpo_loss,
        implicit_dpo_formula,
        {"logp": "BN", "ref_logp": "BN", "correct": "BN"},
        {"beta": 0.3},
    ),
    Case(
        "implicit_prm_kto",
        process.implicit_prm_kto_loss,
        lambda logp, ref_logp, correct, mismatched_log_ratio: (
            kto_formula(logp, ref_logp, correct, mismatched_log_ratio) / np.where(correct, 1.3, 0.7)
        ),
        {"logp": "BN", "ref_logp": "BN", "correct": "BN", "mismatched_log_ratio": "BM"},
        {"beta": 0.1},
        split="candidates",
        per_candidate=True,
    ),
    Case(
        "implicit_prm_nca",
        process.implicit_prm_nca_loss,
        implicit_nca_formula,
        {"logp": "BN", "ref_logp": "BN", "correct": "BN"},
        {"beta": 0.5},
        split="candidates",
    ),
]
CASES = [*CASES, *PAIR_CASES, *OTHER_CASES, *GAME_CASES, *REWARD_MODEL_CASES]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def widen(case, inputs):
    """Without the mask, floats in float64."""
    return {name: np.asarray(x, np.float64) if name in case.floats else x for name, x in unmasked(inputs).items()}


def unmasked(inputs):
    return {name: x for name, x in inputs.items() if name != "where"}


@functools.cache
def program(case):
    """``(floats, rest) -> ((sum, loss), gradients)``, compiled once per structure."""

    def total(floats, rest):
        value = case({**rest, **floats})
        return value.sum(), value

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def value_and_grads(case, inputs):
    """The loss and, of its sum, the gradient in every float argument."""
    floats = {name: inputs[name] for name in case.floats}
    rest = {name: x for name, x in inputs.items() if name not in floats}
    (_, value), grads = program(case)(floats, rest)
    return np.asarray(value), {name: np.asarray(x) for name, x in grads.items()}


def test_every_loss_is_here():
    found = set()
    for info in pkgutil.walk_packages(tiltjax.losses.__path__, "tiltjax.losses."):
        module = importlib.import_module(info.name)
        found |= {getattr(module, name) for name in module.__all__ if name.endswith("_loss")}
    # Token-level and diffusion losses go through the same properties, with their own shapes, in their own tests.
    elsewhere = policy_gradient_test.COVERED | game_test.COVERED | denoising_test.COVERED
    elsewhere |= {constrained.ptx_loss, reward_model.process_class_loss}
    missing = {loss.__name__ for loss in found - {case.loss for case in CASES} - elsewhere}
    assert not missing, f"add these losses to CASES: {sorted(missing)}"
    assert len({case.name for case in CASES}) == len(CASES)


@every_case
def test_is_the_float64_formula(case):
    inputs = unmasked(case.draw())
    value = case(inputs)
    assert value.shape == ((B, case.size) if case.per_candidate else (B,))
    np.testing.assert_allclose(value, case.formula(**widen(case, inputs)), rtol=1e-4, atol=1e-6)
    low = {name: jnp.asarray(x, jnp.bfloat16) if name in case.floats else x for name, x in inputs.items()}
    wide = widen(case, low)
    value = case(low)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, case.formula(**wide), rtol=1e-4, atol=1e-6)


@every_case
def test_masked_is_sliced(case):
    inputs = case.draw()
    where = inputs["where"]
    value = np.asarray(case(inputs))
    wide = widen(case, inputs)
    if case.over_batch:
        real = where.all(-1)
        np.testing.assert_allclose(value[real], case.formula(**{k: x[real] for k, x in wide.items()}), rtol=1e-4)
        assert (value[~real] == 0).all()
        return
    for row in range(B):
        real = where[row, 0] if case.masked == "BNT" else where[row]
        if not real.any():
            assert (value[row] == 0).all()
            continue
        sliced = {
            name: x[row : row + 1, ..., real] if case.arrays[name] == case.masked else x[row : row + 1]
            for name, x in wide.items()
        }
        if "matched" in sliced:
            sliced["matched"] = real.cumsum()[sliced["matched"]] - 1
        kept = value[row][real] if case.per_candidate else value[row]
        np.testing.assert_allclose(kept, case.formula(**sliced)[0], rtol=1e-4, atol=1e-6)
        if case.per_candidate:
            assert (value[row][~real] == 0).all()


@every_case
def test_masked_entries_may_be_nan(case):
    clean = case.draw()
    clean["where"] = np.array(clean["where"])
    clean["where"][0] = False
    dirty = dict(clean)
    for name in case.floats:
        rows = tuple(range(1, clean["where"].ndim))
        real = {case.masked: clean["where"], "B": clean["where"].any(rows), "BM": np.True_}[case.arrays[name]]
        dirty[name] = np.where(real, clean[name], np.nan).astype(np.float32)
    value, grads = value_and_grads(case, dirty)
    expected, expected_grads = value_and_grads(case, clean)
    assert (value[0] == 0).all()
    np.testing.assert_array_equal(value, expected)
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, expected_grads[name], err_msg=name)
        assert (grad[0] == 0).all(), name
    assert (grads[case.trained][clean["where"].any(-1)] != 0).any()


@every_case
def test_extreme_inputs_are_finite(case):
    inputs = case.draw()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for name in case.floats:
            extremes = {"logp": [-1e4, 0.0], "weights": [0.0, 20.0], "rate": [0.0, 1.0], "label": [0.0, 1.0]}
            chosen = extremes.get(name.split("_")[-1], [-1e4, 1e4, 0.0])
            inputs[name] = rng.choice(np.float32(chosen), inputs[name].shape)
        value, grads = value_and_grads(case, inputs)
        assert np.isfinite(value).all()
        assert all(np.isfinite(grad).all() for grad in grads.values())


@every_case
def test_permuting_the_batch_permutes_the_loss(case):
    inputs = case.draw()
    rng = np.random.default_rng(3)
    order = rng.permutation(B)
    value = np.asarray(case(inputs))
    permuted = case({name: x[order] for name, x in inputs.items()})
    np.testing.assert_allclose(permuted, value[order], rtol=1e-6)
    if case.exchangeable:
        order = rng.permutation(case.size)
        axes = {**case.arrays, "where": "BN"}
        permuted = case({name: x[:, order] if axes[name] == "BN" else x for name, x in inputs.items()})
        np.testing.assert_allclose(permuted, value[:, order] if case.per_candidate else value, rtol=1e-5)


@every_case
def test_vmap_is_batch_and_float64_stays_float64(case):
    inputs = case.draw(lead=(3,))
    where = np.array(inputs["where"])
    where[1] = True
    inputs = {**widen(case, inputs), "where": where}
    lone = {name: x[1] for name, x in unmasked(inputs).items()}
    with jax.enable_x64(True):
        batch, mapped = jax.jit(lambda inputs: (case(inputs), jax.vmap(case)(inputs)))(inputs)
        assert batch.dtype == mapped.dtype == jax.eval_shape(case, lone).dtype == jnp.float64
        batch, mapped = np.asarray(batch), np.asarray(mapped)
    np.testing.assert_allclose(mapped, batch, rtol=1e-6)
    np.testing.assert_allclose(batch[1], case.formula(**lone), rtol=1e-6, atol=1e-12)


@every_case
def test_prompts_over_eight_devices(case):
    inputs = {name: np.array(x) for name, x in case.draw().items()}
    extra = {}
    expected = np.asarray(case(inputs))  # Eager.
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = PartitionSpec("data")
    put = jax.device_put(inputs, NamedSharding(mesh, rows))
    if case.split == "prompts":  # The default columns must be the ones that were given.
        extra = {"axis_name": "data"}
        inputs.pop("matched", None)
    run = functools.partial(case, **extra)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows)
    split, mapped = jax.jit(lambda put: (case(put), sharded({name: put[name] for name in inputs})))(put)
    np.testing.assert_allclose(split, expected, rtol=1e-6)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    if case.split == "prompts":  # Where nothing is sent, it is the same once more.
        pmapped = jax.pmap(run, axis_name="data")({name: x[:, None] for name, x in inputs.items()})
        np.testing.assert_allclose(np.asarray(pmapped)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.split == "candidates"], ids=lambda case: case.name)
def test_candidates_over_eight_devices(case):
    """Values, and the gradient of one shared parameter by the rule "return the global value, then pmean"."""
    inputs = {name: np.array(x) for name, x in case.draw().items()}
    expected = np.asarray(case(inputs))

    def total(scale, inputs, axis_name=None):
        extra = {} if axis_name is None else {"axis_name": axis_name}
        value = case({**inputs, case.trained: scale * inputs[case.trained]}, **extra)
        mean = value.mean()
        if case.per_candidate and axis_name is not None:
            mean = jax.lax.pmean(mean, axis_name)
        return mean, value

    def step(scale, inputs):
        grad, value = jax.grad(total, has_aux=True)(scale, inputs, "n")
        return jax.lax.pmean(grad, "n"), value

    split, whole = PartitionSpec(None, "n"), PartitionSpec()
    axes = {**case.arrays, "where": "BN"}
    specs = {name: split if axes[name] in ("BN", "BM") else whole for name in inputs}
    mesh = Mesh(np.array(jax.devices()), ("n",))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(whole, specs), out_specs=(whole, split if case.per_candidate else whole)
    )

    @jax.jit
    def both(scale, inputs):
        return jax.grad(total, has_aux=True)(scale, inputs)[0], *mapped(scale, inputs)

    grad, mapped_grad, mapped_value = both(np.float32(1), inputs)
    np.testing.assert_allclose(mapped_value, expected, rtol=1e-5)
    np.testing.assert_allclose(mapped_grad, grad, rtol=1e-5)

    shards = {
        name: np.moveaxis(x.reshape(B, 8, -1), 1, 0) if axes[name] in ("BN", "BM") else np.broadcast_to(x, (8, B))
        for name, x in inputs.items()
    }
    pmapped_grad, pmapped_value = jax.pmap(step, axis_name="n", in_axes=(None, 0))(np.float32(1), shards)
    if case.per_candidate:
        pmapped_value = np.moveaxis(np.asarray(pmapped_value), 0, 1).reshape(B, case.size)
        np.testing.assert_allclose(pmapped_value, expected, rtol=1e-5)
    else:
        np.testing.assert_allclose(pmapped_value, np.broadcast_to(expected, (8, B)), rtol=1e-5)
    np.testing.assert_allclose(pmapped_grad, np.full(8, grad), rtol=1e-5)


@every_case
def test_gradients(case):
    """Right in the trained log-probability; nothing else receives any."""
    inputs = case.draw()
    _, grads = value_and_grads(case, inputs)
    assert np.any(grads[case.trained] != 0)
    along = np.random.default_rng(4).normal(size=inputs[case.trained].shape)
    ends = (np.float32(inputs[case.trained] + step * along) for step in (1e-2, -1e-2))
    up, down = (np.float64(value_and_grads(case, {**inputs, case.trained: end})[0]) for end in ends)
    slope = np.sum(np.float64(grads[case.trained]) * along)
    np.testing.assert_allclose(slope, np.sum(up - down) / 2e-2, atol=1e-2, rtol=1e-2)
    for name, grad in grads.items():
        assert name == case.trained or (grad == 0).all(), f"{name} receives gradient"


@pytest.fixture
def users():
    """As in a user's process: nobody watches the annotations, and JAX promotes ranks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    with jax.numpy_rank_promotion("allow"):
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


def named(keep):
    return pytest.mark.parametrize("case", [case for case in CASES if keep(case)], ids=lambda case: case.name)


@every_case
@pytest.mark.robustness(
    "Kernels", given="NaN in any array of a loss, where it is not masked", outcome="the loss of its prompt is NaN"
)
def test_unmasked_nan_stays(case):
    inputs = case.draw()
    # The mask comes first to a prompt whose candidates are all real.
    row = int(np.argmax(np.asarray(inputs["where"]).all(tuple(range(1, inputs["where"].ndim)))))
    inputs["where"] = np.array(inputs["where"])
    inputs["where"][row] = True
    for name in case.floats:
        for place in (0, -1):
            dirty = dict(inputs)
            dirty[name] = np.array(inputs[name])
            dirty[name][(row,) + (place,) * (dirty[name].ndim - 1)] = np.nan
            value, _ = value_and_grads(case, dirty)
            own = value[row, place] if case.per_candidate and case.arrays[name] == "BN" else value[row]
            assert np.isnan(value if case.over_batch else own).any(), (name, place)
            assert case.over_batch or np.isfinite(np.delete(value, row, axis=0)).all()


@every_case
@pytest.mark.robustness(
    "Kernels",
    given="scores that share a constant of 1e4, in float32",
    outcome="each loss is within 1e-4 of float64, relative",
)
def test_a_common_constant_costs_no_digits(case):
    """Long completions (all log-probabilities are low), and a policy far from its reference (only its own are)."""
    unit = {"logp": -1e4, "reward": 1e4, "cost": 1e4, "q": 1e4, "value": 1e4}
    for names in (case.floats, [case.trained]):
        inputs = unmasked(case.draw(1))
        for name in set(names) & set(case.floats):
            inputs[name] = (inputs[name] + unit.get(name.split("_")[-1], 0)).astype(np.float32)
        if "log_z" in inputs and len(names) > 1:
            inputs["log_z"] = (inputs["log_z"] + 1e4 / case.options["beta"]).astype(np.float32)
        if "length" in inputs:
            inputs["length"] = np.full_like(inputs["length"], 7)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = case.formula(**widen(case, inputs))
        if np.isfinite(expected).all():  # Exponents of log-ratios are clamped at 80.
            np.testing.assert_allclose(case(inputs), expected, rtol=1e-4, atol=1e-30)


@every_case
@pytest.mark.robustness(
    "Kernels", given="float32 arrays and Python numbers where float64 is enabled", outcome="the loss is float32"
)
def test_python_numbers_do_not_widen(case):
    inputs = case.draw()
    numbers = {name: 0.5 for name in ("margin", "shift") if name in inputs}
    with jax.enable_x64(True):
        assert jax.eval_shape(case, inputs).dtype == jnp.float32
        assert jax.eval_shape(lambda x: case({**x, **numbers}), inputs).dtype == jnp.float32


@every_case
@pytest.mark.robustness(
    "Kernels", given="an option out of its range as a NumPy scalar", outcome="refused by name, as a Python number is"
)
def test_numpy_scalars_are_looked_at(case):
    for name, value in case.options.items():
        if isinstance(value, float) and name not in ("bias", "alpha"):
            for scalar in (np.float32(np.nan), np.float64(-1), np.array(-1.0)):
                with pytest.raises(ValueError, match=f"^{name} must "):
                    dataclasses.replace(case, options={**case.options, name: scalar})(case.draw())


@named(lambda case: case.size == 2)
@pytest.mark.usefixtures("users")
@pytest.mark.robustness(
    "Kernels", given="a loss on pairs, with 1 or 3 candidates, or one array per side", outcome="refused with the shape"
)
def test_pairs_are_two(case):
    inputs = unmasked(case.draw())
    for cut in (lambda x: x[:, :1], lambda x: np.concatenate([x, x[:, :1]], axis=1), lambda x: x[:, 0]):
        other = {name: x if case.arrays[name] == "B" else cut(x) for name, x in inputs.items()}
        with pytest.raises(ValueError, match=r"must have 2 entries, chosen and rejected, on axis -\d; got the shape"):
            case(other)


@every_case
@pytest.mark.usefixtures("users")
@pytest.mark.robustness(
    "Kernels",
    given="a column [B, 1] where one number per prompt is wanted",
    outcome="refused with the shape that is wanted",
)
def test_columns_are_refused(case):
    inputs = unmasked(case.draw())
    for name, axes in case.arrays.items():
        if axes == "B" and name not in ("matched", case.trained):
            with pytest.raises(ValueError, match=f"{name} must be a number or have the shape"):
                case({**inputs, name: inputs[name][:, None]})
    beta = case.options.get("beta")
    if beta is None:
        return

    def per_prompt(beta, inputs):
        return dataclasses.replace(case, options={**case.options, "beta": beta})(inputs)

    for shape, call in (((B, 1), per_prompt), ((B,), jax.jit(per_prompt))):
        try:
            value = call(np.full(shape, beta, np.float32), inputs)
        except ValueError as error:
            assert re.search("beta must be a number", str(error))  # noqa: PT017
        else:
            assert shape == (B,)
            np.testing.assert_allclose(value, case.formula(**widen(case, inputs)), rtol=1e-4, atol=1e-6)


@named(lambda case: LABELS & set(case.arrays) and case.name != "outcome")
@pytest.mark.usefixtures("users")
@pytest.mark.robustness("Kernels", given="labels of -1 and 1, or 0.0 and 2.0, for true and false", outcome="refused")
@pytest.mark.robustness("Kernels", given="a mask of numbers", outcome="refused: it must be boolean")
def test_labels_and_masks_are_boolean(case):
    inputs = case.draw()
    for name in (*LABELS & set(inputs), "where"):
        for low, high in ((-1, 1), (0.0, 2.0)):
            with pytest.raises(ValueError, match=f"{name} must be boolean"):
                case({**inputs, name: np.where(inputs[name], high, low)})


@named(lambda case: any(name in ("label", "correct") for name in case.arrays))
@pytest.mark.usefixtures("users")
@pytest.mark.robustness(
    "Kernels", given="a label that is a share, outside [0, 1]", outcome="refused; NaN where it is traced"
)
def test_shares_lie_between_0_and_1(case):
    if case.loss not in (preference.ipl_loss, reward_model.bradley_terry_loss, reward_model.outcome_loss):
        return
    name = "label" if "label" in case.arrays else "correct"
    inputs = unmasked(case.draw())
    inputs[name] = np.array(inputs[name], np.float32)
    inputs[name].flat[0] = -1
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got -1.0"):
        case(inputs)
    value = np.asarray(jax.jit(case)(inputs))
    assert np.isnan(value.flat[0])
    assert np.isfinite(value.flat[1:]).all()


@named(lambda case: case.size == 2 and case.arrays[case.trained] == "BN" and case.trained == "logp")
@pytest.mark.robustness(
    "Kernels",
    given="a rejected completion of log-probability -inf",
    outcome="value and gradient of the limit, in every loss on pairs",
)
def test_an_impossible_rejected_completion_is_the_limit(case):
    inputs = case.draw()
    inputs["where"] = np.ones_like(inputs["where"])
    results = []
    for rejected in (-np.inf, -1e6):
        inputs["logp"] = np.stack([inputs["logp"][:, 0], np.full(B, rejected, np.float32)], axis=1)
        value, grads = value_and_grads(case, inputs)
        results.append((value, grads["logp"]))
        np.testing.assert_allclose(case(unmasked(inputs)), value, rtol=1e-5)
    (value, grad), (near, near_grad) = results
    assert not np.isnan(value).any()
    assert not np.isnan(grad).any()
    # Some losses grow without bound with it, such as squares and those that doubt the label.
    unbounded = np.abs(near) > 1e3
    np.testing.assert_array_equal(value[unbounded], np.sign(near[unbounded]) * np.inf)
    np.testing.assert_allclose(value[~unbounded], near[~unbounded], rtol=1e-5)
    np.testing.assert_allclose(grad[~unbounded], near_grad[~unbounded], rtol=1e-5)


def test_without_centring_a_reward_of_minus_infinity_is_the_limit():
    loss = jax.jit(jax.value_and_grad(reward_model.bradley_terry_loss))
    value, grad = loss(np.float32([1.0, -np.inf]), label=np.float32(1))
    assert (float(value), grad.tolist()) == (0.0, [0.0, 0.0])
