r"""Reward models from labels: comparisons, rankings, correctness, steps and harm; scores in, one loss per label out.

These losses fit the reward ``r`` that the tilt raises; the rest of the family inverts it. Comparisons fix it up to a
constant of the prompt only (`bradley_terry_loss`, `plackett_luce_loss`), which cancels in the tilt but not in a mean
over prompts. To centre a trained model, subtract ``ops.masked.average(reward, where).mean``, summed over a reference
set; or train with ``centring``.

A scalar head is read at the last real token of a completion (its end token), whichever side the padding is on.
"""

import jax
import jax.numpy as jnp

from tiltjax.losses.preference.pairs import gap, pairs
from tiltjax.ops.checks import check_at_least, check_boolean, check_pair
from tiltjax.ops.logspace import scale
from tiltjax.ops.masked import as_float, check_alike, masked_mean, shares
from tiltjax.ops.order import plackett_luce_logp
from tiltjax.types import Array, Bool, Float, Int, Numeric

__all__ = [
    "bradley_terry_loss",
    "cost_model_loss",
    "labelled_steps",
    "outcome_loss",
    "plackett_luce_loss",
    "process_class_loss",
    "process_loss",
]

_Label = Bool[Array, "..."] | Int[Array, "..."] | Float[Array, "..."]


