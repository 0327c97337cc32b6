"""A trained reward model on disk, and as a reward that reads texts: what ``--reward=model:<directory>`` means."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.data.limits import check_positions, limit
from tiltjax.files import read_json, write_json
from tiltjax.models import heads, pretrained
from tiltjax.models.fields import Fields
from tiltjax.models.heads import RewardModel
from tiltjax.train.hardware import fast_dtype
from tiltjax.train.reward_model import LIKELIHOOD, RewardSpec, make_reward
from tiltjax.train.rollout import score_all
from tiltjax.types import Array, Float

__all__ = ["LearnedReward", "encode", "load_reward_model", "reward_all", "save_reward_model"]

_FILE = "reward.json"


def encode(
    tokenizer: text.Tokenizer,
    prompts: Sequence[text.Text],
    completions: Sequence[Sequence[text.Text]],
    *,
    templates: Sequence[Mapping[str, Any]] | None = None,
    places: Sequence[str] | None = None,
) -> Candidates:
    """Texts as a reward model reads them: every completion is encoded anew and ends in EOS, however it was written.

    Args:
      tokenizer: Of the model.
      prompts: B texts or conversations.
      completions: Of every prompt.
      templates: What the chat template is given beside the messages of every prompt, such as tools: `Row.template`.
      places: Where every prompt was read, for messages: `Row.place`.

    Returns:
      `Candidates` of NumPy arrays.

    Raises:
      ValueError: As `tiltjax.data.text.encode_prompts` and `tiltjax.data.text.encode_completions` do.
    """
    which = [i for i, group in enumerate(completions) for _ in group]
    options: dict[str, Any] = {"prompts": [prompts[i] for i in which]}
    for name, values in (("templates", templates), ("places", places)):
        options[name] = None if values is None else [values[i] for i in which]
    flat, told = text.encode_completions_masked(tokenizer, [c for group in completions for c in group], **options)
    ends = np.cumsum([len(group) for group in completions]).tolist()
    cut = lambda x: [x[end - len(group) : end] for end, group in zip(ends, completions, strict=True)]  # noqa: E731
    asked = text.encode_prompts(tokenizer, prompts, templates=templates, places=places)
    sizes = [len(asked[i]) + len(ids) for i, ids in zip(which, flat, strict=True)]
    names = [
        f"prompt {i} with a completion" if places is None else f"{places[i]}: prompt and completion" for i in which
    ]
    check_positions(tokenizer, sizes, names)
    return batches.from_tokens(asked, cut(flat), pad_id=text.pad_id(tokenizer), loss_mask=cut(told))


def reward_all(
    model: Any,
    candidates: Candidates,
    *,
    scorer: Callable[[Any, Candidates], Float[Array, "B N"]],
    batch_size: int,
    sharding: Sharding | None = None,
) -> Float[np.ndarray, "B N"]:
    """Rewards of any number of prompts, so many at a time.

    Args:
      model: What ``scorer`` takes.
      candidates: B prompts with N completions each, NumPy.
      scorer: From `tiltjax.train.reward_model.make_reward`.
      batch_size: Prompts at a time; a short last batch is filled up with its own rows.
      sharding: Where a batch goes.

    Returns:
      Reward units.
    """
    options: dict[str, Any] = {"keep": ("ref_logp", "where"), "buckets": 1, "description": None}
    return np.asarray(score_all(model, candidates, scorer=scorer, batch_size=batch_size, sharding=sharding, **options))


def save_reward_model(
    model: Any,
    spec: RewardSpec,
    directory: str | os.PathLike,
    *,
    tokenizer: Any,
    source: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes model, tokenizer and meaning; `load_reward_model` makes a reward of it.

    Args:
      model: From `new_model`, trained; adapters are merged.
      spec: What it means.
      directory: Where to.
      tokenizer: Of the policy it was made from.
      source: That policy, see `tiltjax.models.pretrained.save`.
      overwrite: Whether an existing model directory is replaced.

    Raises:
      FileExistsError: As `tiltjax.models.pretrained.save` does.
    """
    digest = hashlib.sha256()
    if isinstance(model, RewardModel):
        heads.save(model, directory, source=source, tokenizer=tokenizer, overwrite=overwrite)
        digest.update(np.asarray(model.kernel[...]).tobytes() + np.asarray(model.bias[...]).tobytes())
        digest.update(pretrained.fingerprint(model.backbone).encode())
    else:
        pretrained.save(model, directory, source=source, tokenizer=tokenizer, overwrite=overwrite)
        digest.update(pretrained.fingerprint(model).encode())
    if jax.process_index() == 0:
        part = Path(directory) / f"{_FILE}.part"
        write_json(part, {**dataclasses.asdict(spec), "fingerprint": digest.hexdigest()[:16]})
        os.replace(part, part.with_suffix(""))


