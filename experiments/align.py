"""Tilt a language model towards a reward: at test time (soft best-of-N) and in its weights.

    python -m experiments.align --output=runs/align

draws N candidates per prompt from the reference policy, scores them, estimates log Z and the effective sample size,
fits the tilted distribution, and evaluates on held-out prompts beside what theory predicts. It writes `report.md` with
plots and samples, `results.json`, `metrics.jsonl`, TensorBoard events, Orbax checkpoints and a Hugging Face export.

EXPECTED_NUMBERS
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from absl import logging as absl_logging
from jax.sharding import NamedSharding

from experiments import reporting
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.data.datasets import read
from tiltjax.models import lora, pretrained
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.tokens import sequence_logp
from tiltjax.rewards.gate import required_columns, score
from tiltjax.rewards.registry import load_reward
from tiltjax.samplers.best_of_n import best_of_n, soft_best_of_n
from tiltjax.samplers.resample import resample
from tiltjax.tilt.temperature import beta_for_ess
from tiltjax.tilt.weights import tilt
from tiltjax.train import evaluate
from tiltjax.train.config import define_flags, field, from_flags, load_config, save_config
from tiltjax.train.hardware import fast_dtype
from tiltjax.train.loop import epoch_batches, fit
from tiltjax.train.metrics import bootstrap_interval
from tiltjax.train.objectives import VarBatch, likelihood_objective, method_kernel, var_objective
from tiltjax.train.rollout import collect, make_sampler, make_scorer, score_all
from tiltjax.train.sharding import batch_sharding, make_mesh, param_spec, pmap_step, shard, sharded_step
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

METHODS = ("soft_best_of_n", "tilted_mle", "best_of_n_sft", "var", "var_importance", "dpo")
PROMPTS = pathlib.Path(__file__).parent / "prompts"
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Everything that decides a run."""

    policy: str = field("smollm2", "Reference policy: smollm2, a Hugging Face directory or hub id, or a GGUF file.")
    reward: str = field("sentiment", "Reward: a shipped name (see tiltjax.rewards.registry) or module:function.")
    prompts: str = field("reviews", "Prompts: a shipped set, a .jsonl or .parquet file, or tfds:<builder>.")
    method: str = field("tilted_mle", "How the tilt is reached; soft_best_of_n trains nothing.", choices=METHODS)
    beta: float = field(0.1, "Strength of the KL term, reward units: the tilt is ref * exp(reward / beta) / Z.")
    num_candidates: int = field(16, "N, candidates per prompt, drawn from the reference.")
    num_prompts: int = field(64, "Training prompts, from the top of the file.")
    num_eval_prompts: int = field(32, "Held-out prompts, the rows after those.")
    max_tokens: int = field(24, "Longest completion, tokens.")
    fit_candidates: int = field(
        4, "tilted_mle: fit this many candidates per prompt, resampled from the tilt; 0 fits all N, each by its weight."
    )
    steps: int = field(24, "Optimizer steps.")
    batch_size: int = field(8, "Prompts per step, each with its N candidates.")
    microbatches: int = field(1, "Parts into which a batch is cut to save memory; the gradient is the same.")
    learning_rate: float = field(5e-5, "Peak of the schedule (linear warm-up over a tenth of the steps, cosine decay).")
    max_grad_norm: float = field(1.0, "Global norm at which gradients are clipped.")
    lora_rank: int = field(0, "Rank of low-rank adapters; 0 trains all parameters.")
    mesh: str = field("", "Device mesh such as data:4,fsdp:2,tensor:1; empty puts every device on data.")
    mapping: str = field("sharded", "How the step is mapped over devices.", choices=("sharded", "pmap"))
    compute_dtype: str = field(
        "auto", "Operand type of matrix products; sums and logits are float32.", choices=("auto", "float32", "bfloat16")
    )
    sample_batch: int = field(8, "Prompts sampled and scored at a time.")
    checkpoint_every: int = field(16, "Steps between checkpoints.")
    seed: int = field(0, "Root of all randomness.")
    output: str = field("runs/align", "Directory of the run; nothing is written outside of it.")
    resume: bool = field(False, "Go on with the run in --output, bit for bit, from wherever it was stopped.")

    def __post_init__(self):
        check_positive("beta", self.beta)
        check_positive("learning_rate", self.learning_rate)
        check_at_least("num_candidates", self.num_candidates, 2)
        for name in ("num_prompts", "num_eval_prompts"):
            check_at_least(name, getattr(self, name), 2)
        for name in ("max_tokens", "steps", "batch_size", "microbatches", "sample_batch", "checkpoint_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("lora_rank", "fit_candidates"):
            check_at_least(name, getattr(self, name), 0)
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size={self.batch_size}, got {self.microbatches}")

    def fingerprint(self) -> str:
        """Of everything that decides the numbers."""
        free = ("output", "resume", "checkpoint_every")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class World:
    """What a run works with: policy, tokenizer, reward, prompts, and the compiled functions."""

    config: AlignConfig
    directory: pathlib.Path
    tokenizer: text.Tokenizer
    source: pathlib.Path | str
    model: Transformer
    reward: Any
    rows: dict[str, list]
    mesh: jax.sharding.Mesh
    sampler: Any
    scorer: Any

    def rollout(self, split: str, model: Transformer, *, seed: int) -> tuple[Candidates, list[list[str]]]:
        """N scored candidates of every prompt of a split, kept on disk once they are whole."""
        config, rows = self.config, self.rows[split.partition("-")[0]]
        path = self.directory / "candidates" / f"{split}.npz"
        if path.exists():
            drawn = batches.load(path, fingerprint=config.fingerprint())
            return drawn, text.decode_completions(self.tokenizer, drawn.completion, drawn.completion_mask)
        drawn = collect(
            jax.random.fold_in(jax.random.key(config.seed), seed),
            model,
            text.encode_prompts(self.tokenizer, [row.prompt for row in rows]),
            sampler=self.sampler,
            pad_id=text.pad_id(self.tokenizer),
            batch_size=config.sample_batch,
            sharding=batch_sharding(self.mesh),
            directory=path.with_suffix(""),
            fingerprint=config.fingerprint(),
            description=f"sample {split}",
        )
        completions = text.decode_completions(self.tokenizer, drawn.completion, drawn.completion_mask)
        drawn = dataclasses.replace(drawn, reward=self.score(rows, completions))
        batches.save(path, drawn, fingerprint=config.fingerprint())
        return drawn, completions

    def score(self, rows: list, completions: list[list[str]]) -> np.ndarray:
        """Rewards ``[P, N]`` of N completions per row."""
        each = len(completions[0])
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
            sharding=batch_sharding(self.mesh),
            description=description,
        )


