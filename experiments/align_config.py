"""The settings of `experiments.align`."""

import dataclasses
import hashlib
import json
from typing import Any

from experiments.align_given import NEEDS
from experiments.align_law import (
    check_law,
    eval_temperature_field,
    filtered,
    mask_truncated_field,
    temperature_field,
    temperatures,
    top_k_field,
    top_p_field,
)
from experiments.run_directory import overwrite_field
from tiltjax.models.config import ATTENTION, REMAT
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.train import methods
from tiltjax.train.config import check_fields, field, output_field, seed_field
from tiltjax.train.hardware import compilation_cache_field
from tiltjax.train.method import Method
from tiltjax.train.methods.likelihood import resampled
from tiltjax.train.sharding import parse_mesh

__all__ = [
    "FREE",
    "HOW",
    "OWN_BETA",
    "UNTRAINED",
    "AlignConfig",
    "attention_field",
    "beta_field",
    "check_beta",
    "check_method",
    "learning_rate_field",
    "own_record",
    "record_of",
    "remat_field",
    "report_beta_field",
    "resolved",
]

FREE = ("output", "resume", "overwrite", "checkpoint_every", "compilation_cache")
"""Settings that move no number of a run."""

HOW = ("remat", "attention", "length_buckets")
"""How a run computes, not what: they move its numbers by rounding, so it may go on with others."""

UNTRAINED = "soft_best_of_n"
"""The way to the tilt that trains nothing."""

OWN_BETA = 0.1
"""The ``beta`` of a run that trains nothing, and of a report where a method has none, reward units."""

ADAPTER_RATE = 5e-4
FULL_RATE = 5e-5
"""Learning rates of adapters, and of all parameters where a record gives none."""


def remat_field() -> Any:
    """The field of an experiment's configuration that is the policy's ``remat``."""
    return field(
        "full",
        "What the backward pass computes again of each block, to save memory: all of it, all but the matrix products "
        "(dots), or nothing.",
        choices=REMAT,
    )


def attention_field() -> Any:
    """The field of an experiment's configuration that is the policy's ``attention``."""
    return field(
        "auto",
        "How attention is computed: plain is the reference path, which stores all scores; fused does not; auto is "
        "fused on GPUs and TPUs where shapes and types permit it, else plain.",
        choices=ATTENTION,
    )


def record_of(config: Any) -> Method | None:
    """The record of a run, as the run's settings change it; None where nothing is trained.

    Its number of candidates is the run's where the record leaves it free, and its temperature is that of the run; that
    of demonstrations is 1, which no law of the policy drew.

    Args:
      config: With ``method``, ``num_candidates``, ``temperature``, ``fit_candidates`` and ``steps``.

    Returns:
      The record.

    Raises:
      ValueError: If there is no such method, or the steps cannot be cut into its rounds.
    """
    record = own_record(config.method)
    if record is None:
        return None
    temperature = 1.0 if set(record.sources) == {"data"} else config.temperature
    record = dataclasses.replace(record, temperature=temperature)
    if len(record.draw) == 1 and record.draw[0][1] > 2:
        record = dataclasses.replace(record, draw=((record.draw[0][0], config.num_candidates),))
    if record.rounds is not None and config.steps % record.rounds:
        raise ValueError(f"steps must be a multiple of the {record.rounds} rounds of {record.name}, got {config.steps}")
    if record.name == "tilted_mle" and config.fit_candidates:
        record = resampled(record, config.fit_candidates)
    return record


def beta_field() -> Any:
    """The field ``beta`` of an experiment that trains by a method, the method's own where nothing is said."""
    return field(
        None,
        "Strength of the KL term, reward units: the tilt is ref * exp(reward / beta) / Z. By default the record's own "
        f"(tiltjax.train.methods), {OWN_BETA} where nothing is trained. Methods on win rates take a quarter of it. 0 "
        "is for methods that do not divide by it: they then have no KL term.",
    )


