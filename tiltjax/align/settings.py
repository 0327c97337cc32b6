"""The settings of a session: small dataclasses, one for each thing that is decided, and `Settings`, which has them all.

Programs with settings of their own inherit the parts that they share, so that a field has one definition.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from tiltjax.align.law import Law, temperatures
from tiltjax.models.config import ATTENTION, REMAT
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.train import methods
from tiltjax.train.config import check_fields, field, seed_field
from tiltjax.train.method import Method
from tiltjax.train.methods.likelihood import resampled
from tiltjax.train.sharding import parse_mesh

__all__ = [
    "COMPUTED",
    "FREE",
    "NEEDS",
    "OWN_BETA",
    "UNTRAINED",
    "Computation",
    "Fitting",
    "Settings",
    "Sources",
    "Tilting",
    "check_beta",
    "check_method",
    "own_record",
]

SettingsT = TypeVar("SettingsT", bound="Settings")

FREE = ("checkpoint_every",)
"""Settings that move no number of a run."""

COMPUTED = ("remat", "attention", "length_buckets")
"""Execution options: they change results only by rounding, so a resumed run may have other values."""

UNTRAINED = "soft_best_of_n"
"""The way to the tilt that trains nothing."""

OWN_BETA = 0.1
"""The ``beta`` of a run that trains nothing, and of a report where a method has none, reward units."""

ADAPTER_RATE = 5e-4
FULL_RATE = 5e-5
"""Learning rates of adapters, and of all parameters where a record gives none."""

NEEDS: dict[str, Callable[[Method], bool]] = {
    "demonstrations": lambda record: "data" in record.sources,
    "corpus": lambda record: "corpus" in record.sources,
    "cost": lambda record: record.constrained,
}
"""Setting -> whether a record needs it."""


def own_record(method: str) -> Method | None:
    """The record of a name on the command line, as it is published; None where nothing is trained."""
    return None if method == UNTRAINED else methods.get_method(method)


def check_method(name: str, value: str) -> None:
    """Raises ValueError unless a record, of the library or the user's own, has that name, or it is `UNTRAINED`."""
    if ":" in value or value in methods.RENAMED:
        methods.get_method(value)
    else:
        check_choice(name, value, (UNTRAINED, *methods.METHODS))


def check_beta(method: str, beta: float) -> None:
    """Raises ValueError unless a method of the command line can have that ``beta``, in reward units."""
    record = own_record(method)
    if record is None:
        check_positive(f"beta of method {method}", beta)
    else:
        record.check_beta(beta)


@dataclasses.dataclass(frozen=True)
class Sources:
    """Settings of what a run starts from: the policy and its prompts."""

    policy: str = field(
        "smollm2",
        "Reference policy: smollm2, a Hugging Face directory (a model, or an adapter of PEFT, which is merged into its "
        "base model) or hub id, or a GGUF file.",
    )
    prompts: str = field(
        "reviews",
        "Prompts: a shipped set; a .jsonl, .json, .csv, .parquet or .arrow file; a folder of them (FOLDER?split=train "
        "where there are several splits); tfds:<builder>; or reasoning_gym:<task>?option=value.",
    )
    skip_bad_rows: bool = field(
        False,
        "Leave out bad rows of whatever is read (prompts, demonstrations, corpus, data), and say how many, instead of "
        "refusing the first.",
    )
    num_candidates: int = field(16, "N, candidates per prompt, drawn from the reference.")
    num_prompts: int = field(64, "Training prompts, from the top of the file.")
    num_eval_prompts: int = field(32, "Held-out prompts: of the rows after those, the ones that repeat none.")
    seed: int = seed_field()


@dataclasses.dataclass(frozen=True)
class Tilting:
    """Settings of the tilt and of the loss that reaches it."""

    beta: float = field(
        None,
        "Strength of the KL term, reward units: the tilt is ref * exp(reward / beta) / Z. By default the record's own "
        f"(tiltjax.train.methods), {OWN_BETA} where nothing is trained. Methods on win rates take a quarter of it. 0 "
        "is for methods that do not divide by it: they then have no KL term.",
    )
    report_beta: float = field(
        None,
        "beta at which the report estimates the tilt (log Z, soft best-of-N, reward - beta KL), reward units, above 0; "
        f"by default --beta, or {OWN_BETA} where that is 0.",
    )
    mask_truncated: bool = field(
        False,
        "Whether completions that --max_tokens cut (drawn, demonstrated or of the corpus) are left out of the loss. "
        "Rewards, baselines and labels still see them.",
    )


