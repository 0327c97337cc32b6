"""Train reward models of every kind, and see what each would choose.

    python -m experiments.reward_model --kinds=global --output=runs/reward

SmolLM2-135M writes completions, a gold reward (VADER sentiment) times ``--scale`` labels them by Bradley-Terry draws,
and a model with low-rank adapters learns from the labels: ``--kinds=global``, ``local``, ``dpo``, ``outcome``,
``process``, ``preference`` or ``cost``, several with commas between, or ``all``. On held-out prompts the report has
likelihood and accuracy beside those of the gold reward itself, how much the model cares for length, and what the gold
reward of the best of n by each model is. Each lies in ``<output>/<kind>/model``, for
``python -m experiments.align --reward=model:<output>/<kind>/model``.

Expected of kind global at the default settings (95% intervals over 32 held-out prompts): NLL 0.625 [0.597, 0.654] where
the gold reward's own is 0.437; accuracy 0.659 [0.630, 0.687] of at most 0.783; the best of 12 by it has a gold reward
of 0.587 [0.466, 0.695], by the gold reward itself 0.793, at random 0.212. About five minutes on two cores.

``--data=pairs.jsonl`` learns from your own labels (columns in `experiments.reward_model.data.file_splits`);
``--label=judge:<policy>`` lets a policy compare instead of the gold reward. On several hosts it is started as
`experiments.align` is.

Bad input ends with one line and exit status 2; TILTJAX_TRACEBACK=1 shows the whole traceback.
"""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.run_directory import Run, RunFlags, open_run
from experiments.reward_model import report
from experiments.reward_model.data import Split, drawn_split, file_splits, judge, newline_tokens
from experiments.reward_model.report import Verdict
from tiltjax.align.fit import optimizer, schedule_of
from tiltjax.align.law import Law
from tiltjax.align.session import Session, prepare
from tiltjax.align.settings import COMPUTED, UNTRAINED, Computation, Fitting, Settings, Sources
from tiltjax.data.pipeline import epoch_batches
from tiltjax.models import lora
from tiltjax.models.heads import RewardModel, is_trainable
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.train import distributed
from tiltjax.train.config import check_fields, field, refield
from tiltjax.train.distributed import Hosts
from tiltjax.train.learned_reward import reward_all, save_reward_model
from tiltjax.train.loop import fit
from tiltjax.train.reward_model import (
    AGGREGATES,
    KINDS,
    LIKELIHOOD,
    Labelled,
    Reading,
    RewardSpec,
    make_reader,
    make_reward,
    new_model,
    reward_objective,
)
from tiltjax.train.sharding import batch_sharding, parse_mesh, shard, sharded_step
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step
from tiltjax.train.streams import stream

__all__ = ["RewardConfig", "evaluate", "kinds_of", "run", "train"]

FREE = ("kinds", "checkpoint_every", *(item.name for item in dataclasses.fields(RunFlags)))
"""Settings that move no number of a model."""


