"""Estimators of the log-partition function: plain, leave-one-out, jackknife, delta-corrected, in-batch, streaming.

Notation of the biases: ``w = exp(r / beta) / Z`` under the reference, ``chi2 = Var(w)``, ``m3 = E(w - 1)^3``. Every
expansion is exact to the order printed; `tiltjax.exact.bandit.log_partition_law` has the whole of it.
"""

import chex
import jax.numpy as jnp

from tiltjax.ops import logspace
from tiltjax.ops.checks import check_choice, check_positive
from tiltjax.ops.collectives import psum
from tiltjax.ops.logspace import LogSum, divide, exp_sum, logmeanexp
from tiltjax.ops.masked import as_float, check_alike, masked_sum
from tiltjax.types import Array, AxisName, Bool, Dtype, Float, Numeric

__all__ = [
    "RunningPartition",
    "delta_log_partition",
    "in_batch_log_partition",
    "jackknife_log_partition",
    "leave_one_out_log_partition",
    "log_partition",
]


def log_partition(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""The plain estimate of ``log Z = log E_ref exp(r / beta)`` from N reference candidates.

    .. math:: \log \hat Z = \log \frac1N \sum_i \exp(r_i/\beta), \qquad
              E \log \hat Z - \log Z = -\frac{\chi^2}{2N} + \frac{m_3/3 - 3\chi^4/4}{N^2} + O(N^{-3})

    ``Z`` itself is unbiased; its logarithm is always low. ``N Var(log Z)`` tends to ``chi2``.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      ``log Z``, nats, ``[*batch]``; 0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(log_partition(jnp.array([0.0, jnp.log(3.0)]), beta=1.0)), 6)  # log of the mean of 1 and 3
      0.693147
    """
    check_positive("beta", beta)
    return exp_sum(reward, beta=beta, where=where, axis_name=axis_name)[1].log_mean


def leave_one_out_log_partition(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    r"""For every candidate, the log-partition estimated from the other ``N - 1``.

    .. math:: \log \hat Z_{-i} = \log \frac{1}{N-1} \sum_{j \ne i} \exp(r_j/\beta), \qquad
              E \log \hat Z_{-i} - \log Z = -\frac{\chi^2}{2(N-1)} + O(N^{-2})

    It is independent of candidate ``i``, so ``beta log Z_{-i}`` is a soft-value baseline that leaves a policy gradient
    unbiased. A candidate that outweighs all others together is left out by summing the others, not by subtraction.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result stays local.

    Returns:
      ``log Z_{-i}``, nats, ``[*batch, N]``; 0 for masked candidates and where there is no other.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> [f"{x:.4f}" for x in leave_one_out_log_partition(jnp.array([2.0, 0.0, 90.0]), beta=1.0)]
      ['89.3069', '89.3069', '1.4338']
    """
    check_positive("beta", beta)
    log_others, _, total = _without_each(reward, beta, where, axis_name)
    return jnp.where(_has_other(reward, where, total), log_others - jnp.log(_others(total))[..., None], 0)


def jackknife_log_partition(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""The log-partition with its ``1/N`` bias removed by the jackknife.

    .. math:: N \log \hat Z - \frac{N-1}{N} \sum_i \log \hat Z_{-i}, \qquad
              \text{bias} = -\frac{m_3/3 - 3\chi^4/4}{N^2} + O(N^{-3})

    For one prompt its mean square error is larger than the plain estimate's where :math:`m_3 > 9 \chi^4/4` and smaller
    elsewhere, to order ``N^-2``; under heavy tails (see `tiltjax.tilt.tails`) it does not help.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      The estimate, nats, ``[*batch]``; the plain one for a single candidate, 0 for none.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Quenouille, 1956, "Notes on bias in estimation".
    """
    check_positive("beta", beta)
    _, log_kept, total = _without_each(reward, beta, where, axis_name)
    counted = _has_other(reward, where, total)
    others = _others(total)
    # sum_i [log(1 - 1/N) - log(1 - w_i / sum w)]: first orders cancel, so no term is multiplied by N.
    gap = jnp.where(counted, -jnp.log1p(1 / others)[..., None] - jnp.where(counted, log_kept, 0), 0)
    return total.log_mean + masked_sum(gap, axis_name=axis_name) * others / (others + 1)


