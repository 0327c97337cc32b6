r"""Sequential Monte Carlo: particles that are weighed and resampled on their way to the tilt.

A chain of proposals ends in ``x ~ p``; the wanted law is ``p exp(r / beta) / Z``. On the way every particle carries the
log of its weight, what its *twist* (an estimate of ``r / beta`` at the end) has gained so far, and the particles are
resampled where the effective sample size falls. The chain may be a diffusion, or a language model a token at a time: a
particle is any pytree.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.ops.collectives import all_gather, axis_index, axis_size
from tiltjax.ops.masked import as_float
from tiltjax.samplers.denoise import Denoiser, LogWeight, levels, reverse_kernel, twisted_mean
from tiltjax.samplers.resample import resample
from tiltjax.tilt.weights import tilt
from tiltjax.types import Array, AxisName, Bool, Float, Numeric, PRNGKey, PyTree

__all__ = ["POTENTIALS", "Particles", "smc", "steered_denoise"]

POTENTIALS = ("difference", "max", "sum")
"""What a particle's weight is made of on the way: see `smc`."""

Propose = Callable[[Array, PyTree, Array], tuple[PyTree, Array]]
"""``(keys [N], particles, step) -> (particles, log of the reference over the proposal [N])``."""

Twist = Callable[[PyTree, Array], Array]
"""``(particles, step) -> [N]``, nats; at the last step the reward itself, over ``beta``."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Particles:
    """Where the particles ended, and what they say about the tilt.

    Attributes:
      state: The particles, leaves ``[N, ...]``: this device's share.
      log_weights: Of the particles since they were last resampled, nats, ``[N]``, likewise.
      log_z: Log of an unbiased estimate of ``Z = E exp(r / beta)``, nats; the same on every device.
      ess: Effective sample size before each step's decision, ``[num_steps]``.
      resampled: Whether the particles were then resampled, ``[num_steps]``.
    """

    state: PyTree
    log_weights: Float[Array, " N"]
    log_z: Float[Array, ""]
    ess: Float[Array, " num_steps"]
    resampled: Bool[Array, " num_steps"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _Carry:
    """Particles on their way: ``gained`` is the log of the product of their potentials, ``peak`` the largest twist."""

    state: PyTree
    log_weights: Float[Array, " N"]
    gained: Float[Array, " N"]
    peak: Float[Array, " N"]
    total: Float[Array, " N"]
    log_z: Float[Array, ""]


def smc(
    key: PRNGKey,
    propose: Propose,
    twist: Twist,
    state: PyTree,
    *,
    num_steps: int,
    potential: str = "difference",
    ess_threshold: Numeric = 0.5,
    every: int = 1,
    method: str = "systematic",
    axis_name: AxisName = None,
) -> Particles:
    r"""Moves, weighs and resamples N particles.

    After step t a particle's log weight grows by its potential ``log G_t`` (and by the proposal's own correction),
    where with ``v_t`` the twist of its state

    .. math:: \log G_t = v_t - v_{t-1} \;(\text{difference}), \qquad \max_{s \le t} v_s \;(\text{max}), \qquad
              \sum_{s \le t} v_s \;(\text{sum}),

    ``v`` before the first step is 0, and the last one is whatever makes the product of all ``exp v``. So each of them
    has the same target, and :math:`E[\hat Z] = Z` whatever the twists, the threshold and the resampling scheme; they
    differ in the variance. With the soft value ``log E[exp(r / beta) | x_t]`` for a twist "difference" has weights of
    least variance; "max" and "sum" keep particles that have once, or often, been good.

    Args:
      key: Consumed. Particle ``i`` moves in step t under a key folded with t and with its global index.
      propose: ``(keys [N], state, step) -> (state, log_ratio [N])`` moves the particles, each by its own key;
        ``log_ratio`` is the log of the reference's over the proposal's density of the move, nats: zeros where the
        proposal is the reference's own step.
      twist: ``(state, step) -> [N]``, nats, of the particles that step led to; at ``step = num_steps - 1`` it must be
        the log weight ``r / beta`` of the finished particle. -inf is final: such a particle is dead.
      state: Particles to begin with, drawn from the reference, numeric leaves ``[N, ...]``.
      num_steps: How many steps, at least 1; ``step`` is 0 ... num_steps - 1.
      potential: One of `POTENTIALS`.
      ess_threshold: Resample where the effective sample size is below this share of N: 0 never does (importance
        sampling), a value above 1 always. Not after the last step: the weights say it.
      every: Weigh only after each so many steps, and after the last: "max" and "sum" grow with their number.
      method: Of `tiltjax.samplers.resample.resample`.
      axis_name: Mapped axis over which the particles are split; the particles of all devices are resampled together.

    Returns:
      `Particles`.

    Raises:
      ValueError: If ``num_steps`` or ``every`` is below 1, ``ess_threshold`` negative, or ``potential`` unknown.

    Example:
      >>> walk = lambda keys, x, step: (x + jax.vmap(jax.random.normal)(keys), jnp.zeros(len(x)))
      >>> out = smc(jax.random.key(0), walk, lambda x, step: x, jnp.zeros(4096), num_steps=2)
      >>> abs(float(out.log_z) - 1.0) < 0.1  # Two steps end in N(0, 2), and log E exp(x) is 2/2.
      True

    References:
      Del Moral, Doucet, Jasra, 2006, DOI 10.1111/j.1467-9868.2006.00553.x; Zhao et al., 2024, arXiv:2404.17546;
      Singhal et al., 2025, arXiv:2501.06848 (the potentials).
    """
    check_at_least("num_steps", num_steps, 1)
    check_at_least("every", every, 1)
    check_at_least("ess_threshold", ess_threshold, 0)
    check_choice("potential", potential, POTENTIALS)
    count = jax.tree.leaves(state)[0].shape[0]
    everyone = count * axis_size(axis_name)
    particles = axis_index(axis_name) * count + jnp.arange(count)
    zero = _vary(jnp.zeros(count), axis_name)

    def weigh(carry: _Carry, step: Array, last: Array) -> _Carry:
        value = as_float(twist(carry.state, step))
        chex.assert_shape(value, (count,))
        peak, total = jnp.maximum(carry.peak, value), carry.total + value
        aim = {"difference": value, "max": carry.gained + peak, "sum": carry.gained + total}[potential]
        aim = jnp.where(last, value, aim)
        growth = jnp.where(carry.gained == -jnp.inf, 0, aim - carry.gained)
        log_weights = carry.log_weights + growth
        return dataclasses.replace(carry, log_weights=log_weights, gained=aim, peak=peak, total=total)

    def select(key: PRNGKey, carry: _Carry, weights: Array, log_z: Array) -> _Carry:
        ancestors = resample(key, all_gather(weights, axis_name), num=everyone, method=method)
        mine = jax.lax.dynamic_slice_in_dim(ancestors, axis_index(axis_name) * count, count)
        everywhere = all_gather((carry.state, carry.gained, carry.peak, carry.total), axis_name)
        state, gained, peak, total = jax.tree.map(lambda x: x[mine], everywhere)
        log_z = carry.log_z + log_z
        return _Carry(state=state, log_weights=zero, gained=gained, peak=peak, total=total, log_z=log_z)

    def move(carry: _Carry, step: Array) -> tuple[_Carry, tuple[Array, Array]]:
        draw, choose = jax.random.split(jax.random.fold_in(key, step))
        keys = jax.vmap(lambda i: jax.random.fold_in(draw, i))(particles)
        moved, log_ratio = propose(keys, carry.state, step)
        last = step == num_steps - 1
        carry = dataclasses.replace(carry, state=moved, log_weights=carry.log_weights + log_ratio)
        due = last | ((step + 1) % every == 0)
        carry = weigh(carry, step, last) if every == 1 else jax.lax.cond(due, weigh, _pass, carry, step, last)
        now = tilt(carry.log_weights, beta=1.0, axis_name=axis_name)
        again = (now.ess < ess_threshold * everyone) & ~last & (now.log_z > -jnp.inf)
        carry = jax.lax.cond(again, lambda c: select(choose, c, now.weights, now.log_z), lambda c: c, carry)
        return carry, (now.ess, again)

    state = jax.tree.map(lambda x: _vary(jnp.asarray(x), axis_name), state)
    carry = _Carry(state=state, log_weights=zero, gained=zero, peak=zero - jnp.inf, total=zero, log_z=jnp.zeros(()))
    carry, (ess, resampled) = jax.lax.scan(move, carry, jnp.arange(num_steps))
    log_z = carry.log_z + tilt(carry.log_weights, beta=1.0, axis_name=axis_name).log_z
    return Particles(state=carry.state, log_weights=carry.log_weights, log_z=log_z, ess=ess, resampled=resampled)


def steered_denoise(
    key: PRNGKey,
    denoiser: Denoiser,
    x: Float[Array, " N *event"],
    alpha_bar: Float[Array, " levels"],
    value: LogWeight,
    *,
    beta: Numeric,
    proposal: str = "reference",
    potential: str = "difference",
    ess_threshold: Numeric = 0.5,
    every: int = 1,
    method: str = "systematic",
    axis_name: AxisName = None,
) -> Particles:
    r"""The reverse chain of a diffusion with `smc`: N particles steered to ``p(x_0) exp(r(x_0) / beta) / Z``.

    Proposal "reference" is a step of DDPM. "twisted" moves its mean by ``std^2 grad value / beta`` and corrects the
    weight for it: fewer particles are lost, at the price of a gradient of the value (through the denoiser, if that is
    what the value reads).

    Args:
      key: Consumed.
      denoiser: ``(x, alpha_bar) -> noise``: its chain is the reference.
      x: Standard normal, ``[N, *event]``: this device's particles at the last level.
      alpha_bar: The schedule, ``[K + 1]``, falling from 1.
      value: ``(x [N, *event], alpha_bar) -> [N]``, reward units: the reward itself at ``alpha_bar = 1``, before that an
        estimate of the soft value, such as the plug-in ``r(to_clean(x, denoiser(x, alpha_bar), alpha_bar))``.
      beta: Strength of the KL term, > 0, reward units.
      proposal: "reference" or "twisted".
      potential: As for `smc`, like all that follow.
      ess_threshold: Share of N below which particles are resampled.
      every: How many steps between two weighings.
      method: Of resampling.
      axis_name: Mapped axis over which the particles are split.

    Returns:
      `Particles`, whose state is ``x_0``. `tiltjax.samplers.resample.resample` with ``exp`` of their log weights
      draws equally weighted ones.

    Raises:
      ValueError: If ``beta`` is not positive and finite, ``proposal`` unknown, or as for `smc`.

    References:
      Wu et al., 2023, arXiv:2306.17775 (twisted proposals); Singhal et al., 2025, arXiv:2501.06848.
    """
    check_positive("beta", beta)
    check_choice("proposal", proposal, ("reference", "twisted"))
    _, before, after = levels(alpha_bar)

    def propose(keys: Array, x: Array, step: Array) -> tuple[Array, Array]:
        mean, std = reverse_kernel(x, denoiser(x, before[step]), before[step], after[step])
        z = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
        if proposal == "reference":
            return mean + std * z, jnp.zeros(len(x), x.dtype)
        goal = twisted_mean(mean, std, lambda x, a: value(x, a) / beta, after[step])
        shift = jnp.where(std > 0, (goal - mean) / jnp.where(std > 0, std, 1), 0)
        return goal + std * z, -jnp.sum(jnp.square(shift) / 2 + shift * z, axis=range(1, x.ndim))

    return smc(
        key,
        propose,
        lambda x, step: value(x, after[step]) / beta,
        as_float(x),
        num_steps=len(alpha_bar) - 1,
        potential=potential,
        ess_threshold=ess_threshold,
        every=every,
        method=method,
        axis_name=axis_name,
    )


def _pass(carry: _Carry, step: Array, last: Array) -> _Carry:
    return carry


def _vary(x: Array, axis_name: AxisName) -> Array:
    """``x`` as a value of each device, though it may be the same on all: what a loop over devices carries."""
    return x if axis_name is None else jnp.where(axis_index(axis_name) >= 0, x, x)
