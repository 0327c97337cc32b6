"""The loop on a table small enough to check by hand, and on the tiny transformer where a model matters."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.data.candidates import Candidates, token_mask
from tiltjax.models import lora
from tiltjax.models.transformer import Transformer
from tiltjax.train import rounds as loop
from tiltjax.train.method import Batch, Feedback, Method, ReferenceUpdate, Round, View
from tiltjax.train.methods import METHODS, get_method
from tiltjax.train.methods.labels import actor_critic, balanced, judged
from tiltjax.train.methods.preference import PAIRWISE
from tiltjax.train.policy import at_work, kl_along_prefixes, model_sample, model_view, with_critics

V, T, P, EOS = 4, 3, 2, 0
TX = optax.adam(0.1)


def table(seed):
    """A policy that looks at the prompt and the last token: logits ``[P, V + 1, V]``, and two critics."""
    rng = np.random.default_rng(seed)
    shapes = {"logits": (P, V + 1, V), "critic": (V + 1, 2)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


TABLE, OTHER = table(0), table(5)


def view(params, candidates):
    x, y = candidates.prompt[:, 0], candidates.completion
    before = jnp.concatenate([jnp.full((*y.shape[:2], 1), V), y[..., :-1]], axis=-1)
    logp = jax.nn.log_softmax(params["logits"])[x[:, None, None], before]
    return View(
        token_logp=jnp.take_along_axis(logp, y[..., None], axis=-1)[..., 0],
        entropy=-jnp.sum(jnp.exp(logp) * logp, axis=-1),
        self_certainty=-jnp.mean(logp, axis=-1) - jnp.log(float(V)),
        value=params["critic"][before],
    )


def sample(key, players, source, prompts, num):
    who = {"previous": players.previous, "reference": players.reference, "initial": players.initial}
    logp = jax.nn.log_softmax(who.get(source, players.state.params)["logits"])[prompts.prompt[:, 0]]
    B = logp.shape[0]
    token, live = jnp.full((B, num), V), jnp.ones((B, num), bool)
    tokens, masks, logps = [], [], []
    for k in jax.random.split(key, T):
        rows = logp[jnp.arange(B)[:, None], token]
        token = jnp.argmax(rows, -1) if source == "greedy" else jax.random.categorical(k, rows)
        token = jnp.where(live, token, EOS)
        tokens.append(token)
        masks.append(live)
        logps.append(jnp.where(live, jnp.take_along_axis(rows, token[..., None], axis=-1)[..., 0], 0))
        live = live & (token != EOS)
    stacked = [jnp.stack(x, axis=-1) for x in (tokens, masks, logps)]
    return Candidates(prompt=prompts.prompt, prompt_mask=prompts.prompt_mask, completion=stacked[0],
                      completion_mask=stacked[1], old_token_logp=stacked[2])  # fmt: skip


def score(candidates):
    y = jnp.where(candidates.completion_mask, candidates.completion, 0)
    reward = jnp.sum(y, axis=-1) / 2.0 + candidates.prompt[:, :1]
    return Feedback(reward=reward, cost=reward - 1, correct=reward > 1.5, answer=y[..., 0])


def prompts(size=4):
    empty = jnp.zeros((size, 0, T), jnp.int32)
    prompt = (jnp.arange(size) % P)[:, None]
    return Candidates(prompt=prompt, prompt_mask=prompt >= 0, completion=empty, completion_mask=empty > 0)


def one_round(method, *, beta=0.5, seed=0, start=None, score=score, **options):
    players = loop.init_players(method, TABLE, TX) if start is None else start
    key = jax.random.key(seed)
    return loop.play(method, players, prompts(), key, sample=sample, score=score, view=view, tx=TX, beta=beta,
                     **options)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("name", "num", "score"))
def prepared(seed, beta, *, name, num=4, score=score):
    """A round's batch, from the first policy's own candidates."""
    method = get_method(name)
    players = loop.init_players(method, TABLE, TX)
    candidates = loop.collect(method, players, prompts(num), jax.random.key(seed), sample=sample)
    key = jax.random.key(seed + 1)
    return loop.prepare(method, players, candidates, score(candidates), key, view=view, beta=beta)[1]


@functools.cache
def batch_of(name, score=score):
    return prepared(0, 0.5, name=name, score=score)


@functools.partial(jax.jit, static_argnames="name")
def gradient(batch, params, beta=0.5, *, name):
    """Loss, metrics and gradient."""
    objective = loop.objective(get_method(name), view=view, beta=beta)

    def total(params):
        loss, metrics = objective(params, None, batch, jax.random.key(0))
        return loss.mean, {name: metric.mean for name, metric in metrics.items()}

    (value, metrics), grads = jax.value_and_grad(total, has_aux=True)(params)
    return value, metrics, grads


ONCE = [name for name in METHODS if name.removeprefix("online_") not in PAIRWISE or name == "online_dpo"]


@pytest.mark.parametrize("name", ONCE)
def test_label_advantage_and_loss_of_every_record_fit(name, monkeypatch):
    """Traced, not computed. Whether they or the memory read the reference or the old policy, the record says."""
    read = []
    monkeypatch.setattr(Batch, "ref", property(lambda batch: read.append("ref") or batch.ref_view))
    monkeypatch.setattr(Batch, "old", property(lambda batch: read.append("old") or batch.old_view))
    method = dataclasses.replace(get_method(name), reads_reference=True, reads_old=True)
    players = loop.init_players(method, TABLE, TX)

    def loss(params, beta):
        held = dataclasses.replace(players, state=dataclasses.replace(players.state, params=params))
        drawn = loop.collect(method, held, prompts(8), jax.random.key(0), sample=sample)
        memory, batch = loop.prepare(method, held, drawn, score(drawn), jax.random.key(1), view=view, beta=beta)
        value = method.loss(view(params, batch.candidates), batch, beta)
        return memory, value

    memory, value = jax.eval_shape(loss, TABLE, jnp.float32(0.5))
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, players.memory)
    assert (value.total.shape, value.count.shape) == ((), ())
    assert method.paper
    assert name == method.name
    assert ("ref" in read) == get_method(name).reads_reference
    assert "old" not in read or get_method(name).reads_old


@pytest.mark.parametrize(
    ("name", "read"), [("sft", ""), ("best_of_n_sft", ""), ("simpo", ""), ("raft", "old"), ("online_orpo", "old"),
                       ("dpo", "ref"), ("ppo", "old ref"), ("rloo", "old ref")],
)  # fmt: skip
def test_policies_are_asked_where_they_are_read(name, read):
    """And what needs their answer is measured there only."""
    method, asked = get_method(name), []

    def counted(params, candidates):
        asked.append(params)
        return view(params, candidates)

    def run():
        players = loop.init_players(method, TABLE, TX)
        drawn = loop.collect(method, players, prompts(), jax.random.key(0), sample=sample)
        _, batch = loop.prepare(method, players, drawn, score(drawn), jax.random.key(1), view=counted, beta=0.5)
        names = {"old": players.state.params, "ref": players.reference}
        assert [any(one is params for one in asked) for params in names.values()] == [name in read for name in names]
        assert (batch.old_view is None, batch.ref_view is None) == ("old" not in read, "ref" not in read)
        return loop.measures(view(TABLE, batch.candidates), batch)

    measured = jax.eval_shape(run)
    assert len(asked) == len(read.split())
    expected = ({"off_policy"} if "old" in read else set()) | ({"kl_k1", "kl_k3"} if "ref" in read else set())
    assert {"off_policy", "kl_k1", "kl_k3"} & set(measured) == expected


def test_a_round_without_a_reference_learns():
    after, metrics = jax.jit(lambda p: one_round(get_method("raft"), start=p))(
        loop.init_players(get_method("raft"), TABLE, TX)
    )
    assert np.abs(np.asarray(after.state.params["logits"] - TABLE["logits"])).max() > 0.01
    assert {"loss", "logp", "grad_norm", "off_policy", "entropy", "reward", "length"} == set(metrics)
    with pytest.raises(ValueError, match="reads_reference must be True for a method that reads the reference's view"):
        jax.eval_shape(lambda: one_round(dataclasses.replace(get_method("dpo"), reads_reference=False)))
    with pytest.raises(ValueError, match="reads_old must be True for a method that reads the policy's old view"):
        jax.eval_shape(lambda: one_round(dataclasses.replace(get_method("grpo"), reads_old=False)))


def test_pairwise_losses_take_pairs_and_differ(monkeypatch):
    """Offline and online, the pairwise records are that of DPO with another loss, which reads a reference or not."""
    batch, read, reading = batch_of("dpo"), [], {}
    monkeypatch.setattr(Batch, "ref", property(lambda batch: read.append(batch) or batch.ref_view))

    @jax.jit
    def losses(batch):
        now, values = view(OTHER, batch.candidates), {}
        for name, (loss, *_) in PAIRWISE.items():
            read.clear()
            values[name] = loss(now, batch, 0.3).mean
            reading[name] = bool(read)
        return values

    values = {name: float(value) for name, value in losses(batch).items()}
    assert np.isfinite(list(values.values())).all()
    assert len({round(value, 5) for value in values.values()}) > len(PAIRWISE) - 3
    for name in PAIRWISE:
        offline, online = get_method(name), get_method(f"online_{name}")
        assert offline.loss is online.loss is PAIRWISE[name][0]
        assert (offline.label, offline.draw, online.draw) == (judged, (("initial", 2),), (("current", 2),))
        assert (offline.schedule, online.schedule) == ("offline", "online")
        assert offline.reads_reference == online.reads_reference == reading[name]


@pytest.mark.parametrize("name", ["grpo_4_epochs", "safe_rlhf", "prime"])
def test_a_round_moves_the_policy_and_nothing_that_is_frozen(name):
    method = get_method(name)
    before = loop.init_players(method, TABLE, TX)
    after, metrics = jax.jit(lambda p: one_round(method, start=p))(before)
    for frozen in ("reference", "initial"):
        chex.assert_trees_all_equal(getattr(after, frozen), TABLE)
    chex.assert_trees_all_equal(after.previous, before.state.params)
    moved = np.abs(np.asarray(after.state.params["logits"]) - np.asarray(before.state.params["logits"]))
    assert 0.01 < moved.max() < 1
    assert int(after.state.step) == method.epochs
    assert int(after.round) == 1
    kept = {"multiplier", "cost"} if name == "safe_rlhf" else set()
    every = {"loss", "logp", "grad_norm", "off_policy", "kl_k1", "kl_k3", "entropy", "reward", "length"}
    assert every | kept == set(metrics)
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_the_first_on_policy_step_has_ratio_exactly_one():
    """On a transformer, whose log-probabilities two compilations round differently; its completions are ragged."""
    model, method = tiny_model(), dataclasses.replace(get_method("grpo"), draw=(("current", 4),))
    tx = optax.sgd(0.0)
    players = loop.init_players(method, model, tx)
    drawn = dataclasses.replace(ragged_candidates(4, 4), ref_logp=None, reward=None)
    reward = Feedback(reward=ragged_candidates(4, 4).reward)
    options = {"view": model_view(), "tx": tx, "beta": 0.1}
    _, metrics = jax.jit(lambda p: loop.fit(method, p, drawn, reward, jax.random.key(0), **options))(players)
    assert float(metrics["off_policy"]) == 0.0
    assert float(metrics["length"]) == drawn.completion_mask.sum(-1).mean()


def test_from_the_second_step_on_the_ratio_is_that_to_the_start_of_the_round():
    batch = batch_of("rloo")
    _, metrics, _ = gradient(batch.change(fresh=np.zeros(4, bool)), OTHER, name="rloo")
    now = jax.jit(view)(OTHER, batch.candidates).token_logp
    ratio = np.sum(np.where(batch.mask, np.float64(now) - np.float64(batch.old.token_logp), 0), axis=-1)
    assert float(metrics["off_policy"]) == pytest.approx(np.abs(np.exp(ratio) - 1).mean(), rel=1e-5)
    _, metrics, _ = gradient(batch.change(fresh=np.ones(4, bool)), OTHER, name="rloo")
    assert float(metrics["off_policy"]) == 0.0


def test_mirror_descent_minimises_the_ratio_and_the_kl_to_the_old_policy():
    """Token by token, with a critic: the loss is the formula's, and with a large beta a round of steps stays nearer."""
    batch, beta = jax.device_get(batch_of("mdpo")).change(fresh=np.zeros(4, bool)), 0.5
    params = OTHER | {"critic": TABLE["critic"]}
    now = jax.device_get(jax.jit(view)(params, batch.candidates))
    log_ratio = np.float64(now.token_logp) - np.float64(batch.old.token_logp)
    ratio = np.exp(log_ratio)
    actor = -ratio * batch.advantage + beta * ratio * (1 / ratio - 1 + log_ratio)
    critic = (now.value[..., :1] - batch.returns) ** 2 / 2
    loss, _, _ = gradient(batch, params, beta, name="mdpo")
    assert float(loss) == pytest.approx((actor + 0.1 * critic[..., 0])[batch.mask].mean(), rel=1e-4)
    assert batch.advantage[batch.mask].std() != pytest.approx(1, abs=0.05)
    method = get_method("mdpo")
    play = jax.jit(lambda players, beta: one_round(method, start=players, beta=beta)[1]["off_policy"])
    far = [float(play(loop.init_players(method, TABLE, TX), beta)) for beta in (0.3, 30.0)]
    assert far[0] > 2 * far[1] > 0


