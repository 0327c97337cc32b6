import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.samplers.decode import candidate_keys, decode
from tiltjax.train.sharding import batch_sharding, make_mesh

B, N, S, T, V = 8, 4, 4, 5, 32
STOPS, PAD = (3, 7, 11, 19, 23), 0
PROMPT = np.random.default_rng(0).integers(1, V, (B, S))
PROMPT_MASK = np.arange(S) < np.array([4, 1, 2, 3, 4, 2, 1, 3])[:, None]


@functools.cache
def tiny_model(vocab_size=V):
    config = TransformerConfig(vocab_size=vocab_size, features=16, num_layers=1, num_heads=2, num_kv_heads=1,
                               head_dim=8, mlp_features=16, rotary_dim=8)  # fmt: skip
    return Transformer(jax.random.key(3), config)


@functools.cache
def sampler(**options):
    """One compiled sampler per set of options, with several tokens that end a completion."""

    @jax.jit
    def run(key, model, prompt, prompt_mask):
        logits, cache = model.prefill(prompt, prompt_mask, num_candidates=N, max_tokens=T)
        options_ = {"num_candidates": N, "max_tokens": T, "eos_id": STOPS, "pad_id": PAD} | options
        return decode(key, logits, cache, model.decode_step, **options_)

    return run


@functools.cache
def drawn(seed=0, **options):
    return jax.device_get(sampler(**options)(jax.random.key(seed), tiny_model(), PROMPT, PROMPT_MASK))


@functools.cache
def scorer(temperature):
    return jax.jit(lambda model, completion: model.score(PROMPT, PROMPT_MASK, completion, temperature=temperature).logp)


def score(out, temperature=1.0):
    logp = scorer(temperature)(tiny_model(), out.completion)
    return np.where(out.completion_mask, logp, 0)


hidden = jax.jit(lambda model, completion: model.hidden(PROMPT, PROMPT_MASK, completion))


def logits_of(out):
    """Next-token logits at every completion position, ``[B, N, T, V]`` in float64."""
    model = tiny_model()
    states = np.asarray(hidden(model, out.completion), np.float64)
    return states @ np.asarray(model.projection(), np.float64).T


def test_logp_is_the_models_score():
    out = drawn()
    assert out.completion.shape == (B, N, T)
    np.testing.assert_allclose(out.token_logp, score(out), atol=1e-4)
    np.testing.assert_array_equal(out.sampled_token_logp, out.token_logp)


def test_sampled_logp_is_that_of_the_temperature():
    out = drawn(temperature=0.7)
    np.testing.assert_allclose(out.token_logp, score(out), atol=1e-4)
    np.testing.assert_allclose(out.sampled_token_logp, score(out, 0.7), atol=1e-4)
    assert np.abs(out.sampled_token_logp - out.token_logp).max() > 0.01


def test_sampled_logp_is_that_of_the_filtered_distribution():
    out = drawn(temperature=0.8, top_k=6, top_p=0.7)
    np.testing.assert_allclose(out.token_logp, score(out), atol=1e-4)
    narrowed = 0
    for place in zip(*np.nonzero(out.completion_mask), strict=True):
        p = softmax(logits_of(out)[place] / 0.8)
        order = np.argsort(-p)[:6]
        kept = np.cumsum(p[order]) / p[order].sum()
        order = order[: 1 + np.searchsorted(kept, 0.7)]
        assert out.completion[place] in order
        expected = np.log(p[out.completion[place]] / p[order].sum())
        assert out.sampled_token_logp[place] == pytest.approx(expected, abs=1e-4)
        assert set(np.flatnonzero(np.unpackbits(out.support[place], bitorder="little"))) == set(order)
        narrowed += len(order) < 6
    assert narrowed > B * N / 2
    np.testing.assert_array_equal(out.support[~out.completion_mask], 255)
    assert drawn(temperature=0.7).support is None


def test_padding_follows_the_first_end():
    out = drawn()
    is_stop = np.isin(out.completion, STOPS)
    lengths = set()
    for tokens, mask, ends, *logp in zip(
        *(x.reshape(B * N, T) for x in (out.completion, out.completion_mask, is_stop)),
        *(x.reshape(B * N, T) for x in (out.token_logp, out.sampled_token_logp)),
        strict=True,
    ):
        length = int(ends.argmax()) + 1 if ends.any() else T
        np.testing.assert_array_equal(mask, np.arange(T) < length)
        assert (tokens[length:] == PAD).all()
        assert not ends[: length - 1].any()
        for values in logp:
            assert (values[length:] == 0).all()
            assert (values[:length] < 0).all()
        lengths.add(length)
    assert {1, 2, T} <= lengths
    assert len(set(out.completion[is_stop].tolist())) > 1


