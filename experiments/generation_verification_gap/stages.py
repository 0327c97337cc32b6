"""The stages of `experiments.generation_verification_gap`, each a function of one seed, compiled over all of them.

Every stage starts from the same supervised checkpoint, has the same network, optimizer, batches and early stopping, and
differs in its loss alone: a kernel of the library, or the exact objective.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.generation_verification_gap.world import (
    Task,
    completion_logp,
    completion_reward,
    init_network,
    tree_logp,
    tree_reward,
)
from tiltjax.exact import bandit
from tiltjax.losses.mle import sft_loss
from tiltjax.losses.preference import dpo_loss, implicit_reward, local_reward_loss
from tiltjax.losses.reward_model import bradley_terry_loss
from tiltjax.types import Array

__all__ = [
    "LOCAL_SCALES",
    "SOURCES",
    "Recipe",
    "Schedule",
    "evaluate",
    "fit",
    "fit_rewards",
    "online",
    "prepare",
    "reward_tables",
]

LOCAL_SCALES = (0.3, 1.0)
"""Scales tried for the local reward model; validation decides."""

SOURCES = ("global", "local", "dpo", "gold")
"""Rewards that the online stage is given, in the order of `reward_tables`."""

SFT_SHARPNESS = 0.3  # Demonstrations follow the uniform policy tilted by this many gold rewards.
BEST_OF = 64


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a stage is optimised.

    Attributes:
      steps: Optimizer steps, rounded down to a multiple of ``checks``.
      batch_size: Examples a step, drawn with replacement.
      checks: Evaluations on held-out examples, evenly spread; the best parameters of all are kept.
      learning_rate: Of AdamW, at the start of a cosine decay.
    """

    steps: int
    batch_size: int
    checks: int
    learning_rate: float = 3e-3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all stages share.

    Attributes:
      beta: Strength of the KL term, of DPO and of the online stage, reward units.
      width: Of both hidden layers.
      offline: Of supervised fine-tuning, the reward models and DPO.
      online: Of the online stage, whose examples are prompts with all of their completions.
      num_demonstrations: For supervised fine-tuning.
      num_held_out: Demonstrations, validation pairs and test pairs apart, each.
      num_test_prompts: On which objectives are computed.
    """

    beta: float = 0.5
    width: int = 64
    offline: Schedule = Schedule(steps=1200, batch_size=128, checks=20)
    online: Schedule = Schedule(steps=400, batch_size=32, checks=8)
    num_demonstrations: int = 4000
    num_held_out: int = 500
    num_test_prompts: int = 300


def fit(
    key: Array, net: Any, data: Any, held_out: Any, loss_fn: Callable[[Any, Any], Array], schedule: Schedule
) -> tuple[Any, Array]:
    """AdamW with a cosine decay; returns the parameters of least held-out loss, the start among them, and that loss.

    Args:
      key: Consumed.
      net: Parameters to start from.
      data: Arrays with a leading axis of examples.
      held_out: The same, for early stopping.
      loss_fn: ``(net, examples) -> [n]``.
      schedule: Steps, batch size, evaluations, learning rate.
    """
    size = jax.tree.leaves(data)[0].shape[0]
    tx = optax.adamw(optax.cosine_decay_schedule(schedule.learning_rate, schedule.steps))

    def step(carry, key):
        net, state = carry
        rows = jax.random.randint(key, (schedule.batch_size,), 0, size)
        batch = jax.tree.map(lambda x: x[rows], data)
        gradient = jax.grad(lambda net: jnp.mean(loss_fn(net, batch)))(net)
        updates, state = tx.update(gradient, state, net)
        return (optax.apply_updates(net, updates), state), None

    def stretch(carry, keys):
        trained, best, least = carry
        trained, _ = jax.lax.scan(step, trained, keys)
        value = jnp.mean(loss_fn(trained[0], held_out))
        best = jax.tree.map(lambda new, old: jnp.where(value < least, new, old), trained[0], best)
        return (trained, best, jnp.minimum(value, least)), None

    keys = jax.random.split(key, (schedule.checks, schedule.steps // schedule.checks))
    start = ((net, tx.init(net)), net, jnp.mean(loss_fn(net, held_out)))
    (_, best, least), _ = jax.lax.scan(stretch, start, keys)
    return best, least


def prepare(key: Array, task: Task, recipe: Recipe) -> dict[str, Any]:
    """A world, its supervised checkpoint, and preferences between that policy's completions."""
    keys = jax.random.split(key, 6)
    secret = task.secret(keys[0])

    def loss(net: Any, rows: Any) -> Array:
        return sft_loss(completion_logp(net, task, rows["prompt"], rows["completion"]))

    prompt = task.prompts(keys[1], recipe.num_demonstrations + recipe.num_held_out)
    shown = jax.random.categorical(keys[2], SFT_SHARPNESS * task.reward(secret, prompt))[:, None]
    demonstrations = _split({"prompt": prompt, "completion": shown}, recipe.num_demonstrations)
    net = init_network(keys[3], task, width=recipe.width)
    net, _ = fit(keys[4], net, *demonstrations, loss, recipe.offline)

    ask, answer, judge = jax.random.split(keys[5], 3)
    prompt = task.prompts(ask, task.num_pairs + 2 * recipe.num_held_out)
    logp = _by_prompt(lambda x: tree_logp(net, task, x), prompt)
    drawn = jax.random.categorical(answer, logp, shape=(2, len(prompt))).T
    gold = jnp.take_along_axis(task.reward(secret, prompt), drawn, axis=1)
    first = jax.random.bernoulli(judge, jax.nn.sigmoid(gold[:, 0] - gold[:, 1]))[:, None]
    pairs = {"completion": drawn, "ref_logp": jnp.take_along_axis(logp, drawn, axis=1), "gold": gold}
    pairs = {"prompt": prompt, **{name: jnp.where(first, x, x[:, ::-1]) for name, x in pairs.items()}}
    train, held_out = _split(pairs, task.num_pairs)
    validation, test = _split(held_out, recipe.num_held_out)
    return {"secret": secret, "sft": net, "train": train, "validation": validation, "test": test}


