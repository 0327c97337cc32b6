import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.data import candidates as batches
from tiltjax.samplers.decode import Decoded
from tiltjax.train.rollout import collect, make_sampler, make_scorer, score_all
from tiltjax.train.sharding import batch_sharding, make_mesh

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12], [5]]
N, T, EOS, PAD = 3, 4, 2, 0
greedy = functools.cache(
    functools.partial(make_sampler, num_candidates=N, max_tokens=T, eos_id=EOS, pad_id=PAD, temperature=0.0)
)
scorer = functools.cache(make_scorer)


class Counted:
    """Stands in for a sampler: its tokens tell key and prompt; counts its calls, and may be interrupted."""

    def __init__(self, interrupt_at=None):
        self.calls, self.interrupt_at = 0, interrupt_at

    def __call__(self, key, model, prompt, prompt_mask):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        noise = jax.random.randint(key, (len(prompt), N, T), 0, 1000)
        return Decoded(
            completion=noise + 1000 * prompt[:, :1, None],
            completion_mask=noise % 2 == 0,
            token_logp=-noise.astype(np.float32),
            sampled_token_logp=0.0 * noise,
        )


def gather(sampler, **options):
    options = {"batch_size": 2, "fingerprint": "a"} | options
    return collect(jax.random.key(0), tiny_model(), PROMPTS, sampler=sampler, pad_id=PAD, **options)


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
    np.testing.assert_array_equal(out.completion_mask, noise % 2 == 0)
    assert len({row.tobytes() for row in noise}) == 5
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(out))


def test_kept_batches_are_not_drawn_again(tmp_path):
    whole, first, second, third = gather(Counted()), Counted(interrupt_at=3), Counted(), Counted()
    with pytest.raises(KeyboardInterrupt):
        gather(first, directory=tmp_path / "train")
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["00000.npz", "00001.npz"]
    chex.assert_trees_all_equal(gather(second, directory=tmp_path / "train"), whole)
    chex.assert_trees_all_equal(gather(third, directory=tmp_path / "train"), whole)
    assert (second.calls, third.calls) == (1, 0)


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
        chex.assert_trees_all_equal(
            dataclasses.replace(other, old_token_logp=None), dataclasses.replace(whole, old_token_logp=None)
        )
        np.testing.assert_allclose(other.old_token_logp, whole.old_token_logp, atol=1e-5)
    logp = score_all(tiny_model(), whole, batch_size=5, scorer=scorer())
    np.testing.assert_allclose(np.where(whole.completion_mask, whole.old_token_logp, 0).sum(-1), logp, atol=1e-4)


def test_score_all_is_the_score_of_each():
    model, candidates = tiny_model(), ragged_candidates(5, N)
    stats = jax.jit(type(model).score)(model, candidates.prompt, candidates.prompt_mask, candidates.completion)
    expected = np.where(candidates.completion_mask, stats.logp, 0).sum(-1)
    out = score_all(model, candidates, batch_size=2)
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    sharded = score_all(model, candidates, batch_size=8, scorer=scorer(), sharding=batch_sharding(make_mesh()))
    np.testing.assert_allclose(sharded, expected, atol=1e-5)
    spoilt = batches.take(candidates, [3])
    spoilt = dataclasses.replace(spoilt, completion=np.where(spoilt.completion_mask, spoilt.completion, 9))
    np.testing.assert_allclose(score_all(model, spoilt, batch_size=2, scorer=scorer()), expected[3:4], atol=1e-5)
