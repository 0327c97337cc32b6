"""Records that learn from what is all there before the first gradient step: one round, cut into mini-batches.

`candidate_groups` makes the rows of a data set of candidates, and `labelled` what a gradient step reads of them; the
loss function of the step is `tiltjax.train.policy.model_objective`. Labels are a function of the whole data set, so a
weight that counts its classes counts all of it. The rest (which rows a step sees, padding, placement, checkpoints) is
that of any data set, and is the loop's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.data import candidates as batches
from tiltjax.data.candidates import Candidates
from tiltjax.models.transformer import Transformer
from tiltjax.train import rounds
from tiltjax.train.method import Batch, Feedback, Method, Round, View
from tiltjax.train.policy import model_view
from tiltjax.types import Array, Int, Params, PRNGKey

__all__ = ["candidate_groups", "labelled", "make_viewer", "trim_batch"]


def candidate_groups(method: Method, drawn: Candidates) -> tuple[Candidates, Int[np.ndarray, " R"]]:
    """Candidates of every prompt as rows of as many as the record learns from at a time.

    Of N candidates a record of k has N // k rows per prompt. With `Method.cross`, each of the N is a row, beside those
    of the next prompts.

    Args:
      method: A record that learns once (`Method.learns_once`), from a policy.
      drawn: P prompts with N candidates each, in NumPy.

    Returns:
      R rows, the first k candidates of all prompts first; and the prompt of each. With `Method.cross` the rows have no
      reward, and no law that drew them.

    Raises:
      ValueError: If a prompt has fewer candidates than a row, or there are too few prompts to cross.

    Example:
      >>> drawn = batches.from_tokens([[5], [6]], [[[7], [8], [9], [4]]] * 2, pad_id=0)
      >>> from tiltjax.train.methods import METHODS
      >>> rows, prompts = candidate_groups(METHODS["dpo"], drawn)
      >>> rows.completion[..., 0].tolist(), prompts.tolist()
      ([[7, 8], [7, 8], [9, 4], [9, 4]], [0, 1, 0, 1])
    """
    (P, N), k = drawn.completion.shape[:2], method.num_candidates
    if k > N:
        raise ValueError(f"num_candidates must be at least {k} for method {method.name}, got {N}")
    if method.cross > P:
        raise ValueError(f"num_prompts must be at least {method.cross} for method {method.name}, got {P}")
    count, shared = N // k, ("prompt", "prompt_mask")

    def rows(name: str, x: Array | None) -> Array | None:
        if x is None:
            return None
        if name in shared:
            return np.tile(x, (count, 1))
        parts = x[:, : count * k].reshape(P, count, k, *x.shape[2:])
        return np.swapaxes(parts, 0, 1).reshape(count * P, k, *x.shape[2:])

    names = [field.name for field in dataclasses.fields(drawn)]
    made = Candidates(**{name: rows(name, getattr(drawn, name)) for name in names})
    if method.cross > 1:
        where, made = made.where, dataclasses.replace(made, where=None, reward=None)
        made = jax.tree.map(np.asarray, rounds.join(method, made, [made]))
        if where is not None:
            rolled = [np.roll(where, -j, axis=0) for j in range(method.cross)]
            made = dataclasses.replace(made, where=np.concatenate(rolled, axis=1))
    return made, np.tile(np.arange(P), count)


def make_viewer(*, temperature: float = 1.0) -> Callable[[Transformer, Candidates], View]:
    """The jitted view of a policy, for `tiltjax.train.rollout.score_all`; entries of padding are 0.

    Args:
      temperature: At which the candidates were drawn.

    Returns:
      ``(model, candidates) -> View``.
    """
    view = model_view(temperature=temperature)

    @jax.jit
    def viewer(model: Transformer, candidates: Candidates) -> View:
        mask = candidates.completion_mask
        return jax.tree.map(lambda x: jnp.where(mask, x, 0), view(model, candidates))

    return viewer


def labelled(
    method: Method, rows: Candidates, feedback: Feedback, key: PRNGKey, *, seen: View | None, beta: float
) -> Batch:
    """What the gradient steps read of the rows.

    Args:
      method: A record that learns once.
      rows: From `candidate_groups`, or demonstrations.
      feedback: Of them.
      key: Of the labels, consumed.
      seen: View of the policy that training begins with, which is reference and old policy; None where the record reads
        neither.
      beta: Strength of the KL term, as of `Method.own_beta`.

    Returns:
      `Batch` of all rows, in NumPy.

    Raises:
      ValueError: If the method cannot have that ``beta``.
    """

    @jax.jit
    def run(rows: Candidates, feedback: Feedback, key: PRNGKey, seen: View | None) -> Batch:
        now = Round(feedback=feedback, beta=beta, key=key, round=jnp.int32(0), memory=None, view=_nobody)
        views = {"old": seen if method.reads_old else None, "ref": seen if method.reads_reference else None}
        return rounds.label(method, rows, now, source=jnp.zeros(rows.completion.shape[1], jnp.int32), **views)[1]

    return jax.device_get(run(rows, feedback, key, seen))


def _nobody(params: Params, candidates: Candidates) -> View:
    raise ValueError("a label of a record that learns once has no other model to ask, as its memory must be None")


def trim_batch(batch: Batch, prompt_length: int, completion_length: int) -> Batch:
    """The same rows with less padding: see `tiltjax.data.candidates.trim`.

    Args:
      batch: Padded on the right.
      prompt_length: S of the result.
      completion_length: T of the result.

    Returns:
      `Batch`; views of the same arrays.
    """
    cut: Any = functools.partial(jax.tree.map, lambda x: x[:, :, :completion_length] if x.ndim > 2 else x)
    names = ("old_view", "ref_view", "advantage", "returns")
    inner = batches.trim(batch.candidates, prompt_length, completion_length)
    return dataclasses.replace(batch, candidates=inner, **{name: cut(getattr(batch, name)) for name in names})