def test_the_best_and_the_worst_of_one_drawing_at_a_low_temperature():
    """All Roads, section B.1.1: 25 completions once, by the policy that is the reference."""
    method = get_method("dpo_best_worst")
    assert (method.draw, method.rounds, method.epochs, method.temperature) == ((("initial", 25),), 1, 1, 0.1)
    assert method.loss is get_method("dpo").loss
    assert method.reference.every is None
    batch = batch_of("dpo_best_worst")
    assert batch.reward.shape == (4, 2)
    rewards = jax.jit(score)(batch.candidates).reward
    np.testing.assert_allclose(batch.reward, rewards)
    assert {m.temperature for name, m in METHODS.items() if name != method.name} == {1.0}


def same_reward(candidates):
    return Feedback(reward=jnp.full(candidates.completion.shape[:2], 0.3))


@pytest.mark.parametrize("name", ["grpo", "gspo", "mdloo"])
def test_a_group_with_equal_rewards_gives_no_gradient(name):
    """On any policy, once the KL is out of it."""
    batch = prepared(0, 0.0, name=name, score=same_reward).change(fresh=np.zeros(4, bool))
    _, _, grads = gradient(batch, OTHER, 0.0, name=name)
    np.testing.assert_array_equal(grads["logits"], 0)
    advantage = np.where(np.arange(batch.reward.shape[1]) == 0, 1.0, 0.0) + np.zeros(batch.reward.shape)
    _, _, grads = gradient(batch.change(advantage=np.float32(advantage)), OTHER, 0.0, name=name)
    assert np.abs(grads["logits"]).max() > 1e-3


