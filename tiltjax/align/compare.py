"""A policy beside its reference, soft best-of-N and theory, on the held-out prompts of a session."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.align.evaluation import Evaluation
from tiltjax.align.law import share_cut
from tiltjax.align.session import Aligned, Session
from tiltjax.align.settings import UNTRAINED, Settings
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.ops.tokens import sequence_logp
from tiltjax.samplers.best_of_n import soft_best_of_n
from tiltjax.train import evaluate
from tiltjax.train.evaluate import Point
from tiltjax.train.metrics import bootstrap_interval
from tiltjax.train.streams import stream
from tiltjax.types import Array, Float

__all__ = ["compare"]

_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""N of best-of-N, as far as half of the candidates go."""

_soft_best_of_n = jax.jit(soft_best_of_n)


def compare(session: Session, aligned: Aligned | None = None) -> Evaluation:
    """Evaluates the reference, soft best-of-N, the tilt in theory, and a policy on the held-out prompts.

    Args:
      session: Of the reference.
      aligned: A policy of `Session.align`; None evaluates without one.

    Returns:
      The evaluation.
    """
    settings = session.settings if aligned is None else aligned.settings
    trained = aligned is not None and settings.method != UNTRAINED
    held_out = session.sample("heldout")
    reward, texts, ends = np.asarray(held_out.reward), session.texts(held_out), text.end_ids(session.tokenizer)
    results: dict[str, Any] = {
        "settings": settings.describe(),
        **{name: getattr(settings, name) for name in ("beta", "learning_rate", "report_beta")},
        **_theory(reward, beta=settings.report_beta),
        "points": _points(reward, settings),
        "law": settings.describe_law(evaluation=True),
        "truncated": {"reference": share_cut(held_out, ends)},
    }
    samples = _samples(session, settings, reward, texts)
    if aligned is not None and trained:
        drawn, said = session.rollout("heldout-tuned", aligned.model, name="heldout tuned")
        results["truncated"]["tuned"] = share_cut(drawn, ends)
        found = _against_reference(session, settings, drawn, reward)
        results["points"]["tuned"] = found.pop("points")
        results |= found
        for i, sample in enumerate(samples):
            sample["tuned"] = (said[i][0], float(np.asarray(drawn.reward)[i, 0]))
    drawn_reward = np.asarray(session.sample().reward)
    return Evaluation(
        settings=settings,
        results=results,
        samples=samples,
        reward=drawn_reward,
        estimates=evaluate.estimate(drawn_reward, beta=settings.report_beta),
        export=functools.partial(session.save, aligned.model, overwrite=True) if aligned and trained else None,
    )


def _theory(reward: Float[Array, "P N"], *, beta: float) -> dict[str, Any]:
    """What the candidates of the reference say of the tilt, with intervals over prompts."""
    theory = evaluate.estimate(reward, beta=beta)
    return {
        "log_z": bootstrap_interval(theory.log_z_jackknife),
        "optimum": bootstrap_interval(beta * theory.log_z_jackknife),
        "tilted_reward": bootstrap_interval(theory.tilted_reward),
        "tilt_kl": bootstrap_interval(theory.tilt_kl),
        "ess": bootstrap_interval(theory.ess),
    }


def _points(reward: Float[Array, "P N"], settings: Settings) -> dict[str, list[Point]]:
    """Reward and KL of all that needs no training."""
    beta = settings.report_beta
    ns = [n for n in _SIZES if n <= max(1, settings.num_candidates // 2)]
    return {
        "reference": [evaluate.policy_point("reference", reward, np.zeros_like(reward))],
        "soft_best_of_n": evaluate.soft_best_of_n_frontier(reward, beta=beta, ns=ns),
        "best_of_n": evaluate.best_of_n_frontier(reward, ns=ns),
        "tilt": evaluate.tilt_frontier(reward, betas=np.geomspace(beta / 8, beta * 32, 17).tolist()),
    }


def _samples(session: Session, settings: Settings, reward: Float[Array, "P N"], texts: list[list[str]]) -> list[dict]:
    """Per held-out prompt a completion of the reference, and the one that soft best-of-N picks."""
    key = stream(settings.seed, "soft best-of-n")
    picked = np.asarray(_soft_best_of_n(key, jnp.asarray(reward), beta=settings.report_beta))
    return [
        {
            "prompt": text.prompt_text(row.prompt),
            "reference": (texts[i][0], float(reward[i, 0])),
            f"soft best-of-{settings.num_candidates}": (texts[i][picked[i]], float(reward[i, picked[i]])),
        }
        for i, row in enumerate(session.rows["heldout"])
    ]


def _against_reference(
    session: Session, settings: Settings, drawn: Candidates, before: Float[Array, "P N"]
) -> dict[str, Any]:
    """Reward, KL and reward - beta KL of a policy from its own candidates, and its gain over the reference's."""
    reward, logp = np.asarray(drawn.reward), np.asarray(sequence_logp(drawn.old_token_logp, drawn.completion_mask))
    log_ratio = logp - session.ref_logp(drawn, "score tuned", temperature=session.settings.eval_temperature)
    return {
        "points": [evaluate.policy_point(settings.method, reward, log_ratio)],
        "improvement": bootstrap_interval(reward.mean(1) - before.mean(1)),
        "objective": bootstrap_interval((reward - settings.report_beta * log_ratio).mean(1)),
    }
