"""The training loop, top to bottom."""

import os
from collections.abc import Callable

import jax
from tqdm import tqdm

from tiltjax.data.pipeline import epoch_batches
from tiltjax.train import checkpoint, distributed
from tiltjax.train.metrics import Journal, Line
from tiltjax.train.state import TrainState
from tiltjax.types import Params, PRNGKey, PyTree

__all__ = ["epoch_batches", "fit"]


def fit(
    state: TrainState,
    batches: Callable[[int], PyTree],
    *,
    step_fn: Callable,
    key: PRNGKey,
    num_steps: int,
    directory: str | os.PathLike | None = None,
    frozen: Params = None,
    resume: bool = False,
    checkpoint_every: int = 50,
    fingerprint: str = "",
    progress: bool = True,
) -> TrainState:
    """Runs the step until ``num_steps``, writing metrics and checkpoints on the way.

    Everything a step uses is a function of its number: batch ``batches(step)``, key ``fold_in(key, step)``. So a run
    that is killed at any moment and resumed ends with the same bits as one that was not: a checkpoint counts when the
    metrics of its steps are written. With several hosts all of them call this; process 0 writes, and if it cannot,
    every one of them ends at the next checkpoint. Where a scalar or the state is not finite, the run ends with the step
    and the name, and no checkpoint has it.

    Args:
      state: The initial state; on resume its structure, types and places are those of the restored one.
      batches: ``step -> batch``.
      step_fn: ``(state, batch, key, frozen) -> (state, scalars)``, jitted; may donate the state.
      key: Root key of the run.
      num_steps: Steps in all.
      directory: Of the run; checkpoints go into ``checkpoints/``. None writes nothing.
      frozen: Handed to every step.
      resume: Whether to go on from the newest whole checkpoint of the directory, if there is one.
      checkpoint_every: Steps between checkpoints; the last step always writes one.
      fingerprint: Of the run: a checkpoint of another one is refused.
      progress: Whether to show a progress bar.

    Returns:
      The final state.

    Raises:
      NonFiniteError: If the loss, the norm of the gradient, another scalar or the state is not finite.
      ValueError: If the checkpoint to go on from is of another run.
      OSError: If a file cannot be written.
    """
    folder = None if directory is None else os.path.join(directory, "checkpoints")
    start = 0
    if folder is not None and resume:
        start = checkpoint.latest(folder, fingerprint=fingerprint) or 0
    if folder is not None and start:
        state = checkpoint.restore(folder, start, state)
    steps = tqdm(range(start, num_steps), initial=start, total=num_steps, desc="fit", unit="step",
                 disable=not (progress and distributed.is_main()))  # fmt: skip
    line: Line | None = None
    with (
        Journal(directory, resume_step=start if resume else None) as journal,
        checkpoint.Saver(folder, fingerprint=fingerprint) as saver,
    ):
        for step in steps:
            state, scalars = step_fn(state, batches(step), jax.random.fold_in(key, step), frozen)
            if line:  # One step behind: reading a scalar never holds the device up.
                steps.set_postfix_str(f"loss {line.values()['loss']:.4f}")
            line = journal.write(step, scalars)
            if (step + 1) % checkpoint_every == 0 or step + 1 == num_steps:
                saver.save(step + 1, state, after=line.written)
    return state
