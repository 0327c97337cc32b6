"""One method in the world of `experiments.arena`: the whole loop inside one `jax.jit`, over all strengths and seeds."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.arena.world import World
from tiltjax.train.finite import check_scalars
from tiltjax.train.method import Method
from tiltjax.train.rounds import collect, fit, init_players
from tiltjax.train.streams import stream
from tiltjax.types import Array

__all__ = ["MEASURES", "Budget", "fitted", "pair_laws", "run"]

MEASURES = ("reward", "kl", "to_tilt", "to_optimum", "entropy", "chosen", "rejected", "cost", "length")
"""What is measured at a checkpoint, exactly, as a mean over prompts: reward; KL to the reference; KL to the tilt, and
to the method's own optimum (the tilt where it has none); entropy; the mean log-probability of the chosen and of the
rejected completion of the reference's pairs; cost; length."""


FINITE = ("reward", "kl", "entropy", "length")
"""Of these what is finite for every policy; its distance to another law may be infinite."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every method may spend.

    Attributes:
      updates: Mini-batches; a method with several epochs takes more steps on the same ones.
      samples: Completions per mini-batch, over all prompts.
      checkpoints: Evaluations, evenly spread.
      betas: Strengths of the KL term, reward units.
      seeds: Independent runs.
      learning_rate: Of Adam, decaying linearly to a tenth.
      published: Whether methods that are published without a KL term have none here either, at every strength.
    """

    updates: int = 96
    samples: int = 64
    checkpoints: int = 16
    betas: tuple[float, ...] = (1.0, 0.5, 0.25)
    seeds: int = 3
    learning_rate: float = 1e-3
    published: bool = False


def fitted(method: Method, *, most: int = 16) -> Method:
    """The record with as many candidates as divide a mini-batch: the nearest power of 2, at most ``most``."""
    if len(method.draw) > 1:
        return method
    ((source, num),) = method.draw
    return dataclasses.replace(method, draw=((source, 2 ** round(np.log2(min(num, most)))),))


def measured(world: World, target: Array, own: Array, pairs: tuple[Array, Array], params: Any) -> Array:
    """`MEASURES` of a policy, ``[len(MEASURES)]``."""
    logp = world.logp(params)
    p = jnp.exp(logp)
    mean = lambda x: jnp.mean(jnp.sum(p * x, axis=-1))  # noqa: E731
    along = [jnp.mean(jnp.sum(law * logp, axis=-1)) for law in pairs]
    length = jnp.asarray(world.space.mask.sum(-1), p.dtype)[None]
    return jnp.stack(
        [mean(world.reward), mean(logp - world.ref_logp), mean(logp - target), mean(logp - own), mean(-logp), *along,
         mean(world.cost), mean(jnp.broadcast_to(length, p.shape))]
    )  # fmt: skip


