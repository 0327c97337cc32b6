"""Rows of candidates that are all there before the first gradient step, and what is labelled on the whole of them."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.train import offline
from tiltjax.train.method import Feedback, Method, ReferenceUpdate
from tiltjax.train.methods import METHODS
from tiltjax.train.methods.likelihood import resampled
from tiltjax.train.rollout import score_all

P, N = 6, 4
KEY = jax.random.key(0)
ONCE = [name for name, record in METHODS.items() if record.learns_once]


def drawn(num=N):
    """Candidates whose tokens and rewards say whose they are: prompt b, candidate n."""
    made = ragged_candidates(P, num)
    who = np.arange(P * num).reshape(P, num)
    old = np.where(made.completion_mask, np.float32(-1), 0)
    return dataclasses.replace(made, reward=who.astype(np.float32), ref_logp=None, old_token_logp=old)


def told_of(rows):
    return Feedback(reward=rows.reward)


def test_every_candidate_is_in_one_row_with_those_of_its_prompt():
    whole = drawn(5)
    rows, prompts = offline.candidate_groups(METHODS["dpo"], whole)
    assert rows.completion.shape[:2] == (2 * P, 2)
    np.testing.assert_array_equal(rows.prompt, whole.prompt[prompts])
    np.testing.assert_array_equal(rows.reward // 5, np.broadcast_to(prompts[:, None], (2 * P, 2)))
    np.testing.assert_array_equal(np.sort(rows.reward, axis=None), np.flatnonzero(np.arange(P * 5) % 5 < 4))
    where = rows.reward.astype(int)
    for name in ("completion", "completion_mask", "old_token_logp"):
        flat = getattr(whole, name).reshape(P * 5, -1)
        np.testing.assert_array_equal(getattr(rows, name), flat[where])


@pytest.mark.parametrize(("name", "cross"), [("kto", 2), ("var", 5)])
def test_a_record_that_crosses_prompts_has_a_row_of_every_candidate(name, cross):
    record = dataclasses.replace(METHODS[name], cross=cross)
    whole = dataclasses.replace(drawn(), where=np.arange(P * N).reshape(P, N) % 5 != 0)
    rows, prompts = offline.candidate_groups(record, whole)
    assert (rows.reward, rows.old_token_logp, rows.completion.shape[:2]) == (None, None, (P * N, cross))
    np.testing.assert_array_equal(prompts, np.tile(np.arange(P), N))
    for r in range(P * N):
        at = [((r + j) % (P * N) % P, (r + j) % (P * N) // P) for j in range(cross)]
        assert len({prompt for prompt, _ in at}) == cross  # All of other prompts.
        for field in ("completion", "completion_mask", "where"):
            np.testing.assert_array_equal(getattr(rows, field)[r], [getattr(whole, field)[b, n] for b, n in at])


def test_too_few_candidates_or_prompts_are_refused():
    with pytest.raises(ValueError, match="num_candidates must be at least 2 for method dpo, got 1"):
        offline.candidate_groups(METHODS["dpo"], drawn(1))
    with pytest.raises(ValueError, match="num_prompts must be at least 8 for method var, got 6"):
        offline.candidate_groups(METHODS["var"], drawn())


def test_labels_are_those_of_the_whole_data_set():
    """KTO's weights count the classes of all rows, whatever mini-batches they are cut into."""
    record, whole = METHODS["kto"], drawn()
    rows, _ = offline.candidate_groups(record, whole)
    right = np.zeros((P * N, 2), bool)
    right[:3] = True
    told = Feedback(reward=np.zeros((P * N, 2), np.float32), correct=right)
    views = score_all(tiny_model(), rows, batch_size=P * N, scorer=offline.make_viewer(), description=None)
    batch = offline.labelled(record, rows, told, KEY, seen=views, beta=0.1)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(batch))
    np.testing.assert_allclose(batch.advantage[:, 0], np.where(right[:, 0], 7.0, 1.0), rtol=1e-6)  # 21 to 3.
    np.testing.assert_array_equal(batch.ref.token_logp, views.token_logp)
    assert batch.old_view is None