class LearnedReward:
    """A trained reward model as a reward: ``(prompts, completions, prompt) -> floats``, on texts.

    A prompt is read as in training: a conversation through the chat template, with every message and the row's tools.

    Attributes:
      spec: What the model means.
      fingerprint: Names the function that it computes.
    """

    def __init__(self, model: Any, reference: Any, spec: RewardSpec, tokenizer: Any, *, batch_size: int, name: str):
        self._model, self._reference, self._tokenizer, self._batch_size = model, reference, tokenizer, batch_size
        self._reward = make_reward(spec)
        self.spec, self.fingerprint, self.__name__ = spec, "", name

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        prompt: list[text.Text] | None = None,
        tools: list | None = None,
        chat_template_kwargs: list | None = None,
    ) -> list[float]:
        """One reward per completion; completions of one prompt that stand together are read in one row."""
        asked_of = prompts if prompt is None else prompt
        nothing = [None] * len(prompts)
        templates = [
            {"tools": tool, **(options or {})}
            for tool, options in zip(tools or nothing, chat_template_kwargs or nothing, strict=True)
        ]
        same = [i and (asked_of[i], templates[i]) == (asked_of[i - 1], templates[i - 1]) for i in range(len(prompts))]
        at = [i for i, again in enumerate(same) if not again] + [len(prompts)]
        each = math.gcd(*np.diff(at).tolist())
        if self.spec.kind == "preference" and each < 2:
            raise ValueError("a preference model compares the completions of a prompt: give each at least 2 of them")
        rows = range(0, len(prompts), each)
        asked = encode(
            self._tokenizer,
            [asked_of[i] for i in rows],
            [completions[i : i + each] for i in rows],
            templates=[templates[i] for i in rows],
        )
        # Few shapes, so few compilations, whatever comes.
        widths = [batches.bucket_length(x.shape[-1], multiple=16) for x in (asked.prompt, asked.completion)]
        asked = jax.tree.map(
            lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, widths[x.ndim - 2] - x.shape[-1])]), asked
        )
        size = max(1, self._batch_size // each)
        value = reward_all(self._model, asked, scorer=self._reward, batch_size=size)
        if self._reference is not None:
            value = value - reward_all(self._reference, asked, scorer=self._reward, batch_size=size)
        return [float(x) - self.spec.offset for x in value.reshape(-1)]


def load_reward_model(
    directory: str | os.PathLike, *, batch_size: int = 32, compute_dtype: str | None = None
) -> LearnedReward:
    """Reads what `save_reward_model` wrote, as a reward.

    Args:
      directory: Of the model.
      batch_size: Completions at a time.
      compute_dtype: Operand type of the matrix products; None takes what this machine computes fast.

    Returns:
      `LearnedReward`, a reward like any other.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If a file is damaged.
    """
    folder = Path(directory)
    facts = read_json(folder / _FILE)
    try:
        spec, fingerprint = _read_spec(facts)
    except ValueError as error:
        raise ValueError(f"{folder / _FILE}: not a reward model ({error})") from None
    options: dict[str, Any] = {"compute_dtype": compute_dtype or fast_dtype()}
    reader = pretrained.load if spec.kind in LIKELIHOOD else heads.load
    reference = pretrained.load(spec.reference, **options) if spec.kind == "dpo" else None
    model, tokenizer = reader(folder, **options), text.load_tokenizer(folder)
    parts: list[Any] = [model] if reference is None else [model, reference]
    for part in parts:
        limit(tokenizer, getattr(part, "backbone", part).config)
    reward = LearnedReward(model, reference, spec, tokenizer, batch_size=batch_size, name=f"model:{directory}")
    facts.pop("fingerprint", None)
    reward.fingerprint = hashlib.sha256(json.dumps([fingerprint, facts], sort_keys=True).encode()).hexdigest()[:16]
    return reward


def _read_spec(facts: dict[str, Any]) -> tuple[RewardSpec, str]:
    """What a model means, and the name of its function."""
    known = {field.name for field in dataclasses.fields(RewardSpec)}
    if unknown := sorted(set(facts) - known - {"fingerprint"}):
        raise ValueError(f"the field {unknown[0]!r} is unknown")
    fields = Fields(facts, _FILE)
    spec = RewardSpec(
        kind=fields.text("kind"),
        beta=fields.positive("beta", 1.0),
        offset=fields.number("offset", 0.0),
        reference=fields.text("reference", ""),
        step_tokens=fields.integer("step_tokens", 0, least=0),
        separators=tuple(fields.integers("separators", [])),
        aggregate=fields.text("aggregate", "last"),
    )
    return spec, fields.text("fingerprint", "")
