r"""Self-play: losses whose target is a preference between completions, and so a game, not a reward.

A preference ``P(y > y')`` need not come from any reward: it may run in a circle. What remains of a reward is the win
rate against a policy, ``r_t(y) = E_{y' ~ pi_t} P(y > y')``, which moves with the policy. Every method here is one step
of the game: the last policy ``pi_t`` (or a reference, or both) tilted by that win rate,

.. math:: \pi_{t+1} \propto \pi_t\, e^{r_t / \eta} \quad \text{(DNO)}, \qquad
          \pi_{t+1} \propto p_\text{ref}^{\beta/\eta}\, \pi_t^{1 - \beta/\eta}\, e^{r_t/\eta} \quad \text{(INPO, MPO)}

Without the pull to a fixed reference, the average of the iterates approaches an equilibrium and the last one circles
around it. Units of ``beta`` and ``eta`` are those of the win rate, a probability. The papers' letters:

| method | paper | here |
| --- | --- | --- |
| SPIN | ``lambda``, scale of the margin | ``beta`` |
| DNO | ``eta``, divides the win rate | ``beta`` |
| INPO | ``tau``, KL to the reference; ``eta``, inverse step size | ``beta``; ``eta`` |
| Nash-MD | ``tau``, KL to the reference; ``beta``, share of the mixture | ``beta``; ``mixture`` |
| XPO | ``beta``; ``alpha``, optimism | ``beta``; ``alpha`` |
| MPO | ``alpha``, KL to the magnet; ``eta``, step size | ``beta``; ``step_size`` |

SPPO and REBEL, which regress on the tilt, are in `tiltjax.losses.regression`.
"""

import jax
import jax.numpy as jnp

from tiltjax.advantages import reward_to_go, token_reward
from tiltjax.losses.penalties import full_vocabulary_kl, kl_k1, kl_k3_corrected
from tiltjax.losses.policy_gradient import mdpo_loss, reinforce_loss
from tiltjax.losses.preference.dpo import dpo_loss
from tiltjax.losses.preference.pairs import Beta, gap, logistic, pairs, ratio_gap
from tiltjax.ops.checks import (
    check_at_least,
    check_boolean,
    check_choice,
    check_per_row,
    check_positive,
    check_within,
    is_number,
)
from tiltjax.ops.logspace import scale
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_sum
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = [
    "dno_loss",
    "geometric_mixture_logits",
    "inpo_loss",
    "magnetic_kl_loss",
    "mpo_loss",
    "nash_md_loss",
    "nash_md_surrogate_loss",
    "self_play_reward",
    "spin_loss",
    "spo_reward",
    "xpo_loss",
]

_LINKS = {"hinge": lambda margin: jax.nn.relu(1 - margin), "linear": jnp.negative, "logistic": logistic}


