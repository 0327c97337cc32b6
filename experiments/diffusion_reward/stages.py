r"""The stages of `experiments.diffusion_reward`: every way to direct a diffusion to a reward, and its KL.

The reference is the unconditional reverse chain of a denoiser; its last step has no noise and stays the reference's in
every method. Two exact statements bound the KL of the images from above, and each method reports the one it has:

* chains of a fine-tuned model: the sum over steps of the KL of two Gaussians of equal width (`path KL`);
* samplers that weigh: for any unbiased estimate Z^ of Z made on the way, the drawn image x obeys
  KL(law of x || reference) <= E[r(x) / beta - log Z^], since the law of (run, x) changed by Z^ exp(-r(x) / beta) is a
  probability law whose x is the reference's. For soft best-of-N steps it is, step by step,
  E log(N weight of the one chosen).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.diffusion_digits import world as digits_world
from tiltjax.advantages import group_normalised
from tiltjax.losses.denoising import (
    ddpo_loss,
    denoising_loss,
    transition_kl,
    transition_logp,
    weighted_denoising_loss,
)
from tiltjax.models.denoiser import Denoiser
from tiltjax.ops.masked import Average, average
from tiltjax.ops.schedule import cosine_schedule, to_clean
from tiltjax.samplers.best_of_n import soft_best_of_n
from tiltjax.samplers.denoise import levels, reverse_kernel
from tiltjax.samplers.guarded import guarded_resample
from tiltjax.samplers.steer import steered_denoise
from tiltjax.tilt.divergence import weights_kl
from tiltjax.tilt.temperature import beta_for_ess
from tiltjax.tilt.weights import tilt
from tiltjax.train.average import averaged
from tiltjax.train.finite import check_scalars, check_tree
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step
from tiltjax.types import Array

__all__ = ["chains", "ddpo", "fit_value", "guarded_draw", "resample_and_tune", "rewards", "soft_steps", "steer", "tune"]

Value = Callable[[Array, Array], Array]


def rewards(name: str, guide: Any) -> Callable[[Array], Array]:
    """The reward of images ``[*batch, H, W, C]``, by name.

    Args:
      name: "ink" (mean darkness, in [0, 1]), "symmetry" (minus the mean distance of a pixel to its mirror image) or
        "class:C" (log-probability of the class, by the guide).
      guide: Parameters of the noise-aware classifier.

    Raises:
      ValueError: If the name is none of these.
    """
    if name == "ink":
        return lambda x: jnp.mean(x + 1, axis=(-3, -2, -1)) / 2
    if name == "symmetry":
        return lambda x: -jnp.mean(jnp.abs(x - jnp.flip(x, axis=-2)), axis=(-3, -2, -1))
    if name.startswith("class:") and name[6:].isdigit():
        place = int(name[6:])
        return lambda x: jax.nn.log_softmax(digits_world.network(guide, x, jnp.float32(1)))[..., place]
    raise ValueError(f"reward must be ink, symmetry or class:C, got {name!r}")


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-3], -1)


@functools.partial(jax.jit, static_argnames=("n", "steps"))
def chains(key: Array, model: Denoiser, ref: Denoiser, *, n: int, steps: int) -> tuple[Array, Array, Array]:
    """Draws n chains of a fine-tuned model.

    Returns:
      Images ``[n, H, W, C]``, path KL to the reference ``[n]``, and the chain ``[steps, n, ...]`` whose entry j is the
      noisy image before step j.
    """
    keys, (number, before, after) = jax.random.split(key), levels(cosine_schedule(steps))
    x = jax.random.normal(keys[0], (n, *model.config.shape))

    def step(x: Array, level: tuple) -> tuple[Array, tuple[Array, Array]]:
        k, a, b = level
        mean, std = reverse_kernel(x, model(x, a), a, b)
        ref_mean, _ = reverse_kernel(x, ref(x, a), a, b)
        kl = transition_kl(_flat(mean), _flat(ref_mean), std)
        return mean + std * jax.random.normal(jax.random.fold_in(keys[1], k), x.shape), (kl, x)

    last, (kl, path) = jax.lax.scan(step, x, (number[:-1], before[:-1], after[:-1]))
    image, _ = reverse_kernel(last, ref(last, before[-1]), before[-1], after[-1])
    return image.clip(-1, 1), jnp.sum(kl, axis=0), jnp.concatenate([path, last[None]])


def plug_in(ref: Denoiser, reward: Callable[[Array], Array]) -> Value:
    """The reward of the image that the denoiser expects, in place of the soft value: too low, by Jensen."""
    return lambda x, alpha_bar: reward(to_clean(x, ref(x, alpha_bar), alpha_bar).clip(-1, 1))


def fit_value(key: Array, image: Array, reward: Array, *, beta: Array, num_steps: int, width: int = 128) -> Value:
    r"""Learns the soft value ``beta log E[exp(r(x_0) / beta) | x_t]`` from images of the reference.

    Minimises :math:`E[e^{f} - y f]` with :math:`y = e^{r/\beta} / Z`, whose minimum is :math:`f = \log E[y | x_t]`: a
    squared error in r would give the plain value.
    """
    weights, log_z = jax.jit(lambda reward: (tilt(reward, beta=beta).weights, tilt(reward, beta=beta).log_z))(reward)
    weights = weights * len(reward)

    def loss(net: Any, key: Array) -> Array:
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (256,), 0, len(reward))
        x, _, alpha_bar = digits_world.noisy(keys[1], image[rows])
        f = digits_world.network(net, x, alpha_bar)[:, 0].clip(-15, 15)
        return jnp.mean(jnp.exp(f) - weights[rows] * f)

    sizes = (int(np.prod(image.shape[1:])) + 6, width, width, 1)
    net = digits_world.fit_network(key, loss, sizes=sizes, num_steps=num_steps)
    return lambda x, alpha_bar: beta * (digits_world.network(net, x, alpha_bar)[..., 0] + log_z)


def soft_steps(
    key: Array, ref: Denoiser, value: Value, *, beta: Array, n: int, num_candidates: int, steps: int
) -> tuple[Array, Array]:
    """Soft best-of-N at every reverse step, weighed by a soft value: images ``[n, ...]`` and the bound on their KL."""
    keys, (number, before, after) = jax.random.split(key), levels(cosine_schedule(steps))
    x = jax.random.normal(keys[0], (n, *ref.config.shape))

    def step(x: Array, level: tuple) -> tuple[Array, Array]:
        k, a, b = level
        draw, choose = jax.random.split(jax.random.fold_in(keys[1], k))
        mean, std = reverse_kernel(x, ref(x, a), a, b)
        candidates = mean[:, None] + std * jax.random.normal(draw, (n, num_candidates, *x.shape[1:]))
        worth = value(candidates, b)
        place = soft_best_of_n(choose, worth, beta=beta)
        kl = weights_kl(tilt(worth, beta=beta).weights)
        return jax.vmap(lambda c, i: c[i])(candidates, place), kl

    last, kl = jax.lax.scan(step, x, (number[:-1], before[:-1], after[:-1]))
    image, _ = reverse_kernel(last, ref(last, before[-1]), before[-1], after[-1])
    return image.clip(-1, 1), jnp.sum(kl, axis=0)


def steer(
    key: Array, ref: Denoiser, value: Value, reward: Callable, *, beta: float, runs: int, particles: int, steps: int
) -> tuple[Array, Array]:
    """Sequential Monte Carlo, many small runs: an image of each ``[runs, ...]``, and what bounds the KL ``[runs]``."""

    def aim(x: Array, alpha_bar: Array) -> Array:
        return jnp.where(alpha_bar == 1, reward(x.clip(-1, 1)), value(x, jnp.minimum(alpha_bar, 0.9999)))

    def one(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (particles, *ref.config.shape))
        out = steered_denoise(keys[1], ref, x, cosine_schedule(steps), aim, beta=beta)
        image = out.state[jax.random.categorical(keys[2], out.log_weights)].clip(-1, 1)
        return image, reward(image) / beta - out.log_z

    return jax.jit(jax.vmap(one))(jax.random.split(key, runs))


def tune(
    key: Array,
    model: Denoiser,
    image: Array,
    reward: Array | None,
    *,
    beta: Array | float = 1.0,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> Denoiser:
    """Fine-tunes on images by denoising score matching, weighted by the tilt of their reward; None weighs all alike.

    Returns the average of the last tens of steps: what single steps add by chance costs KL and brings no reward.
    """
    tx = averaged(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate)), decay=0.97)

    def loss_fn(model: Denoiser, _: Any, batch: Any, key: Array) -> tuple[Average, dict]:
        picked, worth = batch
        x, noise, alpha_bar = digits_world.noisy(key, picked)
        flat = [_flat(y) for y in (model.output(x, alpha_bar), picked, noise)]
        kind = model.config.prediction
        if worth is None:
            return average(denoising_loss(*flat, alpha_bar, kind=kind)), {}
        one = weighted_denoising_loss(*flat, alpha_bar, worth, beta=beta, kind=kind)
        return average(one[None]), {}

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        state, image, reward = carry
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (batch_size,), 0, len(image))
        batch = (image[rows], None if reward is None else reward[rows])
        state, _ = train_step(state, batch, keys[1], loss_fn=loss_fn, tx=tx)
        return (state, image, reward), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0][0])
    state = run((init_state(model, tx), image, reward), jax.random.split(key, num_steps))
    check_tree(f"step {num_steps} of fine-tuning", state)
    return state.opt_state.average


def guarded_draw(
    key: Array, reward: Array, *, beta: float, min_ess: float, max_copies: int
) -> tuple[Array, dict[str, float]]:
    """Resamples candidates towards their reward, with a ``beta`` raised until ``min_ess`` of them count.

    Returns:
      Indices ``[N]``, and the figures of the guard: the beta that was used, the effective sample size, the most copies
      of one candidate and how many candidates live on.
    """
    N = len(reward)

    @jax.jit
    def draw(key: Array, reward: Array) -> Any:
        used = jnp.maximum(beta, beta_for_ess(reward, ess=max(1.0, min_ess * N)))
        return guarded_resample(key, reward, num=N, beta=used, max_copies=max_copies)

    out = draw(key, reward)
    figures = {"beta": out.beta, "ess": out.ess, "most_copies": out.most, "survivors": out.distinct}
    return out.indices, {name: float(value) for name, value in figures.items()}


def resample_and_tune(
    key: Array,
    ref: Denoiser,
    reward: Callable,
    *,
    beta: float,
    rounds: int,
    pool: int,
    steps: int,
    min_ess: float = 0.2,
    max_copies: int = 8,
    **options: Any,
) -> tuple[Denoiser, list[dict[str, float]]]:
    """Draw, resample, fine-tune, again: each of the rounds tilts by ``exp(r / (rounds beta))``, from its own images."""
    model, log = ref, []
    for i in range(rounds):
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        image, _, _ = chains(keys[0], model, ref, n=pool, steps=steps)
        picked, figures = guarded_draw(
            keys[1], reward(image), beta=rounds * beta, min_ess=min_ess, max_copies=max_copies
        )
        model = tune(keys[2], model, image[picked], None, **options)
        log.append(figures)
    return model, log


def ddpo(
    key: Array,
    ref: Denoiser,
    reward: Callable,
    *,
    beta: float,
    n: int,
    steps: int,
    num_iterations: int,
    learning_rate: float,
    clip: float = 1e-4,
    tick: Callable[[], Any] = lambda: None,
) -> tuple[Denoiser, list[list[float]]]:
    """Policy gradient on reward - beta path KL: the model, and (reward, path KL) of the chains of every iteration.

    Each iteration draws n chains and makes two updates, on the even and on the odd steps; the second is off-policy,
    and clipped.
    """
    # Adam's first steps have the size of the learning rate, however small the gradient: each costs KL.
    rate = optax.linear_schedule(0.0, learning_rate, min(10, 2 * num_iterations))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    _, before, after = levels(cosine_schedule(steps))

    def kernels(model: Denoiser, x: Array, rows: Array) -> tuple[Array, Array]:
        a, b = (jnp.broadcast_to(v[rows][:, None], x.shape[:2]) for v in (before, after))
        mean, std = reverse_kernel(x, model(x, a), a, b)
        return _flat(mean), std[..., 0, 0, 0]

    def loss_fn(model: Denoiser, ref: Denoiser, batch: Any, _: Array) -> tuple[Average, dict]:
        x, moved, old, rows, advantage, spread = batch
        mean, std = kernels(model, x, rows)
        logp = transition_logp(_flat(moved), mean, std).T
        loss = ddpo_loss(logp, old.T, advantage, jnp.ones(logp.shape, bool), clip=clip)
        kl = jnp.sum(transition_kl(mean, kernels(ref, x, rows)[0], std), axis=0)
        return average(loss + beta / spread * kl), {}

    @jax.jit
    def iterate(state: Any, ref: Denoiser, key: Array) -> tuple[Any, tuple[Array, Array]]:
        image, kl, path = chains(key, state.params, ref, n=n, steps=steps)
        worth = reward(image)
        objective = worth - beta * kl
        advantage, spread = group_normalised(objective), jnp.std(objective) + 1e-6
        halves = [np.arange(first, steps - 1, 2) for first in (0, 1)]
        old = []
        for rows in halves:
            mean, std = kernels(state.params, path[rows], rows)
            old.append(transition_logp(_flat(path[rows + 1]), mean, std))
        for rows, logp in zip(halves, old, strict=True):
            batch = (path[rows], path[rows + 1], logp, rows, advantage, spread)
            state, _ = train_step(state, batch, key, ref, loss_fn=loss_fn, tx=tx)
        return state, (worth.mean(), kl.mean())

    state, seen = init_state(ref, tx), []
    for i in range(num_iterations):
        state, figures = iterate(state, ref, jax.random.fold_in(key, i))
        seen.append([float(figures[0]), float(figures[1])])
        check_scalars(f"iteration {i}", dict(zip(("reward", "kl"), seen[-1], strict=True)))
        tick()
    check_tree(f"iteration {num_iterations}", state)
    return state.params, seen
