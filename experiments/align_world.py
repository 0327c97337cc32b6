"""What `experiments.align` works with, and the two things it does with a model: draw scored candidates, and fit."""

import dataclasses
import functools
import hashlib
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from experiments.align_config import AlignConfig
from experiments.align_given import LEARNED, Given, load_given
from experiments.align_online import RECORDS
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.data.datasets import PromptRow, read
from tiltjax.data.packing import Sequences, pack_sequences, rows_needed
from tiltjax.data.pipeline import Stream, epoch_batches, host_batches
from tiltjax.models import lora, pretrained
from tiltjax.models.transformer import Transformer
from tiltjax.rewards.gate import required_columns, score
from tiltjax.rewards.puzzles import puzzle_rows
from tiltjax.rewards.registry import load_reward, parse_spec
from tiltjax.samplers.best_of_n import best_of_n
from tiltjax.samplers.resample import resample
from tiltjax.tilt.weights import tilt
from tiltjax.train import distributed
from tiltjax.train.hardware import fast_dtype
from tiltjax.train.learned_reward import load_reward_model
from tiltjax.train.loop import fit
from tiltjax.train.methods import METHODS
from tiltjax.train.objectives import (
    VarBatch,
    candidate_weights,
    likelihood_objective,
    method_kernel,
    packed_objective,
    var_objective,
)
from tiltjax.train.rollout import collect, make_sampler, make_scorer, score_all
from tiltjax.train.sharding import batch_sharding, make_mesh, param_spec, pmap_step, shard, sharded_step
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

__all__ = ["World", "prepare", "prompt_rows", "training_data", "tune"]

_LOG = logging.getLogger(__name__)

PROMPTS = pathlib.Path(__file__).parent / "prompts"
DOUBLINGS = 6
"""How often the number of puzzles is doubled, until enough of their questions differ."""
QUEUE = 4
"""Batches of prompts that wait in one queue while ``sample_batch`` times N candidates are being decoded."""