@pytest.mark.parametrize("name", ["dpo", "grpo", "ppo", "nash_md"])
def test_padding_moves_no_metric_no_loss_and_no_gradient(name):
    batch = jax.device_get(batch_of(name)).change(fresh=np.zeros(len(batch_of(name).source), bool))
    mask = batch.candidates.completion_mask
    assert not mask.all()

    def spoil(x):
        return np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 3)), x, np.float32(np.nan))

    changes = {seen: jax.tree.map(spoil, getattr(batch, seen)) for seen in ("old_view", "ref_view")}
    if batch.advantage is not None and batch.advantage.ndim == 3:
        changes["advantage"] = spoil(batch.advantage)
    tokens = np.where(mask, batch.candidates.completion, 3)
    spoilt = batch.change(candidates=dataclasses.replace(batch.candidates, completion=tokens), **changes)
    outcomes = [gradient(x, OTHER, name=name) for x in (spoilt, batch)]
    chex.assert_trees_all_close(*outcomes, rtol=1e-6, atol=1e-7)


@functools.partial(jax.jit, static_argnames="name")
def learned_from(loss_mask, fill, *, name):
    """Loss, metrics and gradient of a round whose views say ``fill`` wherever no token is learned from."""

    def spoilt(params, candidates):
        seen, mask = view(params, candidates), token_mask(candidates)
        return jax.tree.map(lambda x: jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 3)), x, fill), seen)

    method = get_method(name)
    players = loop.init_players(method, TABLE, TX)
    candidates = loop.collect(method, players, prompts(), jax.random.key(0), sample=sample)
    candidates = dataclasses.replace(candidates, loss_mask=loss_mask & candidates.completion_mask)
    feedback, key = score(candidates), jax.random.key(1)
    _, batch = loop.prepare(method, players, candidates, feedback, key, view=spoilt, beta=0.5)
    objective = loop.objective(method, view=spoilt, beta=0.5)

    def total(params):
        loss, metrics = objective(params, None, batch, key)
        return loss.mean, {name: metric.mean for name, metric in metrics.items()}

    return jax.value_and_grad(total, has_aux=True)(OTHER)