@dataclasses.dataclass(frozen=True)
class RewardConfig(RunFlags, Sources, Law, Fitting, Computation):
    """Everything that decides a run."""

    kinds: str = field("global", f"Kinds with commas between, or all: {', '.join(KINDS)}.")
    policy: str = refield(
        Sources, "policy", "smollm2", "Writes the completions and becomes the model: as in experiments.align."
    )
    prompts: str = refield(Sources, "prompts", "reviews", "Prompts of the completions: as in experiments.align.")
    data: str = field("", "Rows with labels: a file or folder as for --prompts; empty labels the policy's own text.")
    gold: str = refield(
        Settings, "reward", "", "Gold reward, as in experiments.align; empty is sentiment, and none with --data."
    )
    label: str = field("gold", "Who compares: gold, or judge:<policy>.")
    criterion: str = field("is the more positive one", "What a judge is asked: 'Which continuation ...?'")
    scale: float = field(4.0, "Log-odds per unit of the gold reward.")
    pairs: int = field(0, "Comparisons per training prompt; 0 takes all pairs of its candidates.")
    num_candidates: int = refield(Sources, "num_candidates", 12, "N, completions per prompt.")
    num_eval_prompts: int = refield(
        Sources, "num_eval_prompts", 32, "Held-out prompts, the rows after those; of --data, the last rows."
    )
    max_tokens: int = refield(Settings, "max_tokens", 24)
    steps: int = refield(Fitting, "steps", 48)
    batch_size: int = refield(Fitting, "batch_size", 2, "Prompts per step, each with its completions.")
    learning_rate: float = refield(
        Fitting,
        "learning_rate",
        2e-3,
        "Peak of the schedule (linear warm-up over a tenth of the steps, cosine decay); try 5e-5 with --lora_rank=0.",
    )
    centring: float = field(0.0, "global: weight of the squared sum of a pair's rewards, per squared unit; try 0.01.")
    beta: float = field(
        0.0, "local, dpo: reward units per nat; 0 takes 1 / H (H the longest completion) for local and 0.1 for dpo."
    )
    step_tokens: int = field(8, "process: tokens per step of the policy's own text; in --data a step is a line.")
    aggregate: str = field("last", "process: how the scores of steps become one.", choices=AGGREGATES)
    sample_batch: int = refield(Computation, "sample_batch", 8, "Prompts sampled and scored at a time.")
    checkpoint_every: int = refield(Fitting, "checkpoint_every", 24)
    output: str = refield(RunFlags, "output", "runs/reward")
    resume: bool = refield(
        RunFlags,
        "resume",
        False,
        "Go on with the run in --output, and with further kinds beside those it has; with another --remat or "
        "--attention numbers agree to rounding.",
    )

    def __post_init__(self):
        check_fields(self)
        parse_mesh(self.mesh)
        kinds_of(self)
        for name in ("scale", "learning_rate", "max_grad_norm"):
            check_positive(name, getattr(self, name))
        for name in ("pairs", "lora_rank", "centring", "beta"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("steps", "batch_size", "microbatches", "step_tokens", "checkpoint_every"):
            check_at_least(name, getattr(self, name), 1)
        if self.label != "gold" and not self.label.startswith("judge:"):
            raise ValueError(f"label must be gold or judge:<policy>, got {self.label!r}")
        if self.label != "gold" and (self.data or {"outcome", "process", "cost"} & set(kinds_of(self))):
            raise ValueError("a judge compares completions of the policy: no --data, and no labels of single ones")
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size={self.batch_size}, got {self.microbatches}")

    def drawing(self) -> Settings:
        """The settings of a session with the policy that writes; it trains nothing."""
        parts = (Sources, Law, Computation)
        values = {item.name: getattr(self, item.name) for part in parts for item in dataclasses.fields(part)}
        settings: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return Settings(
            reward=self.gold or ("brevity" if self.data else "sentiment"),
            method=UNTRAINED,
            max_tokens=self.max_tokens,
            batch_size=self.sample_batch,
            **settings,
        )


def kinds_of(config: RewardConfig) -> tuple[str, ...]:
    """The kinds of a run, each once."""
    kinds = KINDS if config.kinds == "all" else tuple(dict.fromkeys(config.kinds.split(",")))
    for kind in kinds:
        check_choice("kinds", kind, (*KINDS, "all"))
    return kinds


def run(config: RewardConfig) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``: on process 0, and nothing on the others."""
    with open_run(config, free=(*FREE, *COMPUTED), writes=KINDS) as held:
        return _run(config, held)


def _run(config: RewardConfig, held: Run) -> dict[str, Any]:
    session = prepare(config.drawing(), held.directory)
    if config.batch_size % session.places:
        raise ValueError(f"batch_size must be a multiple of data x fsdp = {session.places}, got {config.batch_size}")

    places: dict[str, Any] = {"batch_size": session.scored_batch, "sharding": batch_sharding(session.mesh)}
    compare = None
    if config.label != "gold":
        policy = config.label.removeprefix("judge:")
        compare = judge(policy, config, criterion=config.criterion, batch_size=config.sample_batch)
    verdicts: list[Verdict] = []
    agreement = None
    for kind in kinds_of(config):
        spec = _spec(config, session, kind)
        if config.data:
            learn, held_out = file_splits(
                config.data, session.tokenizer, spec, held_out=config.num_eval_prompts, skip_bad=config.skip_bad_rows
            )
        held.begin(session.parts)  # Not before: input that is refused leaves no run behind.
        if not config.data:
            options: dict[str, Any] = {"scale": config.scale}
            learn, agreement = drawn_split(session, "train", spec, most=config.pairs, compare=compare, **options)
            held_out, _ = drawn_split(session, "heldout", spec, **options)
        if kind == "local" and not config.beta:
            spec = dataclasses.replace(spec, beta=1 / learn.data.candidates.completion.shape[-1])
        learn = _referred(session, spec, learn)
        model = train(config, session, spec, learn.data)
        if kind in ("global", *LIKELIHOOD):  # The constant that comparisons leave open.
            spec = dataclasses.replace(spec, offset=_mean(spec, model, learn.data, **places))
        export: dict[str, Any] = {"source": config.policy, "tokenizer": session.tokenizer}
        save_reward_model(model, spec, held.directory / kind / "model", overwrite=True, **export)
        held_out = _referred(session, spec, held_out)
        reading = evaluate(spec, model, held_out.data, **places)
        shown, reward = held_out, reading.reward
        if config.data and config.gold:
            shown = _referred(session, spec, drawn_split(session, "heldout", spec, scale=config.scale)[0])
            reward = evaluate(spec, model, shown.data, **places).reward
        verdicts.append(report.verdict(spec, held_out, reading, shown, reward))
    told = agreement if compare else None
    return distributed.by_main(lambda: report.write(held.directory, config, verdicts, agreement=told)) or {}


def train(config: RewardConfig, session: Session, spec: RewardSpec, data: Labelled) -> Any:
    """Fits a model of the kind; returns it with adapters merged."""
    backbone = session.model
    if config.lora_rank:
        key = stream(config.seed, "reward adapters")
        backbone = lora.add(key, backbone, rank=config.lora_rank)
    model, frozen = new_model(spec, backbone), None
    if config.lora_rank:
        model, frozen = lora.partition(model, lora.is_adapter if spec.kind in LIKELIHOOD else is_trainable)
    tx = optimizer(**schedule_of(config))
    state = shard(init_state(model, tx), session.mesh)
    loss_fn = reward_objective(spec, centring=config.centring if spec.kind == "global" else 0.0)
    step = functools.partial(train_step, loss_fn=loss_fn, tx=tx, microbatches=config.microbatches)
    order = epoch_batches(len(data.candidates.prompt), config.batch_size, seed=config.seed)
    place, size = batch_sharding(session.mesh), config.batch_size
    mine = distributed.host_rows(place, size)
    state = fit(
        state,
        lambda i: distributed.global_batch(_rows(data, order(i)[mine]), place, size),
        step_fn=sharded_step(step, state, frozen, session.mesh),
        key=stream(config.seed, "reward fit"),
        num_steps=config.steps,
        directory=pathlib.Path(config.output) / spec.kind,
        frozen=frozen,
        resume=config.resume,
        checkpoint_every=config.checkpoint_every,
        fingerprint=_fingerprint(config, session, spec, data),
    )
    params = state.params if frozen is None else lora.combine(state.params, frozen)
    if isinstance(params, RewardModel):
        params.backbone = lora.merge(params.backbone)
        return params
    return lora.merge(params)


def _fingerprint(config: RewardConfig, session: Session, spec: RewardSpec, data: Labelled) -> str:
    """Of everything that decides the parameters after a step, to rounding; of the data it is tokens and labels."""
    fields = {name: v for name, v in dataclasses.asdict(config).items() if name not in (*FREE, *COMPUTED)}
    digest = hashlib.sha256(repr((session.fingerprint, sorted(fields.items()), spec)).encode())
    for leaf in jax.tree.leaves(data):
        if not np.issubdtype(leaf.dtype, np.floating):
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def evaluate(
    spec: RewardSpec, model: Any, data: Labelled, *, batch_size: int, sharding: Sharding | None = None
) -> Reading:
    """What a model says about labelled completions, batch by batch; NumPy arrays over all prompts."""
    reader, num = make_reader(spec), len(data.candidates.prompt)
    mine, parts = distributed.host_rows(sharding, batch_size), []
    for start in range(0, num, batch_size):
        rows = np.arange(start, min(start + batch_size, num))
        here = _rows(data, np.resize(rows, batch_size)[mine])
        part = distributed.fetch(reader(model, distributed.global_batch(here, sharding, batch_size)))
        parts.append(_rows(part, np.arange(len(rows))))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _rows(data: Any, at: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[at], data)


def _mean(spec: RewardSpec, model: Any, data: Labelled, **places: Any) -> float:
    """The mean reward of completions that were learned from, of at most 16 prompts."""
    part = _rows(data, np.arange(min(16, len(data.candidates.prompt)))).candidates
    return float(np.mean(reward_all(model, part, scorer=make_reward(spec), **places)))


def _referred(session: Session, spec: RewardSpec, split: Split) -> Split:
    """With the reference's log-probabilities, where the kind needs them."""
    if spec.kind != "dpo":
        return split
    candidates = split.data.candidates
    candidates = dataclasses.replace(
        candidates, ref_logp=session.ref_logp(candidates, "score reference", temperature=1.0)
    )
    return dataclasses.replace(split, data=dataclasses.replace(split.data, candidates=candidates))


def _spec(config: RewardConfig, session: Session, kind: str) -> RewardSpec:
    steps: dict[str, Any] = {}
    if kind == "process":
        steps = {"aggregate": config.aggregate}
        steps |= (
            {"separators": newline_tokens(session.tokenizer)} if config.data else {"step_tokens": config.step_tokens}
        )
    beta = config.beta or (0.1 if kind == "dpo" else 1.0)
    return RewardSpec(kind=kind, beta=beta, reference=config.policy if kind == "dpo" else "", **steps)


@program
def main() -> None:
    """Reads the flags, joins the other hosts and runs."""
    config = from_flags(RewardConfig)
    distributed.initialize(from_flags(Hosts))
    with distributed.ends_with_the_others():
        run(config)


if __name__ == "__main__":
    run_program(main, RewardConfig, Hosts)
