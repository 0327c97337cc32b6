"""Soft reinforcement learning on a token tree, by backward induction.

Values here are those of the *whole* completion as seen from a prefix, rewards already earned included: the field's
``Q(s, z)`` plus what ``s z`` has earned. Policies do not notice, and with a reward for the whole completion only there
is no difference. So the value of taking token ``z`` at prefix ``s`` is the value of the prefix ``s z``, all kinds of
values are H + 1 arrays ``[*batch, V**t]``, and the last one is the reward itself.
"""

from collections.abc import Callable

import jax.numpy as jnp

from tiltjax.exact.tree.world import Levels, path_sums
from tiltjax.ops.checks import check_positive
from tiltjax.ops.logspace import logsumexp
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Numeric

__all__ = [
    "implicit_values",
    "max_values",
    "mean_values",
    "regularised_reward",
    "soft_values",
    "tilted_policy",
]


def soft_values(ref: Levels, reward: Float[Array, "*batch K"], *, beta: Numeric) -> list[Float[Array, "*batch n"]]:
    r"""Soft values of every prefix: what tilts the next token exactly as the tilt of whole completions does.

    .. math:: V(s) = \beta \log \sum_z p_\text{ref}(z | s)\, e^{V(s z) / \beta}
              = \beta \log E_\text{ref} \bigl[ e^{r / \beta} \big| s \bigr]

    At the root it is :math:`\beta \log Z`, and along the optimum
    :math:`\beta \log (p^* / p_\text{ref})(s) = V(s) - V(\text{root})`.

    Args:
      ref: The reference, H levels ``[*batch, V**t, V]`` of log-probabilities, nats.
      reward: Reward of every completion, reward units.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      H + 1 arrays ``[*batch, V**t]``, reward units; the last is ``reward``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> ref = [jnp.log(jnp.array([[0.5, 0.5]]))]
      >>> round(float(soft_values(ref, jnp.array([0.0, jnp.log(3.0)]), beta=1.0)[0][0]), 4)  # log 2
      0.6931

    References:
      Mudgal et al., 2023, arXiv:2310.17022; Swamy et al., 2025, arXiv:2503.01067, Eq. 12.
    """
    check_positive("beta", beta)
    return _backward(ref, reward, lambda logp, child: beta * logsumexp(logp + child / beta))


def mean_values(ref: Levels, reward: Float[Array, "*batch K"]) -> list[Float[Array, "*batch n"]]:
    r"""Mean reward of the reference from every prefix on, :math:`E_\text{ref}[r | s]`: soft values at large ``beta``.

    What a process reward model trained on roll-outs estimates. Arguments and shapes as in `soft_values`.
    """
    return _backward(ref, reward, lambda logp, child: jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * child, 0), -1))


def max_values(ref: Levels, reward: Float[Array, "*batch K"]) -> list[Float[Array, "*batch n"]]:
    """Largest reward that the reference can still reach from every prefix: soft values as ``beta`` goes to 0.

    Arguments and shapes as in `soft_values`.
    """
    return _backward(ref, reward, lambda logp, child: jnp.max(jnp.where(logp > -jnp.inf, child, -jnp.inf), axis=-1))


def tilted_policy(ref: Levels, values: Levels, *, beta: Numeric) -> list[Float[Array, "*batch n V"]]:
    r"""The reference tilted token by token towards the values of the next prefix.

    .. math:: \pi(z | s) = \frac{p_\text{ref}(z | s)\, e^{V(s z) / \beta}}
                                {\sum_{z'} p_\text{ref}(z' | s)\, e^{V(s z') / \beta}}

    With `soft_values` at the same ``beta`` this is the optimum of `regularised_reward`, the tilt of whole completions;
    with `mean_values` it is controlled decoding, right to first order in ``1 / beta`` only.

    Args:
      ref: The reference, H levels ``[*batch, V**t, V]`` of log-probabilities, nats.
      values: H + 1 arrays ``[*batch, V**t]``, reward units.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      H levels ``[*batch, V**t, V]`` of log-probabilities.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Mudgal et al., 2023, arXiv:2310.17022.
    """
    check_positive("beta", beta)
    tilted = []
    for logp, child in zip(ref, values[1:], strict=True):
        x = as_float(logp) + as_float(child).reshape(logp.shape) / beta
        tilted.append(x - logsumexp(x)[..., None])
    return tilted


def implicit_values(policy: Levels, ref: Levels, *, beta: Numeric) -> list[Float[Array, "*batch n"]]:
    r"""The values that a policy implies: its log-ratio to the reference, summed along every prefix.

    .. math:: q(s) = \beta \sum_{i \le |s|} \log \frac{\pi(s_i | s_{<i})}{p_\text{ref}(s_i | s_{<i})}
              = \beta \log E_\text{ref} \bigl[ e^{r_\pi / \beta} \big| s \bigr]

    where :math:`r_\pi = q(y)` is the implicit reward of a whole completion: so ``q`` are its `soft_values`, 0 at the
    root, and the implicit process reward of a token is the difference of ``q`` along it.

    Args:
      policy: H levels ``[*batch, V**t, V]`` of log-probabilities, nats.
      ref: The reference's, which must not exclude a token that the policy writes.
      beta: Strength of the KL term, > 0, reward units per nat.

    Returns:
      H + 1 arrays ``[*batch, V**t]``, reward units; 0 for a token that neither writes.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Yuan et al., 2024, arXiv:2412.01981.
    """
    check_positive("beta", beta)
    pairs = [(as_float(p), as_float(q)) for p, q in zip(policy, ref, strict=True)]
    return path_sums([beta * (jnp.where(q > -jnp.inf, p, 0) - jnp.where(q > -jnp.inf, q, 0)) for p, q in pairs])


def regularised_reward(
    logp: Float[Array, "*batch K"],
    ref_logp: Float[Array, "*batch K"],
    reward: Float[Array, "*batch K"],
    *,
    beta: Numeric,
) -> Float[Array, "*batch"]:
    r"""What soft reinforcement learning maximises.

    .. math:: J(\pi) = E_\pi r - \beta\, \mathrm{KL}(\pi \| p_\text{ref})
              = \beta \log Z - \beta\, \mathrm{KL}(\pi \| p^*)

    so within any class of policies its maximum is the reverse-KL projection of the tilt (`project`).

    Args:
      logp: Policy's log-probability of every completion, nats.
      ref_logp: The reference's, nats.
      reward: Reward of every completion, reward units.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      ``J``, ``[*batch]``, reward units.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Swamy et al., 2025, arXiv:2503.01067, Lemma 2.1.
    """
    check_positive("beta", beta)
    logp, ref_logp = as_float(logp), as_float(ref_logp)
    written = logp > -jnp.inf
    ratio = jnp.where(written, logp, 0) - jnp.where(written, ref_logp, 0)
    return jnp.sum(jnp.where(written, jnp.exp(logp) * (reward - beta * ratio), 0), axis=-1)


def _backward(ref: Levels, reward: Array, reduce: Callable[[Array, Array], Array]) -> list[Array]:
    """Values from the completions back to the root: ``reduce(log-probabilities, values of the children)``."""
    values = [as_float(reward)]
    for logp in reversed(ref):
        values.append(reduce(as_float(logp), values[-1].reshape(logp.shape)))
    return values[::-1]
