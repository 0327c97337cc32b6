import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.data.candidates import from_tokens
from tiltjax.data.packing import pack, padding, unpack
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

    chex.assert_trees_all_close(both(together), both(alone), rtol=1e-4, atol=1e-5)


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
