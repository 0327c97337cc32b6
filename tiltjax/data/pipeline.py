"""Which prompts each step sees, and a grain pipeline that hands every host its share of them.

The whole state of the pipeline is the number of the step: the order is a function of seed and step, and every host cuts
its rows out of the same global batch. So the step that a checkpoint holds restores the pipeline exactly, on any number
of hosts. (The iterator state that grain would write is one file per process, named by their number: it can go on only
with as many.)
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tiltjax.ops.checks import check_at_least
from tiltjax.types import Array, Int, PyTree

__all__ = ["Stream", "epoch_batches", "host_batches"]


def epoch_batches(
    num_prompts: int,
    batch_size: int,
    *,
    seed: int,
    lengths: Int[np.ndarray, " num_prompts"] | None = None,
    window: int = 1,
) -> Callable[[int], np.ndarray]:
    """Which prompts each step sees: every prompt once per epoch, in an order that depends on seed and epoch only.

    A window of k puts prompts of similar length into one batch, so that few of a step's positions are padding: the
    epoch's order is cut into windows of k batches, each is sorted by length and cut into batches, and the batches of
    the whole epoch are shuffled again. A batch is then no random draw of the prompts: its gradient differs from that of
    the epoch by noise that depends on its length, and is larger where length and loss go together. Over an epoch every
    prompt counts as often as before.

    Args:
      num_prompts: How many there are; a last incomplete batch of an epoch is dropped, before anything is sorted.
      batch_size: Prompts per step.
      seed: Of the order.
      lengths: Of every prompt, in whatever unit; where there is a window, the order depends on them too.
      window: Batches that are sorted together; 1 leaves every batch a random one.

    Returns:
      ``step -> indices [batch_size]``, not to be written to.

    Raises:
      ValueError: If ``batch_size`` exceeds ``num_prompts``, ``window`` < 1, or there is a window but not the length of
        every prompt.

    Example:
      >>> sorted(np.concatenate([epoch_batches(4, 2, seed=0)(step) for step in (0, 1)]).tolist())
      [0, 1, 2, 3]
      >>> order = epoch_batches(4, 2, seed=0, lengths=np.array([9, 1, 8, 2]), window=2)
      >>> sorted(sorted(order(step).tolist()) for step in (0, 1))
      [[0, 2], [1, 3]]
    """
    if not 1 <= batch_size <= num_prompts:
        raise ValueError(f"batch_size must lie in [1, {num_prompts}] (the number of prompts), got {batch_size}")
    check_at_least("window", window, 1)
    known = 0 if lengths is None else len(lengths)
    if window > 1 and known != num_prompts:
        raise ValueError(f"lengths must be those of all {num_prompts} prompts where window={window}, got {known}")
    per_epoch = num_prompts // batch_size

    @functools.lru_cache(maxsize=2)
    def batches(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(num_prompts)[: per_epoch * batch_size]
        if lengths is not None and window > 1:
            cuts = range(window * batch_size, len(order), window * batch_size)
            parts = (part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, cuts))
            order = np.concatenate(list(parts)).reshape(per_epoch, batch_size)[rng.permutation(per_epoch)]
        order = order.reshape(per_epoch, batch_size)
        order.flags.writeable = False
        return order

    return lambda step: batches(step // per_epoch)[step % per_epoch]


def host_batches(
    take: Callable[[Int[Array, " _"]], PyTree],
    order: Callable[[int], np.ndarray],
    *,
    num_steps: int,
    rows: Int[Array, " _"] | slice = slice(None),
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
