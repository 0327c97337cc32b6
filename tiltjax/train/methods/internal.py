"""Methods that need nobody's judgement: the policy's own certainty, or the majority of its answers, as the reward."""

from tiltjax.data.candidates import token_mask
from tiltjax.losses.penalties import kl_k3
from tiltjax.losses.policy_gradient import ppo_clip_loss
from tiltjax.rewards.internal import empo_reward, sequence_entropy_reward, token_entropy_reward, token_mean, ttrl_reward
from tiltjax.train.method import Batch, Method, Prepare, Round
from tiltjax.train.methods.labels import group_scaled, logp_of, surrogate
from tiltjax.types import Array

__all__ = ["INTERNAL"]


def self_certainty(now: Round, batch: Batch) -> Batch:
    """How far from uniform the policy was."""
    return batch.change(reward=token_mean(batch.old.self_certainty, where=token_mask(batch.candidates)))


def token_entropy(now: Round, batch: Batch) -> Batch:
    """Minus the entropy along the completion."""
    return batch.change(reward=token_entropy_reward(batch.old.entropy, where=token_mask(batch.candidates)))


def sequence_entropy(now: Round, batch: Batch) -> Batch:
    """The completion's own log-probability."""
    return batch.change(reward=sequence_entropy_reward(logp_of(batch.old, batch)))


def _answers(now: Round) -> Array:
    if now.feedback.answer is None:
        raise ValueError("feedback must have answers for a method that counts votes, got None")
    return now.feedback.answer


def semantic(now: Round, batch: Batch) -> Batch:
    """The share of the candidates with the same answer."""
    return batch.change(reward=empo_reward(_answers(now), where=batch.where))


def majority(now: Round, batch: Batch) -> Batch:
    """Whether the answer is the majority's."""
    return batch.change(reward=ttrl_reward(_answers(now), where=batch.where))


def _rlif(name: str, paper: str, label: Prepare, num: int, feedback: str, beta: float) -> Method:
    return Method(name, paper, surrogate(ppo_clip_loss, mode="seq_mean_token_mean", kl=kl_k3), (("current", num),),
                  feedback, label=label, advantage=group_scaled, beta=beta, zero_beta=True, optimum="none")  # fmt: skip


INTERNAL = (
    _rlif("self_certainty", "Zhao et al., 2025, arXiv:2505.19590", self_certainty, 7, "internal", 0.005),
    _rlif("token_entropy", "Prabhudesai et al., 2025, arXiv:2505.22660", token_entropy, 8, "internal", 0.001),
    _rlif("sequence_entropy", "Agarwal et al., 2025, arXiv:2505.15134", sequence_entropy, 4, "internal", 0.001),
    _rlif("empo", "Zhang et al., 2025, arXiv:2504.05812", semantic, 8, "vote", 0.0),
    _rlif("ttrl", "Zuo et al., 2025, arXiv:2504.16084", majority, 64, "vote", 0.0),
)
"""Self-certainty (Intuitor), token entropy (RENT), sequence entropy, EMPO and TTRL, each climbed by GRPO."""
