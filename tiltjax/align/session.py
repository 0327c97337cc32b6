"""What a run works with, loaded once: policy, tokenizer, reward, prompts, devices, and the functions compiled for them.

session = Session.load("HuggingFaceTB/SmolLM2-135M-Instruct", reward=my_reward, prompts="prompts.jsonl")
drawn = session.sample()
tuned = session.align("tilted_mle", drawn, beta=0.1)
session.evaluate(tuned).save("runs/mine")
"""

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tiltjax.align.evaluation import Evaluation
from tiltjax.align.inputs import LEARNED, Inputs, load_inputs, needed_columns, read_inputs
from tiltjax.align.law import share_cut
from tiltjax.align.settings import UNTRAINED, Fitting, Settings, Tilting
from tiltjax.align.sources import prompt_rows
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.data.datasets import hold_out, with_columns
from tiltjax.data.limits import limit
from tiltjax.models import pretrained
from tiltjax.models.transformer import Transformer
from tiltjax.rewards.gate import required_columns, score
from tiltjax.rewards.registry import function_code, load_reward, object_code, reward_code
from tiltjax.tilt.temperature import beta_for_ess
from tiltjax.train import distributed
from tiltjax.train.evaluate import PromptEstimates, estimate
from tiltjax.train.hardware import fast_dtype
from tiltjax.train.learned_reward import load_reward_model
from tiltjax.train.memory import Drawing, check_memory, memory_limit
from tiltjax.train.method import View
from tiltjax.train.offline import make_viewer
from tiltjax.train.rollout import collect, make_sampler, make_scorer, score_all
from tiltjax.train.sharding import batch_sharding, make_mesh, param_spec
from tiltjax.train.streams import stream
from tiltjax.types import Float

__all__ = ["Aligned", "Session", "prepare", "score_rows"]

_LOG = logging.getLogger(__name__)

QUEUE = 4
"""Batches of prompts that wait in one queue while ``sample_batch`` times N candidates are being decoded."""

LEARNING = (
    *(item.name for part in (Tilting, Fitting) for item in dataclasses.fields(part)),
    "demonstrations", "corpus", "cost", "desirable_above", "fit_candidates", "pack", "length_buckets", "length_window",
    "mapping", "temperature",
)  # fmt: skip
"""Settings that `Session.align` may change."""


@dataclasses.dataclass(frozen=True)
class Aligned:
    """What `Session.align` returns.

    Attributes:
      model: The policy, adapters merged and without critics.
      settings: That it was made with.
    """

    model: Transformer
    settings: Settings


