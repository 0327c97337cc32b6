import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.data.candidates import from_tokens
from tiltjax.data.packing import pack, pack_sequences, padding, rows_needed, unpack
from tiltjax.models.config import TransformerConfig
from tiltjax.models.segments import Segments
from tiltjax.models.transformer import Transformer

RNG = np.random.default_rng(0)
B, N = 7, 2
SMALL = dict(vocab_size=32, features=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_features=24, rotary_dim=8,
             remat="none")  # fmt: skip


def tokens(longest):
    return RNG.integers(1, 32, RNG.integers(1, longest + 1)).tolist()


BATCH = from_tokens([tokens(9) for _ in range(B)], [[tokens(5) for _ in range(N)] for _ in range(B)], pad_id=0)
PACKED = pack(BATCH, length=12, most=3, pad_id=7)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4, "rope_theta": None, "rotary_dim": 0}])
def test_packed_is_unpacked(changes):
    """Log-probabilities and gradients, with rotary positions and with learned ones under a window."""
    model = Transformer(jax.random.key(0), TransformerConfig(**SMALL | changes))
    weights = RNG.normal(size=BATCH.completion.shape).astype(np.float32)
    segments = Segments(prompt=PACKED.prompt_segment, completion=PACKED.segment)

    def alone(model):
        return model.score(BATCH.prompt, BATCH.prompt_mask, BATCH.completion).logp

    def together(model):
        logp = model.score(PACKED.prompt, PACKED.prompt_mask, PACKED.completion, segments=segments).logp
        return unpack(PACKED, logp)

    def both(score):
        function = lambda m: (jnp.sum(weights * (x := jnp.where(BATCH.completion_mask, score(m), 0))), x)
        grad, logp = jax.jit(jax.grad(function, has_aux=True))(model)
        return jax.tree.leaves(grad), logp

    (grad, logp), expected = both(together), both(alone)
    chex.assert_trees_all_close((grad, logp), expected, rtol=1e-4, atol=1e-5)
    # As whole sequences: every candidate's log-probability by a weight of its own.
    each = RNG.normal(size=(B, N)).astype(np.float32)
    rows = pack_sequences(BATCH, each, length=24)
    whole = jax.jit(model.score_sequences)(rows.token, rows.segment).logp
    total = np.sum(np.float64(whole) * rows.weight[:, 1:])
    assert total == pytest.approx(np.sum(each * np.float64(logp).sum(axis=-1)), rel=1e-5, abs=1e-4)


def test_every_candidate_is_packed_once_and_padding_shrinks():
    assert len(np.unique(PACKED.place)) == B * N
    np.testing.assert_array_equal(np.asarray(unpack(PACKED, PACKED.completion.astype(np.float32))), BATCH.completion)
    np.testing.assert_array_equal(
        np.asarray(unpack(PACKED, PACKED.completion_mask.astype(np.float32))), BATCH.completion_mask
    )
    assert PACKED.prompt_mask.sum() == BATCH.prompt_mask.sum()
    assert len(PACKED.prompt) < B
    before, after = padding(BATCH), padding(PACKED)
    assert before["prompt"] == pytest.approx(1 - BATCH.prompt_mask.sum() / BATCH.prompt_mask.size)
    assert after["prompt"] == pytest.approx(1 - BATCH.prompt_mask.sum() / PACKED.prompt_mask.size)
    assert PACKED.prompt_mask.size < BATCH.prompt_mask.size
    assert set(before) == {"prompt", "completion"}


def test_rows_of_nothing_are_finite():
    more = pack(BATCH, length=12, most=3, rows=len(PACKED.prompt) + 2)
    assert more.prompt_mask[-2:].sum() == 2
    assert not more.completion_mask[-2:].any()
    np.testing.assert_array_equal(more.place, PACKED.place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 3}, "length must be at least the longest prompt, 8 tokens, got 3"),
        ({"length": 12, "most": 0}, "most must be at least 1, got 0"),
        ({"length": 12, "rows": 1}, "rows must be at least"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pack(BATCH, **options)


def test_sequences_are_laid_down_whole_and_once():
    """Every sequence of weight above 0 can be read back, with its weight on its completion and on nothing else."""
    weights = np.where(RNG.random((B, N)) < 0.3, 0, RNG.random((B, N)))
    weights[2] = 0
    rows = pack_sequences(BATCH, weights, length=24, rows=9, pad_id=7)
    seen = []
    for r, g in {(r, g) for r, g in np.ndindex(9, 24) if (rows.segment[r] == g).any()}:
        (place,) = np.nonzero(rows.segment[r] == g)
        assert (np.diff(place) == 1).all()
        prompt = place[rows.weight[r, place] == 0]
        completion = place[rows.weight[r, place] > 0]
        assert prompt.max() < completion.min()
        (weight,) = set(rows.weight[r, completion].tolist())
        seen.append((weight, rows.token[r, prompt].tolist(), rows.token[r, completion].tolist()))
    expected = [
        (float(np.float32(weights[b, n])), BATCH.prompt[b][BATCH.prompt_mask[b]].tolist(),
         BATCH.completion[b, n][BATCH.completion_mask[b, n]].tolist())
        for b, n in np.argwhere(weights)
    ]  # fmt: skip
    assert sorted(seen) == sorted(expected)
    assert (rows.token[rows.segment < 0] == 7).all()
    assert rows.count.sum() == B
    sizes = [len(prompt) + len(completion) for _, prompt, completion in expected]
    assert rows_needed(sizes, length=24) == len({r for r in range(9) if (rows.segment[r] >= 0).any()}) < len(sizes)
    for options, message in (({"length": 3}, "length must be at least the longest"), ({"rows": 1}, "rows must be")):
        with pytest.raises(ValueError, match=message):
            pack_sequences(BATCH, weights, **{"length": 14} | options)
