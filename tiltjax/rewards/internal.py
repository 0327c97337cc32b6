r"""Rewards without labels: what the policy itself, or the vote of its candidates, says of a completion.

All are detached: `jax.lax.stop_gradient` stands in front of every formula, as for any other reward. What a policy
gradient of such a reward ascends is therefore not always the mean of that reward. With ``u`` the mean over the tokens
of ``KL(policy || uniform)``, in completions of a fixed length L,

.. math:: E_\pi u = \log V - H(\pi) / L

the expected policy gradient is

* for `sequence_entropy_reward` exactly that of ``-H(policy)``, though the reward depends on the parameters;
* for `self_certainty` and `token_entropy_reward` only the part of theirs that comes from which prefixes are visited.
  The certainty of a position does not depend on the token that is sampled there: the last token gets no gradient, and
  a completion of one token none at all;
* for `empo_reward` and `ttrl_reward` one that sharpens the policy towards its frequent answers, right or wrong.

The closed form by which ``E u - beta KL`` (of whole completions, ``beta > 1 / L``) from a reference ``p`` has its
maximum at ``p^(L beta / (L beta - 1))``, normalised, needs the gradient to flow *through* ``u`` as well: differentiate
``E u`` for that. Forget to detach the reward of a policy-gradient loss and you get neither, but that loss plus
``-logp`` times the gradient of the reward. The mean of `self_certainty` with direction "uniform_to_policy", with
gradient, has no maximum at all: it grows without bound as any one token becomes impossible.

All of them can be raised by short, repetitive, confident text: watch length, entropy and `tiltjax.tilt.diversity`.
"""

import operator
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.ops.checks import check_boolean, check_choice, is_number
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_sum
from tiltjax.types import Array, Bool, Float, Int, Numeric

__all__ = [
    "Vote",
    "cluster_answers",
    "empo_reward",
    "majority_vote",
    "self_certainty",
    "semantic_entropy",
    "sequence_entropy_reward",
    "token_entropy_reward",
    "token_mean",
    "ttrl_reward",
]


