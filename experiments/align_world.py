"""What `experiments.align` works with, and how it draws candidates of a model and scores them."""

import dataclasses
import functools
import hashlib
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.align_config import AlignConfig, own_record
from experiments.align_given import LEARNED, Given, load_given, needed_columns, read_given
from experiments.align_law import law, share_cut
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.data.datasets import PromptRow, hold_out, read, with_columns
from tiltjax.data.limits import limit
from tiltjax.models import pretrained
from tiltjax.models.transformer import Transformer
from tiltjax.rewards.gate import required_columns, score
from tiltjax.rewards.puzzles import puzzle_rows
from tiltjax.rewards.registry import load_reward, object_code, parse_spec, reward_code
from tiltjax.train import distributed
from tiltjax.train.hardware import fast_dtype
from tiltjax.train.learned_reward import load_reward_model
from tiltjax.train.memory import Drawing, check_memory, memory_limit
from tiltjax.train.method import Method, View
from tiltjax.train.offline import make_viewer
from tiltjax.train.rollout import collect, make_sampler, make_scorer, score_all
from tiltjax.train.sharding import batch_sharding, make_mesh, param_spec
from tiltjax.train.streams import stream

__all__ = ["World", "prepare", "prompt_rows", "score_rows"]

_LOG = logging.getLogger(__name__)

PROMPTS = pathlib.Path(__file__).parent / "prompts"
DOUBLINGS = 6
"""How often the number of puzzles is doubled, until enough of their questions differ."""
QUEUE = 4
"""Batches of prompts that wait in one queue while ``sample_batch`` times N candidates are being decoded."""