MASKED = ["dpo", "simpo", "ld_dpo", "grpo", "reinforce_pp", "ppo_ptx", "prime", "kto", "var", "self_certainty"]


@pytest.mark.robustness(
    "Data",
    given="tokens inside a completion that others wrote, such as a tool's answer",
    outcome="they are read and not learned from: no loss, label or KL sees their log-probability",
)
@pytest.mark.parametrize("name", MASKED)
def test_tokens_that_are_not_learned_from_are_read_by_nobody(name):
    """Not by labels, advantages, memory, loss or metrics: NaN in their place changes nothing, and is seen without."""
    method = get_method(name)
    shape = (4, method.num_candidates * method.cross, T)
    loss_mask = np.ones(shape, bool)
    loss_mask[:, ::2, 0], loss_mask[:, 1::2, 1] = False, False
    spoilt, plain = (learned_from(loss_mask, fill, name=name) for fill in (np.float32(np.nan), np.float32(0)))
    chex.assert_tree_all_finite(spoilt)
    chex.assert_trees_all_close(spoilt, plain, rtol=1e-6)
    (loss, _), _ = learned_from(np.full(shape, True), np.float32(0), name=name)
    assert abs(float(loss) - float(plain[0][0])) > 1e-4


def test_a_completion_masked_as_a_whole_counts_for_the_others_only():
    """Baselines and labels are those of all candidates; the loss has the others."""
    method = dataclasses.replace(get_method("rloo"), draw=(("current", 4),))
    players = loop.init_players(method, TABLE, TX)
    collect = jax.jit(lambda players: loop.collect(method, players, prompts(), jax.random.key(0), sample=sample))
    candidates = collect(players)
    cut = np.arange(16).reshape(4, 4) % 3 == 0
    masked = dataclasses.replace(candidates, loss_mask=candidates.completion_mask & ~cut[..., None])
    run = jax.jit(lambda c: loop.prepare(method, players, c, score(c), jax.random.key(1), view=view, beta=0.5)[1])
    whole, part = run(candidates), run(masked)
    np.testing.assert_array_equal(part.advantage, whole.advantage)
    np.testing.assert_array_equal(part.where, ~cut)
    np.testing.assert_array_equal(part.mask, whole.mask & ~cut[..., None])


def test_a_pair_counts_where_both_of_it_do():
    batch = batch_of("online_dpo")
    half = batch.change(where=np.array([[True, True], [True, False], [False, True], [False, False]]))
    loss, _, grads = gradient(half, OTHER, name="online_dpo")
    first = jax.tree.map(lambda x: x[:1], batch)
    alone, _, expected = gradient(first, OTHER, name="online_dpo")
    assert float(loss) == pytest.approx(float(alone), rel=1e-6)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-7)