def self_certainty(
    logits: Float[Array, "*batch T V"],
    *,
    direction: str,
    where: Bool[Array, "*batch T"] | None = None,
    vocabulary: int | Bool[Array, " V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""How far the next-token distributions are from uniform, mean over the tokens of a completion.

    .. math:: u = \frac1T \sum_t \mathrm{KL}(U \,\|\, \pi_t) = \frac1T \sum_t \Bigl[\log \sum_v e^{z_{tv}}
              - \frac1V \sum_v z_{tv} - \log V\Bigr] \quad \text{or} \quad
              u = \frac1T \sum_t \mathrm{KL}(\pi_t \,\|\, U) = \log V - \frac1T \sum_t H(\pi_t)

    The two are different rewards and there is no default. "uniform_to_policy" is Intuitor's, has no upper bound and is
    ruled by the least likely tokens; "policy_to_uniform" lies in [0, log V] and is ruled by the most likely ones.
    Without gradient: see the top of the module. Where the logits do not fit in memory, use
    `tiltjax.ops.tokens.token_logp`: "uniform_to_policy" is ``token_mean(stats.self_certainty, where=mask)``, and
    "policy_to_uniform" is ``log V + token_entropy_reward(stats.entropy, where=mask)``.

    Args:
      logits: At the positions that predict the tokens, at temperature 1.
      direction: "uniform_to_policy" or "policy_to_uniform".
      where: True for real tokens; None means all.
      vocabulary: Where the last axis is padded: how many leading entries are real, or True for the real ones. Padding
        left in (-inf, or large negative logits) changes V, and makes "uniform_to_policy" huge or infinite.

    Returns:
      One reward per completion, nats, not negative up to rounding; 0 without a real token.

    Raises:
      ValueError: If ``direction`` is unknown, or ``vocabulary`` is a number outside 1 to V.

    Example:
      >>> logits = jnp.log(jnp.array([[0.75, 0.25]]))  # one token
      >>> round(float(self_certainty(logits, direction="uniform_to_policy")), 4)  # log(1/2) - log(3/16) / 2
      0.1438
      >>> round(float(self_certainty(logits, direction="policy_to_uniform")), 4)  # log 2 - 0.5623
      0.1308

    References:
      "uniform_to_policy": Zhao et al., 2025, arXiv:2505.19590 (Intuitor; its code leaves out the constant log V).
      "policy_to_uniform": Jiao, Chen, Li, 2025, arXiv:2509.04372.
    """
    check_choice("direction", direction, ("policy_to_uniform", "uniform_to_policy"))
    logits = jax.lax.stop_gradient(as_float(logits))
    check_alike(where, logits[..., 0])
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0)
    real = jnp.broadcast_to(_real_entries(vocabulary, logits.shape[-1]), logits.shape)
    logp = jax.nn.log_softmax(logits, where=real)
    log_size = jnp.log(masked_sum(jnp.ones_like(logp), real))
    if direction == "uniform_to_policy":
        return token_mean(-log_size - masked_mean(logp, real), where=where)
    possible = logp != -jnp.inf
    negentropy = jnp.sum(jnp.where(possible, jnp.exp(logp) * jnp.where(possible, logp, 0), 0), axis=-1)
    return token_mean(log_size + negentropy, where=where)


def token_mean(
    value: Float[Array, "*batch T"], *, where: Bool[Array, "*batch T"] | None = None
) -> Float[Array, "*batch"]:
    """Mean over the real tokens of a completion, as a reward: without gradient.

    Args:
      value: One value per token, such as a field of `tiltjax.ops.tokens.TokenStats`; masked ones may hold anything.
      where: True for real tokens; None means all.

    Returns:
      One reward per completion, in the unit of ``value``; 0 without a real token.
    """
    return masked_mean(jax.lax.stop_gradient(value), where)


def token_entropy_reward(
    entropy: Float[Array, "*batch T"], *, where: Bool[Array, "*batch T"] | None = None, reduce: str = "mean"
) -> Float[Array, "*batch"]:
    r"""Minus the entropy of the next-token distributions along a completion.

    .. math:: r = -\frac1T \sum_t H(\pi_t) \quad \text{("mean")}, \qquad r = -\sum_t H(\pi_t) \quad \text{("sum")}

    The mean differs from `self_certainty` with direction "policy_to_uniform" by the constant log V, which leaves every
    group advantage as it is. The sum pays for short completions. Without gradient: see the top of the module.

    Args:
      entropy: Over the whole vocabulary, nats, at temperature 1: ``token_logp(...).entropy``.
      where: True for real tokens; None means all.
      reduce: "mean" or "sum" over the real tokens.

    Returns:
      One reward per completion, nats, not positive; 0 without a real token.

    Raises:
      ValueError: If ``reduce`` is unknown.

    References:
      Agarwal et al., 2025, arXiv:2505.15134 (EM-RL-token); Prabhudesai et al., 2025, arXiv:2505.22660 (RENT).
    """
    check_choice("reduce", reduce, ("mean", "sum"))
    if reduce == "mean":
        return -token_mean(entropy, where=where)
    return -masked_sum(jax.lax.stop_gradient(entropy), where)


def sequence_entropy_reward(logp: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""The log-probability of the completion under the policy that drew it: minus a one-sample entropy.

    .. math:: r = \log \pi(y), \qquad \nabla E_\pi[\mathrm{sg}(r)] = -\nabla H(\pi)

    where the gradient on the left is that of the policy alone. Without gradient, and here that costs nothing.

    Args:
      logp: Log-probability of the completion, nats: `tiltjax.ops.tokens.sequence_logp`.

    Returns:
      ``logp`` in float32 or wider.

    References:
      Agarwal et al., 2025, arXiv:2505.15134 (EM-RL-sequence).
    """
    return jax.lax.stop_gradient(as_float(logp))


def semantic_entropy(
    cluster: Int[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None
) -> Float[Array, "*batch"]:
    r"""Entropy of the meanings among the candidates of a prompt.

    .. math:: H = -\sum_c \frac{n_c}{N} \log \frac{n_c}{N}

    with ``n_c`` the number of candidates in cluster ``c``. Each unparsable candidate is a cluster of its own.

    Args:
      cluster: Which candidates mean the same (`cluster_answers`); negative for an unparsable one.
      where: True for real candidates; None means all.

    Returns:
      One entropy per prompt, nats, from 0 (unanimous) to log N (no two agree); 0 without a real candidate.

    Example:
      >>> round(float(semantic_entropy(jnp.array([0, 0, 1, -1]))), 4)  # 1.5 log 2
      1.0397

    References:
      Kuhn, Gal, Farquhar, 2023, arXiv:2302.09664 (the discrete form).
    """
    votes = _votes(cluster, where)
    total = jnp.maximum(_count(cluster, where), 1)[..., None]
    return masked_mean(jnp.log(total) - jnp.log(as_float(jnp.maximum(votes, 1))), where)


def empo_reward(
    cluster: Int[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    min_entropy: Numeric | None = None,
    max_entropy: Numeric | None = None,
) -> Float[Array, "*batch N"]:
    r"""The share of a prompt's candidates that mean the same as this one.

    .. math:: r_i = \frac{n_{c(i)}}{N}

    and 0 for an unparsable candidate, for a whole group in which no two agree, and for a whole group whose semantic
    entropy is not strictly between the thresholds: such a prompt is too easy, or its majority is not to be trusted.

    Args:
      cluster: Which candidates mean the same (`cluster_answers`); negative for an unparsable one.
      where: True for real candidates; None means all.
      min_entropy: Lower threshold on `semantic_entropy`, nats; None for none. With 0, unanimous groups get 0.
      max_entropy: Upper threshold, nats; None for none.

    Returns:
      Rewards ``[*batch, N]``, float32, in [0, 1]; 0 where masked.

    Example:
      >>> empo_reward(jnp.array([0, 0, 1, -1])).tolist(), empo_reward(jnp.array([0, 1, 2, 3])).tolist()
      ([0.5, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0])

    References:
      Zhang et al., 2025, arXiv:2504.05812.
    """
    votes = _votes(cluster, where)
    entropy = semantic_entropy(cluster, where=where)
    keep = jnp.max(votes, axis=-1) > 1
    if min_entropy is not None:
        keep &= entropy > min_entropy
    if max_entropy is not None:
        keep &= entropy < max_entropy
    total = jnp.maximum(_count(cluster, where), 1)
    return jnp.where(keep[..., None], votes / total[..., None], 0)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Vote:
    """The most frequent answer of a prompt's candidates.

    Attributes:
      answer: Its id, ``[*batch]``; -1 where no candidate could be parsed.
      share: Its votes over the number of real candidates, unparsable ones included, ``[*batch]``, in [0, 1].
    """

    answer: Int[Array, "*batch"]
    share: Float[Array, "*batch"]


def majority_vote(answer: Int[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None) -> Vote:
    """The most frequent answer; of several, the one seen first.

    Candidates that could not be parsed never form a class, however many they are.

    Args:
      answer: Id of every candidate's answer (`cluster_answers`); negative for an unparsable one.
      where: True for real candidates; None means all.

    Returns:
      `Vote` of the winner and its share.

    Example:
      >>> vote = majority_vote(jnp.array([-1, 7, 3, 3, 7, -1, -1, 5]))
      >>> int(vote.answer), float(vote.share)
      (7, 0.25)
    """
    votes = _votes(answer, where)
    first = jnp.argmax(votes, axis=-1, keepdims=True)
    most, winner = (jnp.take_along_axis(x, first, axis=-1)[..., 0] for x in (votes, jnp.asarray(answer)))
    return Vote(answer=jnp.where(most > 0, winner, -1), share=most / jnp.maximum(_count(answer, where), 1))


def ttrl_reward(
    answer: Int[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None
) -> Float[Array, "*batch N"]:
    r"""1 for the candidates that give the majority's answer, else 0.

    .. math:: r_i = 1[a_i = a^*], \qquad a^* = \arg\max_a \#\{j : a_j = a\}

    Trained on, it converges to the policy's most frequent answer, right or wrong. To vote with more candidates than are
    trained on, slice the rewards: ``ttrl_reward(answer)[..., :32]`` for 32 of 64.

    Args:
      answer: Id of every candidate's answer (`cluster_answers`); negative for an unparsable one.
      where: True for the candidates that vote; None means all.

    Returns:
      Rewards ``[*batch, N]``, float32; 0 where unparsable or masked. Ties as in `majority_vote`.

    Example:
      >>> ttrl_reward(jnp.array([-1, 7, 3, 3, 7, -1, -1, 5])).tolist()
      [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]

    References:
      Zuo et al., 2025, arXiv:2504.16084.
    """
    winner = majority_vote(answer, where=where).answer[..., None]
    return jnp.where(_parsed(answer, where) & (answer == winner), 1.0, 0.0)


def cluster_answers(
    answers: Sequence[str | None], *, equivalent: Callable[[str, str], bool] = operator.eq
) -> Int[np.ndarray, " N"]:
    """Turns the answers to one prompt into ids, counted from 0 in order of first appearance. Runs on the host.

    Every new text is compared with the first member of each cluster, so where ``equivalent`` is not transitive the
    order of the candidates matters.

    Args:
      answers: What `tiltjax.rewards.verifiers.extract_answer` found in each candidate; None or blank is unparsable.
        White space at the ends does not count.
      equivalent: ``(earlier, later) -> bool``, asked of different texts only; by default these are never the same.

    Returns:
      Ids, int32; -1 for an unparsable answer.

    Example:
      >>> from tiltjax.rewards.verifiers import as_number
      >>> cluster_answers(["1/2", "0.5", None, "2", "1/2"]).tolist()
      [0, 1, -1, 2, 0]
      >>> cluster_answers(["1/2", "0.5", None, "2"], equivalent=lambda a, b: as_number(a) == as_number(b)).tolist()
      [0, 0, -1, 1]
    """
    known: dict[str, int] = {}
    firsts: list[str] = []
    texts = [(answer or "").strip() for answer in answers]
    for text in texts:
        if text and text not in known:
            known[text] = next((i for i, first in enumerate(firsts) if equivalent(first, text)), len(firsts))
            if known[text] == len(firsts):
                firsts.append(text)
    return np.array([known.get(text, -1) for text in texts], np.int32)


def _real_entries(vocabulary: int | Array | None, size: int) -> Array:
    if vocabulary is None:
        return jnp.ones(size, bool)
    if is_number(vocabulary):
        if not 1 <= vocabulary <= size:
            raise ValueError(f"vocabulary must lie in 1 to {size}, the size of the last axis; got {vocabulary}")
        return jnp.arange(size) < vocabulary
    check_boolean("vocabulary", vocabulary)
    chex.assert_shape(vocabulary, (size,))
    return jnp.asarray(vocabulary)


def _parsed(answer: Array, where: Array | None) -> Array:
    check_alike(where, answer)
    return answer >= 0 if where is None else (answer >= 0) & where


def _count(answer: Array, where: Array | None) -> Array:
    """Real candidates per prompt, float32, unparsable ones included."""
    return masked_sum(jnp.ones(answer.shape), where)


def _votes(answer: Array, where: Array | None) -> Array:
    """How many candidates agree with each, itself included; 0 where unparsable or masked."""
    parsed = _parsed(answer, where)
    agree = answer[..., :, None] == answer[..., None, :]
    return jnp.sum(agree & parsed[..., :, None] & parsed[..., None, :], axis=-1)
