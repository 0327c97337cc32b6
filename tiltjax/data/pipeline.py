"""Which prompts each step sees, and a grain pipeline that hands every host its share of them.

The whole state of the pipeline is the number of the step: the order is a function of seed and step, and every host cuts
its rows out of the same global batch. So the step that a checkpoint holds restores the pipeline exactly, on any number
of hosts. (The iterator state that grain would write is one file per process, named by their number: it can go on only
with as many.)
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tiltjax.ops.checks import check_at_least
from tiltjax.types import Array, Int, PyTree

__all__ = ["Stream", "epoch_batches", "host_batches"]


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


def host_batches(
    take: Callable[[Int[Array, "_"]], PyTree],
    order: Callable[[int], np.ndarray],
    *,
    num_steps: int,
    rows: Int[Array, "_"] | slice = slice(None),
) -> Any:
    """A grain dataset whose element ``step`` is this host's share of that step's batch.

    Nothing but the host's own rows is ever taken. It is a dataset like any other: map it, slice it, prefetch it.

    Args:
      take: ``indices -> batch``: reads those rows.
      order: ``step -> indices`` of the global batch, such as `epoch_batches`.
      num_steps: Its length.
      rows: Which rows of the global batch are this host's (`tiltjax.train.distributed.host_rows`); the default is all.

    Returns:
      A ``grain.MapDataset``, random access.

    Raises:
      ValueError: If ``num_steps`` < 1.

    Example:
      >>> data = np.arange(10, 16)
      >>> halves = [host_batches(data.__getitem__, epoch_batches(6, 4, seed=0), num_steps=3, rows=rows)
      ...           for rows in (slice(0, 2), slice(2, 4))]
      >>> whole = host_batches(data.__getitem__, epoch_batches(6, 4, seed=0), num_steps=3)
      >>> all((np.concatenate([half[step] for half in halves]) == whole[step]).all() for step in range(3))
      True
    """
    import grain

    check_at_least("num_steps", num_steps, 1)
    return grain.MapDataset.range(num_steps).map(lambda step: take(order(int(step))[rows]))


class Stream:
    """``step -> batch`` of a grain dataset, read ahead of the training step by a thread of grain's.

    Asked for the steps in turn it never reads one twice; asked for another step (a resumed run) it begins there.

    Args:
      dataset: From `host_batches`.
      ahead: Batches kept ready.

    Raises:
      ValueError: If ``ahead`` < 1.
    """

    def __init__(self, dataset: Any, *, ahead: int = 2):
        check_at_least("ahead", ahead, 1)
        self._dataset, self._ahead = dataset, ahead
        self._next: int | None = None
        self._iterator: Any = None

    def __call__(self, step: int) -> PyTree:
        """The batch of a step, in ``[0, len(dataset))``."""
        import grain

        if step != self._next:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._ahead)
            self._iterator = iter(self._dataset[step:].to_iter_dataset(options))
        self._next = step + 1
        return next(self._iterator)