def test_greedy_is_the_argmax_chain():
    out = drawn(temperature=0.0)
    best = logits_of(out).argmax(-1)
    np.testing.assert_array_equal(out.completion[out.completion_mask], best[out.completion_mask])
    np.testing.assert_allclose(out.token_logp, score(out), atol=1e-4)
    np.testing.assert_array_equal(out.sampled_token_logp, 0)
    np.testing.assert_array_equal(out.completion, drawn(1, temperature=0.0).completion)
    np.testing.assert_array_equal(out.completion, out.completion[:, :1].repeat(N, axis=1))


def test_the_key_decides_and_candidates_differ():
    out = drawn()
    again = sampler()(jax.random.key(0), tiny_model(), PROMPT, PROMPT_MASK)
    np.testing.assert_array_equal(out.completion, again.completion)
    assert (out.completion != drawn(1).completion).any()
    firsts = [len(set(row)) for row in out.completion[..., 0].tolist()]
    assert np.mean(firsts) > N / 2
    same = np.broadcast_to(PROMPT[:1], (B, S)), np.broadcast_to(PROMPT_MASK[:1], (B, S))
    rows = jax.device_get(sampler()(jax.random.key(0), tiny_model(), *same).completion)
    assert len({row.tobytes() for row in rows}) == B


def test_a_key_for_each_prompt_is_the_key_of_its_place():
    """Fewer prompts in another order draw the same, each with its own key."""
    out, rows = drawn(), np.array([6, 1, 1, 0, 2, 3, 4, 7])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), rows)
    mixed = sampler()(keys, tiny_model(), PROMPT[rows], PROMPT_MASK[rows])
    np.testing.assert_array_equal(mixed.completion, out.completion[rows])
    np.testing.assert_allclose(mixed.token_logp, out.token_logp[rows], atol=1e-6)


def test_a_key_for_each_candidate_is_the_key_of_its_place():
    """Some candidates in another order draw the same, each with its own key; so a part of them can be drawn apart."""
    out, some = drawn(), np.array([2, 0, 3, 3])
    keys = candidate_keys(jax.random.key(0), B, 2 * N)[:, :N]
    mixed = sampler()(keys[:, some], tiny_model(), PROMPT, PROMPT_MASK)
    np.testing.assert_array_equal(mixed.completion, out.completion[:, some])
    np.testing.assert_allclose(mixed.token_logp, out.token_logp[:, some], atol=1e-6)
    with pytest.raises(AssertionError, match="shape"):
        candidate_keys(keys, B, N - 1)


def test_other_prompts_do_not_matter():
    out = drawn()
    others = PROMPT.copy()
    others[1:] = (others[1:] * 5 + 3) % V
    changed = sampler()(jax.random.key(0), tiny_model(), others, np.roll(PROMPT_MASK, 1, 0) | PROMPT_MASK)
    assert (changed.completion[1:] != out.completion[1:]).any()
    for name in ("completion", "completion_mask", "token_logp"):
        np.testing.assert_array_equal(getattr(changed, name)[0], getattr(out, name)[0])


def test_prompts_over_eight_devices():
    mesh = make_mesh("data:8")
    prompts = jax.device_put((PROMPT, PROMPT_MASK), batch_sharding(mesh))
    sharded = sampler()(jax.random.key(0), tiny_model(), *prompts)
    assert sharded.completion.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    np.testing.assert_array_equal(sharded.completion, drawn().completion)
    np.testing.assert_array_equal(sharded.completion_mask, drawn().completion_mask)
    np.testing.assert_allclose(sharded.token_logp, drawn().token_logp, atol=1e-6)


