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


@pytest.mark.parametrize(("num", "size", "window"), [(23, 4, 3), (64, 4, 4), (64, 4, 64), (30, 7, 3), (9, 9, 2)])
def test_a_window_groups_similar_lengths_and_loses_no_prompt(num, size, window):
    lengths = np.random.default_rng(0).permutation(num)
    order, plain = (epoch_batches(num, size, seed=1, lengths=lengths, window=k) for k in (window, 1))
    per_epoch = num // size
    for epoch in range(3):
        batches, random = (np.stack([of(epoch * per_epoch + i) for i in range(per_epoch)]) for of in (order, plain))
        assert len(np.unique(batches)) == per_epoch * size
        np.testing.assert_array_equal(np.sort(batches, axis=None), np.sort(random, axis=None))
        # The batches of a window, in any order and at any place of the epoch, are its prompts sorted and cut.
        found = {tuple(batch) for batch in batches.tolist()}
        for start in range(0, per_epoch, window):
            part = random[start : start + window].ravel()
            cut = part[np.argsort(lengths[part])].reshape(-1, size)
            assert {tuple(batch) for batch in cut.tolist()} <= found
        spread = [np.ptp(lengths[some], axis=1).sum() for some in (batches, random)]
        assert per_epoch == 1 or spread[0] < spread[1]


def test_a_grouped_order_is_a_function_of_seed_step_and_lengths():
    lengths = np.random.default_rng(0).permutation(64)
    made = [epoch_batches(64, 4, seed=seed, lengths=part, window=8)
            for seed, part in [(1, lengths), (1, lengths.copy()), (2, lengths), (1, lengths[::-1])]]  # fmt: skip
    whole = np.stack([made[0](step) for step in range(48)])
    np.testing.assert_array_equal(whole[47], made[1](47))  # Begun anywhere, asked in any order.
    np.testing.assert_array_equal(whole[::-1], [made[1](step) for step in range(47, -1, -1)])
    assert all((whole != [other(step) for step in range(48)]).any() for other in made[2:])
    assert (whole[:16] != whole[16:32]).any()
    assert (np.diff(lengths[whole[:8]].mean(axis=1)) < 0).any()  # Not the shortest first.
    with pytest.raises(ValueError, match="read-only"):
        made[0](0)[0] = 1


def test_prompts_of_one_length_keep_their_order_within_a_window():
    batches = [[epoch_batches(12, 4, seed=3, lengths=np.zeros(12, int), window=window)(step).tolist()
                for step in range(3)] for window in (1, 3)]  # fmt: skip
    assert sorted(batches[0]) == sorted(batches[1])


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        epoch_batches(11, 4, seed=0, window=0)
    for lengths, got in ((None, 0), (np.ones(10, int), 10)):
        with pytest.raises(ValueError, match=f"lengths must be those of all 11 prompts where window=2, got {got}"):
            epoch_batches(11, 4, seed=0, lengths=lengths, window=2)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        host_batches(DATA.__getitem__, ORDER, num_steps=0)
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        Stream(halves(1)[0], ahead=0)
