import numpy as np
import pytest

from tiltjax.data.pipeline import Stream, epoch_batches, host_batches

DATA = np.random.default_rng(0).normal(size=(11, 3))
ORDER = epoch_batches(11, 4, seed=3)
STEPS = 7


def halves(count, take=DATA.__getitem__):
    """The datasets of ``count`` hosts with equal shares of a batch of 4."""
    each = 4 // count
    return [host_batches(take, ORDER, num_steps=STEPS, rows=np.arange(i * each, (i + 1) * each)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_shares_of_all_hosts_are_the_batch(count):
    for step in range(STEPS):
        parts = [part[step] for part in halves(count)]
        np.testing.assert_array_equal(np.concatenate(parts), DATA[ORDER(step)])


def test_a_host_reads_its_own_rows_only():
    read = []
    second = halves(2, take=lambda rows: read.extend(rows.tolist()) or DATA[rows])[1]
    batches = [second[step] for step in range(STEPS)]
    assert read == np.concatenate([ORDER(step)[2:] for step in range(STEPS)]).tolist()
    assert {batch.shape for batch in batches} == {(2, 3)}


def test_stopped_on_two_hosts_it_goes_on_with_four():
    first = [Stream(part) for part in halves(2)]
    seen = [np.concatenate([stream(step) for stream in first]) for step in range(3)]
    second = [Stream(part, ahead=1) for part in halves(4)]
    seen += [np.concatenate([stream(step) for stream in second]) for step in range(3, STEPS)]
    np.testing.assert_array_equal(seen, [DATA[ORDER(step)] for step in range(STEPS)])


def test_a_stream_reads_ahead_and_nothing_twice():
    read = []
    dataset = host_batches(lambda rows: read.append(rows.tolist()) or rows, ORDER, num_steps=STEPS)
    stream = Stream(dataset)
    for step in range(STEPS):
        np.testing.assert_array_equal(stream(step), ORDER(step))
    assert read == [ORDER(step).tolist() for step in range(STEPS)]
    np.testing.assert_array_equal(stream(2), ORDER(2))  # Back, as after a restart.


def test_the_iterator_of_grain_is_restored_by_its_own_state():
    dataset = host_batches(DATA.__getitem__, ORDER, num_steps=STEPS)
    iterator = iter(dataset.to_iter_dataset())
    next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(STEPS - 1)]
    other = iter(dataset.to_iter_dataset())
    other.set_state(state)
    np.testing.assert_array_equal(list(other), expected)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        host_batches(DATA.__getitem__, ORDER, num_steps=0)
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        Stream(halves(1)[0], ahead=0)