def spin_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    link: str = "logistic",
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Self-play fine-tuning: the data's completion preferred to the opponent's own.

    .. math:: \ell(t), \qquad t = \beta \left( a_0 - a_1 \right), \qquad a_i = \log \frac{\pi(y_i)}{\pi_k(y_i)}, \qquad
              \ell(t) = -\log \sigma(t) \ \text{ or } \ {-t} \ \text{ or } \ \max(0, 1 - t)

    for the logistic, linear and hinge link. Candidate 0 is the data's, candidate 1 was drawn from the opponent
    :math:`\pi_k`, the previous iterate, which is the reference too. Self-play stops where the opponent generates as
    the data does: the expected gradient of every link is then 0 at the opponent.

    With the linear link the expected gradient is ``beta`` times that of `tiltjax.losses.mle.sft_loss`, exactly, **only
    while the opponent is the current policy**: then the score of its own sample has mean 0, and what remains of it is
    noise. With an opponent held fixed it is a difference of two likelihoods, up to a constant: unbounded below, with an
    expected gradient that does not vanish at the data either, unless opponent and data agree. The other links are
    bounded below by 0.

    Args:
      logp: Policy's log-probability of real and generated, sums over tokens, nats.
      ref_logp: The opponent's, nats; no gradient.
      beta: Scale of the margin, > 0; ``lambda`` of the paper, 0.1 in its code. A number, or one per pair.
      link: "logistic", "linear" or "hinge".
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked. Of either sign for the linear link.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``link`` is unknown.

    Example:
      >>> arrays = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
      >>> [round(float(spin_loss(*arrays, beta=0.25, link=link)), 4) for link in ("logistic", "linear", "hinge")]
      [0.4741, -0.5, 0.5]

    References:
      Chen et al., 2024, arXiv:2401.01335, Eq. 4.7; Swamy et al., 2025, arXiv:2503.01067 (the linear link is SFT).
    """
    check_positive("beta", beta)
    check_choice("link", link, _LINKS)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    margin = beta * ratio_gap(logp, ref_logp)
    return jnp.where(real, _LINKS[link](margin), 0)


def dno_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    win_rate: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Direct Nash optimisation: DPO against the last policy, with soft labels from win rates against it.

    .. math:: -p \log \sigma(d) - (1 - p) \log \sigma(-d), \qquad p = \sigma\left( r_t(y_0) - r_t(y_1) \right), \qquad
              d = \beta \left( \log \frac{\pi(y_0)}{\pi_t(y_0)} - \log \frac{\pi(y_1)}{\pi_t(y_1)} \right)

    Its minimiser is the tilt :math:`\pi_t e^{r_t/\beta} / Z`, whatever distribution the pairs come from, as long as
    they connect the completions. The order of a pair is without meaning. The paper's ``eta`` divides the win rate, so
    ``beta = eta``; in SPPO and REBEL ``eta`` is a step size, and ``beta = 1 / eta``. Pitfall: win rates lie in [0, 1],
    so p lies in [0.27, 0.73], and a win rate from few opponents has as much noise as that. At hard labels, ``p = 1``,
    it is `tiltjax.losses.preference.dpo_loss` with :math:`\pi_t` as the reference: what the practical version trains
    on, from pairs of a large gap only.

    Args:
      logp: Policy's log-probability of two candidates, sums over tokens, nats.
      ref_logp: That of the last policy, the reference here, nats; no gradient.
      win_rate: Probability that each beats a completion of the last policy, in [0, 1]; no gradient. See `spo_reward`.
      beta: Strength of the KL term, > 0, in units of preference probability; ``eta`` of the paper. A number, or one per
        pair.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> logp, ref_logp = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
      >>> round(float(dno_loss(logp, ref_logp, jnp.array([0.75, 0.25]), beta=0.25)), 4)  # The label's own entropy.
      0.6628

    References:
      Rosset et al., 2024, arXiv:2404.03715, Algorithm 1.
    """
    check_positive("beta", beta)
    real, logp, ref_logp, win_rate = pairs(where, logp, ref_logp, win_rate, beta=beta)
    margin, advantage = beta * ratio_gap(logp, ref_logp), gap(win_rate)
    loss = jax.nn.sigmoid(advantage) * logistic(margin) + jax.nn.sigmoid(-advantage) * logistic(-margin)
    return jnp.where(real, loss, 0)