def test_the_reward_lands_on_the_last_real_token():
    batch = batch_of("ppo")
    old = dataclasses.replace(batch.old, value=jnp.zeros_like(batch.old.value))
    run = jax.jit(lambda batch: actor_critic(batch.reward, batch, beta=0.0, lam=0.0))
    advantage, returns = run(batch.change(old_view=old))
    ends = np.asarray(batch.mask.sum(-1)) - 1
    assert len(set(ends.ravel().tolist())) > 1
    for b, n in np.ndindex(ends.shape):
        expected = np.where(np.arange(T) == ends[b, n], batch.reward[b, n], 0)
        np.testing.assert_allclose(advantage[b, n], expected, rtol=1e-6)
    np.testing.assert_array_equal(returns, advantage)
    with pytest.raises(ValueError, match="view must give values"):
        actor_critic(batch.reward, batch.change(old_view=dataclasses.replace(old, value=None)), beta=0.0)


class TestLabels:
    def test_pairs_put_the_chosen_first(self):
        batch = batch_of("online_dpo_best_worst")
        assert batch.reward.shape == (4, 2)
        assert bool((batch.reward[:, 0] >= batch.reward[:, 1]).all())
        np.testing.assert_array_equal(batch.where[:, 0], batch.reward[:, 0] > batch.reward[:, 1])
        np.testing.assert_allclose(jax.jit(score)(batch.candidates).reward, batch.reward)

    def test_noisy_labels_follow_the_odds(self):
        batch = prepared(3, 0.5, name="dpo", num=512)
        margin = np.asarray(batch.reward)[:, 0] - np.asarray(batch.reward)[:, 1]
        gap = np.abs(margin)
        right = (margin > 0)[gap > 0].mean()
        assert right == pytest.approx((1 / (1 + np.exp(-gap[gap > 0]))).mean(), abs=0.07)

    def test_only_the_chosen_is_imitated(self):
        """On the same comparisons as DPO's, the loss is minus the chosen's log-probability."""
        batch, pairs = prepared(3, 0.5, name="preferred_ft"), prepared(3, 0.5, name="dpo")
        np.testing.assert_array_equal(batch.candidates.completion, pairs.candidates.completion)
        np.testing.assert_array_equal(batch.where, [[True, False]] * 4)
        logp = np.where(pairs.mask, jax.jit(view)(OTHER, pairs.candidates).token_logp, 0).sum(-1)
        loss, _, _ = gradient(batch, OTHER, name="preferred_ft")
        assert float(loss) == pytest.approx(-logp[:, 0].mean(), rel=1e-5)

    def test_the_classes_of_kto_are_balanced_as_the_paper_advises(self):
        """Over random labels and masks: the rarer class weighs more, no more than it must, the other one 1."""
        rng, seen = np.random.default_rng(0), set()
        now = Round(feedback=Feedback(reward=jnp.zeros((48, 2))), beta=0.5, key=jax.random.key(0), round=jnp.int32(0),
                    memory=None, view=view)  # fmt: skip
        weigh = jax.jit(lambda batch: balanced(now, batch).advantage)
        batch = prepared(0, 0.5, name="kto", num=48)
        for odds in np.repeat([0.01, 0.2, 0.5, 0.54, 0.6, 0.95], 8):
            good, where = rng.random((48, 2)) < odds, rng.random((48, 2)) < 0.8
            weight = np.asarray(weigh(batch.change(reward=np.float32(good), where=where)))
            counts = (where & good).sum(), (where & ~good).sum()
            desirable, undesirable = weight[good], weight[~good]
            if not all(counts):
                np.testing.assert_array_equal(weight, 1)
                continue
            assert np.ptp(desirable) == np.ptp(undesirable) == 0
            assert min(desirable[0], undesirable[0]) == 1
            ratio = counts[0] * desirable[0] / (counts[1] * undesirable[0])
            expected = min(max(counts[0] / counts[1], 1.0), 4 / 3)
            assert ratio == pytest.approx(expected, rel=1e-5)
            seen.add(round(expected, 3) if expected in (1, 4 / 3) else 0)
        assert seen == {0, 1, 1.333}

    def test_the_loss_of_kto_counts_by_the_weights_of_its_classes(self):
        """A quarter is desirable, so it weighs three times as much."""
        quarter = lambda c: Feedback(reward=score(c).reward, correct=jnp.arange(8)[:, None] + jnp.zeros((1, 2)) < 2)
        batch = prepared(0, 0.5, name="kto", num=8, score=quarter)
        ratio = np.where(batch.candidates.completion_mask, jax.jit(view)(OTHER, batch.candidates).token_logp
                         - batch.ref.token_logp, 0).sum(-1)  # fmt: skip
        gain = 0.5 * (ratio[:, 0] - max(ratio[:, 1].mean(), 0))
        sign, weight = np.where(np.arange(8) < 2, -1, 1), np.where(np.arange(8) < 2, 3.0, 1.0)
        for name in ("kto", "online_kto"):
            loss, _, _ = gradient(batch, OTHER, name=name)
            assert float(loss) == pytest.approx((weight / (1 + np.exp(-sign * gain))).mean(), rel=1e-5)

    def test_a_sampler_that_is_not_the_reference_is_corrected(self):
        method = get_method("online_tilted_mle")

        @jax.jit
        def run():
            players = dataclasses.replace(loop.init_players(method, TABLE, TX), reference=OTHER)
            drawn = loop.collect(method, players, prompts(), jax.random.key(0), sample=sample)
            _, batch = loop.prepare(method, players, drawn, score(drawn), jax.random.key(1), view=view, beta=0.5)
            return drawn, score(drawn).reward, batch.reward, view(OTHER, drawn).token_logp

        drawn, raw, corrected, ref_logp = jax.device_get(run())
        ratio = np.where(drawn.completion_mask, ref_logp - drawn.old_token_logp, 0).sum(-1)
        np.testing.assert_allclose(corrected, raw + 0.5 * ratio, rtol=1e-4, atol=1e-5)

    def test_completions_cross_prompts(self):
        batch = batch_of("var")
        assert batch.reward.shape == (4, 8)
        own = batch.candidates.completion[:, 0]
        for j in range(8):
            np.testing.assert_array_equal(batch.candidates.completion[:, j], np.roll(own, -j, axis=0))
        np.testing.assert_allclose(batch.ref.token_logp, jax.jit(view)(TABLE, batch.candidates).token_logp, rtol=1e-6)

    def test_dynamic_sampling_drops_only_ties(self):
        def half(candidates):
            return Feedback(reward=jnp.where(jnp.arange(4)[:, None] < 2, 1.0, score(candidates).reward))

        batch = batch_of("dapo", score=half)
        np.testing.assert_array_equal(batch.where.any(-1), [False, False, True, True])

    def test_feedback_that_is_missing_is_named(self):
        bare = lambda c: Feedback(reward=score(c).reward)
        for name, message in (("ttrl", "feedback must have answers"), ("safe_rlhf", "feedback must have a cost")):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(lambda: one_round(get_method(name), score=bare))  # noqa: B023