def delta_log_partition(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""The log-partition with its ``1/N`` bias removed by the estimated variance of the weights.

    .. math:: \log \hat Z + \frac12 \Bigl(\frac{1}{\mathrm{ESS}} - \frac1N\Bigr), \qquad
              \text{bias} = \frac{3\chi^4/4 - \chi^2/2 - 2 m_3/3}{N^2} + O(N^{-3})

    The correction never exceeds 1/2, so it stays tame where the jackknife does not.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      The estimate, nats, ``[*batch]``; 0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(delta_log_partition(jnp.array([0.0, jnp.log(3.0)]), beta=1.0)), 6)  # + (1/1.6 - 1/2) / 2
      0.755647
    """
    check_positive("beta", beta)
    total = exp_sum(reward, beta=beta, where=where, axis_name=axis_name)[1]
    some = total.count > 0
    return total.log_mean + jnp.where(some, 1 / jnp.where(some, total.ess, 1) - 1 / jnp.maximum(total.count, 1), 0) / 2


def in_batch_log_partition(
    ref_logp: Float[Array, "B M"],
    reward: Float[Array, "B M"],
    *,
    beta: Numeric | Float[Array, " B"],
    method: str,
    ref_mixture_logp: Float[Array, " M"] | None = None,
    where: Bool[Array, "B M"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, " B"]:
    r"""The log-partition of every prompt from the completions of the whole batch.

    Entry ``[i, j]`` is completion ``j`` scored under prompt ``i``.

    .. math::
      \text{sum:}\quad     & \hat Z_i = \textstyle\sum_j \mathrm{ref}(y_j|x_i)\, e^{r(x_i,y_j)/\beta} \\
      \text{mean:}\quad    & \hat Z_i = \textstyle\frac1M \sum_j \mathrm{ref}(y_j|x_i)\, e^{r(x_i,y_j)/\beta} \\
      \text{balance:}\quad & \hat Z_i = \textstyle\frac1M \sum_j
          \frac{\mathrm{ref}(y_j|x_i)}{\frac1B \sum_k \mathrm{ref}(y_j|x_k)}\, e^{r(x_i,y_j)/\beta}

    Biases, for completions drawn from the references of the batch's own prompts, equally many from each:

    * ``"sum"`` is the printed form of VAR: a sum cut off at the completions at hand.
      ``E Z_i = M E_{y ~ mix}[ref(y|x_i) exp(r/beta)]``, which is not ``Z_i`` and has no limit in M. Where a completion
      is likely under its own prompt only (sequences of many tokens), the weight ``ref exp(r/beta) / Z`` is 1 whatever
      the reward: plain supervised fine-tuning.
    * ``"mean"`` divides it by M: a limit, but still ``E_mix[ref exp(r/beta)]`` and not ``Z_i``.
    * ``"balance"`` weighs by ``ref(y|x_i) / mix(y)``: ``E Z_i = Z_i`` exactly (the balance heuristic), so its logarithm
      is low by ``Var / 2M`` to first order like the plain estimate. With disjoint supports it is the plain estimate
      over the prompt's own completions.

    Args:
      ref_logp: Reference log-probability of completion ``j`` under prompt ``i``, nats; -inf where impossible.
      reward: Reward of completion ``j`` for prompt ``i``, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      method: ``"sum"``, ``"mean"`` or ``"balance"``.
      ref_mixture_logp: ``log mix(y_j)`` where the prompts did not give equally many completions, nats; read by
        ``"balance"`` only, None takes the equal mixture of all real prompts.
      where: True for real pairs: a padded prompt is a row, a padded completion a column, of False.
      axis_name: Mapped axis over which the rows are split; every device holds its own prompts against all M columns.

    Returns:
      ``log Z_i``, nats, ``[B]``; 0 for a prompt without a real pair.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``method`` is unknown.

    Example:
      >>> logp = jnp.log(jnp.array([[0.5, 0.25], [0.25, 0.5]]))
      >>> [round(float(jnp.exp(in_batch_log_partition(logp, jnp.zeros((2, 2)), beta=1.0, method=m))[0]), 6)
      ...  for m in ("sum", "mean", "balance")]
      [0.75, 0.375, 1.0]

    References:
      Du et al., 2025, arXiv:2502.11026 ("sum"); Veach and Guibas, 1995 (balance heuristic).
    """
    check_positive("beta", beta)
    check_choice("method", method, ("sum", "mean", "balance"))
    chex.assert_rank([ref_logp, reward], 2)
    check_alike(where, ref_logp, reward)
    ref_logp, reward = as_float(ref_logp), as_float(reward)
    if where is not None:
        ref_logp, reward = jnp.where(where, ref_logp, -jnp.inf), jnp.where(where, reward, 0)
    log_density = ref_logp
    if method == "balance":
        if ref_mixture_logp is None:
            ref_mixture_logp = logmeanexp(ref_logp.T, where=None if where is None else where.T, axis_name=axis_name)
        possible = ref_logp != -jnp.inf
        ratio = jnp.where(possible, ref_logp, 0) - jnp.where(jnp.isinf(ref_mixture_logp), 0, ref_mixture_logp)[None]
        log_density = jnp.where(possible, ratio, -jnp.inf)
    total = exp_sum(log_density + divide(reward, beta), where=where)[1]
    return total.log_mean if method != "sum" else jnp.where(total.count > 0, total.log_sum, 0)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class RunningPartition:
    """The plain log-partition over candidates that arrive in parts: N rewards are never in memory together.

    Exact to rounding, whatever the parts: `merge` is associative and commutative. A pytree, so it is a scan carry; use
    one ``beta`` throughout.

    Attributes:
      moments: Sum of the weights and of their squares so far, every field ``[*batch]``.

    Example:
      >>> running = RunningPartition.empty()
      >>> for part in (jnp.array([0.0, 1.0]), jnp.array([5.0])):
      ...     running = running.update(part, beta=2.0)
      >>> round(float(running.log_z), 5), round(float(log_partition(jnp.array([0.0, 1.0, 5.0]), beta=2.0)), 5)
      (1.59812, 1.59812)
    """

    moments: LogSum

    @classmethod
    def empty(cls, shape: tuple[int, ...] = (), dtype: Dtype = jnp.float32) -> "RunningPartition":
        """No candidate yet, for prompts of this shape."""
        return cls(moments=logspace.empty(shape, dtype))

    def update(
        self,
        reward: Float[Array, "*batch N"],
        *,
        beta: Numeric | Float[Array, "*batch"],
        where: Bool[Array, "*batch N"] | None = None,
        axis_name: AxisName = None,
    ) -> "RunningPartition":
        """Takes in the rewards of some more candidates; arguments as for `log_partition`."""
        check_positive("beta", beta)
        part = exp_sum(reward, beta=beta, where=where, axis_name=axis_name)[1]
        return RunningPartition(moments=logspace.merge(self.moments, part))

    def merge(self, other: "RunningPartition") -> "RunningPartition":
        """Both together: candidates that were seen by either."""
        return RunningPartition(moments=logspace.merge(self.moments, other.moments))

    @property
    def log_z(self) -> Float[Array, "*batch"]:
        """`log_partition` of all candidates so far, nats; 0 before the first."""
        return self.moments.log_mean

    @property
    def ess(self) -> Float[Array, "*batch"]:
        """Effective sample size of all candidates so far; 0 before the first."""
        return self.moments.ess


def _others(total: LogSum) -> Array:
    """``N - 1``, at least 1."""
    return jnp.maximum(total.count - 1, 1)


def _has_other(reward: Array, where: Array | None, total: LogSum) -> Array:
    """Which candidates are real and not alone."""
    several = jnp.broadcast_to(total.count[..., None] > 1, reward.shape)
    return several if where is None else where & several


def _without_each(reward, beta, where, axis_name):
    """Log-sum without candidate i, log of the share of the mass it leaves, and the whole sum."""
    reward = as_float(reward)
    weights, total = exp_sum(reward, beta=beta, where=where, axis_name=axis_name)
    top = weights == 1  # the largest, and what ties with it to rounding
    rest_where = ~top if where is None else where & ~top
    rest = exp_sum(reward, beta=beta, where=rest_where, axis_name=axis_name)[1]
    sole = top & (psum(jnp.sum(top, axis=-1), axis_name) == 1)[..., None]
    # Against a sole largest, subtraction could cancel; of any other, mass - weight is at least half of what it was.
    share = jnp.where(sole, 0, weights) / jnp.where(total.mass == 0, 1, total.mass)[..., None]
    log_kept = jnp.where(sole, (rest.log_sum - total.log_sum)[..., None], jnp.log1p(-share))
    return jnp.where(sole, rest.log_sum[..., None], total.log_sum[..., None] + jnp.log1p(-share)), log_kept, total