def open_run(config: AlignConfig) -> pathlib.Path:
    """Makes the directory of the run, or checks that it is the one to go on with."""
    directory = pathlib.Path(config.output)
    saved = directory / "config.json"
    if saved.exists():
        if not config.resume:
            raise ValueError(
                f"{directory}: there is a run already; pass --resume to go on with it, or another --output"
            )
        old = load_config(AlignConfig, saved)
        if old.fingerprint() != config.fingerprint():
            pairs = zip(dataclasses.asdict(old).items(), dataclasses.asdict(config).values(), strict=True)
            changed = ", ".join(f"{k} ({a} -> {b})" for (k, a), b in pairs if a != b and k not in ("output", "resume"))
            raise ValueError(f"{saved}: --resume with other settings: {changed}")
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)
    return directory


def prepare(config: AlignConfig, directory: pathlib.Path) -> World:
    """Loads everything, the cheap things that may fail first."""
    reward = load_reward(config.reward)
    shipped = PROMPTS / f"{config.prompts}.jsonl"
    rows = read(shipped if shipped.exists() else config.prompts, "prompt")
    wanted = config.num_prompts + config.num_eval_prompts
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
    source = text.find_embedded_gguf() if config.policy == "smollm2" else config.policy
    tokenizer = text.load_tokenizer(source)
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
    )
    train, held_out = rows[: config.num_prompts], rows[config.num_prompts : wanted]
    return World(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        source=source,
        model=model,
        reward=reward,
        rows={"train": train, "heldout": held_out},
        mesh=mesh,
        sampler=sampler,
        scorer=make_scorer(),
    )