def report_beta_field() -> Any:
    """The field ``report_beta`` of an experiment, in which its report counts."""
    return field(
        None,
        "beta at which the report estimates the tilt (log Z, soft best-of-N, reward - beta KL), reward units, above 0; "
        f"by default --beta, or {OWN_BETA} where that is 0.",
    )


def learning_rate_field() -> Any:
    """The field ``learning_rate`` of an experiment that trains by a method."""
    return field(
        None,
        "Peak of the schedule (linear warm-up over a tenth of the steps, cosine decay). By default "
        f"{ADAPTER_RATE:g} for adapters, which at a record's own rate would learn nothing; with --lora_rank=0 the "
        f"record's own, {FULL_RATE:g} where it has none.",
    )


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


def _defaults(config: Any) -> dict[str, float]:
    """What ``beta``, ``report_beta`` and ``learning_rate`` of a configuration mean where they say nothing."""
    record = own_record(config.method)
    beta = config.beta
    if beta is None:
        beta = OWN_BETA if record is None else record.reward_beta
    rate = config.learning_rate
    if rate is None:
        own = None if record is None else record.learning_rate
        rate = ADAPTER_RATE if config.lora_rank else (own or FULL_RATE)
    report = config.report_beta
    resolved = {"beta": beta, "learning_rate": rate, "report_beta": (beta or OWN_BETA) if report is None else report}
    return resolved | temperatures(config, record)