class TestReference:
    def test_updates_when_due_and_resets(self):
        method = dataclasses.replace(
            get_method("rloo"), reference=ReferenceUpdate(every=2, alpha=1.0, reset_optimizer=True)
        )
        play = jax.jit(lambda p: one_round(method, start=p)[0])
        first = play(loop.init_players(method, TABLE, TX))
        chex.assert_trees_all_equal(first.reference, TABLE)
        second = play(first)
        chex.assert_trees_all_equal(second.reference, second.state.params)
        chex.assert_trees_all_equal(second.previous, first.state.params)
        assert float(optax.tree.norm(second.state.opt_state[0].mu)) == 0
        assert float(optax.tree.norm(first.state.opt_state[0].mu)) > 0


def test_minibatches_epochs_and_probes():
    method = dataclasses.replace(get_method("rloo"), epochs=2)
    probe = lambda params: params["logits"].sum(-1)
    options = {"minibatches": 2, "probe": probe, "probes": 4}
    after, seen = jax.jit(lambda p: one_round(method, start=p, **options))(loop.init_players(method, TABLE, TX))
    assert int(after.state.step) == 4
    assert seen.shape == (4, P, V + 1)
    np.testing.assert_allclose(seen[-1], probe(jax.device_get(after.state.params)), rtol=1e-5)
    with pytest.raises(ValueError, match="minibatches must be at least 1, got 0"):
        one_round(method, minibatches=0)


def test_microbatches_move_the_policy_as_the_whole_batch_does():
    method = get_method("rloo")
    both = jax.jit(lambda p: [one_round(method, start=p, microbatches=k)[0].state.params for k in (1, 2)])
    chex.assert_trees_all_close(*both(loop.init_players(method, TABLE, TX)), atol=1e-5)


def test_the_loop_scans_over_rounds_and_maps_over_beta():
    """Online learning inside one jit: the stronger the KL term, the nearer the reference it stays."""
    method = get_method("rloo")

    def learn(beta, key):
        def turn(players, key):
            options = {"sample": sample, "score": score, "view": view, "tx": TX, "beta": beta}
            return loop.play(method, players, prompts(16), key, **options)

        return jax.lax.scan(turn, loop.init_players(method, TABLE, TX), jax.random.split(key, 60))[1]

    metrics = jax.jit(jax.vmap(learn, (0, None)))(jnp.array([5.0, 0.2]), jax.random.key(0))
    reward, kl = (np.asarray(metrics[name])[:, -10:].mean(1) for name in ("reward", "kl_k1"))
    assert reward[1] > reward[0] + 0.3
    assert kl[1] > 4 * kl[0] > 0


PUBLISHED_AT_0 = [name for name, record in METHODS.items() if record.beta == 0]