def inpo_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    old_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    eta: Beta,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Iterative Nash policy optimisation: IPO against a geometric mixture of the reference and the last policy.

    .. math:: \left( h - \frac{1}{2 \eta} \right)^2, \qquad
              h = \log \frac{\pi(y_0)}{\pi(y_1)} - \frac{\beta}{\eta} \log \frac{p_\text{ref}(y_0)}{p_\text{ref}(y_1)}
                  - \frac{\eta - \beta}{\eta} \log \frac{\pi_t(y_0)}{\pi_t(y_1)}

    Over pairs drawn from :math:`\pi_t` its minimiser is the mirror-descent step
    :math:`\pi_{t+1} \propto p_\text{ref}^{\beta/\eta} \pi_t^{1 - \beta/\eta} e^{r_t/\eta}`, without an estimate of the
    win rate :math:`r_t`. At ``eta = beta`` it is `tiltjax.losses.preference.ipo_loss` (sums) against the reference, at
    ``beta = 0`` IPO against the last policy at strength ``eta``. With ``eta = beta (t + 2) / 2`` the iterates converge
    to the equilibrium of the game regularised by ``beta``. Pitfalls: it needs the log-probabilities of three models;
    pairs of another distribution change the minimiser.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The fixed reference's, nats; no gradient.
      old_logp: That of the last policy, which drew the pairs, nats; no gradient.
      beta: Strength of the KL term to the reference, >= 0, in units of preference probability; ``tau`` of the paper. A
        number, or one per pair.
      eta: Inverse step size, the strength of both KL terms together, > 0 and >= ``beta``, in the same units.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``, nats squared; 0 where masked.

    Raises:
      ValueError: If, as Python numbers, ``beta`` is negative, ``eta`` is not positive and finite, or ``eta < beta``.

    Example:
      >>> logp, ref_logp, old_logp = jnp.array([-2.0, -8.0]), jnp.array([-5.0, -5.0]), jnp.array([-4.0, -6.0])
      >>> float(inpo_loss(logp, ref_logp, old_logp, beta=0.125, eta=0.25))  # (6 - 0 - 2 / 2 - 2)^2
      9.0

    References:
      Zhang et al., 2024, arXiv:2407.00617, Algorithm 1.
    """
    check_at_least("beta", beta, 0)
    check_positive("eta", eta)
    if is_number(beta) and is_number(eta) and eta < beta:
        raise ValueError(f"eta must be at least beta, got {eta!r} with beta {beta!r}")
    real, logp, ref_logp, old_logp = pairs(where, logp, ref_logp, old_logp, beta=beta, eta=eta)
    share = beta / eta
    h = gap(logp) - share * gap(ref_logp) - (1 - share) * gap(old_logp)
    return jnp.where(real, jnp.square(h - 1 / (2 * eta)), 0)


def xpo_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    from_reference: Bool[Array, "*batch 2"],
    *,
    beta: Beta,
    alpha: Numeric,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Exploratory preference optimisation: online DPO that turns away from what the reference says anyway.

    .. math:: -\log \sigma\left( \beta (a_0 - a_1) \right) + \alpha \log \pi(\tilde y), \qquad
              a_i = \log \frac{\pi(y_i)}{p_\text{ref}(y_i)}

    One completion of each pair was drawn from the policy and one, :math:`\tilde y`, from the reference; a judge said
    which is chosen. The sign of the second term is plus: it lowers the likelihood of the reference's completion, which
    is optimism about all others. Pitfalls: the loss is unbounded below through it, so ``alpha`` stays tiny; the
    reference's completion may be the chosen one, and which it was must be kept when the pair is ordered.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      from_reference: True for the candidate that the reference drew: one of the two.
      beta: Strength of the KL term, > 0, reward units per nat; 0.1 in TRL. A number, or one per pair.
      alpha: Strength of the optimism, >= 0; 1e-5 in TRL, and `tiltjax.losses.preference.dpo_loss` at 0.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``alpha`` a negative one.

    Example:
      >>> arrays = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0]), jnp.array([False, True])
      >>> round(float(xpo_loss(*arrays, beta=0.5, alpha=0.01)), 4)  # 0.3133 + 0.01 * -6
      0.2533

    References:
      Xie et al., 2024, arXiv:2405.21046, Algorithm 1.
    """
    check_at_least("alpha", alpha, 0)
    check_boolean("from_reference", from_reference)
    check_alike(None, logp, from_reference)
    loss = dpo_loss(logp, ref_logp, beta=beta, where=where)
    _, logp = pairs(where, logp)
    return loss + scale(alpha, masked_sum(logp, from_reference))


def nash_md_loss(
    token_logp: Float[Array, "*batch N T"],
    ref_token_logp: Float[Array, "*batch N T"],
    win_rate: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N T"],
    *,
    beta: Numeric,
) -> Float[Array, "*batch N"]:
    r"""Nash-MD's policy gradient, with the KL of whole completions.

    .. math:: -\sum_t \mathrm{sg}\left( P(y \succ y') - \tfrac12 - \beta \sum_{s \ge t} \log
              \frac{\pi(y_s)}{p_\text{ref}(y_s)} \right) \log \pi(y_t)

    On completions :math:`y` of the policy, its expected gradient is exactly minus that of
    :math:`E\, P(y \succ y') - \beta\, \mathrm{KL}(\pi \,\|\, p_\text{ref})`, the opponent held fixed. In Nash-MD the
    opponent :math:`y'` is drawn from the mixture of policy and reference (`geometric_mixture_logits`), in self-play
    from the policy. A token is charged for the log-ratios from itself on: those before it are past, and would only add
    noise. It has no importance ratio: one step per batch. Its value means nothing.

    Args:
      token_logp: Policy's log-probability of every token of its own completions, nats.
      ref_token_logp: The reference's, nats; no gradient.
      win_rate: Probability that a candidate beats its opponent, or the mean over several, in [0, 1]; no gradient.
      mask: True for real tokens.
      beta: Strength of the KL term, >= 0, in units of preference probability; ``tau`` of the paper, 0.1 in TRL.

    Returns:
      Loss per candidate ``[*batch, N]``, the sum over its tokens: any other aggregate changes the gradient. 0 for a
      candidate without a token.

    Raises:
      ValueError: If ``beta`` is a negative Python number.

    Example:
      >>> arrays = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.5]]), jnp.array([0.75]), jnp.array([[True, True]])
      >>> grad = lambda loss: jax.grad(lambda x: loss(x, *arrays[1:], beta=0.5).sum())(arrays[0]).tolist()
      >>> grad(nash_md_loss)  # -(0.25 - 0.5 * 1.5), -(0.25 - 0.5 * 0.5)
      [[0.5, -0.0]]
      >>> grad(nash_md_surrogate_loss)  # The first token is not charged for the second.
      [[0.25, -0.0]]

    References:
      Munos et al., 2023, arXiv:2312.00886, section 7.
    """
    check_per_row("win_rate", win_rate, jnp.shape(mask)[:-1])
    reward = token_reward(as_float(win_rate) - 0.5, kl_k1(token_logp, ref_token_logp, mask), mask, beta=beta)
    return masked_sum(reinforce_loss(token_logp, reward_to_go(reward, mask), mask))