def fit_rewards(key: Array, world: dict[str, Any], task: Task, recipe: Recipe) -> dict[str, Any]:
    """Three reward models of the same preferences: a scalar head, a free policy, and a policy beside its reference.

    Returns:
      The networks, the local model's scale, and every model's loss on the test pairs beside the true reward's.
    """

    def global_loss(net: Any, rows: Any) -> Array:
        return bradley_terry_loss(completion_reward(net, task, rows["prompt"], rows["completion"]))

    def local_loss(net: Any, rows: Any, scale: Array) -> Array:
        return local_reward_loss(completion_logp(net, task, rows["prompt"], rows["completion"]), beta=scale)

    def offline_loss(net: Any, rows: Any) -> Array:
        logp = completion_logp(net, task, rows["prompt"], rows["completion"])
        return dpo_loss(logp, rows["ref_logp"], beta=recipe.beta)

    def train(key: Array, loss_fn: Callable) -> tuple[Any, Array]:
        return fit(key, world["sft"], world["train"], world["validation"], loss_fn, recipe.offline)

    keys = jax.random.split(key, 3)
    verifier, _ = train(keys[0], global_loss)
    scales = jnp.array(LOCAL_SCALES)
    tried, least = jax.lax.map(lambda scale: train(keys[1], lambda net, rows: local_loss(net, rows, scale)), scales)
    local, scale = jax.tree.map(lambda x: x[jnp.argmin(least)], (tried, scales))
    offline, _ = train(keys[2], offline_loss)
    test = world["test"]
    nll = {
        "oracle": bradley_terry_loss(test["gold"]),
        "global": global_loss(verifier, test),
        "local": local_loss(local, test, scale),
        "dpo": offline_loss(offline, test),
    }
    return {"global": verifier, "local": local, "dpo": offline, "scale": scale, "nll": jax.tree.map(jnp.mean, nll)}