@pytest.mark.robustness(
    "Methods",
    given="--beta=0, or a record published with beta 0",
    outcome="there is no KL term, whatever the reference says",
)
@pytest.mark.parametrize("name", sorted({*PUBLISHED_AT_0, "grpo", "rloo", "reinforce_pp", "ppo"} - {"prime"}))
def test_at_beta_0_nothing_depends_on_the_reference(name):
    """Not even where it rules out a token that was drawn: 0 times an infinite log-ratio is not 0."""
    method = get_method(name)
    players = loop.init_players(method, TABLE, TX)
    options = {"view": view, "tx": TX, "beta": 0.0}

    @jax.jit
    def fit(reference):
        candidates = loop.collect(method, players, prompts(), jax.random.key(0), sample=sample)
        held = dataclasses.replace(players, reference=reference)
        return loop.fit(method, held, candidates, score(candidates), jax.random.key(1), **options)[0].state.params

    ruled_out = np.where(np.arange(V) == 2, np.float32(-np.inf), TABLE["logits"])
    reached = [fit(reference) for reference in (TABLE, OTHER, {**TABLE, "logits": ruled_out})]
    assert np.isfinite(np.asarray(reached[0]["logits"])).all()
    for other in reached[1:]:
        chex.assert_trees_all_equal(other, reached[0])


def test_published_without_a_kl_term():
    assert sorted(PUBLISHED_AT_0) == [
        "cispo", "dapo", "dapo_4_epochs", "dr_grpo", "empo", "gspo", "prime", "ttrl",
    ]  # fmt: skip
    assert all(METHODS[name].zero_beta for name in PUBLISHED_AT_0)
    chex.assert_tree_all_finite(jax.jit(lambda: one_round(get_method("prime"), beta=0.0)[0].state.params)())


@pytest.mark.robustness(
    "Methods", given="--beta=0 where the loss or the labels divide by it", outcome="refused by the name of the record"
)
@pytest.mark.parametrize("name", ONCE)
def test_beta_0_is_traced_or_refused_by_the_name_of_the_record(name):
    """A loss that divides by beta says so itself: no record that does is marked as one that does not."""
    method = get_method(name)
    if method.zero_beta:
        with pytest.raises(ValueError, match=f"beta must be a finite number at least 0 for method {name}, got -1"):
            method.check_beta(-1.0)
        assert jax.eval_shape(lambda: one_round(method, beta=0.0))[0].round.shape == ()
        return
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"beta must be a finite number above 0 .* for method {name}, got"):
            method.check_beta(beta)


def test_the_loop_refuses_a_beta_that_the_record_does_not_allow():
    with pytest.raises(ValueError, match=r"beta must be .* for method dpo, got 0\.0"):
        jax.eval_shape(lambda: one_round(get_method("dpo"), beta=0.0))


def test_units_of_beta_tilt_alike_at_a_tie():
    by_reward, by_wins = get_method("rloo"), get_method("inpo")
    assert by_reward.own_beta(0.4) == by_reward.reward_beta / by_reward.beta * 0.4 == 0.4
    assert by_wins.own_beta(by_wins.reward_beta) == by_wins.beta == 0.005
    gap = 1e-3  # Between a candidate's reward and that of its opponent.
    wins = 1 / (1 + np.exp(-gap)) - 0.5
    np.testing.assert_allclose(wins / by_wins.own_beta(0.1), gap / by_reward.own_beta(0.1), rtol=1e-6)


class TestRecord:
    def test_bad_fields_are_named(self):
        loss = get_method("rloo").loss
        for options, message in (
            ({"draw": (("nobody", 2),)}, "draw must be one of"),
            ({"draw": (("current", 0),)}, "draw must be at least 1, got 0"),
            ({"feedback": "applause"}, "feedback must be one of"),
            ({"optimum": "summit"}, "optimum must be one of"),
            ({"units": "metres"}, "units must be one of"),
            ({"epochs": 0}, "epochs must be at least 1, got 0"),
            ({"critics": -1}, "critics must be at least 0, got -1"),
            ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
            ({"resample": -1}, "resample must be at least 0, got -1"),
            ({"cross": 2}, "cross must be 1 where a prompt has several candidates, got 2"),
        ):
            with pytest.raises(ValueError, match=message):
                Method("m", "nobody", loss, **options)
        with pytest.raises(ValueError, match=r"method must be one of .*; got 'magic'"):
            get_method("magic")

    def test_schedules(self):
        names = ("dpo", "iterated_tilted_mle", "rloo")
        assert [get_method(name).schedule for name in names] == ["offline", "iterated", "online"]


hidden = jax.jit(lambda model, c: model.hidden(c.prompt, c.prompt_mask, c.completion))
STOPS = tuple(range(3, 32, 4))


FILTERS = {"temperature": 0.8, "top_k": 8, "top_p": 0.6}


@functools.cache
def drawn_by_model(source="current"):
    """Candidates of the tiny transformer; the reference is the policy itself."""
    draw = model_sample(max_tokens=5, eos_id=STOPS, pad_id=0, **FILTERS)
    players = loop.init_players(get_method("rloo"), tiny_model(), optax.sgd(0.1))
    return jax.device_get(draw(jax.random.key(0), players, source, ragged_candidates(4), 4))