def warn_of_collapse(config: AlignConfig, reward: np.ndarray, ess: np.ndarray) -> None:
    """One line where the weights rest on a few candidates, with the beta that would restore them."""
    if np.mean(ess) < 0.1 * config.num_candidates:
        wanted = float(np.mean(beta_for_ess(jnp.asarray(reward), ess=0.25 * config.num_candidates)))
        _LOG.warning(
            "weights have collapsed: mean effective sample size %.1f of %d; --beta=%.3g would give a quarter of N",
            np.mean(ess), config.num_candidates, wanted,
        )  # fmt: skip


def training_data(world: World, drawn: Candidates) -> tuple[Any, Any]:
    """``(step -> batch, loss function)`` of the method."""
    config = world.config
    if config.method == "var":
        blocks = var_blocks(world, drawn)
        order = epoch_batches(len(blocks), 1, seed=config.seed)
        return lambda step: blocks[order(step)[0]], var_objective(beta=config.beta)
    if config.method == "dpo":
        worst = best_of_n(-jnp.asarray(drawn.reward))
        pair = np.stack([best_of_n(jnp.asarray(drawn.reward)), worst], axis=1)
        drawn = batches.select(dataclasses.replace(drawn, ref_logp=world.ref_logp(drawn, "score reference")), pair)
        chosen, rejected = np.asarray(drawn.reward).T
        decided = np.stack([chosen > rejected] * 2, axis=1)  # A prompt whose candidates all tie teaches nothing.
        drawn = dataclasses.replace(drawn, where=decided)
    kernel = method_kernel(config.method, beta=config.beta)
    if config.method == "tilted_mle" and config.fit_candidates:
        key = jax.random.fold_in(jax.random.key(config.seed), 6)
        weights = tilt(jnp.asarray(drawn.reward), beta=config.beta).weights
        drawn = batches.select(drawn, np.asarray(resample(key, weights, num=config.fit_candidates)))
        kernel = method_kernel("sft", beta=config.beta)
    drawn = dataclasses.replace(drawn, old_token_logp=None)
    order = epoch_batches(config.num_prompts, config.batch_size, seed=config.seed)
    return lambda step: batches.take(drawn, order(step)), likelihood_objective(kernel)


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
        ref_logp = world.ref_logp(crossed, f"score across prompts {start // B + 1}")
        texts = text.decode_completions(world.tokenizer, crossed.completion, crossed.completion_mask)
        reward = world.score(world.rows["train"][start : start + B], texts)
        swap = lambda x: np.swapaxes(x.reshape(B, B, N), 1, 2).copy()  # noqa: E731, B023
        blocks.append(VarBatch(candidates=part, ref_logp=swap(ref_logp), reward=swap(reward)))
    return blocks


def tune(world: World, drawn: Candidates) -> Transformer:
    """Fits the policy; returns it with adapters merged."""
    config = world.config
    if config.method == "soft_best_of_n":
        return world.model
    batch_of, loss_fn = training_data(world, drawn)
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
    mapped = pmap_step(step) if config.mapping == "pmap" else sharded_step(step, state, frozen, world.mesh)
    place = (lambda x: x) if config.mapping == "pmap" else lambda x: jax.device_put(x, batch_sharding(world.mesh))
    state = fit(
        state,
        lambda step: place(batch_of(step)),
        step_fn=mapped,
        key=jax.random.fold_in(jax.random.key(config.seed), 3),
        num_steps=config.steps,
        directory=world.directory,
        frozen=frozen,
        resume=config.resume,
        checkpoint_every=config.checkpoint_every,
    )
    return lora.merge(state.params if frozen is None else lora.combine(state.params, frozen))