def nash_md_surrogate_loss(
    token_logp: Float[Array, "*batch N T"],
    ref_token_logp: Float[Array, "*batch N T"],
    win_rate: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N T"],
    *,
    beta: Numeric,
) -> Float[Array, "*batch N"]:
    r"""Nash-MD as TRL trains it, every token charged for its own log-ratio only.

    .. math:: -\sum_t \mathrm{sg}\left( P(y \succ y') - \tfrac12 - \beta \log
              \frac{\pi(y_t)}{p_\text{ref}(y_t)} \right) \log \pi(y_t)

    Less noisy than `nash_md_loss` and **not** the gradient of a KL between completions: it is that of the sum over
    tokens of the next-token KL with the distribution of prefixes held fixed, which leaves out that an early token
    decides which prefixes come later. For completions of a single token both are the same.

    Args:
      token_logp: As in `nash_md_loss`.
      ref_token_logp: As in `nash_md_loss`.
      win_rate: As in `nash_md_loss`.
      mask: As in `nash_md_loss`.
      beta: As in `nash_md_loss`.

    Returns:
      Loss per candidate ``[*batch, N]``, the sum over its tokens; 0 for a candidate without a token.

    Raises:
      ValueError: If ``beta`` is a negative Python number.

    References:
      Munos et al., 2023, arXiv:2312.00886, section 7, as in TRL's ``NashMDTrainer``.
    """
    check_at_least("beta", beta, 0)
    check_per_row("win_rate", win_rate, jnp.shape(mask)[:-1])
    advantage = as_float(win_rate)[..., None] - 0.5 - beta * kl_k1(token_logp, ref_token_logp, mask)
    return masked_sum(reinforce_loss(token_logp, advantage, mask))


def geometric_mixture_logits(
    logits: Float[Array, "*batch V"], ref_logits: Float[Array, "*batch V"], *, mixture: Numeric
) -> Float[Array, "*batch V"]:
    r"""Next-token log-probabilities of the geometric mixture of two policies, Nash-MD's opponent.

    .. math:: \log \mathrm{softmax}\left( (1 - b) \log \pi + b \log p_\text{ref} \right)

    **Not** the geometric mixture of whole completions, :math:`\pi(y)^{1-b} p_\text{ref}(y)^b / Z`: this one divides by
    a normaliser at every token, and those depend on the prefix. The two agree for completions of one token. Where the
    supports are disjoint there is no mixture, and the row is NaN.

    Args:
      logits: Policy's logits; -inf for impossible tokens.
      ref_logits: The reference's.
      mixture: Share b of the reference in the exponent, in [0, 1]: 0 is the policy, 1 the reference; 0.5 in TRL.

    Returns:
      Log-probabilities ``[*batch, V]``, nats; -inf where a policy of positive share has it.

    Raises:
      ValueError: If ``mixture`` is a Python number outside [0, 1].

    Example:
      >>> logits = geometric_mixture_logits(jnp.log(jnp.array([0.8, 0.2])), jnp.log(jnp.array([0.2, 0.8])), mixture=0.5)
      >>> [round(float(p), 4) for p in jnp.exp(logits)]
      [0.5, 0.5]

    References:
      Munos et al., 2023, arXiv:2312.00886, section 7.
    """
    check_within("mixture", mixture, 0, 1)
    check_alike(None, logits, ref_logits)
    # A share of 0 takes no part: 0 * -inf is NaN.
    shares = ((1 - mixture, as_float(logits)), (mixture, as_float(ref_logits)))
    ours, theirs = (share * jnp.where(share > 0, x, 0) for share, x in shares)
    return jax.nn.log_softmax(ours + theirs)