def pair_laws(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Laws of the chosen and of the rejected of two completions of the reference, judged by Bradley and Terry."""
    ref, reward = np.exp(world.ref_logp.astype(np.float64)), world.reward.astype(np.float64)
    wins = np.stack([(1 / (1 + np.exp(r[None] - r[:, None]))) @ q for r, q in zip(reward, ref, strict=True)])
    return (2 * ref * wins).astype(np.float32), (2 * ref * (1 - wins)).astype(np.float32)


def optimum(world: World, method: Method, betas: tuple[float, ...]) -> np.ndarray:
    """The law that the method tends to, for every strength, ``[betas, P, K]``, nats."""
    law = {"constrained": world.constrained, "equilibrium": world.equilibrium}.get(method.optimum, world.tilt)
    return np.stack([np.asarray(law(method.own_beta(beta))) for beta in betas])


def first(world: World, owns: np.ndarray, budget: Budget) -> np.ndarray:
    """`MEASURES` of the reference, ``[betas, 1, 1, len(MEASURES)]``."""
    p, pairs = np.exp(world.ref_logp), pair_laws(world)
    length = np.broadcast_to(world.space.mask.sum(-1)[None], p.shape)
    mean = lambda x: float(np.mean(np.sum(p * x, axis=-1)))  # noqa: E731
    along = [float(np.mean(np.sum(law * world.ref_logp, axis=-1))) for law in pairs]
    rows = [
        [mean(world.reward), 0.0, mean(world.ref_logp - np.asarray(world.tilt(beta))), mean(world.ref_logp - own),
         mean(-world.ref_logp), *along, mean(world.cost), mean(length)]
        for beta, own in zip(budget.betas, owns, strict=True)
    ]  # fmt: skip
    return np.array(rows)[:, None, None]


def run(world: World, method: Method, budget: Budget) -> dict[str, Any]:
    """Trains and measures every strength and seed.

    Returns:
      ``curves [betas, seeds, 1 + checkpoints, MEASURES]`` as lists, the samples and gradient steps of every checkpoint,
      and the seconds that it took.
    """
    began = time.time()
    method = fitted(method)
    N, B, C = method.num_candidates, budget.updates, budget.checkpoints
    rounds = min(method.rounds or B, B)
    if budget.samples % N or B % rounds or max(rounds, C) % min(rounds, C):
        raise ValueError(f"samples={budget.samples}, updates={B} and checkpoints={C} do not suit {method.name}")
    minibatches, probes = B // rounds, max(1, C // rounds)
    prompts = world.batch_of_prompts(minibatches * budget.samples // N)
    pairs = pair_laws(world)
    steps = B * method.epochs
    bare = budget.published and method.beta == 0

    def one(beta: Array, used: Array, own: Array, key: Array) -> Array:
        rate = optax.linear_schedule(budget.learning_rate, budget.learning_rate / 10, steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        target = world.tilt(beta)
        probe = functools.partial(measured, world, target, own, pairs)
        sample = world.sampler(target, mixture=method.mixture, temperature=method.temperature)
        view = functools.partial(world.view, temperature=method.temperature)
        start = init_players(method, world.params, tx)

        def turn(players, r):
            draw, learn = jax.random.split(jax.random.fold_in(key, r))
            candidates = collect(method, players, prompts, draw, sample=sample)
            strength = 0.0 if bare else used
            return fit(method, players, candidates, world.score(candidates), learn, view=view, tx=tx, beta=strength,
                       minibatches=minibatches, probe=probe if rounds <= C else None, probes=probes)  # fmt: skip

        def stretch(players, some):
            players, _ = jax.lax.scan(turn, players, some)
            return players, probe(players.state.params)

        if rounds > C:
            _, seen = jax.lax.scan(stretch, start, jnp.arange(rounds).reshape(C, -1))
        else:
            _, seen = jax.lax.scan(turn, start, jnp.arange(rounds))
        return seen.reshape(C, -1)

    betas, owns = np.array(budget.betas, np.float32), optimum(world, method, budget.betas)
    keys = jax.random.split(stream(world.config.seed, "arena runs"), budget.seeds)
    used = np.array([method.own_beta(beta) for beta in budget.betas], np.float32)
    every = jax.vmap(jax.vmap(one, (None, None, None, 0)), (0, 0, 0, None))
    seen = np.asarray(jax.jit(every)(betas, used, owns, keys), np.float64)
    means = dict(zip(MEASURES, seen.mean(axis=(0, 1, 2)), strict=True))
    check_scalars(method.name, {name: means[name] for name in FINITE})
    curves = np.concatenate([np.broadcast_to(first(world, owns, budget), seen[:, :, :1].shape), seen], axis=2)
    at = np.arange(C + 1) * (B // C)
    return {
        "name": method.name,
        "schedule": method.schedule,
        "optimum": method.optimum,
        "feedback": method.feedback,
        "paper": method.paper,
        "curves": curves.round(6).tolist(),
        "samples": (at * budget.samples).tolist(),
        "steps": (at * method.epochs).tolist(),
        "seconds": round(time.time() - began, 1),
    }