@dataclasses.dataclass(frozen=True)
class Fitting:
    """Settings of the optimizer and of the batches that it sees."""

    steps: int = field(24, "Optimizer steps.")
    batch_size: int = field(8, "Prompts per step, each with its N candidates.")
    microbatches: int = field(1, "Parts into which a batch is cut to save memory; the gradient is the same.")
    learning_rate: float = field(
        None,
        "Peak of the schedule (linear warm-up over a tenth of the steps, cosine decay). By default "
        f"{ADAPTER_RATE:g} for adapters, which at a record's own rate would learn nothing; with --lora_rank=0 the "
        f"record's own, {FULL_RATE:g} where it has none.",
    )
    max_grad_norm: float = field(1.0, "Global norm at which gradients are clipped.")
    lora_rank: int = field(16, "Rank of low-rank adapters; 0 trains all parameters.")
    checkpoint_every: int = field(8, "Steps between checkpoints.")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Settings of how a run computes."""

    mesh: str = field("", "Device mesh such as data:4,fsdp:2,tensor:1; empty puts every device on data.")
    compute_dtype: str = field(
        "auto", "Operand type of matrix products; sums and logits are float32.", choices=("auto", "float32", "bfloat16")
    )
    remat: str = field(
        "full",
        "Rematerialisation: what the backward pass computes again of each block, to save memory: all of it (full), all "
        "but the matrix products (dots), or nothing (none).",
        choices=REMAT,
    )
    attention: str = field(
        "auto",
        "How attention is computed: plain is the reference path, which stores all scores; fused does not; auto is "
        "fused on GPUs and TPUs where shapes and types permit it, else plain.",
        choices=ATTENTION,
    )
    sample_batch: int = field(
        8,
        "Prompts sampled (by continuous batching of their candidates) and scored at a time; where devices cannot share "
        "them, they share the candidates of each.",
    )


@dataclasses.dataclass(frozen=True)
class Settings(Sources, Law, Tilting, Fitting, Computation):
    """Everything that decides a session.

    ``beta``, ``report_beta``, ``learning_rate`` and the temperatures are numbers once it is made; `change` asks the
    record anew for those that were left open.
    """

    reward: str = field(
        "sentiment",
        "Reward: a shipped name (see tiltjax.rewards.registry), package.module:function or file.py:function, which is "
        "run with your rights, or model:<directory> of a model of experiments.reward_model.",
    )
    demonstrations: str = field(
        "",
        "What sft and spin imitate: a column of the prompts (such as answer), or a file, folder or tfds:<builder> with "
        "a completion of every training prompt.",
    )
    corpus: str = field(
        "", "What ppo_ptx must not forget: a file or tfds:<builder> with prompt and completion, or with text."
    )
    cost: str = field(
        "",
        "What safe_rlhf holds at 0 or below, above 0 meaning harm: named like --reward, or model:<directory> of a "
        "model of kind cost.",
    )
    desirable_above: float | None = field(
        None,
        "Reward above which a completion is desirable (kto, online_kto) or right (prime). By default a coin with the "
        "odds of the reward decides for kto, and 0 for prime.",
    )
    method: str = field(
        "tilted_mle",
        f"How the tilt is reached: {UNTRAINED} trains nothing; every other name is a record of tiltjax.train.methods, "
        "which fits candidates of the reference or demonstrations, or learns in rounds of fresh ones (docs/methods.md "
        "says which). package.module:record or file.py:record is one of your own, which is run with your rights. "
        f"Names: {', '.join((UNTRAINED, *methods.METHODS))}.",
        check=check_method,
        code=True,
    )
    max_tokens: int = field(24, "Longest completion, tokens.")
    fit_candidates: int = field(
        4, "tilted_mle: fit this many candidates per prompt, resampled from the tilt; 0 fits all N, each by its weight."
    )
    pack: bool = field(
        False,
        "Sequence packing: rows of whole sequences without padding, of candidates that count only; loss and gradient "
        "are the same. For methods that learn once, by a weight of each candidate: tilted_mle, sft, ...",
    )
    length_buckets: int = field(
        4,
        "Maximum number of shapes (prompt by completion length) to pad the steps of a fit to. Each costs a compilation "
        "and is used only if it saves a tenth of all positions; 1 pads to the longest. Methods in rounds and packed "
        "rows have one.",
    )
    length_window: int = field(
        1,
        "Sort prompts by length within windows of this many batches, so that length_buckets saves more; batches are "
        "then no longer uniform samples of the prompts. 1 does not sort.",
    )
    mapping: str = field("sharded", "How the step is mapped over devices.", choices=("sharded", "pmap"))

    _open: ClassVar[tuple[str, ...]] = ()
    """Fields that were left open, of an instance."""

    def __post_init__(self):
        check_fields(self)
        parse_mesh(self.mesh)
        self._resolve()
        check_beta(self.method, self.beta)
        for name in ("report_beta", "learning_rate", "max_grad_norm"):
            check_positive(name, getattr(self, name))
        check_at_least("num_candidates", self.num_candidates, 2)
        for name in ("num_prompts", "num_eval_prompts"):
            check_at_least(name, getattr(self, name), 2)
        for name in ("max_tokens", "steps", "batch_size", "microbatches", "sample_batch", "checkpoint_every",
                     "length_buckets", "length_window"):  # fmt: skip
            check_at_least(name, getattr(self, name), 1)
        for name in ("lora_rank", "fit_candidates"):
            check_at_least(name, getattr(self, name), 0)
        self.check_law()
        self._check_filters()
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size={self.batch_size}, got {self.microbatches}")
        if self.batch_size > self.num_prompts and self.method != UNTRAINED:
            raise ValueError(f"batch_size must be at most num_prompts={self.num_prompts}, got {self.batch_size}")
        record = self.record
        if record is None:
            return
        told = f"got method={self.method}"
        if self.pack and not (record.learns_once and record.linear):
            raise ValueError(f"pack is for methods that learn once, by weights (tilted_mle, sft, ...); {told}")
        if self.length_window > 1 and (self.pack or not record.learns_once):
            raise ValueError(f"length_window is for methods that learn once, without pack; {told}, pack={self.pack}")
        if record.learns_once and record.cross > self.num_prompts:
            raise ValueError(f"num_prompts must be at least {record.cross} for {self.method}, got {self.num_prompts}")
        if self.mapping == "pmap" and not record.learns_once:
            raise ValueError(f"mapping must be sharded for a method that learns in rounds; {told}, mapping='pmap'")
        if record.couples_prompts and (self.mapping == "pmap" or self.microbatches > 1):
            cut = f"mapping={self.mapping!r}, microbatches={self.microbatches}"
            raise ValueError(f"a batch must not be cut for a loss that couples its prompts; {told}, {cut}")
        for name, needs in NEEDS.items():
            if needs(record) and not getattr(self, name):
                raise ValueError(f"method {self.method} needs {name}")

    def _check_filters(self) -> None:
        record = own_record(self.method)
        across = record is not None and record.cross > 1
        if self.filtered and (across or self.pack):
            why = "with pack" if self.pack else f"for method={self.method}, which scores completions of other prompts"
            raise ValueError(f"top_k must be 0 and top_p 1 {why}; got top_k={self.top_k}, top_p={self.top_p}")

    def _resolve(self) -> None:
        """Fills in what is left open from the record."""
        record = own_record(self.method)
        beta, rate = self.beta, self.learning_rate
        if beta is None:
            beta = OWN_BETA if record is None else record.reward_beta
        if rate is None:
            own = None if record is None else record.learning_rate
            rate = ADAPTER_RATE if self.lora_rank else (own or FULL_RATE)
        report = (beta or OWN_BETA) if self.report_beta is None else self.report_beta
        found = {"beta": beta, "learning_rate": rate, "report_beta": report} | temperatures(self, record)
        object.__setattr__(self, "_open", tuple(name for name in found if getattr(self, name) is None))
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def change(self: SettingsT, **changes: Any) -> SettingsT:
        """The settings with changes; what was left open is what the record of the changed settings says.

        Args:
          **changes: Field -> value.

        Returns:
          Settings of the same class.
        """
        names = {item.name for item in dataclasses.fields(self)} - set(self._open)
        values: dict[str, Any] = {name: getattr(self, name) for name in names} | changes
        return type(self)(**values)

    @property
    def record(self) -> Method | None:
        """The record of the method, as the settings change it; None where nothing is trained.

        Its number of candidates is that of the settings where the record leaves it free, and its temperature is that of
        the settings; that of demonstrations is 1, which no law of the policy drew.

        Raises:
          ValueError: If there is no such method, or the steps cannot be cut into its rounds.
        """
        record = own_record(self.method)
        if record is None:
            return None
        temperature = 1.0 if set(record.sources) == {"data"} else self.temperature
        record = dataclasses.replace(record, temperature=temperature)
        if len(record.draw) == 1 and record.draw[0][1] > 2:
            record = dataclasses.replace(record, draw=((record.draw[0][0], self.num_candidates),))
        if record.rounds is not None and self.steps % record.rounds:
            rounds = f"the {record.rounds} rounds of {record.name}"
            raise ValueError(f"steps must be a multiple of {rounds}, got {self.steps}")
        if record.name == "tilted_mle" and self.fit_candidates:
            record = resampled(record, self.fit_candidates)
        return record

    @property
    def in_rounds(self) -> bool:
        """Whether the method learns in rounds of fresh candidates."""
        record = own_record(self.method)
        return record is not None and not record.learns_once

    def fingerprint(self) -> str:
        """Of everything that decides the numbers, to rounding."""
        names = {item.name for item in dataclasses.fields(Settings)} - {*FREE, *COMPUTED}
        values = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """What beta and learning rate are, and what the record of the method publishes, in one line."""
        record = own_record(self.method)
        beta, rate = f"beta {self.beta:g}", f"learning rate {self.learning_rate:g}"
        if record is not None:
            beta += f" (published {record.reward_beta:g}"
            beta += f"; {record.own_beta(self.beta):g} in win rates)" if record.units == "preference" else ")"
            if record.learning_rate is not None:
                rate += f" (published {record.learning_rate:g} for all parameters)"
        trained = f"adapters of rank {self.lora_rank}" if self.lora_rank else "all parameters"
        return f"{self.method}: {beta}, {rate}, {trained}; the report counts at beta {self.report_beta:g}"