def bradley_terry_loss(
    reward: Float[Array, "*batch 2"],
    *,
    margin: Numeric | Float[Array, "*batch"] | None = None,
    label: Float[Array, "*batch"] | None = None,
    centring: Numeric = 0.0,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The Bradley-Terry likelihood of a comparison: index 0 chosen, index 1 rejected.

    .. math:: -q \log \sigma(d - m) - (1 - q) \log \sigma(-d - m) + c\, (r_0 + r_1)^2, \qquad d = r_0 - r_1

    ``r`` and ``r + f(x)`` have the same likelihood. The centring term touches the sum of the two rewards and never
    their difference, so it picks the ``f`` with rewards around 0 and leaves the ranking alone. Pitfalls: the margin is
    subtracted, so that a pair that differs much must be told apart by more; added, it would make that pair easier.
    Labels without noise have no finite maximum.

    Args:
      reward: Reward of chosen and rejected, reward units: what is trained.
      margin: ``m`` >= 0, by how much the preferred one should lead, reward units, whichever it is; no gradient. A
        number, or one per pair. None is 0.
      label: ``q`` in [0, 1], the share of annotators who preferred index 0, 1/2 for a tie; no gradient. None is 1.
      centring: ``c`` >= 0, per squared reward unit; 0.01 is usual.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``, nats; 0 where masked.

    Raises:
      ValueError: If ``centring`` is a negative Python number.

    Example:
      >>> reward = jnp.array([1.5, 0.5])
      >>> [round(float(bradley_terry_loss(reward, margin=m)), 4) for m in (0.0, 1.0)]
      [0.3133, 0.6931]

    References:
      Bradley, Terry, 1952; Ouyang et al., 2022, arXiv:2203.02155, Eq. 1; Touvron et al., 2023, arXiv:2307.09288, Eq. 2
      (margin); Eisenstein et al., 2023, arXiv:2312.09244 (centring).
    """
    check_at_least("centring", centring, 0)
    check_pair("reward", reward)
    real, reward = pairs(where, reward, margin=margin, label=label)
    margin = 0.0 if margin is None else jnp.where(real, _constant(margin), 0)
    loss = -jax.nn.log_sigmoid(gap(reward) - margin)
    if label is not None:
        label = shares("label", label, loss, real)
        loss = scale(label, loss) - scale(1 - label, jax.nn.log_sigmoid(-gap(reward) - margin))
    total = jnp.sum(reward, axis=-1)
    # Without centring, an infinite reward of the rejected costs nothing, and has no gradient.
    total = jnp.where((centring == 0) & jnp.isinf(total), 0, total)
    return jnp.where(real, loss + centring * jnp.square(total), 0)


def plackett_luce_loss(
    reward: Float[Array, "*batch N"],
    ranking: Int[Array, "*batch N"] | None = None,
    *,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The Plackett-Luce likelihood of a ranking of N candidates.

    .. math:: -\sum_{k=1}^{n-1} \left[ r_{\tau(k)} - \log \sum_{j \ge k} e^{r_{\tau(j)}} \right]

    With two candidates it is `bradley_terry_loss`; with the implicit reward in place of ``r`` it is
    `tiltjax.losses.preference.plackett_luce_dpo_loss`. Pitfall: a sum over ranks, so a prompt with more candidates
    weighs more.

    Args:
      reward: Reward of every candidate, reward units: what is trained.
      ranking: Index of the best candidate, of the second, ... of the worst. None means that they are in that order.
      where: True for real candidates, in the order of ``reward``; masked ones drop out of the ranking.

    Returns:
      Loss per prompt ``[*batch]``, nats; 0 with fewer than two real candidates.

    Example:
      >>> reward = jnp.log(jnp.array([1.0, 2.0, 3.0]))
      >>> round(float(plackett_luce_loss(reward, jnp.array([2, 1, 0]))), 4)  # -log(3/6 * 2/3)
      1.0986

    References:
      Plackett, 1975; Rafailov et al., 2023, arXiv:2305.18290, appendix A.3.
    """
    return -plackett_luce_logp(reward, ranking, where=where)


def outcome_loss(
    logit: Float[Array, "*batch"], correct: _Label, *, where: Bool[Array, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    r"""Outcome reward model: the cross-entropy of "this completion is correct".

    .. math:: -c \log \sigma(s) - (1 - c) \log \sigma(-s)

    Unlike a comparison it fixes the constant of every prompt: ``s`` is the log-odds of a correct completion. Read at
    the last token it is an outcome reward model proper. To train at every token, pass the logits ``[*batch, T]``, the
    completion's label repeated ``T`` times and the completion mask as ``where``, then average over tokens: each logit
    then predicts the outcome from its prefix, which is a value function of whoever wrote the completions.

    Args:
      logit: Log-odds of a correct completion, nats: what is trained.
      correct: Whether it is, or a share in [0, 1]; no gradient.
      where: True for real entries; None means all.

    Returns:
      Loss per entry ``[*batch]``, nats; 0 where masked.

    Example:
      >>> loss = outcome_loss(jnp.log(jnp.array([3.0, 3.0])), jnp.array([True, False]))
      >>> [round(float(x), 4) for x in loss]  # -log(3/4), -log(1/4)
      [0.2877, 1.3863]

    References:
      Cobbe et al., 2021, arXiv:2110.14168.
    """
    logit = as_float(logit)
    correct = shares("correct", correct, logit, where)
    if where is not None:
        logit = jnp.where(where, logit, 0)
    loss = -scale(correct, jax.nn.log_sigmoid(logit)) - scale(1 - correct, jax.nn.log_sigmoid(-logit))
    return loss if where is None else jnp.where(where, loss, 0)


def process_loss(
    step_logit: Float[Array, "*batch T"], label: _Label, *, where: Bool[Array, "*batch T"] | None = None
) -> Float[Array, "*batch"]:
    r"""Process reward model: the cross-entropy of "this step is good", averaged over the labelled steps.

    .. math:: \frac1{|S|} \sum_{t \in S} \left[ -c_t \log \sigma(s_t) - (1 - c_t) \log \sigma(-s_t) \right]

    Positions are tokens, of which only the one that ends a step carries a label, or steps. Pitfall: an unlabelled
    position is left out by ``where``, never by its label; `labelled_steps` makes one from the other.

    Args:
      step_logit: Log-odds of a good step at every position, nats: what is trained.
      label: Whether the step that ends there is good, or a share in [0, 1], such as of the rollouts from there that
        ended well; no gradient.
      where: True for labelled positions; None means all.

    Returns:
      Loss per completion ``[*batch]``, nats; 0 without a labelled step.

    Example:
      >>> label, where = labelled_steps(jnp.array([-100, 1, -100, 0]))
      >>> round(float(process_loss(jnp.log(jnp.array([9.0, 3.0, 9.0, 1.0])), label, where=where)), 4)
      0.4904

    References:
      Lightman et al., 2023, arXiv:2305.20050; Wang et al., 2023, arXiv:2312.08935 (rollouts).
    """
    return masked_mean(outcome_loss(step_logit, label, where=where), where)


def process_class_loss(
    step_logit: Float[Array, "*batch T C"],
    label: Int[Array, "*batch T"],
    *,
    where: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Process reward model with C classes, such as bad, neutral and good.

    .. math:: -\frac1{|S|} \sum_{t \in S} \log \mathrm{softmax}(s_t)_{c_t}

    With two classes it is `process_loss` of the difference of their logits.

    Args:
      step_logit: Logits of the classes at every position: what is trained.
      label: Class of the step that ends there, in ``[0, C)``.
      where: True for labelled positions, as in `process_loss`; None means all.

    Returns:
      Loss per completion ``[*batch]``, nats; 0 without a labelled step.

    Example:
      >>> round(float(process_class_loss(jnp.zeros((5, 3)), jnp.array([0, 1, 2, 2, 1]))), 4)  # log 3
      1.0986

    References:
      Lightman et al., 2023, arXiv:2305.20050.
    """
    logit = as_float(step_logit)
    check_alike(where, label, logit[..., 0])
    if where is not None:
        logit, label = jnp.where(where[..., None], logit, 0), jnp.where(where, label, 0)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logit), label[..., None], axis=-1)[..., 0]
    return -masked_mean(logp, where)


def labelled_steps(
    label: Int[Array, "*batch T"], *, ignore: int = -100
) -> tuple[Int[Array, "*batch T"], Bool[Array, "*batch T"]]:
    """Splits labels that mark "no step ends here" by a number into labels and a mask.

    Args:
      label: Labels, ``ignore`` where there is none.
      ignore: What marks an unlabelled position.

    Returns:
      The labels, 0 in the place of ``ignore``, and True where there is one: ``label`` and ``where`` of `process_loss`
      and `process_class_loss`.

    Example:
      >>> [x.tolist() for x in labelled_steps(jnp.array([-100, 1, 0]))]
      [[0, 1, 0], [False, True, True]]
    """
    where = jnp.asarray(label) != ignore
    return jnp.where(where, label, 0), where


def cost_model_loss(
    cost: Float[Array, "*batch 2"],
    harmful: Bool[Array, "*batch 2"],
    *,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Safe RLHF's cost model: a comparison of two completions by harm, and whether each is harmful at all.

    .. math:: -\log \sigma(c_1 - c_0) - \sum_{i} \log \sigma(s_i c_i), \qquad
              s_i = \begin{cases} +1 & \text{harmful} \\ -1 & \text{safe} \end{cases}

    Index 0 is chosen, which means safer, and index 1 rejected, more harmful: a lower cost is better. A cost above 0
    means harm; the second term fixes that zero, which a comparison alone leaves open, and `tiltjax.losses.constrained`
    needs it. Pitfall: the paper writes the pair the other way round, ``y_w`` being the more harmful one, so its
    :math:`c(y_w) - c(y_l)` is :math:`c_1 - c_0` here; its code calls a safe completion +1.

    Args:
      cost: Cost of chosen and rejected, reward units: what is trained.
      harmful: Whether each completion is harmful in itself; both may be, or neither.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``, nats; 0 where masked.

    Example:
      >>> cost, safe = jnp.array([-1.0, 2.0]), jnp.array([False, False])
      >>> [round(float(cost_model_loss(cost, h)), 4) for h in (jnp.array([False, True]), safe)]
      [0.4888, 2.4888]

    References:
      Dai et al., 2023, arXiv:2310.12773, Eq. 6.
    """
    check_pair("cost", cost)
    check_boolean("harmful", harmful)
    check_alike(None, cost, harmful)
    real, cost = pairs(where, cost)
    harm = jax.nn.log_sigmoid(jnp.where(harmful, cost, -cost))
    return jnp.where(real, -jax.nn.log_sigmoid(-gap(cost)) - jnp.sum(harm, axis=-1), 0)


def _constant(x: Array | float) -> Array:
    return jax.lax.stop_gradient(as_float(x))