def run(config: AlignConfig) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``."""
    directory = open_run(config)
    world = prepare(config, directory)
    drawn, _ = world.rollout("train", world.model, seed=0)
    reward = np.asarray(drawn.reward)
    estimates = evaluate.estimate(reward, beta=config.beta)
    warn_of_collapse(config, reward, estimates.ess)
    tuned = tune(world, drawn)
    held_out, texts = world.rollout("heldout", world.model, seed=1)
    results, samples = compare(world, held_out, texts, tuned)
    if config.method != "soft_best_of_n":
        pretrained.save(tuned, directory / "hf", tokenizer=world.tokenizer, overwrite=True)
    reporting.write(directory, config, results, samples, train=estimates)
    return results


def compare(world: World, held_out: Candidates, texts: list[list[str]], tuned: Transformer) -> tuple[dict, list]:
    """Reference, soft best-of-N, theory and the tuned policy on the held-out prompts."""
    config = world.config
    reward = np.asarray(held_out.reward)
    theory = evaluate.estimate(reward, beta=config.beta)
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= max(1, config.num_candidates // 2)]
    points = {
        "reference": [evaluate.policy_point("reference", reward, np.zeros_like(reward))],
        "soft_best_of_n": evaluate.soft_best_of_n_frontier(reward, beta=config.beta, ns=ns),
        "best_of_n": evaluate.best_of_n_frontier(reward, ns=ns),
        "tilt": evaluate.tilt_frontier(reward, betas=np.geomspace(config.beta / 8, config.beta * 32, 17).tolist()),
    }
    picked = soft_best_of_n(jax.random.key(config.seed + 5), jnp.asarray(reward), beta=config.beta)
    samples = [
        {
            "prompt": text.prompt_text(row.prompt),
            "reference": (texts[i][0], float(reward[i, 0])),
            f"soft best-of-{config.num_candidates}": (texts[i][int(picked[i])], float(reward[i, int(picked[i])])),
        }
        for i, row in enumerate(world.rows["heldout"])
    ]
    results: dict[str, Any] = {
        "log_z": bootstrap_interval(theory.log_z_jackknife),
        "optimum": bootstrap_interval(config.beta * theory.log_z_jackknife),
        "tilted_reward": bootstrap_interval(theory.tilted_reward),
        "tilt_kl": bootstrap_interval(theory.tilt_kl),
        "ess": bootstrap_interval(theory.ess),
        "pareto_k_above_0.7": float(np.mean(theory.pareto_k > 0.7)),
        "points": points,
    }
    if config.method != "soft_best_of_n":
        sampled, tuned_texts = world.rollout("heldout-tuned", tuned, seed=2)
        logp = np.asarray(sequence_logp(sampled.old_token_logp, sampled.completion_mask))
        log_ratio, tuned_reward = logp - world.ref_logp(sampled, "score tuned"), np.asarray(sampled.reward)
        points["tuned"] = [evaluate.policy_point(config.method, tuned_reward, log_ratio)]
        results["improvement"] = bootstrap_interval(tuned_reward.mean(1) - reward.mean(1))
        results["objective"] = bootstrap_interval((tuned_reward - config.beta * log_ratio).mean(1))
        for i, sample in enumerate(samples):
            sample["tuned"] = (tuned_texts[i][0], float(tuned_reward[i, 0]))
    return results, samples


def main(argv: list[str]) -> None:
    """Reads the flags, runs, and turns bad input into one line and exit status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        run(from_flags(AlignConfig))
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("TILTJAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    define_flags(AlignConfig)
    app.run(main)
