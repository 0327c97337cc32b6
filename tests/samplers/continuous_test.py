import functools

import jax
import numpy as np
import pytest

from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.samplers.continuous import decode_queue, grid_of, occupancy
from tiltjax.samplers.decode import candidate_keys, decode

P, N, S, T, V = 7, 5, 6, 9, 32
STOPS, PAD = (3, 7, 11, 19, 23, 27), 0
RNG = np.random.default_rng(0)
PROMPT = RNG.integers(1, V, (P, S))
PROMPT_MASK = np.arange(S) < np.array([6, 1, 3, 2, 5, 4, 1])[:, None]
OPTIONS = {"num_candidates": N, "max_tokens": T, "eos_id": STOPS, "pad_id": PAD}
FILTERED = {"temperature": 0.8, "top_k": 9, "top_p": 0.9}


@functools.cache
def model(window=None):
    config = TransformerConfig(vocab_size=V, features=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
                               mlp_features=16, rotary_dim=8, sliding_window=window)  # fmt: skip
    return Transformer(jax.random.key(3), config)


@functools.cache
def queue(groups, slots, **options):
    @jax.jit
    def run(key, model, prompt, prompt_mask):
        prefill = functools.partial(model.prefill, num_candidates=min(slots, N), max_tokens=T)
        grid = {"groups": groups, "slots": slots}
        return decode_queue(
            key, prompt, prompt_mask, prefill, model.refill, model.decode_step, **grid, **OPTIONS | options
        )

    return run


@functools.cache
def one_by_one(window, **options):
    """Every prompt alone, by plain decoding, with the key that it has in a queue."""
    model_ = model(window)

    @jax.jit
    def run(key, prompt, prompt_mask):
        logits, cache = model_.prefill(prompt, prompt_mask, num_candidates=N, max_tokens=T)
        return decode(key[None], logits, cache, model_.decode_step, **OPTIONS | options)

    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(P)]
    parts = [run(keys[i], PROMPT[i : i + 1], PROMPT_MASK[i : i + 1]) for i in range(P)]
    return jax.tree.map(lambda *x: np.concatenate([np.atleast_1d(part) for part in x]), *parts)


def simulated(ends, groups, slots):
    """Rounds of drawing that a clerk with G tables of W chairs needs: one token a round from every chair."""
    waiting, tables = [list(row) for row in ends], [[] for _ in range(groups)]
    hands = [[] for _ in range(groups)]
    rounds = 0
    while True:
        for g in range(groups):
            hands[g] = [left for left in hands[g] if left > 0]
            if not hands[g] and not tables[g] and waiting:
                tables[g] = waiting.pop(0)
            while len(hands[g]) < slots and tables[g]:
                hands[g].append(tables[g].pop(0))
        if not any(hands):
            return rounds
        rounds += 1
        hands = [[left - 1 for left in hand] for hand in hands]


@pytest.mark.parametrize(
    ("groups", "slots", "window", "options"),
    [(2, 3, None, {}), (3, 1, 3, FILTERED), (100, 100, None, {})],
    ids=["shared", "windowed", "together"],
)
def test_the_schedule_moves_no_token(groups, slots, window, options):
    # A key for each candidate or one for all: the same draws.
    key = candidate_keys(jax.random.key(0), P, N) if groups > P else jax.random.key(0)
    out = queue(groups, slots, **options)(key, model(window), PROMPT, PROMPT_MASK)
    expected = one_by_one(window, **options)
    np.testing.assert_array_equal(out.completion, expected.completion)
    np.testing.assert_array_equal(out.completion_mask, expected.completion_mask)
    for name in ("token_logp", "sampled_token_logp"):
        np.testing.assert_allclose(getattr(out, name), getattr(expected, name), atol=1e-5)
    np.testing.assert_array_equal(out.support, expected.support)
    lengths, grid = expected.completion_mask.sum(-1), min(groups, P) * min(slots, N)
    assert len(set(lengths.reshape(-1).tolist())) > T / 2
    rounds = int(out.steps) + 1
    assert rounds == simulated(lengths, groups, slots)
    assert rounds >= -(-lengths.sum() // grid)
    assert occupancy(out, grid) == pytest.approx(lengths.sum() / (grid * rounds))
    if slots == 1:  # No candidate waits for another one of its prompt: only the end of the queue is ragged.
        assert occupancy(out, grid) > 0.8
    if groups > P:  # Everything at once is plain decoding.
        assert rounds == lengths.max()


def test_a_key_for_each_candidate_is_the_key_of_its_place():
    some = np.array([4, 2, 0, 3, 3])
    keys = candidate_keys(jax.random.key(0), P, N)[:, some]
    out = queue(100, 100)(keys, model(), PROMPT, PROMPT_MASK)
    np.testing.assert_array_equal(out.completion, one_by_one(None).completion[:, some])


def test_prompts_that_fill_up_draw_nothing():
    rows = np.array([0, 1, 2, 3, 4, 0, 0])
    mask = PROMPT_MASK[rows] & (np.arange(P) < 5)[:, None]
    for grid, key in (((2, 3), jax.random.key(0)), ((100, 100), candidate_keys(jax.random.key(0), P, N))):
        out = queue(*grid)(key, model(), PROMPT[rows], mask)
        assert not out.completion_mask[5:].any()
        assert (out.completion[5:] == PAD).all()
        assert (out.token_logp[5:] == 0).all()
        np.testing.assert_array_equal(out.completion[:5], one_by_one(None).completion[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    grid = {"groups": 1, "slots": 1}
    with pytest.raises(ValueError, match=f"^{message}"):
        decode_queue(
            jax.random.key(0), PROMPT, PROMPT_MASK, lambda *a: a, lambda *a: a, lambda *a: a, **grid | OPTIONS | options
        )


def test_the_grid_fills_its_slots_and_no_more():
    for slots in (1, 3, 16, 100):
        for P in (1, 2, 9, 64):
            for n in (1, 5, 16):
                groups, width = grid_of(slots, P, n)
                assert 1 <= groups <= P
                assert 1 <= width <= n
                assert groups * width <= slots
                assert groups == P or width == min(n, slots, -(-n // 4)) or (groups + 1) * width > slots
    with pytest.raises(ValueError, match=r"^slots must be at least 1, got 0"):
        grid_of(0, 1, 1)