def test_every_sequence_comes_at_its_rate():
    """All 21 completions of up to two tokens out of five, enumerated with the scorer."""
    eos, n = 4, 10_000
    model = jax.tree.map(lambda x: 2 * x, tiny_model(5))
    prompt, mask = jnp.asarray([[1, 2, 0]]), jnp.asarray([[True, True, False]])

    @jax.jit
    def law(completion):
        return model.score(prompt, mask, completion).logp

    @jax.jit
    def draw(key):
        logits, cache = model.prefill(prompt, mask, num_candidates=n, max_tokens=2)
        return decode(
            key, logits, cache, model.decode_step, num_candidates=n, max_tokens=2, eos_id=eos, pad_id=0
        )  # fmt: skip

    pairs = np.array([(a, b) for a in range(4) for b in range(5)] + [(eos, 0)])
    logp = np.asarray(law(pairs[None]), np.float64)[0]
    p = np.exp(logp[:, 0] + np.where(pairs[:, 0] == eos, 0, logp[:, 1]))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 * p.min()
    out = draw(jax.random.key(0))
    place = {tuple(pair): i for i, pair in enumerate(pairs.tolist())}
    count = np.bincount([place[tuple(row)] for row in out.completion[0].tolist()], minlength=len(p))
    statistic, df = np.sum((count - n * p) ** 2 / (n * p)), len(p) - 1
    assert statistic < df + 4 * np.sqrt(2 * df), statistic


def test_tokens_are_independent_draws_of_fixed_logits():
    row = np.array([0.0, 1.0, -1.0, 0.5, -np.inf])
    rows, draws = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (4, 5)), (4, 32, 64)

    def step(token, cache):
        return jnp.broadcast_to(rows[:, None], (*token.shape, 5)), cache

    out = jax.jit(
        lambda key: decode(key, rows, None, step, num_candidates=32, max_tokens=64, eos_id=4, pad_id=4).completion
    )(jax.random.key(0))
    assert out.shape == draws
    law, token = softmax(row), np.asarray(out)
    assert (token < 4).all()
    # Neighbours in time, among candidates and among prompts: each pair as often as the product of its laws says.
    expected = np.outer(law, law)[:4, :4].reshape(-1)
    for axis in range(3):
        first, second = (np.take(token, range(i, token.shape[axis], 2), axis) for i in (0, 1))
        count = np.bincount((4 * first + second).reshape(-1), minlength=16)
        statistic = np.sum((count - first.size * expected) ** 2 / (first.size * expected))
        assert statistic < 15 + 4 * np.sqrt(30), (axis, statistic)


CALLS = []


@functools.cache
def ending(max_tokens):
    """Decoding that ends candidate (b, n) at token ``ends[b, n]``; every step that is executed adds to `CALLS`."""

    @jax.jit
    def run(ends):
        def step(token, t):
            jax.debug.callback(lambda: CALLS.append(1))
            wanted = jnp.where(ends == t + 1, 8, 5)
            return jnp.where(wanted[..., None] == jnp.arange(10)[None, None], 0.0, -1e9), t + 1

        first = jnp.where(jnp.arange(10)[None] == jnp.where(ends[:, :1] == 0, 9, 5), 0.0, -1e9)
        options = {"num_candidates": 2, "max_tokens": max_tokens, "eos_id": (9, 8), "pad_id": 0}
        return decode(jax.random.key(0), first, jnp.int32(0), step, **options)

    return run


@pytest.mark.parametrize(
    ("ends", "max_tokens", "steps"),
    [
        ([[1, 3], [2, 1]], 6, 3),
        ([[0, 0], [0, 0]], 6, 0),
        ([[1, 99], [2, 1]], 6, 5),
        ([[1, 5], [2, 1]], 6, 5),
        ([[99, 99], [99, 99]], 1, 0),
    ],
)
def test_the_loop_stops_with_the_last_live_candidate(ends, max_tokens, steps):
    CALLS.clear()
    out = jax.block_until_ready(ending(max_tokens)(jnp.asarray(ends)))
    jax.effects_barrier()
    assert len(CALLS) == steps == int(out.steps)
    np.testing.assert_array_equal(out.completion_mask, np.arange(max_tokens) <= np.array(ends)[..., None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number above 0, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 0.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"temperature": 0.0, "top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    options = {"num_candidates": 2, "max_tokens": 3, "eos_id": 1, "pad_id": 0} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        decode(
            jax.random.key(0), jnp.zeros((1, 4)), None, lambda token, cache: (jnp.zeros((1, 2, 4)), cache), **options
        )