def resolved(config: Any) -> str:
    """What a configuration's beta and learning rate are, and what the record of its method publishes, in one line."""
    record = own_record(config.method)
    beta, rate = f"beta {config.beta:g}", f"learning rate {config.learning_rate:g}"
    if record is not None:
        beta += f" (published {record.reward_beta:g}"
        beta += f"; {record.own_beta(config.beta):g} in win rates)" if record.units == "preference" else ")"
        if record.learning_rate is not None:
            rate += f" (published {record.learning_rate:g} for all parameters)"
    trained = f"adapters of rank {config.lora_rank}" if config.lora_rank else "all parameters"
    return f"{config.method}: {beta}, {rate}, {trained}; the report counts at beta {config.report_beta:g}"


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Everything that decides a run. ``beta``, ``report_beta`` and ``learning_rate`` are numbers once it is made."""

    policy: str = field(
        "smollm2",
        "Reference policy: smollm2, a Hugging Face directory (a model, or an adapter of PEFT, which is merged into its "
        "base model) or hub id, or a GGUF file.",
    )
    reward: str = field(
        "sentiment",
        "Reward: a shipped name (see tiltjax.rewards.registry), package.module:function or file.py:function, which is "
        "run with your rights, or model:<directory> of a model of experiments.reward_model.",
    )
    prompts: str = field(
        "reviews",
        "Prompts: a shipped set; a .jsonl, .json, .csv, .parquet or .arrow file; a folder of them (FOLDER?split=train "
        "where there are several splits); tfds:<builder>; or reasoning_gym:<task>?option=value.",
    )
    demonstrations: str = field(
        "",
        "What sft and spin imitate: a column of the prompts (such as answer), or a file, folder or tfds:<builder> with "
        "a completion of every training prompt.",
    )
    corpus: str = field(
        "", "What ppo_ptx must not forget: a file or tfds:<builder> with prompt and completion, or with text."
    )
    skip_bad_rows: bool = field(
        False,
        "Leave out bad rows of prompts, demonstrations and corpus, and say how many, instead of refusing the first.",
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
    beta: float = beta_field()
    report_beta: float = report_beta_field()
    num_candidates: int = field(16, "N, candidates per prompt, drawn from the reference.")
    num_prompts: int = field(64, "Training prompts, from the top of the file.")
    num_eval_prompts: int = field(32, "Held-out prompts: of the rows after those, the ones that repeat none.")
    max_tokens: int = field(24, "Longest completion, tokens.")
    temperature: float = temperature_field()
    top_k: int = top_k_field()
    top_p: float = top_p_field()
    eval_temperature: float = eval_temperature_field()
    mask_truncated: bool = mask_truncated_field()
    fit_candidates: int = field(
        4, "tilted_mle: fit this many candidates per prompt, resampled from the tilt; 0 fits all N, each by its weight."
    )
    steps: int = field(24, "Optimizer steps.")
    batch_size: int = field(8, "Prompts per step, each with its N candidates.")
    microbatches: int = field(1, "Parts into which a batch is cut to save memory; the gradient is the same.")
    pack: bool = field(
        False,
        "Sequence packing: rows of whole sequences without padding, of candidates that count only; loss and gradient "
        "are the same. For methods that learn once, by a weight of each candidate: tilted_mle, sft, ...",
    )
    length_buckets: int = field(
        4,
        "Most shapes (prompt by completion length) that the steps of a fit are padded to, each a compilation and taken "
        "only where it saves a tenth of the positions; 1 pads all to the longest. Methods in rounds and packed rows "
        "have one.",
    )
    length_window: int = field(
        1,
        "Batches of an epoch among which prompts of similar length are put together, so that buckets save more; steps "
        "are then no longer random draws of the prompts. 1 leaves them random.",
    )
    learning_rate: float = learning_rate_field()
    max_grad_norm: float = field(1.0, "Global norm at which gradients are clipped.")
    lora_rank: int = field(16, "Rank of low-rank adapters; 0 trains all parameters.")
    mesh: str = field("", "Device mesh such as data:4,fsdp:2,tensor:1; empty puts every device on data.")
    mapping: str = field("sharded", "How the step is mapped over devices.", choices=("sharded", "pmap"))
    compute_dtype: str = field(
        "auto", "Operand type of matrix products; sums and logits are float32.", choices=("auto", "float32", "bfloat16")
    )
    remat: str = remat_field()
    attention: str = attention_field()
    sample_batch: int = field(
        8,
        "Prompts sampled (their number of candidates, from a queue) and scored at a time; where devices cannot share "
        "them, they share the candidates of each.",
    )
    checkpoint_every: int = field(8, "Steps between checkpoints.")
    compilation_cache: str = compilation_cache_field()
    seed: int = seed_field()
    output: str = output_field("runs/align")
    resume: bool = field(
        False,
        "Go on with the run in --output from wherever it was stopped: bit for bit with the same settings, to rounding "
        "with another --remat, --attention or --length_buckets.",
    )
    overwrite: bool = overwrite_field()

    def __post_init__(self):
        check_fields(self)
        parse_mesh(self.mesh)
        for name, value in _defaults(self).items():
            object.__setattr__(self, name, value)
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
        check_law(self)
        self._check_filters()
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size={self.batch_size}, got {self.microbatches}")
        if self.batch_size > self.num_prompts and self.method != UNTRAINED:
            raise ValueError(f"batch_size must be at most num_prompts={self.num_prompts}, got {self.batch_size}")
        record = record_of(self)
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
        for flag, needs in NEEDS.items():
            if needs(record) and not getattr(self, flag):
                raise ValueError(f"--method={self.method} needs --{flag}")

    def _check_filters(self) -> None:
        record = own_record(self.method)
        across = record is not None and record.cross > 1
        if filtered(self) and (across or self.pack):
            why = "with pack" if self.pack else f"for method={self.method}, which scores completions of other prompts"
            raise ValueError(f"top_k must be 0 and top_p 1 {why}; got top_k={self.top_k}, top_p={self.top_p}")

    @property
    def in_rounds(self) -> bool:
        """Whether the method learns in rounds of fresh candidates."""
        record = own_record(self.method)
        return record is not None and not record.learns_once

    def fingerprint(self) -> str:
        """Of everything that decides the numbers, to rounding."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in (*FREE, *HOW)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