def magnetic_kl_loss(
    logits: Float[Array, "*batch V"],
    magnet_logits: Float[Array, "*batch V"],
    old_logits: Float[Array, "*batch V"],
    mask: Bool[Array, "*batch"] | None = None,
    *,
    beta: Numeric,
    step_size: Numeric,
) -> Float[Array, "*batch"]:
    r"""The two pulls of magnetic mirror descent, summed over the vocabulary.

    .. math:: \beta\, \mathrm{KL}(\pi \,\|\, m) + \tfrac1s\, \mathrm{KL}(\pi \,\|\, \pi_k)

    The magnet m regularises the game, the last policy keeps the step short. Added to minus the win rate against
    :math:`\pi_k`, its minimiser over all distributions is
    :math:`\pi_{k+1} \propto \left( \pi_k\, m^{\beta s} e^{s r_k} \right)^{1/(1 + \beta s)}`, the step of `inpo_loss`
    with ``eta = beta + 1 / step_size``. Replace the magnet by the policy every so many rounds and the equilibria of the
    regularised games approach one of the game itself. The gradient is that of the reverse KLs, without sampling noise;
    over tokens, with the prefixes held fixed.

    Args:
      logits: Policy's logits.
      magnet_logits: The magnet's, at first the reference; no gradient.
      old_logits: The last policy's; no gradient.
      mask: True for real positions; None means all.
      beta: Strength of the KL term to the magnet, >= 0, in units of preference probability; ``alpha`` of the paper.
      step_size: Of the mirror descent, > 0, per unit of preference probability; ``eta`` of the paper.

    Returns:
      Loss per position ``[*batch]``, in units of preference probability; 0 where masked.

    Raises:
      ValueError: If ``beta`` is negative, or ``step_size`` not positive and finite, as Python numbers.

    References:
      Sokota et al., 2022, arXiv:2206.05825 (magnetic mirror descent); Wang et al., 2024, arXiv:2410.16714.
    """
    check_at_least("beta", beta, 0)
    check_positive("step_size", step_size)
    to_magnet, to_old = (full_vocabulary_kl(logits, x, mask) for x in (magnet_logits, old_logits))
    return beta * to_magnet + to_old / step_size


def mpo_loss(
    token_logp: Float[Array, "*batch N T"],
    magnet_token_logp: Float[Array, "*batch N T"],
    old_token_logp: Float[Array, "*batch N T"],
    advantage: Float[Array, "*batch N"] | Float[Array, "*batch N T"],
    mask: Bool[Array, "*batch N T"],
    *,
    beta: Numeric,
    step_size: Numeric,
    token_kl: Float[Array, "*batch N T"] | None = None,
) -> Float[Array, "*batch N T"]:
    r"""Magnetic preference optimisation, token by token: the policy gradient of a win rate, held by two KL terms.

    .. math:: -\frac{\pi(y_t)}{\pi_k(y_t)} A_t + \beta\, \mathrm{KL}_t(\pi \,\|\, m)
              + \tfrac1s\, \mathrm{KL}_t(\pi \,\|\, \pi_k)

    The tokens come from the last policy :math:`\pi_k`, and ``advantage`` is a win rate against it less a baseline:
    `tiltjax.advantages.leave_one_out` of `self_play_reward`. Both KL terms have the gradient of the reverse KL on every
    inner step of a round, not only on the first. Aggregate with ``seq_mean_token_sum`` of
    `tiltjax.losses.policy_gradient.aggregate`. Pitfalls: with one inner step per round the KL to the last policy does
    nothing; the KLs are those of the next token at the drawn prefixes. For those of whole completions pass
    log-probabilities of whole completions, ``T = 1``: the loss is then exactly that of the game, in expectation.

    Args:
      token_logp: Policy's log-probability of every token, nats.
      magnet_token_logp: The magnet's, at first the reference, nats; no gradient.
      old_token_logp: That of the last policy, which drew the tokens, nats; no gradient.
      advantage: Per candidate or per token, in units of preference probability; no gradient.
      mask: True for real tokens.
      beta: Strength of the KL term to the magnet, >= 0, in the units of the advantage; ``alpha`` of the paper.
      step_size: Of the mirror descent, > 0; ``eta`` of the paper.
      token_kl: Both KL terms, weighted, with their gradient, from `magnetic_kl_loss`; None means the sampled ones,
        `tiltjax.losses.penalties.kl_k3_corrected`.

    Returns:
      Loss per token ``[*batch, N, T]``, in the units of the advantage; 0 where masked.

    Raises:
      ValueError: If ``beta`` is negative, or ``step_size`` not positive and finite, as Python numbers.

    Example:
      >>> logp, mask = jnp.log(jnp.array([[0.5, 0.25]])), jnp.array([[True, True]])
      >>> mpo_loss(logp, logp, logp, jnp.array([0.5]), mask, beta=0.1, step_size=1.0).tolist()
      [[-0.5, -0.5]]

    References:
      Wang et al., 2024, arXiv:2410.16714.
    """
    check_at_least("beta", beta, 0)
    check_positive("step_size", step_size)
    if token_kl is None:
        to_magnet = kl_k3_corrected(token_logp, magnet_token_logp, old_token_logp, mask)
        token_kl = beta * to_magnet + kl_k3_corrected(token_logp, old_token_logp, old_token_logp, mask) / step_size
    return mdpo_loss(token_logp, old_token_logp, advantage, mask, beta=1.0, token_kl=token_kl)


