import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.worlds import CONFIG, ragged_candidates, tiny_model
from tiltjax.data import candidates as batches
from tiltjax.models.transformer import Transformer
from tiltjax.samplers.decode import Decoded
from tiltjax.train import rollout
from tiltjax.train.finite import NonFiniteError
from tiltjax.train.rollout import collect, make_sampler, make_scorer, score_all
from tiltjax.train.sharding import batch_sharding, make_mesh, shard

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12], [5]]
N, T, EOS, PAD = 3, 4, 2, 0
greedy = functools.cache(
    functools.partial(make_sampler, num_candidates=N, max_tokens=T, eos_id=EOS, pad_id=PAD, temperature=0.0)
)
scorer = functools.cache(make_scorer)


@functools.cache
def sampler_of(**options):
    """Ragged completions: eight tokens out of 32 end one."""
    options = {"num_candidates": N} | options
    return make_sampler(max_tokens=T, eos_id=tuple(range(3, 32, 4)), pad_id=PAD, **options)


class Counted:
    """Stands in for a sampler: its tokens tell key and prompt; notes its calls, and may be interrupted."""

    def __init__(self, interrupt_at=None):
        self.calls, self.interrupt_at, self.shapes, self.events = 0, interrupt_at, [], []

    def __call__(self, key, model, prompt, prompt_mask, index):
        self.calls += 1
        self.shapes.append(prompt.shape)
        self.events.append(("drawn", np.asarray(index).tolist()))
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        noise = jax.vmap(lambda key: jax.random.randint(key, (N, T), 0, 1000))(keys)
        return Decoded(
            completion=noise + 1000 * prompt[:, :1, None],
            completion_mask=np.arange(T)[None, None] < 1 + noise[..., :1] % T,
            token_logp=0.0 * noise,
            sampled_token_logp=-noise.astype(np.float32),
        )


@functools.cache
def telling_model():
    """It has the tokens of `Counted`."""
    return Transformer(jax.random.key(0), dataclasses.replace(CONFIG, vocab_size=13_000))


def gather(sampler, **options):
    options = {"batch_size": 2, "fingerprint": "a", "prompts": PROMPTS} | options
    model = telling_model() if isinstance(sampler, Counted) else tiny_model()
    return collect(jax.random.key(0), model, sampler=sampler, pad_id=PAD, **options)


def test_every_prompt_once_in_order_and_a_short_last_batch():
    sampler = Counted()
    out = gather(sampler)
    assert sampler.calls == 3
    assert out.completion.shape == (5, N, T)
    np.testing.assert_array_equal(out.prompt, [[5, 6, 7], [8, PAD, PAD], [9, 10, PAD], [11, 12, PAD], [5, PAD, PAD]])
    np.testing.assert_array_equal(out.prompt_mask.sum(1), [3, 1, 2, 2, 1])
    np.testing.assert_array_equal(
        out.completion // 1000, np.broadcast_to(out.prompt[:, :1, None], out.completion.shape)
    )
    noise = out.completion % 1000
    np.testing.assert_array_equal(out.old_token_logp, -noise)
    np.testing.assert_array_equal(out.completion_mask, np.arange(T) < 1 + noise[..., :1] % T)
    assert len({row.tobytes() for row in noise}) == 5
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(out))


def test_kept_batches_are_not_drawn_again(tmp_path):
    whole, first, second, third = gather(Counted()), Counted(interrupt_at=3), Counted(), Counted()
    with pytest.raises(KeyboardInterrupt):
        gather(first, directory=tmp_path / "train")
    # The second batch was under way when the third one was begun.
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["00000.npz"]
    chex.assert_trees_all_equal(gather(second, directory=tmp_path / "train"), whole)
    chex.assert_trees_all_equal(gather(third, directory=tmp_path / "train"), whole)
    assert (second.calls, third.calls) == (2, 0)


def length_reward(events, fail_at=None):
    def reward(rows, part):
        events.append(("rewarded", rows.tolist()))
        if len([e for e in events if e[0] == "rewarded"]) == fail_at:
            raise ValueError("no reward")
        np.testing.assert_array_equal(part.prompt[:, 0], [PROMPTS[i][0] for i in rows])
        return part.completion_mask.sum(-1).astype(np.float32) + 100 * rows[:, None]

    return reward