@dataclasses.dataclass(frozen=True)
class World:
    """What a run works with: policy, tokenizer, reward, prompts, what else a method needs, the compiled functions.

    ``parts`` are the fingerprints of what the run is made of, by name; ``fingerprint`` is that of all of them.
    """

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
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluator: Any = None
    """Sampler of held-out prompts."""
    viewer: Any = None
    """``temperature -> `` what asks a policy about every token."""

    @property
    def places(self) -> int:
        """Over how many devices prompts are divided."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def scored_batch(self) -> int:
        """Prompts scored at a time: those of ``sample_batch``, and up to what the devices can share."""
        return -(-self.config.sample_batch // self.places) * self.places

    def rollout(self, split: str, model: Transformer, *, name: str) -> tuple[Candidates, list[list[str]]]:
        """N scored candidates of every prompt of a split, from the stream of that name; kept once they are whole."""
        config, rows = self.config, self.rows[split.partition("-")[0]]
        path = self.directory / "candidates" / f"{split}.npz"
        if distributed.agree(path.exists()):
            drawn = batches.load(path, fingerprint=self.fingerprint, vocab_size=self.model.config.vocab_size)
            self._note_cut(split, drawn)
            return drawn, self.texts(drawn)
        size = config.sample_batch * min(QUEUE, -(-len(rows) // config.sample_batch))
        everywhere = NamedSharding(self.mesh, PartitionSpec())  # The sampler then divides candidates.
        drawn = collect(
            stream(config.seed, f"sample {name}"),
            model,
            self.encode(rows),
            sampler=self.evaluator if split.startswith("heldout") else self.sampler,
            pad_id=text.pad_id(self.tokenizer),
            batch_size=size,
            reward=lambda places, part: self.score([rows[i] for i in places], self.texts(part)),
            sharding=everywhere if size % self.places else batch_sharding(self.mesh),
            directory=path.with_suffix(""),
            fingerprint=self.fingerprint,
            description=f"sample {split}",
        )
        distributed.by_main(lambda: batches.save(path, drawn, fingerprint=self.fingerprint))
        self._note_cut(split, drawn)
        return drawn, self.texts(drawn)

    def _note_cut(self, split: str, drawn: Candidates) -> None:
        share, most = share_cut(drawn, text.end_ids(self.tokenizer)), self.config.max_tokens
        _LOG.info("%s: %.0f%% of the completions were cut at max_tokens=%d", split, 100 * share, most)

    def encode(self, rows: list) -> list[list[int]]:
        """Token ids of prompts that completions of ``max_tokens`` are to follow."""
        return _encode(self.tokenizer, rows, self.config)

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
        return score_rows(self.reward, rows, completions, name=self.config.reward)

    def ref_logp(self, drawn: Candidates, description: str, *, temperature: float) -> np.ndarray:
        """Log-probability of every completion under the reference.

        Args:
          drawn: Completions; of those that a filter drew, the reference is restricted to what it left.
          description: Of the progress bar.
          temperature: At which they were drawn.
        """
        return score_all(
            self.model,
            drawn,
            batch_size=self.scored_batch,
            scorer=self.scorer(temperature),
            buckets=4 if len(drawn.prompt) > self.scored_batch else 1,  # Many calls of one batch: one shape.
            sharding=batch_sharding(self.mesh),
            description=description,
        )

    def with_reference(self, name: str, drawn: Candidates, description: str, *, temperature: float) -> Candidates:
        """The same candidates with ``ref_logp`` (see there), computed once and kept in ``candidates/<name>.npz``.

        A file that another reference, tokenizer, prompt or setting has made is refused.
        """
        path = self.directory / "candidates" / f"{name}.npz"
        if distributed.agree(path.exists()):
            return batches.load(path, fingerprint=self.fingerprint, vocab_size=self.model.config.vocab_size)
        drawn = dataclasses.replace(drawn, ref_logp=self.ref_logp(drawn, description, temperature=temperature))

        def keep():
            path.parent.mkdir(parents=True, exist_ok=True)
            batches.save(path, drawn, fingerprint=self.fingerprint)

        distributed.by_main(keep)
        return drawn

    def view(self, rows: Candidates, description: str, *, temperature: float) -> View:
        """What the reference says of every token of the candidates, in NumPy.

        Args:
          rows: Candidates; of those that a filter drew, the reference is restricted to what it left.
          description: Of the progress bar.
          temperature: At which they were drawn.
        """
        return score_all(
            self.model,
            rows,
            batch_size=self.scored_batch,
            scorer=self.viewer(temperature),
            buckets=4 if len(rows.prompt) > self.scored_batch else 1,
            sharding=batch_sharding(self.mesh),
            description=description,
        )


def score_rows(reward: Any, rows: list, completions: list[list[str]], *, name: str | None = None) -> np.ndarray:
    """Rewards of N completions of every row, in this process.

    Args:
      reward: Called with texts, and with the columns that it asks for, the whole prompt among them.
      rows: P prompt rows.
      completions: N texts of each.
      name: Of the reward, for messages; None takes the function's.

    Returns:
      ``[P, N]``.
    """
    each = len(completions[0]) if rows else 1
    shown = [text.prompt_text(row.prompt) for row in rows for _ in range(each)]
    names = sorted({name for row in rows for name in row.columns})
    columns = {name: [row.columns.get(name) for row in rows for _ in range(each)] for name in names}
    columns["prompt"] = [row.prompt for row in rows for _ in range(each)]
    flat = [completion for group in completions for completion in group]
    return score(reward, shown, flat, columns=columns, name=name, batch_size=64 * each).reshape(len(rows), each)


def _encode(tokenizer: text.Tokenizer, rows: list, config: AlignConfig) -> list[list[int]]:
    options: dict[str, Any] = {"templates": [row.template for row in rows], "places": [row.place for row in rows]}
    return text.encode_prompts(tokenizer, [row.prompt for row in rows], max_tokens=config.max_tokens, **options)


def prompt_rows(source: str, wanted: int, *, seed: int, skip_bad: bool = False) -> list:
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
        return [
            PromptRow(prompt=str(row.pop("prompt")), columns=dict(row), place=f"{source}:{i}")
            for i, row in enumerate(rows, 1)
        ]
    shipped = PROMPTS / f"{source}.jsonl"
    return list(read(shipped if shipped.exists() else source, "prompt", skip_bad=skip_bad))


def _split_prompts(config: AlignConfig, record: Method | None, reward: Any) -> tuple[list, list]:
    """Rows to train on and rows to be judged by, with every column that something needs."""
    skip, wanted = config.skip_bad_rows, config.num_prompts + config.num_eval_prompts
    rows = prompt_rows(config.prompts, wanted, seed=config.seed, skip_bad=skip)
    needs = dict.fromkeys(required_columns(reward), f"reward {config.reward!r}")
    needs |= needed_columns(config, record, rows)
    rows = with_columns(rows, needs, source=config.prompts, skip_bad=skip)
    return hold_out(rows, config.num_prompts, config.num_eval_prompts, source=config.prompts)


def prepare(config: AlignConfig, directory: pathlib.Path) -> World:
    """Loads everything, the cheap things that may fail first."""
    told = None if config.compute_dtype == "auto" else config.compute_dtype
    if config.reward.startswith(LEARNED):
        reward: Any = load_reward_model(config.reward.removeprefix(LEARNED), compute_dtype=told)
    else:
        reward = load_reward(config.reward)
    record = own_record(config.method)
    train, held_out = _split_prompts(config, record, reward)
    texts = read_given(config, record, train)
    mesh = make_mesh(config.mesh)
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % places:
        raise ValueError(f"batch_size must be a multiple of data x fsdp = {places}, got {config.batch_size}")
    if config.mapping == "pmap":
        if mesh.shape["data"] != jax.device_count():
            raise ValueError(f"mesh must put every device on data where mapping=pmap, got {config.mesh!r}")
        if config.batch_size // places % config.microbatches:
            raise ValueError(
                f"microbatches must divide the {config.batch_size // places} prompts of each device "
                f"where mapping=pmap, got {config.microbatches}"
            )
    tokenizer = text.load_tokenizer(config.policy)
    dtype = fast_dtype() if config.compute_dtype == "auto" else config.compute_dtype
    model = pretrained.load(
        config.policy,
        compute_dtype=dtype,
        remat=config.remat,
        attention=config.attention,
        sharding=lambda path, shape: NamedSharding(mesh, param_spec(path, shape, mesh)),
    )
    limit(tokenizer, model.config)
    # What cannot be read, or needs more memory than there is, is refused before anything is sampled.
    longest = max(map(len, _encode(tokenizer, [*train, *held_out], config)))
    drawing = Drawing(
        num_prompts=config.num_prompts,
        num_candidates=config.num_candidates,
        sample_batch=min(config.sample_batch, config.num_prompts),
        prompt_tokens=longest,
        max_tokens=config.max_tokens,
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    check_memory(drawing, model.config, held=held, limit=memory_limit())
    given = load_given(config, record, train, tokenizer, texts)
    sampler, evaluator = (
        make_sampler(
            num_candidates=config.num_candidates,
            max_tokens=config.max_tokens,
            eos_id=text.end_ids(tokenizer),
            pad_id=text.pad_id(tokenizer),
            slots=config.sample_batch * config.num_candidates,
            mesh=mesh,
            **law(config, evaluation=evaluation),
        )
        for evaluation in (False, True)
    )
    if config.eval_temperature == config.temperature:
        evaluator = sampler  # One compilation.
    # Candidates are kept for a resumed run; an edited prompt file or another policy under the same name is refused.
    parts = {
        "settings": config.fingerprint(),
        "compute type": dtype,
        "policy": pretrained.fingerprint(model),
        "tokenizer": text.tokenizer_fingerprint(tokenizer),
        "prompts": _digest("\n".join(repr(row) for row in (*train, *held_out))),
        "reward (its code or model)": getattr(reward, "fingerprint", "") or reward_code(config.reward),
        "demonstrations, corpus or cost": given.fingerprint,
    }
    if ":" in config.method:
        parts["method (its code)"] = object_code(config.method, what="method")
    return World(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        model=model,
        reward=reward,
        rows={"train": train, "heldout": held_out},
        mesh=mesh,
        sampler=sampler,
        evaluator=evaluator,
        scorer=functools.cache(lambda temperature: make_scorer(temperature=temperature)),
        viewer=functools.cache(lambda temperature: make_viewer(temperature=temperature)),
        fingerprint=_digest("\n".join(parts.values())),
        given=given,
        parts=parts,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