@dataclasses.dataclass(frozen=True)
class Session:
    """What a run works with; see `load`.

    Attributes:
      settings: Everything that decides the run.
      tokenizer: Of the policy.
      model: The reference policy.
      reward: Called with texts; see `tiltjax.rewards.gate.score`.
      rows: Prompt rows of the splits "train" and "heldout".
      mesh: Of devices.
      sampler: Draws candidates of the training prompts.
      evaluator: Draws candidates of the held-out prompts.
      scorer: ``temperature ->`` the function that computes log-probabilities of completions.
      viewer: ``temperature ->`` the function that asks a policy about every token.
      inputs: What the method needs besides prompts and a reward.
      parts: What the run is made of -> its fingerprint.
      fingerprint: Of all parts.
      directory: Where candidates are kept; None keeps nothing.
      resume: Whether a fit goes on from the checkpoints of the directory.
    """

    settings: Settings
    tokenizer: text.Tokenizer
    model: Transformer
    reward: Any
    rows: dict[str, list]
    mesh: Mesh
    sampler: Any
    scorer: Any
    fingerprint: str
    inputs: Inputs
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluator: Any = None
    viewer: Any = None
    directory: pathlib.Path | None = None
    resume: bool = False
    _drawn: dict[str, Candidates] = dataclasses.field(default_factory=dict, repr=False, init=False)

    @classmethod
    def load(
        cls,
        policy: str | os.PathLike = "smollm2",
        *,
        reward: str | Callable[..., Any] = "sentiment",
        prompts: str | os.PathLike | Sequence[Any] = "reviews",
        directory: str | os.PathLike | None = None,
        resume: bool = False,
        **settings: Any,
    ) -> "Session":
        """Loads a policy with its tokenizer, a reward and prompts, and puts the policy on the devices.

        Args:
          policy: A Hugging Face directory or hub id, a GGUF file, or the name of a shipped one.
          reward: A name as for ``--reward`` of `experiments.align`, or a function ``(prompts, completions, **columns)``
            of lists that returns a float for each completion. It is given the columns that its signature names.
          prompts: A name as for ``--prompts``, or rows: strings, or objects with "prompt" and further columns.
          directory: Where candidates are kept, so that a session of the same settings does not draw them again; None
            keeps nothing.
          resume: Whether `align` goes on from the checkpoints that are in its directory.
          **settings: Fields of `Settings`, such as ``num_candidates``, ``max_tokens``, ``mesh`` and ``seed``. Where
            ``num_prompts`` and ``num_eval_prompts`` are left out, rows are divided two to one.

        Returns:
          The session.

        Raises:
          ValueError: In one line, if a setting, a prompt or the reward is not good.
          OSError: If there is no such file.
        """
        rows = None
        if not isinstance(prompts, str | os.PathLike):
            rows, prompts = list(prompts), "rows"
            held_out = settings.setdefault("num_eval_prompts", max(2, len(rows) // 3))
            settings.setdefault("num_prompts", max(2, len(rows) - held_out))
        settings.setdefault("method", UNTRAINED)
        settings.setdefault("batch_size", min(Settings.batch_size, settings.get("num_prompts", Settings.num_prompts)))
        function = None if isinstance(reward, str) else reward
        name = reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)
        made = Settings(policy=os.fspath(policy), reward=name, prompts=os.fspath(prompts), **settings)
        place = None if directory is None else pathlib.Path(directory)
        return prepare(made, place, resume=resume, reward=function, rows=rows)

    def sample(self, split: str = "train") -> Candidates:
        """N candidates of every prompt of a split, drawn from the reference, with their rewards.

        They are a function of the session: a second call returns the same ones.

        Args:
          split: "train" or "heldout".

        Returns:
          Candidates ``[P, N]``, in NumPy.
        """
        if split not in self.rows:
            raise ValueError(f"split must be one of {', '.join(self.rows)}, got {split!r}")
        if split not in self._drawn:
            self._drawn[split] = self.rollout(split, self.model, name=split)[0]
        return self._drawn[split]

    def estimate(self, drawn: Candidates | None = None, *, beta: float | None = None) -> PromptEstimates:
        """Log Z, effective sample size and the reward and KL of the tilt, of every prompt.

        Args:
          drawn: Candidates of the reference with rewards; None takes those of `sample`.
          beta: Reward units; None takes ``report_beta`` of the settings.

        Returns:
          Estimates, ``[P]`` each, in nats and reward units.
        """
        reward = np.asarray((self.sample() if drawn is None else drawn).reward)
        found = estimate(reward, beta=self.settings.report_beta if beta is None else beta)
        N = reward.shape[1]
        if np.mean(found.ess) < 0.1 * N:
            wanted = float(np.mean(beta_for_ess(jnp.asarray(reward), ess=0.25 * N)))
            name = "report_beta" if self.settings.in_rounds else "beta"
            _LOG.warning(
                "weights have collapsed: mean effective sample size %.1f of %d; %s=%.3g would give a quarter of N",
                np.mean(found.ess), N, name, wanted,
            )  # fmt: skip
        return found

    def align(
        self,
        method: str | None = None,
        drawn: Candidates | None = None,
        *,
        directory: str | os.PathLike | None = None,
        resume: bool | None = None,
        watch: Callable[[int, Transformer], None] | None = None,
        **settings: Any,
    ) -> Aligned:
        """Aligns the policy by a record of `tiltjax.train.methods`; with several hosts all of them call this.

        Args:
          method: Name of the record, or ``module:record`` of one of your own; None takes that of the settings.
          drawn: What a record that learns once learns from: N scored candidates of every training prompt, drawn from
            the reference by this session; None takes those of `sample`. Other records draw their own.
          directory: Where metrics and checkpoints are written; None takes that of the session, if it has one.
          resume: Whether to go on from the newest checkpoint there; None takes that of the session.
          watch: Of a record that learns in rounds: called with the number of rounds played and the policy, before each
            checkpoint.
          **settings: Of the fit, such as ``beta``, ``steps``, ``batch_size`` and ``learning_rate``.

        Returns:
          The policy and the settings that it was made with.

        Raises:
          ValueError: If there is no such method, or it cannot run with these settings.
        """
        from tiltjax.align.fit import tune
        from tiltjax.align.rounds import improve

        if strange := sorted(set(settings) - set(LEARNING)):
            raise ValueError(f"{strange[0]} is no setting of a fit; it belongs to Session.load, or there is none")
        changed = self.settings.change(**settings, **({} if method is None else {"method": method}))
        if not changed.in_rounds:  # What was drawn was drawn at the temperature of the session.
            changed = changed.change(temperature=self.settings.temperature)
        check_mesh(changed, self.mesh)
        session = dataclasses.replace(
            self,
            settings=changed,
            directory=self.directory if directory is None else pathlib.Path(directory),
            resume=self.resume if resume is None else resume,
        )
        if changed != self.settings:
            inputs = load_inputs(changed, changed.record, self.rows["train"], self.tokenizer)
            session = dataclasses.replace(session, inputs=inputs)
        if changed.record is None:
            model = self.model
        elif changed.in_rounds:
            model = improve(session, watch=watch)
        else:
            model = tune(session, self.sample() if drawn is None else drawn)
        return Aligned(model, changed)

    def evaluate(self, aligned: Aligned | None = None) -> Evaluation:
        """Reference, best-of-N, soft best-of-N, what theory says of the tilt, and a policy, on the held-out prompts.

        Args:
          aligned: Of `align`; None evaluates without one.

        Returns:
          The evaluation: numbers with their intervals, samples, and `save` with the report.
        """
        from tiltjax.align.compare import compare

        return compare(self, aligned)

    def save(self, model: Transformer, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes a policy as a Hugging Face directory, with the tokenizer and the generation settings of this one.

        Args:
          model: The policy.
          directory: Where to.
          overwrite: Whether a model directory that is there is replaced.
        """
        source, tokenizer = self.settings.policy, self.tokenizer
        pretrained.save(model, directory, source=source, tokenizer=tokenizer, overwrite=overwrite)

    @property
    def places(self) -> int:
        """Over how many devices prompts are divided."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def scored_batch(self) -> int:
        """Prompts scored at a time: those of ``sample_batch``, and up to what the devices can share."""
        return -(-self.settings.sample_batch // self.places) * self.places

    def rollout(self, split: str, model: Transformer, *, name: str) -> tuple[Candidates, list[list[str]]]:
        """N scored candidates of every prompt of a split, from the stream of that name; kept once they are whole."""
        settings, rows = self.settings, self.rows[split.partition("-")[0]]
        drawn = self.kept(split)
        if drawn is not None:
            self._note_cut(split, drawn)
            return drawn, self.texts(drawn)
        path = self.kept_at(split)
        size = settings.sample_batch * min(QUEUE, -(-len(rows) // settings.sample_batch))
        everywhere = NamedSharding(self.mesh, PartitionSpec())  # The sampler then divides candidates.
        drawn = collect(
            stream(settings.seed, f"sample {name}"),
            model,
            self.encode(rows),
            sampler=self.evaluator if split.startswith("heldout") else self.sampler,
            pad_id=text.pad_id(self.tokenizer),
            batch_size=size,
            reward=lambda places, part: self.score([rows[i] for i in places], self.texts(part)),
            sharding=everywhere if size % self.places else batch_sharding(self.mesh),
            directory=None if path is None else path.with_suffix(""),
            fingerprint=self.fingerprint,
            description=f"sample {split}",
        )
        self.keep(split, drawn)
        self._note_cut(split, drawn)
        return drawn, self.texts(drawn)

    def kept_at(self, name: str) -> pathlib.Path | None:
        """The file of kept candidates; None where the session keeps none."""
        return None if self.directory is None else self.directory / "candidates" / f"{name}.npz"

    def kept(self, name: str) -> Candidates | None:
        """Candidates that `keep` wrote, if there are any; those of another session are refused by ValueError."""
        path = self.kept_at(name)
        if path is None or not distributed.agree(path.exists()):
            return None
        return batches.load(path, fingerprint=self.fingerprint, vocab_size=self.model.config.vocab_size)

    def keep(self, name: str, drawn: Candidates) -> None:
        """Writes candidates, where the session keeps any; with several hosts all of them call this."""

        def write(path: pathlib.Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            batches.save(path, drawn, fingerprint=self.fingerprint)

        path = self.kept_at(name)
        if path is not None:
            distributed.by_main(lambda: write(path))

    def _note_cut(self, split: str, drawn: Candidates) -> None:
        share, most = share_cut(drawn, text.end_ids(self.tokenizer)), self.settings.max_tokens
        _LOG.info("%s: %.0f%% of the completions were cut at max_tokens=%d", split, 100 * share, most)

    def encode(self, rows: list) -> list[list[int]]:
        """Token ids of prompts that completions of ``max_tokens`` are to follow."""
        return _encode(self.tokenizer, rows, self.settings)

    def texts(self, drawn: Candidates) -> list[list[str]]:
        """The completions as text."""
        return text.decode_completions(self.tokenizer, drawn.completion, drawn.completion_mask)

    def score(
        self, rows: list, completions: list[list[str]], *, reward: Callable[..., Any] | None = None, name: str = ""
    ) -> Float[np.ndarray, "P N"]:
        """Rewards of N completions per row; every host computes those of its share of the rows.

        Args:
          rows: P prompt rows.
          completions: N texts of each.
          reward: Another one than the session's, such as a cost.
          name: Of that, for messages.

        Returns:
          Rewards, in NumPy, the same on every host.
        """
        each, mine = len(completions[0]), distributed.share(len(rows))
        function, name = (self.reward, self.settings.reward) if reward is None else (reward, name)

        def own() -> np.ndarray:
            if not rows[mine]:
                return np.zeros((0, each), np.float32)
            return score_rows(function, rows[mine], completions[mine], name=name)

        return distributed.gather_rows(distributed.together(own), len(rows))

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
        kept = self.kept(name)
        if kept is not None:
            return kept
        drawn = dataclasses.replace(drawn, ref_logp=self.ref_logp(drawn, description, temperature=temperature))
        self.keep(name, drawn)
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


def _encode(tokenizer: text.Tokenizer, rows: list, settings: Settings) -> list[list[int]]:
    options: dict[str, Any] = {"templates": [row.template for row in rows], "places": [row.place for row in rows]}
    return text.encode_prompts(tokenizer, [row.prompt for row in rows], max_tokens=settings.max_tokens, **options)


def _split_prompts(settings: Settings, reward: Any, rows: Sequence[Any] | None) -> tuple[list, list]:
    """Rows to train on and rows to be judged by, with every column that something needs."""
    skip, wanted = settings.skip_bad_rows, settings.num_prompts + settings.num_eval_prompts
    found = prompt_rows(settings.prompts if rows is None else rows, wanted, seed=settings.seed, skip_bad=skip)
    needs = dict.fromkeys(required_columns(reward), f"reward {settings.reward!r}")
    needs |= needed_columns(settings, settings.record, found)
    found = with_columns(found, needs, source=settings.prompts, skip_bad=skip)
    return hold_out(found, settings.num_prompts, settings.num_eval_prompts, source=settings.prompts)


def check_mesh(settings: Settings, mesh: Mesh) -> None:
    """Raises ValueError if the batch cannot be divided over the devices."""
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.batch_size % places:
        raise ValueError(f"batch_size must be a multiple of data x fsdp = {places}, got {settings.batch_size}")
    if settings.mapping == "pmap":
        if mesh.shape["data"] != jax.device_count():
            raise ValueError(f"mesh must put every device on data where mapping=pmap, got {settings.mesh!r}")
        if settings.batch_size // places % settings.microbatches:
            raise ValueError(
                f"microbatches must divide the {settings.batch_size // places} prompts of each device "
                f"where mapping=pmap, got {settings.microbatches}"
            )


def prepare(
    settings: Settings,
    directory: pathlib.Path | None = None,
    *,
    resume: bool = False,
    reward: Callable[..., Any] | None = None,
    rows: Sequence[Any] | None = None,
) -> Session:
    """Loads everything, the cheap things that may fail first.

    Args:
      settings: Of the session.
      directory: Where candidates are kept; None keeps nothing.
      resume: Whether a fit goes on from its checkpoints.
      reward: The reward as a function; None loads the one that the settings name.
      rows: The prompts; None reads those that the settings name.

    Returns:
      The session; nothing is written.

    Raises:
      ValueError: In one line, if something that was read is not good, or there is too little memory.
      OSError: If there is no such file.
    """
    dtype = fast_dtype() if settings.compute_dtype == "auto" else settings.compute_dtype
    code = function_code(reward) if reward is not None else ""
    if reward is None:
        reward = _load_reward(settings)
        code = getattr(reward, "fingerprint", "") or reward_code(settings.reward)
    record = settings.record
    train, held_out = _split_prompts(settings, reward, rows)
    texts = read_inputs(settings, record, train)
    mesh = make_mesh(settings.mesh)
    check_mesh(settings, mesh)
    tokenizer = text.load_tokenizer(settings.policy)
    model = pretrained.load(
        settings.policy,
        compute_dtype=dtype,
        remat=settings.remat,
        attention=settings.attention,
        sharding=lambda path, shape: NamedSharding(mesh, param_spec(path, shape, mesh)),
    )
    limit(tokenizer, model.config)
    # What cannot be read, or needs more memory than there is, is refused before anything is sampled.
    _check_memory(settings, model, longest=max(map(len, _encode(tokenizer, [*train, *held_out], settings))))
    inputs = load_inputs(settings, record, train, tokenizer, texts)
    sampler, evaluator = _samplers(settings, tokenizer, mesh)
    # Candidates are kept for a resumed run; an edited prompt file or another policy under the same name is refused.
    parts = {
        "settings": settings.fingerprint(),
        "compute type": dtype,
        "policy": pretrained.fingerprint(model),
        "tokenizer": text.tokenizer_fingerprint(tokenizer),
        "prompts": _digest("\n".join(repr(row) for row in (*train, *held_out))),
        "reward (its code or model)": code,
        "demonstrations, corpus or cost": inputs.fingerprint,
    }
    if ":" in settings.method:
        parts["method (its code)"] = object_code(settings.method, what="method")
    return Session(
        settings=settings,
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
        inputs=inputs,
        parts=parts,
        directory=directory,
        resume=resume,
    )


def _load_reward(settings: Settings) -> Callable[..., Any]:
    if not settings.reward.startswith(LEARNED):
        return load_reward(settings.reward)
    dtype = None if settings.compute_dtype == "auto" else settings.compute_dtype
    return load_reward_model(settings.reward.removeprefix(LEARNED), compute_dtype=dtype)


def _check_memory(settings: Settings, model: Transformer, *, longest: int) -> None:
    drawing = Drawing(
        num_prompts=settings.num_prompts,
        num_candidates=settings.num_candidates,
        sample_batch=min(settings.sample_batch, settings.num_prompts),
        prompt_tokens=longest,
        max_tokens=settings.max_tokens,
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    check_memory(drawing, model.config, held=held, limit=memory_limit())


def _samplers(settings: Settings, tokenizer: text.Tokenizer, mesh: Mesh) -> tuple[Any, Any]:
    """Of training prompts and of held-out ones; one function, and one compilation, where the law is the same."""
    sampler, evaluator = (
        make_sampler(
            num_candidates=settings.num_candidates,
            max_tokens=settings.max_tokens,
            eos_id=text.end_ids(tokenizer),
            pad_id=text.pad_id(tokenizer),
            slots=settings.sample_batch * settings.num_candidates,
            mesh=mesh,
            **settings.law(evaluation=evaluation),
        )
        for evaluation in (False, True)
    )
    return sampler, sampler if settings.eval_temperature == settings.temperature else evaluator


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