def test_a_batch_is_rewarded_while_the_next_is_drawn(tmp_path):
    sampler = Counted()
    out = gather(sampler, reward=length_reward(sampler.events), directory=tmp_path)
    batches_, order = ([0, 1], [2, 3], [4]), []
    for i, rows in enumerate(batches_):
        order += [("drawn", [*rows, *rows][:2])] + ([("rewarded", batches_[i - 1])] if i else [])
    assert sampler.events == [*order, ("rewarded", [4])]
    np.testing.assert_array_equal(out.reward, out.completion_mask.sum(-1) + 100 * np.arange(5)[:, None])
    again = Counted()
    chex.assert_trees_all_equal(gather(again, reward=length_reward(again.events), directory=tmp_path), out)
    assert again.events == []


def test_a_reward_that_fails_costs_no_candidate(tmp_path):
    first, second = Counted(), Counted()
    with pytest.raises(ValueError, match="no reward"):
        gather(first, reward=length_reward(first.events, fail_at=2), directory=tmp_path)
    out = gather(second, reward=length_reward(second.events), directory=tmp_path)
    assert [rows for event, rows in second.events if event == "rewarded"] == [[2, 3], [4]]
    assert second.calls == 1
    chex.assert_trees_all_equal(out, gather(Counted(), reward=length_reward([])))