class TestPolicy:
    def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(self):
        """At the temperature, and with the filters."""
        out = drawn_by_model()
        states = np.float64(hidden(tiny_model(), out))
        logp = log_softmax(states @ np.asarray(tiny_model().projection(), np.float64).T / 0.8, axis=-1)
        view = jax.jit(model_view(temperature=0.8))
        seen = view(tiny_model(), dataclasses.replace(out, support=None))
        filtered = view(tiny_model(), out)
        np.testing.assert_allclose(
            np.where(out.completion_mask, filtered.token_logp, 0), np.where(out.completion_mask, out.old_token_logp, 0),
            atol=1e-4,
        )  # fmt: skip
        for place in zip(*np.nonzero(out.completion_mask), strict=True):
            token = out.completion[place]
            assert float(seen.token_logp[place]) == pytest.approx(logp[place][token], abs=1e-4)
            order = np.argsort(-logp[place])[:8]
            p = np.exp(logp[place][order] - np.logaddexp.reduce(logp[place][order]))
            kept = order[: 1 + np.searchsorted(np.cumsum(p), 0.6)]
            assert token in kept
            expected = logp[place][token] - np.logaddexp.reduce(logp[place][kept])
            assert out.old_token_logp[place] == pytest.approx(expected, abs=1e-4)
        assert len(set(out.completion_mask.sum(-1).ravel().tolist())) > 1

    def test_the_mixture_of_a_policy_with_itself_is_the_policy(self):
        ours, mixed = drawn_by_model(), drawn_by_model("mixture")
        np.testing.assert_array_equal(mixed.completion, ours.completion)
        np.testing.assert_allclose(mixed.old_token_logp, ours.old_token_logp, atol=1e-5)

    def test_players_at_work_are_whole_and_narrow(self):
        """Adapters are merged and critics left out, once for many draws; who does not write stays as it is."""
        config = dataclasses.replace(tiny_model().config, compute_dtype="bfloat16")
        model = lora.add(jax.random.key(1), Transformer(jax.random.key(0), config), rank=2, targets=("query", "down"))
        trained, frozen = lora.partition(model, lora.is_adapter)
        trained = jax.tree.map(lambda x: x + 0.3, trained)
        players = loop.init_players(get_method("ppo"), with_critics(trained, features=16), optax.sgd(0.1))
        ready = at_work(players, ("current", "data"), frozen=frozen)
        assert ready.reference is players.reference
        expected = lora.merge(lora.combine(trained, frozen)).cast(jnp.bfloat16)
        chex.assert_trees_all_equal(ready.state.params, expected)
        assert ready.state.params.blocks.up.kernel.dtype == jnp.bfloat16
        mixed = at_work(players, ("mixture",), frozen=frozen)
        chex.assert_trees_all_equal((mixed.state.params, mixed.reference), (expected, expected))

    def test_a_large_batch_goes_through_in_parts(self):
        batch, params = ragged_candidates(6, 2), with_critics(tiny_model(), features=16)
        params["critic"]["kernel"] = jnp.ones((16, 1))
        whole, parts = (jax.jit(model_view(rows=rows))(params, batch) for rows in (None, 2))
        chex.assert_trees_all_close(whole, parts, atol=1e-5)

    def test_data_must_be_given(self):
        with pytest.raises(ValueError, match="written must be given for the source 'data', got None"):
            drawn_by_model("data")
        with pytest.raises(ValueError, match="source must be one of"):
            drawn_by_model("nobody")

    def test_critics_read_the_hidden_state(self):
        out = ragged_candidates(4)
        params = with_critics(tiny_model(), features=16, num=2)
        params["critic"]["kernel"] = jnp.ones((16, 2))
        seen = jax.jit(model_view())(params, out)
        states = np.asarray(hidden(tiny_model(), out))
        np.testing.assert_allclose(seen.value, np.stack([states.sum(-1)] * 2, -1), atol=1e-4)

    def test_the_exact_kl_along_the_prefix_beside_its_estimators(self):
        part = dataclasses.replace(ragged_candidates(6, 3), where=np.arange(18).reshape(6, 3) % 4 > 0)
        models = tiny_model(), tiny_model(1)
        out = jax.jit(kl_along_prefixes)(*models, part)
        laws = []
        for model in models:
            states = np.float64(hidden(model, part))
            laws.append(log_softmax(states @ np.asarray(model.projection(), np.float64).T, axis=-1))
        exact = (np.exp(laws[0]) * (laws[0] - laws[1])).sum(-1)
        ratio = np.take_along_axis(laws[0] - laws[1], part.completion[..., None], axis=-1)[..., 0]
        each = {"kl": exact, "k1": ratio, "k2": ratio**2 / 2, "k3": np.exp(-ratio) - 1 + ratio}
        mask = part.completion_mask & part.where[..., None]
        product = f":f32[{part.completion.size},{models[0].config.vocab_size}] = dot_general["
        assert str(jax.make_jaxpr(kl_along_prefixes)(*models, part)).count(product) == len(models)
        for name, value in each.items():
            assert float(out[name].count) == part.where.sum()
            assert float(out[name].mean) == pytest.approx(np.where(mask, value, 0).sum() / part.where.sum(), rel=1e-4)
