"""The training loop, top to bottom."""

import os
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from tiltjax.train import checkpoint
from tiltjax.train.metrics import MetricsWriter
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
    directory: str | os.PathLike,
    frozen: Params = None,
    resume: bool = False,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> TrainState:
    """Runs the step until ``num_steps``, writing metrics and checkpoints on the way.

    Everything a step uses is a function of its number: batch ``batches(step)``, key ``fold_in(key, step)``. So a run
    that is killed at any moment and resumed ends with the same bits as one that was not.

    Args:
      state: The initial state; on resume its structure, types and places are those of the restored one.
      batches: ``step -> batch``.
      step_fn: ``(state, batch, key, frozen) -> (state, scalars)``, jitted; may donate the state.
      key: Root key of the run.
      num_steps: Steps in all.
      directory: Of the run; checkpoints go into ``checkpoints/``.
      frozen: Handed to every step.
      resume: Whether to go on from the newest whole checkpoint, if there is one.
      checkpoint_every: Steps between checkpoints; the last step always writes one.
      progress: Whether to show a progress bar.

    Returns:
      The final state.
    """
    folder = os.path.join(directory, "checkpoints")
    start = (checkpoint.latest(folder) if resume else None) or 0
    if start:
        state = checkpoint.restore(folder, start, state)
    writer = MetricsWriter(directory, resume_step=start if resume else None)
    steps = tqdm(range(start, num_steps), initial=start, total=num_steps, desc="fit", unit="step", disable=not progress)
    pending: tuple[int, PyTree] | None = None
    with writer:
        for step in steps:
            state, scalars = step_fn(state, batches(step), jax.random.fold_in(key, step), frozen)
            if pending:  # One step behind: reading a scalar never holds the device up.
                steps.set_postfix_str(f"loss {_write(writer, *pending):.4f}")
            pending = (step, scalars)
            if (step + 1) % checkpoint_every == 0 or step + 1 == num_steps:
                _write(writer, *pending)
                pending = None
                checkpoint.save(folder, step + 1, state)
    return state


def epoch_batches(num_prompts: int, batch_size: int, *, seed: int) -> Callable[[int], np.ndarray]:
    """Which prompts each step sees: every prompt once per epoch, in an order that depends on seed and epoch only.

    Args:
      num_prompts: How many there are; a last incomplete batch of an epoch is dropped.
      batch_size: Prompts per step.
      seed: Of the order.

    Returns:
      ``step -> indices [batch_size]``.

    Raises:
      ValueError: If ``batch_size`` exceeds ``num_prompts``.

    Example:
      >>> sorted(np.concatenate([epoch_batches(4, 2, seed=0)(step) for step in (0, 1)]).tolist())
      [0, 1, 2, 3]
    """
    if not 1 <= batch_size <= num_prompts:
        raise ValueError(f"batch_size must lie in [1, {num_prompts}] (the number of prompts), got {batch_size}")
    per_epoch = num_prompts // batch_size

    def indices(step: int) -> np.ndarray:
        order = np.random.default_rng([seed, step // per_epoch]).permutation(num_prompts)
        place = step % per_epoch * batch_size
        return order[place : place + batch_size]

    return indices


def _write(writer: MetricsWriter, step: int, scalars: PyTree) -> float:
    values = jax.device_get(scalars)
    writer.write(step, values)
    return float(values["loss"])