def spo_reward(
    preference: Float[Array, "*batch N Q"],
    *,
    centred: bool = False,
    where: Bool[Array, "*batch N Q"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""The reward of self-play preference optimisation: how often a candidate beats a queue of earlier ones.

    .. math:: r_i = \frac{1}{|Q|} \sum_{q \in Q} P(y_i \succ q) \quad \left( {} - \tfrac12 \text{ if centred} \right)

    Any reinforcement learner may follow: the win rate against the policy of late, in a game that is its own opponent.
    The queue is an array of completions that the caller rolls, the oldest out first:
    ``queue = jnp.concatenate([queue[n:], new])`` after each batch of ``n``. Over several steps of an episode, divide
    by their number and give each its share.

    Args:
      preference: Probability that candidate i beats item q of the queue, in [0, 1].
      centred: Whether 1/2 is subtracted: a tie is then worth 0. Advantages with a baseline do not change.
      where: True where the candidate and the item are real, the shape of ``preference``; None means all.

    Returns:
      Reward per candidate ``[*batch, N]``, in units of preference probability, without gradient; 0 where it met no one.

    Example:
      >>> def prefer(y, queue):  # The larger wins.
      ...     return (y[:, None] > queue[None, :]) + 0.5 * (y[:, None] == queue[None, :])
      >>> queue, new = jnp.array([1, 2, 3, 4]), jnp.array([4, 2])
      >>> spo_reward(prefer(new, queue)).tolist()
      [0.875, 0.375]
      >>> jnp.concatenate([queue[2:], new]).tolist()
      [3, 4, 4, 2]

    References:
      Swamy et al., 2024, arXiv:2401.04056, Algorithm 1.
    """
    preference = jax.lax.stop_gradient(as_float(preference))
    check_alike(where, preference)
    return masked_mean(preference - 0.5 if centred else preference, where)


def self_play_reward(
    preference: Float[Array, "*batch N N"],
    *,
    centred: bool = False,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""`spo_reward` within a prompt's own candidates: how often a candidate beats the others.

    .. math:: r_i = \frac{1}{n - 1} \sum_{j \ne i} P(y_i \succ y_j)
              \quad \left( {} - \tfrac12 \text{ if centred} \right)

    An unbiased estimate of the win rate against the policy that drew the candidates. Pitfall: the official code of SPPO
    keeps the candidate itself at 1/2, which shrinks the centred reward by ``(n - 1) / n``.

    Args:
      preference: Probability that candidate i (row) beats candidate j (column), in [0, 1]; the diagonal is not read.
      centred: Whether 1/2 is subtracted. Where ``P_ij + P_ji = 1`` the centred rewards of a prompt sum to 0.
      where: True for real candidates; None means all.

    Returns:
      Reward per candidate ``[*batch, N]``, in units of preference probability, without gradient; 0 where masked, and
      where there is no other candidate.

    Example:
      >>> self_play_reward(jnp.array([[0.5, 1.0, 0.5], [0.0, 0.5, 0.25], [0.5, 0.75, 0.5]])).tolist()
      [0.75, 0.125, 0.625]

    References:
      Swamy et al., 2024, arXiv:2401.04056.
    """
    N = preference.shape[-1]
    check_alike(where, preference[..., 0])
    others = jnp.broadcast_to(~jnp.eye(N, dtype=bool), preference.shape)
    if where is not None:
        others = others & (where[..., :, None] & where[..., None, :])
    return spo_reward(preference, centred=centred, where=others)