@dataclasses.dataclass(frozen=True)
class World:
    """What a run works with: policy, tokenizer, reward, prompts, what else a method needs, the compiled functions."""

    config: AlignConfig
    directory: pathlib.Path
    tokenizer: text.Tokenizer
    model: Transformer
    reward: Any
    rows: dict[str, list]
    mesh: jax.sharding.Mesh
    sampler: Any
    scorer: Any
    fingerprint: str
    given: Given

    def rollout(self, split: str, model: Transformer, *, seed: int) -> tuple[Candidates, list[list[str]]]:
        """N scored candidates of every prompt of a split, kept on disk once they are whole."""
        config, rows = self.config, self.rows[split.partition("-")[0]]
        path = self.directory / "candidates" / f"{split}.npz"
        if distributed.agree(path.exists()):
            drawn = batches.load(path, fingerprint=self.fingerprint)
            return drawn, self.texts(drawn)
        drawn = collect(
            jax.random.fold_in(jax.random.key(config.seed), seed),
            model,
            text.encode_prompts(self.tokenizer, [row.prompt for row in rows]),
            sampler=self.sampler,
            pad_id=text.pad_id(self.tokenizer),
            batch_size=config.sample_batch * min(QUEUE, -(-len(rows) // config.sample_batch)),
            reward=lambda places, part: self.score([rows[i] for i in places], self.texts(part)),
            sharding=batch_sharding(self.mesh),
            directory=path.with_suffix(""),
            fingerprint=self.fingerprint,
            description=f"sample {split}",
        )
        if distributed.is_main():
            batches.save(path, drawn, fingerprint=self.fingerprint)
        return drawn, self.texts(drawn)

    def texts(self, drawn: Candidates) -> list[list[str]]:
        """The completions as text."""
        return text.decode_completions(self.tokenizer, drawn.completion, drawn.completion_mask)

    def score(self, rows: list, completions: list[list[str]]) -> np.ndarray:
        """Rewards ``[P, N]`` of N completions per row; every host computes those of its share of the rows."""
        each, mine = len(completions[0]), distributed.share(len(rows))
        values = distributed.together(lambda: self._score(rows[mine], completions[mine], each))
        return distributed.gather_rows(values, len(rows))

    def _score(self, rows: list, completions: list[list[str]], each: int) -> np.ndarray:
        if not rows:
            return np.zeros((0, each), np.float32)
        shown = [text.prompt_text(row.prompt) for row in rows for _ in range(each)]
        names = sorted({name for row in rows for name in row.columns})
        columns = {name: [row.columns.get(name) for row in rows for _ in range(each)] for name in names}
        flat = [completion for group in completions for completion in group]
        values = score(self.reward, shown, flat, columns=columns, name=self.config.reward, batch_size=64 * each)
        return values.reshape(len(rows), each)

    def ref_logp(self, drawn: Candidates, description: str) -> np.ndarray:
        """Log-probability of every completion under the reference, by the scorer."""
        return score_all(
            self.model,
            drawn,
            batch_size=self.config.sample_batch,
            scorer=self.scorer,
            buckets=4 if len(drawn.prompt) > self.config.sample_batch else 1,  # Many calls of one batch: one shape.
            sharding=batch_sharding(self.mesh),
            description=description,
        )

    def with_reference(self, name: str, drawn: Candidates, description: str) -> Candidates:
        """The same candidates with ``ref_logp``, computed once and kept in ``candidates/<name>.npz``.

        A file that another reference, tokenizer, prompt or setting has made is refused.
        """
        path = self.directory / "candidates" / f"{name}.npz"
        if distributed.agree(path.exists()):
            return batches.load(path, fingerprint=self.fingerprint)
        drawn = dataclasses.replace(drawn, ref_logp=self.ref_logp(drawn, description))
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            batches.save(path, drawn, fingerprint=self.fingerprint)
        return drawn


def prompt_rows(source: str, wanted: int, *, seed: int) -> list:
    """Prompts of a shipped set or a file or TFDS builder (all), or of a reasoning-gym task.

    Of a task there are as many different ones as are wanted, or fewer where it has no more.
    """
    if source.startswith("reasoning_gym:"):
        name, options = parse_spec(source.removeprefix("reasoning_gym:"))
        asked: dict[str, dict] = {}  # A question that comes again would be trained on and held out.
        for size in (wanted << doubled for doubled in range(DOUBLINGS)):
            for row in puzzle_rows(name, size=size, seed=seed, **options):
                asked.setdefault(str(row["prompt"]), row)
            if len(asked) >= wanted:
                break
        rows = list(asked.values())[:wanted]
        return [PromptRow(prompt=str(row.pop("prompt")), columns=dict(row)) for row in rows]
    shipped = PROMPTS / f"{source}.jsonl"
    return list(read(shipped if shipped.exists() else source, "prompt"))


def prepare(config: AlignConfig, directory: pathlib.Path) -> World:
    """Loads everything, the cheap things that may fail first."""
    learned, told = config.reward.startswith(LEARNED), None if config.compute_dtype == "auto" else config.compute_dtype
    if learned:
        reward: Any = load_reward_model(config.reward.removeprefix(LEARNED), compute_dtype=told)
    else:
        reward = load_reward(config.reward)
    wanted = config.num_prompts + config.num_eval_prompts
    rows = prompt_rows(config.prompts, wanted, seed=config.seed)
    if len(rows) < wanted:
        raise ValueError(
            f"{config.prompts}: {wanted} prompts are needed (training and held-out), the file has {len(rows)}"
        )
    for column in required_columns(reward):
        if column not in rows[0].columns:
            raise ValueError(f"{config.prompts}: reward {config.reward!r} needs a column {column!r}")
    mesh = make_mesh(config.mesh)
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    for name in ("batch_size", "sample_batch"):
        if getattr(config, name) % places:
            raise ValueError(f"{name} must be a multiple of data x fsdp = {places}, got {getattr(config, name)}")
    if config.mapping == "pmap":
        if places != jax.device_count():
            raise ValueError(f"mesh must put every device on data where mapping=pmap, got {config.mesh!r}")
        if config.batch_size // places % config.microbatches:
            raise ValueError(
                f"microbatches must divide the {config.batch_size // places} prompts of each device "
                f"where mapping=pmap, got {config.microbatches}"
            )
    source = text.find_embedded_gguf() if config.policy == "smollm2" else config.policy
    tokenizer = text.load_tokenizer(source)
    train, held_out = rows[: config.num_prompts], rows[config.num_prompts : wanted]
    record = METHODS[RECORDS[config.method]] if config.method in RECORDS else None
    given = load_given(config, record, train, tokenizer)
    dtype = fast_dtype() if config.compute_dtype == "auto" else config.compute_dtype
    model = pretrained.load(
        source,
        compute_dtype=dtype,
        sharding=lambda path, shape: NamedSharding(mesh, param_spec(path, shape, mesh)),
    )
    sampler = make_sampler(
        num_candidates=config.num_candidates,
        max_tokens=config.max_tokens,
        eos_id=text.eos_id(tokenizer),
        pad_id=text.pad_id(tokenizer),
        slots=config.sample_batch * config.num_candidates,
        mesh=mesh,
    )
    # Candidates are kept for a resumed run; an edited prompt file or another policy under the same name is refused.
    parts = [reward.fingerprint] if learned else []
    parts += [given.fingerprint] if given.fingerprint else []
    parts += [config.fingerprint(), dtype, pretrained.fingerprint(model), text.tokenizer_fingerprint(tokenizer)]
    made_of = "\n".join([*parts, *(repr(row) for row in rows[:wanted])])
    return World(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        model=model,
        reward=reward,
        rows={"train": train, "heldout": held_out},
        mesh=mesh,
        sampler=sampler,
        scorer=make_scorer(),
        fingerprint=hashlib.sha256(made_of.encode()).hexdigest()[:16],
        given=given,
    )


def training_data(world: World, drawn: Candidates) -> tuple[Any, Any, Any]:
    """``(rows, step -> which of them, loss function)`` of the method."""
    config = world.config
    if config.method == "var":
        blocks, B = var_blocks(world, drawn), config.batch_size
        which = epoch_batches(len(blocks), 1, seed=config.seed)
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
        return rows, lambda step: which(step)[0] * B + np.arange(B), var_objective(beta=config.beta)
    if config.method == "dpo":
        worst = best_of_n(-jnp.asarray(drawn.reward))
        pair = np.stack([best_of_n(jnp.asarray(drawn.reward)), worst], axis=1)
        drawn = world.with_reference("train-pairs", batches.select(drawn, pair), "score reference")
        chosen, rejected = np.asarray(drawn.reward).T
        decided = np.stack([chosen > rejected] * 2, axis=1)  # A prompt whose candidates all tie teaches nothing.
        drawn = dataclasses.replace(drawn, where=decided)
    if config.method == "sft":
        key = jax.random.fold_in(jax.random.key(config.seed), 7)
        drawn = world.given.demonstrated(key, np.arange(config.num_prompts), drawn, 1)
    kernel = method_kernel(config.method, beta=config.beta)
    if config.method == "tilted_mle" and config.fit_candidates:
        key = jax.random.fold_in(jax.random.key(config.seed), 6)
        weights = tilt(jnp.asarray(drawn.reward), beta=config.beta).weights
        drawn = batches.select(drawn, np.asarray(resample(key, weights, num=config.fit_candidates)))
        kernel = method_kernel("sft", beta=config.beta)
    drawn = dataclasses.replace(drawn, old_token_logp=None)
    order = epoch_batches(config.num_prompts, config.batch_size, seed=config.seed)
    if config.pack:
        return (drawn, np.asarray(candidate_weights(kernel, drawn))), order, packed_objective()
    return drawn, order, likelihood_objective(kernel)


def packed(world: World, data: tuple[Candidates, np.ndarray], order: Callable[[int], np.ndarray]) -> tuple:
    """``(indices of prompts -> their rows, number of rows)``: the same number at every step."""
    config, (drawn, weights) = world.config, data
    sizes = drawn.prompt_mask.sum(axis=-1)[:, None] + drawn.completion_mask.sum(axis=-1)
    places = world.mesh.shape["data"] * world.mesh.shape["fsdp"] * config.microbatches
    steps = [sizes[at][weights[at] != 0] for at in map(order, range(config.steps))]

    def plan(times: int) -> tuple[int, int, int]:
        length = batches.bucket_length(times * max(int(step.max(initial=1)) for step in steps), multiple=8)
        rows = batches.bucket_length(max(rows_needed(step, length=length) for step in steps), multiple=places)
        return rows * length, length, rows

    _, length, rows = min(plan(times) for times in (1, 2, 4, 8))  # Of those that hold the least, the shortest.
    N, T = drawn.completion.shape[1:]
    before, after = config.batch_size * (drawn.prompt.shape[1] + N * T), rows * length
    held = drawn.prompt_mask.sum() + drawn.completion_mask.sum()
    counts = sizes[weights != 0].sum() * config.batch_size / len(sizes)
    _LOG.info(
        "packed: %d rows of %d tokens a step, %d positions in place of %d (%.0f%% saved), "
        "padding %.0f%% in place of %.0f%%",
        rows, length, after, before, 100 * (1 - after / before), 100 * (1 - counts / after),
        100 * (1 - held * config.batch_size / (before * len(sizes))),
    )  # fmt: skip

    def take(which: np.ndarray) -> Sequences:
        part, weight = jax.tree.map(lambda x: x[which], (drawn, weights))
        return pack_sequences(part, weight, length=length, rows=rows, pad_id=text.pad_id(world.tokenizer))

    return take, rows


def var_blocks(world: World, drawn: Candidates) -> list[VarBatch]:
    """Mini-batches of fixed members with every completion scored under every prompt of its mini-batch."""
    config, blocks = world.config, []
    for start in range(0, config.num_prompts - config.batch_size + 1, config.batch_size):
        part = batches.take(dataclasses.replace(drawn, old_token_logp=None), slice(start, start + config.batch_size))
        B, N, T = part.completion.shape
        shape = (B, B * N)
        crossed = Candidates(
            prompt=part.prompt,
            prompt_mask=part.prompt_mask,
            completion=np.broadcast_to(part.completion.reshape(1, B * N, T), (*shape, T)).copy(),
            completion_mask=np.broadcast_to(part.completion_mask.reshape(1, B * N, T), (*shape, T)).copy(),
        )
        crossed = world.with_reference(f"train-crossed-{start // B}", crossed, f"score across prompts {start // B + 1}")
        texts = text.decode_completions(world.tokenizer, crossed.completion, crossed.completion_mask)
        reward = world.score(world.rows["train"][start : start + B], texts)
        swap = lambda x: np.swapaxes(x.reshape(B, B, N), 1, 2).copy()  # noqa: E731, B023
        ref_logp = swap(np.asarray(crossed.ref_logp))
        blocks.append(VarBatch(candidates=part, ref_logp=ref_logp, reward=swap(reward), own=np.arange(B)))
    return blocks


def tune(world: World, drawn: Candidates) -> Transformer:
    """Fits the policy; returns it with adapters merged."""
    config = world.config
    if config.method == "soft_best_of_n":
        return world.model
    data, order, loss_fn = training_data(world, drawn)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 10), max(2, config.steps), 0.1 * config.learning_rate
    )
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adamw(schedule, b2=0.95, weight_decay=0.0))
    if config.lora_rank:
        key = jax.random.fold_in(jax.random.key(config.seed), 4)
        trained, frozen = lora.partition(lora.add(key, world.model, rank=config.lora_rank), lora.is_adapter)
    else:
        trained, frozen = world.model, None
    state = shard(init_state(trained, tx), world.mesh)
    step = functools.partial(train_step, loss_fn=loss_fn, tx=tx, microbatches=config.microbatches)
    place = batch_sharding(world.mesh)
    take, size = (lambda which: jax.tree.map(lambda x: x[which], data)), config.batch_size
    if config.pack:
        take, size = packed(world, data, order)
    mine = distributed.host_rows(place, size)
    if config.pack:  # A host cuts its rows out of those of the whole batch.
        rows = host_batches(lambda which: jax.tree.map(lambda x: x[mine], take(which)), order, num_steps=config.steps)
    else:
        rows = host_batches(take, order, num_steps=config.steps, rows=mine)
    stream = Stream(rows)
    batch_of = lambda step: distributed.global_batch(stream(step), place, size)  # noqa: E731
    mapped = sharded_step(step, state, frozen, world.mesh) if config.mapping == "sharded" else pmap_step(step)
    if config.mapping == "pmap":  # It maps over the devices of this host, and takes what is on them.
        batch_of, state, frozen = stream, distributed.localize(state), distributed.localize(frozen)
    state = fit(
        state,
        batch_of,
        step_fn=mapped,
        key=jax.random.fold_in(jax.random.key(config.seed), 3),
        num_steps=config.steps,
        directory=world.directory,
        frozen=frozen,
        resume=config.resume,
        checkpoint_every=config.checkpoint_every,
    )
    params = state.params if frozen is None else lora.combine(state.params, frozen)
    return lora.merge(distributed.replicate(params, world.mesh))
