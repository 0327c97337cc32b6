import itertools

import numpy as np
import pytest

from tiltjax.data.buckets import batches_of, bucket_of, choose_buckets, padding_waste


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_other_choice_wastes_less(seed, most):
    lengths = np.random.default_rng(seed).integers(1, 30, 25)
    buckets = choose_buckets(lengths, most=most, multiple=3, saving=0.0)

    def held(choice):
        return sum(min(b for b in choice if b >= length) for length in lengths)

    grid = [*range(3, lengths.max(), 3), lengths.max()]
    tops = [top for top in grid if top >= lengths.max()]
    choices = [(*rest, tops[0]) for k in range(most) for rest in itertools.combinations(grid[:-1], k)]
    assert len(buckets) <= most
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == lengths.max()
    assert held(buckets) == min(map(held, choices))


def test_a_bucket_must_be_worth_its_compilation():
    lengths = [8] * 10 + [16] * 90
    assert choose_buckets(lengths, saving=0.04) == (8, 16)
    assert choose_buckets(lengths, saving=0.06) == (16,)
    assert choose_buckets([5] * 9) == (5,)
    assert choose_buckets([5] * 9, longest=20) == (8,)
    assert choose_buckets([0, 0]) == (1,)


def test_bad_options_are_named():
    for options in ({"most": 0}, {"multiple": 0}, {"saving": -1.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be at least"):
            choose_buckets([1], **options)
    with pytest.raises(ValueError, match="lengths is empty"):
        choose_buckets([])
    with pytest.raises(ValueError, match="at most 8, the largest bucket; got 9"):
        bucket_of([9], (8,))
    for options in ({"most": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be at least 1"):
            batches_of(np.array([[1]]), (4,), **{"batch_size": 1} | options)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("columns", [1, 2])
def test_every_row_once_in_few_shapes(most, columns):
    rng = np.random.default_rng(most)
    lengths = np.stack([rng.integers(1, 65, 50), rng.geometric(0.05, 50).clip(max=100)], axis=1)[:, :columns]
    widths = (70, 128)[:columns]
    plan = batches_of(lengths, widths, batch_size=8, most=most)
    assert len(plan) == 7
    assert sorted(np.concatenate([b.rows[: b.real] for b in plan]).tolist()) == list(range(50))
    assert len({b.lengths for b in plan}) <= most
    for batch in plan:
        assert batch.rows.shape == (8,)
        assert (lengths[batch.rows] <= np.array(batch.lengths)).all()
        assert (np.array(batch.lengths) <= np.array(widths)).all()
    whole = batches_of(lengths, widths, batch_size=8, most=1)
    assert {b.lengths for b in whole} == {widths}
    np.testing.assert_array_equal(np.concatenate([b.rows for b in whole])[:50], np.arange(50))
    waste, before = padding_waste(lengths, plan), padding_waste(lengths, whole)
    np.testing.assert_allclose(before, 1 - lengths.sum(0) / (56 * np.array(widths)))
    assert (waste <= before).all()
    positions = [8 * sum(sum(batch.lengths) for batch in some) for some in (plan, whole)]
    waste, before = (1 - lengths.sum() / held for held in positions)  # Of all columns, as the buckets are chosen.
    assert most < 4 or waste < 0.9 * before
    again = batches_of(lengths.copy(), widths, batch_size=8, most=most)
    assert all(np.array_equal(a.rows, b.rows) and a.lengths == b.lengths for a, b in zip(plan, again, strict=True))


def test_a_bucket_must_be_worth_its_compilation_beside_the_other_columns():
    """Half of the prompts are short, but with 16 long completions of each they are few of the positions."""
    lengths = np.stack([np.repeat([8, 16], 40), np.resize([16, 32, 48, 64], 80)], axis=1)

    def shapes(*counts):
        plan = batches_of(lengths, (16, 64), batch_size=1, counts=counts, most=4, saving=0.06)
        return sorted({batch.lengths for batch in plan})

    assert shapes(1, 16) == [(16, 16), (16, 32), (16, 48), (16, 64)]
    assert shapes(16, 1) == [(8, 64), (16, 64)]
    assert shapes(1, 1) == shapes() == [(16, 32), (16, 64)]


def test_few_shapes_go_to_the_column_that_saves_most():
    lengths = np.stack([np.repeat([8, 64], 40), np.resize([8, 16, 24, 64], 80)], axis=1)
    for columns in (lengths, lengths[:, ::-1]):
        for most, held in ((1, 128), (2, 98), (3, 94), (4, 70)):
            plan = batches_of(columns, (64, 64), batch_size=1, most=most, saving=0.01)
            assert np.mean([sum(batch.lengths) for batch in plan]) == held