def reward_tables(
    world: dict[str, Any], models: dict[str, Any], task: Task, recipe: Recipe, prompt: Array
) -> tuple[Array, Array]:
    """Every completion's reward under each of `SOURCES`, ``[n, 4, K]``, and the SFT policy's log-probability."""

    def tables(prompt: Array) -> tuple[Array, Array]:
        ref_logp = tree_logp(world["sft"], task, prompt)
        rewards = (
            tree_reward(models["global"], task, prompt),
            models["scale"] * tree_logp(models["local"], task, prompt),
            implicit_reward(tree_logp(models["dpo"], task, prompt), ref_logp, beta=recipe.beta),
            task.reward(world["secret"], prompt),
        )
        return jnp.stack(rewards, axis=1), ref_logp

    return _by_prompt(tables, prompt)


def online(key: Array, world: dict[str, Any], models: dict[str, Any], task: Task, recipe: Recipe) -> Any:
    """Soft reinforcement learning without sampling noise, once for each of `SOURCES`: policies with a leading axis.

    Ascends the enumerated ``E reward - beta KL(policy || SFT)`` on the prompts of the training pairs, and stops early
    by the same reward on those of the validation pairs.
    """
    prompt = jnp.concatenate([world["train"]["prompt"], world["validation"]["prompt"]])
    rewards, ref_logp = reward_tables(world, models, task, recipe, prompt)

    def loss(net: Any, rows: Any) -> Array:
        logp = tree_logp(net, task, rows["prompt"])
        return -jnp.sum(jnp.exp(logp) * (rows["reward"] - recipe.beta * (logp - rows["ref_logp"])), axis=-1)

    def train(reward: Array) -> Any:
        rows = {"prompt": prompt, "ref_logp": ref_logp, "reward": reward}
        return fit(key, world["sft"], *_split(rows, task.num_pairs), loss, recipe.online)[0]

    return jax.lax.map(train, jnp.moveaxis(rewards, 1, 0))


def evaluate(
    key: Array, world: dict[str, Any], models: dict[str, Any], policies: Any, task: Task, recipe: Recipe
) -> dict[str, Any]:
    """Exact figures on fresh prompts: objectives under the gold reward, best-of-64, and a win rate."""
    prompt = task.prompts(key, recipe.num_test_prompts)
    tables, ref_logp = reward_tables(world, models, task, recipe, prompt)
    tables = jnp.moveaxis(tables, 1, 0)
    ascended = jax.vmap(lambda net: _by_prompt(lambda x: tree_logp(net, task, x), prompt))(policies)
    gold, ref = tables[-1], jnp.exp(ref_logp)
    # Inverts the implicit reward.
    laws = {"sft": ref, "dpo": jnp.exp(tables[SOURCES.index("dpo")] / recipe.beta + ref_logp)}
    laws |= {f"online_{source}": jnp.exp(logp) for source, logp in zip(SOURCES, ascended, strict=True)}
    objective = {
        name: jnp.mean(jnp.sum(law * gold, axis=-1) - recipe.beta * bandit.kl(law, ref)) for name, law in laws.items()
    }
    objective["optimum"] = jnp.mean(recipe.beta * bandit.log_partition(ref, gold, beta=recipe.beta))
    picked = {
        name: jnp.mean(jnp.sum(bandit.best_of_n_law(ref, table, n=BEST_OF) * gold, axis=-1))
        for name, table in zip(("global", "local", "dpo", "oracle"), tables, strict=True)
    }

    def preferred(rows: tuple[Array, Array, Array]) -> Array:
        ours, theirs, gold = rows
        return ours @ jax.nn.sigmoid(gold[:, None] - gold[None, :]) @ theirs

    wins = jax.lax.map(preferred, (laws["online_global"], laws["dpo"], gold), batch_size=32)
    return {
        "objective": objective,
        "best_of_64": picked,
        "nll": models["nll"],
        "local_scale": models["scale"],
        "win_rate": jnp.mean(wins),
    }


def _by_prompt(fn: Callable[[Array], Any], prompt: Array) -> Any:
    """``fn(prompt)`` in pieces that fit the cache."""
    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(lambda row: fn(row[None]), prompt, batch_size=256))


def _split(rows: Any, n: int) -> tuple[Any, Any]:
    """The first ``n`` rows, and the others."""
    return jax.tree.map(lambda x: x[:n], rows), jax.tree.map(lambda x: x[n:], rows)