@pytest.mark.robustness(
    "Numbers",
    given="a log-probability that is NaN or infinite, of the sampler or of the scorer",
    outcome="the run ends with the name, the prompt and the candidate; the batch is not kept",
)
def test_a_log_probability_that_is_not_finite_is_named(tmp_path):
    def sampler(*arguments):
        drawn = Counted()(*arguments)
        bad = (np.asarray(arguments[-1]) == 3)[:, None, None] & (np.arange(N) == 1)[:, None]
        return dataclasses.replace(drawn, token_logp=np.where(bad, np.nan, drawn.token_logp))

    with pytest.raises(NonFiniteError, match="sample: the log-probability is nan at prompt 3, candidate 1"):
        gather(sampler, directory=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["00000.npz"]

    def minus_infinity(model, part):
        return np.where(np.asarray(part.prompt)[:, :1] == 1, -np.inf, np.zeros(part.completion.shape[:2], np.float32))

    candidates = batches.from_tokens([[5], [7], [1], [9]], [[[3]] * N] * 4, pad_id=PAD)
    with pytest.raises(NonFiniteError, match="judge: what the model says is -inf at prompt 2, candidate 0"):
        score_all(None, candidates, batch_size=2, scorer=minus_infinity, description="judge")


def test_buckets_move_nothing_but_padding(caplog, tmp_path):
    prompts = [[5 + i] * (20 if i % 3 == 0 else 2) for i in range(9)]
    short, long = Counted(), Counted()
    with caplog.at_level("INFO", logger="tiltjax.train.rollout"):
        out = gather(short, prompts=prompts, directory=tmp_path)
    chex.assert_trees_all_equal(out, gather(long, prompts=prompts, buckets=1))
    assert short.shapes == [(2, 8)] * 3 + [(2, 20)] * 2
    assert long.shapes == [(2, 20)] * 5
    assert "9 rows in 5 batches of 2 shapes (compilations) [(8,), (20,)]; padding 44%, in one shape 64%" in caplog.text
    with pytest.raises(ValueError, match=r"00000\.npz: made from other prompts, or cut into other batches"):
        gather(Counted(), prompts=prompts, directory=tmp_path, buckets=1)


def test_a_queue_draws_what_batches_draw():
    """The real sampler: all together, and as one queue per device with no more than two candidates at a time."""
    prompts = [[1 + (i * j) % 29 for j in range(1, 2 + 5 * i % 12)] for i in range(11)]
    out = gather(sampler_of(), prompts=prompts, batch_size=16, buckets=1)
    assert len(set(out.completion_mask.sum(-1).reshape(-1).tolist())) > 2
    queue = sampler_of(slots=16, mesh=make_mesh("data:4,fsdp:2"))
    other = gather(queue, prompts=prompts, batch_size=16, sharding=batch_sharding(make_mesh("data:4,fsdp:2")))
    np.testing.assert_array_equal(other.completion, out.completion)
    np.testing.assert_array_equal(other.completion_mask, out.completion_mask)
    np.testing.assert_allclose(other.old_token_logp, out.old_token_logp, atol=1e-5)


def drawn(sampler, num_prompts, model=None):
    """What the sampler draws of so many prompts of different length."""
    prompt = 1 + np.arange(num_prompts * 5).reshape(num_prompts, 5) % 31
    mask = np.arange(5) < 1 + np.arange(num_prompts)[:, None] % 5
    return sampler(jax.random.key(0), tiny_model() if model is None else model, prompt, mask)


def same_tokens(out, expected):
    np.testing.assert_array_equal(out.completion, expected.completion)
    np.testing.assert_array_equal(out.completion_mask, expected.completion_mask)
    for name in ("token_logp", "sampled_token_logp"):
        np.testing.assert_allclose(getattr(out, name), getattr(expected, name), atol=1e-5)


@pytest.mark.parametrize("slots", [None, 8])
def test_the_candidates_of_one_prompt_are_spread_over_all_devices(slots):
    mesh, n = make_mesh("data:4,fsdp:2"), 16
    out = drawn(sampler_of(slots=slots, mesh=mesh, num_candidates=n), 1, shard(tiny_model(), mesh))
    same_tokens(out, drawn(sampler_of(num_candidates=n), 1))
    over_candidates = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    assert all(x.sharding.is_equivalent_to(over_candidates, x.ndim) for x in jax.tree.leaves(out))
    # Two candidates on each device: it stops with the longer one, and where it has one slot, with the second.
    lengths = np.asarray(out.completion_mask).sum(-1).reshape(8, n // 8)
    np.testing.assert_array_equal(out.steps[0] + 1, lengths.max(-1) if slots is None else lengths.sum(-1))
    assert len({row.tobytes() for row in np.asarray(out.completion[0])}) > n / 2
    assert len(set(out.steps[0].tolist())) > 1


@pytest.mark.parametrize("slots", [None, 16])
@pytest.mark.parametrize(
    ("B", "n", "share", "axes"),
    [
        (1, 16, (1, 2), "data:4,fsdp:2"),
        (8, 16, (1, 16), "data:4,fsdp:2"),
        (16, 3, (2, 3), "data:4,fsdp:2"),
        (4, 6, (1, 3), "data:4,fsdp:2"),
        (2, 8, (1, 2), "data:4,fsdp:2"),
        (3, 4, (3, 1), "data:4,fsdp:2"),
        (2, 6, (1, 6), "data:4,fsdp:2"),
        (3, 5, (3, 5), "data:4,fsdp:2"),
        (4, 2, (1, 1), "data:2,fsdp:4"),
        (4, 3, (1, 3), "data:2,fsdp:4"),
    ],
    ids=["one prompt", "prompts", "two each", "both", "both, turned", "candidates in part", "prompts in part",
         "neither", "data leaves prompts to fsdp", "and does nothing itself"],
)  # fmt: skip
def test_what_a_device_does_of_a_call(B, n, share, axes, slots, monkeypatch):
    """The candidates that each device makes room for, read where the sampler is traced."""
    seen = []

    def noted(keys, *arguments, **options):
        rows = options["groups"] * options["slots"] if slots else arguments[1].own[0].value.shape[0]
        seen.append((keys.shape, rows))
        return whole[slots is None](keys, *arguments, **options)

    whole = {True: rollout.decode, False: rollout.decode_queue}
    monkeypatch.setattr(rollout, "decode" if slots is None else "decode_queue", noted)
    sampler = sampler_of.__wrapped__(num_candidates=n, slots=slots, mesh=make_mesh(axes))
    shape = jax.eval_shape(functools.partial(drawn, sampler, B))
    assert shape.completion.shape == (B, n, T)
    ((keys, rows),) = seen
    by_compiler = slots is None and share[1] == n  # Prompts that are divided where they lie.
    assert keys == ((B, n) if by_compiler else share)
    assert rows == (min(16 * np.prod(share) // (B * n), np.prod(share)) if slots else np.prod(keys))


@pytest.mark.parametrize(("B", "n"), [(4, 4), (3, 4), (3, 5)], ids=["both", "candidates in part", "neither"])
def test_a_call_that_divides_in_part_draws_the_same(B, n):
    mesh = make_mesh("data:4,fsdp:2")
    out = drawn(sampler_of(num_candidates=n, slots=16, mesh=mesh), B)
    most = drawn(sampler_of(num_candidates=5), 4)  # What a prompt's first candidates are, no other decides.
    same_tokens(out, jax.tree.map(lambda x: x[:B, :n], dataclasses.replace(most, steps=None)))


def test_prompts_go_through_one_at_a_time_on_all_devices():
    mesh = make_mesh("data:4,fsdp:2")
    everywhere = NamedSharding(mesh, PartitionSpec())
    out = gather(sampler_of(num_candidates=16, mesh=mesh), batch_size=1, buckets=1, sharding=everywhere)
    expected = gather(sampler_of(num_candidates=16), batch_size=5, buckets=1)
    np.testing.assert_array_equal(out.completion, expected.completion)
    np.testing.assert_array_equal(out.completion_mask, expected.completion_mask)
    np.testing.assert_allclose(out.old_token_logp, expected.old_token_logp, atol=1e-5)


def test_batches_of_another_run_are_refused(tmp_path):
    gather(Counted(), directory=tmp_path)
    with pytest.raises(ValueError, match=r"00000\.npz: made by another .*: a, not b"):
        gather(Counted(), directory=tmp_path, fingerprint="b")
    (tmp_path / "00001.npz").write_bytes((tmp_path / "00001.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00001\.npz: not a whole \.npz file"):
        gather(Counted(), directory=tmp_path)


def test_greedy_completions_do_not_depend_on_the_batch():
    whole, parts = (gather(greedy(), batch_size=size) for size in (5, 2))
    sharded = gather(greedy(), batch_size=8, sharding=batch_sharding(make_mesh()))
    for other in (parts, sharded):
        chex.assert_trees_all_equal(other, whole)
    np.testing.assert_array_equal(whole.old_token_logp, 0)  # Nothing else could be drawn.


def test_score_all_is_the_score_of_each():
    model, candidates = tiny_model(), ragged_candidates(5, N)
    stats = jax.jit(type(model).score)(model, candidates.prompt, candidates.prompt_mask, candidates.completion)
    expected = np.where(candidates.completion_mask, stats.logp, 0).sum(-1)
    out = score_all(model, candidates, batch_size=2, buckets=1)
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    sharded = score_all(model, candidates, batch_size=8, scorer=scorer(), sharding=batch_sharding(make_mesh()))
    np.testing.assert_allclose(sharded, expected, atol=1e-5)
    spoilt = batches.take(candidates, [3])
    spoilt = dataclasses.replace(spoilt, completion=np.where(spoilt.completion_mask, spoilt.completion, 9))
    np.testing.assert_allclose(score_all(model, spoilt, batch_size=2, scorer=scorer()), expected[3:4], atol=1e-5)


def test_buckets_move_no_score():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 32, 30 if i < 2 else 3).tolist() for i in range(8)]
    completions = [[rng.integers(1, 32, 20 if i % 4 == 0 else 2).tolist() for _ in range(N)] for i in range(8)]
    candidates = batches.from_tokens(prompts, completions, pad_id=PAD)
    shapes = []

    def noted(model, part):
        shapes.append((part.prompt.shape[1], part.completion.shape[2]))
        return scorer()(model, part)

    whole, cut = (score_all(tiny_model(), candidates, batch_size=4, scorer=noted, buckets=k) for k in (1, 4))
    np.testing.assert_allclose(cut, whole, atol=1e-5)
    assert shapes == [(30, 20)] * 2 + [(8, 8), (30, 20)]
