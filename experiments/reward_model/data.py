"""What `experiments.reward_model` learns from: the policy's completions, labelled by a gold reward or a judge; a file.

The gold reward times ``scale`` is the truth: a comparison is a Bradley-Terry draw from it, "right" a draw with these
log-odds, "harmful" one with their negative, and a good step one with the log-odds of the text up to its end.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tiltjax.align.session import Session, score_rows
from tiltjax.align.settings import Computation
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.data.chat import transcript
from tiltjax.data.datasets import prompt_identity, read
from tiltjax.data.limits import check_positions, limit
from tiltjax.models import pretrained
from tiltjax.models.transformer import Transformer
from tiltjax.train.hardware import fast_dtype
from tiltjax.train.learned_reward import encode
from tiltjax.train.reward_model import WITH_MARGIN, Labelled, RewardSpec, step_ends
from tiltjax.train.rollout import score_all
from tiltjax.train.streams import generator

__all__ = ["Compare", "Split", "drawn_split", "file_splits", "judge", "newline_tokens", "pairs_of"]

_LOG = logging.getLogger(__name__)

_HARM = ("chosen_harmful", "rejected_harmful")
"""Columns of kind "cost"."""

Compare = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]
"""``(prompts, first, second) -> log-odds that the first is preferred``, nats."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled completions, and what is known about them.

    Attributes:
      data: What is learned from, or held out.
      length: Of every completion, characters, ``[P, N]``.
      gold: The gold reward, ``[P, N]``; None where there is none.
      truth: Log-odds that the gold reward gives the labels of the kind, in the shape of the labels; None likewise.
    """

    data: Labelled
    length: np.ndarray
    gold: np.ndarray | None = None
    truth: np.ndarray | None = None


def pairs_of(num_prompts: int, num_candidates: int, *, most: int, rng: np.random.Generator) -> np.ndarray:
    """Comparisons of every prompt ``[P, K, 2]``: all of them, or ``most`` drawn without replacement."""
    every = np.array(list(itertools.combinations(range(num_candidates), 2)))
    if not most or most >= len(every):
        return np.broadcast_to(every, (num_prompts, *every.shape)).copy()
    return np.stack([every[rng.permutation(len(every))[:most]] for _ in range(num_prompts)])


def drawn_split(
    session: Session,
    name: str,
    spec: RewardSpec,
    *,
    scale: float,
    most: int = 0,
    compare: Compare | None = None,
) -> tuple[Split, float]:
    """Completions that the policy writes for the prompts of a split, labelled.

    Args:
      session: From `tiltjax.align.session.prepare`, with the gold reward.
      name: "train" or "heldout".
      spec: Of the kind whose labels are wanted.
      scale: Log-odds per unit of the gold reward.
      most: Comparisons per prompt; 0 takes all.
      compare: Who compares; None means the gold reward.

    Returns:
      The split, and how often the labels of comparisons agree with the sign of the gold reward's difference.
    """
    drawn, texts = session.rollout(name, session.model, name=name)
    prompts, templates = [row.prompt for row in session.rows[name]], [row.template for row in session.rows[name]]
    gold = np.asarray(drawn.reward, np.float64)
    rng = generator(session.settings.seed, f"labels {name}")
    candidates = encode(session.tokenizer, prompts, texts, templates=templates)
    pair = pairs_of(*gold.shape, most=most, rng=rng)
    rows = np.arange(len(pair))[:, None]
    ahead = scale * (gold[rows, pair[..., 0]] - gold[rows, pair[..., 1]])
    log_odds = ahead
    if compare is not None:
        shown = [transcript(prompt) for prompt in prompts]
        first, second = ([texts[p][i] for p, places in enumerate(pair[..., k]) for i in places] for k in (0, 1))
        log_odds = compare([shown[p] for p in range(len(pair)) for _ in pair[p]], first, second).reshape(ahead.shape)
    swapped = ~_bernoulli(rng, log_odds)
    pair = np.where(swapped[..., None], pair[..., ::-1], pair)
    ahead = np.where(swapped, -ahead, ahead)
    label, truth = _bernoulli(rng, scale * gold), ahead
    labels: dict[str, Any] = {"pair": pair, "pair_where": np.full(ahead.shape, True), "label": label}
    if spec.kind == "cost":
        labels["label"] = ~label
    if spec.kind == "outcome":
        truth = scale * gold
    if spec.kind == "process":
        truth = scale * _prefix_gold(session, session.rows[name], candidates, spec)
        good = _bernoulli(rng, truth).astype(np.int32)
        ends = np.asarray(step_ends(spec, candidates.completion, candidates.completion_mask))
        labels["step_label"] = np.where(ends, good, -100).astype(np.int32)
    length = np.array([[len(completion) for completion in group] for group in texts], float)
    decided = ahead != 0
    agreement = float(np.mean(ahead[decided] > 0)) if decided.any() else 0.5
    return Split(data=Labelled(candidates=candidates, **labels), length=length, gold=gold, truth=truth), agreement


def _prefix_gold(session: Session, rows: list, candidates: Candidates, spec: RewardSpec) -> np.ndarray:
    """The gold reward of the text up to every place where a step ends, 0 elsewhere, ``[P, N, T]``."""
    tokens = np.asarray(candidates.completion)
    places = np.argwhere(np.asarray(step_ends(spec, tokens, candidates.completion_mask)))
    until = np.arange(tokens.shape[-1])[None] <= places[:, 2:]
    cut = text.decode_completions(session.tokenizer, tokens[places[:, 0], places[:, 1]][None], until[None])[0]
    out = np.zeros(tokens.shape)
    out[tuple(places.T)] = score_rows(session.reward, [rows[p] for p in places[:, 0]], [[one] for one in cut])[:, 0]
    return out


def _bernoulli(rng: np.random.Generator, log_odds: np.ndarray) -> np.ndarray:
    return rng.logistic(size=log_odds.shape) < log_odds


def file_splits(
    source: str, tokenizer: text.Tokenizer, spec: RewardSpec, *, held_out: int, skip_bad: bool = False
) -> tuple[Split, Split]:
    """Somebody's labels; the last rows are held out, and rows before them that have a prompt of theirs are left out.

    Args:
      source: As for `tiltjax.data.datasets.read`. Kind "outcome" takes the columns prompt, completion and label;
        "process" prompt, completions (the steps) and labels; "cost" prompt, chosen (the safer), rejected,
        chosen_harmful and rejected_harmful; all others prompt, chosen and rejected. A column margin beside chosen and
        rejected enters the loss of kinds "global" and "preference".
      tokenizer: Of the policy.
      spec: Of the kind.
      held_out: Rows that are held out.
      skip_bad: Leaves out bad rows and says how many, instead of refusing the first.

    Returns:
      The splits to learn from and to judge by.

    Raises:
      ValueError: If a row is bad, or there are too few.
    """
    kind = {"outcome": "unpaired", "process": "prompt"}.get(spec.kind, "pair")
    check = {"process": _check_steps, "cost": _check_harm}.get(spec.kind)
    rows: list[Any] = read(source, kind, skip_bad=skip_bad, check=check)
    if len(rows) < held_out + 2:
        raise ValueError(f"{source}: {held_out + 2} rows are needed (2 to learn from), the file has {len(rows)}")
    rows = _without_held_out(source, rows, held_out)
    prompts = [row.prompt for row in rows]
    options: dict[str, Any] = {"templates": [row.template for row in rows], "places": [row.place for row in rows]}
    labels: dict[str, Any] = {}
    if spec.kind == "process":
        candidates, labels["step_label"] = _steps(tokenizer, rows)
        groups = [["".join(row.columns["completions"])] for row in rows]
    elif spec.kind == "outcome":
        groups = [[row.completion] for row in rows]
        candidates = encode(tokenizer, prompts, groups, **options)
        labels["label"] = np.array([[row.label] for row in rows])
    else:
        groups = [[row.chosen, row.rejected] for row in rows]
        candidates = encode(tokenizer, prompts, groups, **options)
        labels["pair"] = np.broadcast_to(np.array([[[0, 1]]]), (len(rows), 1, 2)).copy()
        labels["pair_where"] = np.full((len(rows), 1), True)
        labels["margin"] = _margin(source, spec, rows)
        if spec.kind == "cost":
            labels["label"] = np.array([[row.columns[name] for name in _HARM] for row in rows])
    length = np.array([[_characters(completion) for completion in group] for group in groups], float)
    whole = Labelled(candidates=candidates, **labels)
    first, last = slice(None, len(rows) - held_out), slice(len(rows) - held_out, None)
    parts = [Split(data=jax.tree.map(lambda x, at=at: x[at], whole), length=length[at]) for at in (first, last)]
    return parts[0], parts[1]


def _without_held_out(source: str, rows: list, held_out: int) -> list:
    """The rows, less those to learn from whose prompt is among the last ones."""
    first, last = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    judged = {prompt_identity(row) for row in last}
    learned = [row for row in first if prompt_identity(row) not in judged]
    if repeated := len(first) - len(learned):
        told = f"{repeated} of {len(first)} rows to learn from have a prompt of the {held_out} held-out rows"
        if len(learned) < 2:
            raise ValueError(f"{source}: {told}: too few are left to learn from")
        _LOG.warning("%s: %s: left out", source, told)
    return learned + last


def _margin(source: str, spec: RewardSpec, rows: list) -> np.ndarray | None:
    """Of every pair ``[P, 1]``; None where there is none, or the kind has no use for one."""
    given = sum(row.margin is not None for row in rows)
    if not given:
        return None
    if spec.kind not in WITH_MARGIN:
        _LOG.warning("%s: %d rows have a margin, which the loss of kind %s does not use", source, given, spec.kind)
        return None
    _LOG.info("%s: %d of %d rows have a margin; that of the others is 0", source, given, len(rows))
    return np.array([[row.margin or 0.0] for row in rows], np.float32)


def _characters(completion: text.Text) -> int:
    return len(completion if isinstance(completion, str) else completion[-1].get("content") or "")


def _check_harm(row: Any) -> None:
    for name in _HARM:
        if not isinstance(row.columns.get(name), bool):
            raise ValueError(f"{name} must be true or false")


def _check_steps(row: Any) -> None:
    steps, labels = row.columns.get("completions"), row.columns.get("labels")
    if not (isinstance(steps, list) and isinstance(labels, list) and len(steps) == len(labels) > 0):
        raise ValueError("completions and labels must be lists of the same length, not empty")
    for i, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str):
            raise ValueError(f"completions[{i}] must be a text")
        if label not in (0, 1):
            raise ValueError(f"labels[{i}] must be true or false, got {label!r}")


def _steps(tokenizer: text.Tokenizer, rows: list) -> tuple[Candidates, np.ndarray]:
    """Steps stand one to a line; a label stands at the last token of its step."""
    completions, ends = [], []
    for row in rows:
        steps, labels = row.columns["completions"], row.columns["labels"]
        told = [f"{step.rstrip()}\n" for step in steps[:-1]]
        lines = text.encode_completions(tokenizer, told, places=[row.place] * len(told), eos=False)
        lines += text.encode_completions(tokenizer, steps[-1:], prompts=[row.prompt], places=[row.place])
        completions.append([token for line in lines for token in line])
        ends.append(dict(zip(np.cumsum([len(line) for line in lines]) - 1, labels, strict=True)))
    places, templates = [row.place for row in rows], [row.template for row in rows]
    prompts = text.encode_prompts(tokenizer, [row.prompt for row in rows], templates=templates, places=places)
    sizes = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    check_positions(tokenizer, sizes, [f"{place}: prompt and completion" for place in places])
    candidates = batches.supervised(prompts, completions, pad_id=text.pad_id(tokenizer))
    label = np.full(candidates.completion.shape, -100, np.int32)
    for row, marked in zip(label, ends, strict=True):
        for place, value in marked.items():
            row[0, place] = int(value)
    return candidates, label


def newline_tokens(tokenizer: text.Tokenizer) -> tuple[int, ...]:
    """Tokens whose text ends in a line break."""
    return tuple(i for i in range(len(tokenizer)) if tokenizer.decode([i]).endswith("\n"))


def judge(policy: str, computation: Computation, *, criterion: str, batch_size: int) -> Compare:
    r"""A policy as the judge: it is asked which of two completions is better, once in each order.

    .. math:: \ell = \tfrac12 \left[ \log \frac{\pi(A | y_1, y_2)}{\pi(B | y_1, y_2)}
                     - \log \frac{\pi(A | y_2, y_1)}{\pi(B | y_2, y_1)} \right]

    A judge that prefers whatever stands first cancels out.

    Args:
      policy: As on the command line.
      computation: Of the run, for the type of its matrix products and its attention.
      criterion: What "better" means, to complete the question "Which continuation ...?".
      batch_size: Questions at a time.

    Returns:
      `Compare`.

    References:
      Lee et al., 2023, arXiv:2309.00267 (both orders, and the probabilities of the two answers).
    """
    tokenizer = text.load_tokenizer(policy)
    dtype = fast_dtype() if computation.compute_dtype == "auto" else computation.compute_dtype
    model: Transformer = pretrained.load(policy, compute_dtype=dtype, attention=computation.attention)
    limit(tokenizer, model.config)
    answers = text.encode_completions(tokenizer, ["A", "B"], eos=False)

    def compare(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        def asked(prompt: str, one: str, other: str) -> text.Text:
            question = (
                f"Beginning: {prompt}\n\nContinuation A: {one}\n\nContinuation B: {other}\n\n"
                f"Which continuation {criterion}? Answer with one letter, A or B."
            )
            return [{"role": "user", "content": question}] if tokenizer.chat_template else f"{question}\nAnswer:"

        questions = [asked(*row) for row in zip(prompts, first, second, strict=True)]
        questions += [asked(p, b, a) for p, a, b in zip(prompts, first, second, strict=True)]
        tokens = text.encode_prompts(tokenizer, questions, max_tokens=1)
        rows = batches.from_tokens(tokens, [answers] * len(tokens), pad_id=text.pad_id(tokenizer))
        logp = score_all(model, rows, batch_size=batch_size, description="judge")
        log_odds = (logp[:, 0] - logp[:, 1]).reshape(2, -1)
        return 0.5 * (log_odds[0] - log_odds[1])

    return compare