def test_a_view_is_that_of_every_token_whatever_a_batch_is_padded_to():
    rows, model = drawn(2), tiny_model()
    views = score_all(
        model, rows, batch_size=2, scorer=offline.make_viewer(temperature=0.5), description=None, buckets=3
    )
    score = jax.jit(lambda m: m.score(rows.prompt, rows.prompt_mask, rows.completion, temperature=0.5))
    expected = score(model)
    mask = rows.completion_mask
    for mine, theirs in ((views.token_logp, expected.logp), (views.entropy, expected.entropy)):
        np.testing.assert_allclose(mine[mask], np.asarray(theirs)[mask], atol=2e-6, rtol=1e-5)
        np.testing.assert_array_equal(mine[~mask], 0)
    assert views.value is None


def test_resampling_leaves_the_mean_of_the_weights():
    """The candidates that are left are the tilt's, and each counts alike; masked ones are never among them."""
    record = resampled(METHODS["tilted_mle"], 3)
    whole = dataclasses.replace(drawn(), where=np.arange(P * N).reshape(P, N) % 4 != 3)
    whole = dataclasses.replace(whole, reward=np.float32(whole.reward - 4 * np.arange(P)[:, None]))
    many = jax.tree.map(lambda x: np.concatenate([x] * 60), whole)
    seen = offline.labelled(record, many, told_of(many), KEY, seen=None, beta=1.0).reward
    weights = np.exp(np.arange(3.0))
    shares = [(seen == n).mean() for n in range(4)]
    np.testing.assert_allclose(shares[:3], weights / weights.sum(), atol=0.02)
    assert shares[3] == 0
    assert (record.num_candidates, record.linear, record.name) == (16, True, "tilted_mle")


def test_which_records_learn_once():
    assert {"sft", "tilted_mle", "var", "kto", "dpo", "dpo_best_worst", "rwr"} <= set(ONCE)
    assert not {"online_dpo", "raft", "spin", "grpo", "ppo"} & set(ONCE)
    assert all(METHODS[name].schedule == "offline" for name in ONCE)
    assert all(record.learns_once for record in METHODS.values() if record.schedule == "offline")
    plain: Method = METHODS["tilted_mle"]
    for change in ({"rounds": 2}, {"epochs": 2}, {"critics": 1}, {"draw": (("initial", 2), ("greedy", 1))}):
        assert not dataclasses.replace(plain, **change).learns_once
    assert dataclasses.replace(plain, reference=ReferenceUpdate(every=1)).learns_once  # One round ends with it.


@pytest.mark.parametrize("name", ["rwr", "awr", "tilted_mle", "kto", "plackett_luce", "dpo"])
def test_a_loss_couples_prompts_where_its_record_says_so(name):
    record = METHODS[name]
    k = record.num_candidates if record.num_candidates <= N else N
    rows = ragged_candidates(P, max(k, record.cross))
    rng = np.random.default_rng(0)

    def view(scale):
        logp = np.where(rows.completion_mask, rng.normal(-2, scale, rows.completion_mask.shape), 0)
        return offline.View(
            token_logp=np.float32(logp), entropy=np.float32(0 * logp), self_certainty=np.float32(0 * logp)
        )

    reward = np.float32(rng.normal(size=rows.completion.shape[:2]))
    told = Feedback(reward=reward, correct=reward > 0)
    batch = offline.labelled(record, rows, told, KEY, seen=view(1), beta=0.5)
    loss = jax.jit(lambda view, batch: record.loss(view, batch, 0.5).total)
    now = view(1)
    halves = [jax.tree.map(lambda x: x[part], (now, batch)) for part in (slice(None, None, 2), slice(1, None, 2))]  # noqa: B023
    whole, apart = float(loss(now, batch)), sum(float(loss(*half)) for half in halves)
    assert (apart == pytest.approx(whole, rel=1e-4)) != record.couples_prompts
