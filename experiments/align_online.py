"""`experiments.align` by a record of `tiltjax.train.methods`: rounds of candidates, rewards from the host, and fits."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from tiltjax.data import text
from tiltjax.data.candidates import Candidates, concatenate, pad, take
from tiltjax.data.pipeline import epoch_batches
from tiltjax.models import lora
from tiltjax.models.transformer import Transformer
from tiltjax.train import checkpoint, method
from tiltjax.train.methods import METHODS
from tiltjax.train.metrics import MetricsWriter
from tiltjax.train.policy import model_sample, model_view
from tiltjax.train.sharding import batch_sharding, shard

__all__ = ["RECORDS", "improve", "record_of"]

_OFFLINE = ("tilted_mle", "best_of_n_sft", "var", "var_importance", "dpo")


def _applies(record: method.Method) -> bool:
    """Whether prompts and a reward are all that it needs."""
    needs = {source for source, _ in record.draw} & {"data", "corpus"}
    critics = ("ppo", "ppo_ptx", "safe_rlhf")
    return (
        not needs and record.name not in critics and record.feedback in ("reward", "preference", "binary", "internal")
    )


RECORDS: dict[str, str] = {
    (f"online_{name}" if name in _OFFLINE else name): name
    for name, record in METHODS.items()
    if _applies(record) and not (name in _OFFLINE and record.rounds == 1)
}
"""Name on the command line -> record. Where an offline method of `experiments.align` has the name, its online record is
``online_<name>``."""


def record_of(name: str, *, num_candidates: int, steps: int) -> method.Method:
    """The record, with the run's number of candidates where it is free, and no more rounds than steps."""
    record = METHODS[RECORDS[name]]
    if len(record.draw) == 1 and record.draw[0][1] > 2:
        record = dataclasses.replace(record, draw=((record.draw[0][0], num_candidates),))
    if record.rounds is not None and steps % record.rounds:
        raise ValueError(f"steps must be a multiple of the {record.rounds} rounds of {name}, got {steps}")
    return record


def improve(world: Any, *, watch: Callable[[int, Transformer], None] | None = None) -> Transformer:
    """Plays all rounds; returns the policy with adapters merged.

    A round is a function of its number and of the players before it, which are the checkpoint: a run that is killed and
    resumed ends with the same bits.

    Args:
      world: Of `experiments.align_world.prepare`.
      watch: Called with the number of rounds played and the policy, before each checkpoint is written: once more for
        the same round if the run is killed in between.

    Returns:
      The policy after the last round.
    """
    config = world.config
    if jax.process_count() > 1:
        raise ValueError(f"method {config.method!r} runs on one host")
    record = record_of(config.method, num_candidates=config.num_candidates, steps=config.steps)
    rounds = record.rounds or config.steps
    minibatches, place = config.steps // rounds, batch_sharding(world.mesh)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 10), max(2, config.steps * record.epochs),
        0.1 * config.learning_rate,
    )  # fmt: skip
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adamw(schedule, b2=0.95, weight_decay=0.0))
    trained, frozen = world.model, None
    if config.lora_rank:
        key = jax.random.fold_in(jax.random.key(config.seed), 4)
        trained, frozen = lora.partition(lora.add(key, world.model, rank=config.lora_rank), lora.is_adapter)
    ends: dict[str, Any] = {"eos_id": text.eos_id(world.tokenizer), "pad_id": text.pad_id(world.tokenizer)}
    sample = model_sample(max_tokens=config.max_tokens, frozen=frozen, mixture=record.mixture, **ends)
    options: dict[str, Any] = {"view": model_view(frozen=frozen), "tx": tx, "beta": config.beta}
    fit = jax.jit(functools.partial(method.fit, record, minibatches=minibatches, **options))
    players, first = shard(method.init_players(record, trained, tx), world.mesh), 0
    folder = world.directory / "checkpoints"
    if config.resume and (first := checkpoint.latest(folder) or 0):
        players = checkpoint.restore(folder, first, players)
    whole = lambda params: lora.merge(params if frozen is None else lora.combine(params, frozen))  # noqa: E731
    asked = _prompts(world)
    order = epoch_batches(config.num_prompts, config.batch_size, seed=config.seed)
    with (
        checkpoint.Saver(folder) as saver,
        MetricsWriter(world.directory, resume_step=first if first else None) as writer,
        tqdm(total=rounds, initial=first, desc=config.method, unit="round") as bar,
    ):
        for r in range(first, rounds):
            draw, learn = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1000 + r))
            parts = []
            for m in range(minibatches):
                rows = order(r * minibatches + m)
                prompts = jax.device_put(take(asked, rows), place)
                drawn = method.collect(record, players, prompts, jax.random.fold_in(draw, m), sample=sample)
                drawn = jax.device_get(drawn)
                reward = world.score([world.rows["train"][i] for i in rows], world.texts(drawn))
                parts.append(dataclasses.replace(drawn, reward=np.float32(reward)))
            batch = concatenate(parts)
            feedback = method.Feedback(reward=jnp.asarray(batch.reward))
            players, scalars = fit(players, jax.device_put(batch, place), feedback, learn)
            values = {name: float(value) for name, value in jax.device_get(scalars).items()}
            writer.write(r, values)
            bar.set_postfix_str(json.dumps({k: round(values[k], 3) for k in ("reward", "kl_k1")}))
            bar.update()
            if (r + 1) % config.checkpoint_every == 0 or r + 1 == rounds:
                if watch is not None:
                    watch(r + 1, whole(players.state.params))
                saver.save(r + 1, players)
    return whole(players.state.params)


def _prompts(world: Any) -> Candidates:
    tokens = text.encode_prompts(world.tokenizer, [row.prompt for row in world.rows["train"]])
    prompt, mask = pad(tokens, pad_id=text.pad_id(world.tokenizer))
    empty = np.zeros((len(prompt), 0, world.config.max_tokens), np.int32)
    return Candidates(prompt=prompt, prompt_mask=mask, completion=empty, completion_mask=empty > 0)
