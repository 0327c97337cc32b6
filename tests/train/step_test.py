import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.worlds import bigram, ragged_candidates, tiny_model
from tiltjax.advantages import reinforce_pp_advantage
from tiltjax.losses import mle, preference
from tiltjax.losses.penalties import kl_k1
from tiltjax.losses.policy_gradient import aggregate, ppo_clip_loss
from tiltjax.models import lora
from tiltjax.ops.masked import average
from tiltjax.train import distributed, rounds
from tiltjax.train.method import Feedback
from tiltjax.train.methods import get_method
from tiltjax.train.objectives import likelihood_objective, sft_objective
from tiltjax.train.policy import model_view
from tiltjax.train.sharding import BATCH, batch_sharding, make_mesh, pmap_step, shard, sharded_step, shardings
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
TILTED = likelihood_objective(lambda logp, b: (mle.tilted_mle_loss(logp, b.reward, beta=0.3, where=b.where), {}))
DPO = likelihood_objective(lambda logp, b: (preference.dpo_loss(logp, b.ref_logp, beta=0.1, where=b.where), {}))
METHODS = {"sft": sft_objective(), "tilted_mle": TILTED, "dpo": DPO}


def run(step, state, batch, frozen=None, steps=3):
    for i in range(steps):
        state, scalars = step(state, batch, jax.random.key(i), frozen)
    return jax.device_get((state, scalars))


def fresh_state(params):
    """One whose buffers may be donated."""
    return jax.tree.map(jnp.copy, init_state(params, TX))


def one_device(loss_fn, **options):
    return jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=TX, **options))


def close(actual, expected):
    # Adam moves a parameter by 1e-2 however small its gradient is, and so magnifies the rounding of the smallest.
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_pmapped_and_sharded_steps_equal_one_device(method):
    assert jax.device_count() == 8
    loss_fn, batch, params = METHODS[method], ragged_candidates(), tiny_model() if method == "sft" else bigram()
    expected = run(one_device(loss_fn), init_state(params, TX), batch)
    pmapped = run(pmap_step(functools.partial(train_step, loss_fn=loss_fn, tx=TX)), fresh_state(params), batch)
    close(pmapped, expected)
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    state = shard(init_state(params, TX), mesh)
    step = sharded_step(functools.partial(train_step, loss_fn=loss_fn, tx=TX), state, None, mesh)
    close(run(step, state, jax.device_put(batch, batch_sharding(mesh))), expected)


def test_between_pmapped_steps_the_state_stays_where_it_is():
    batch, params, frozen = ragged_candidates(), bigram(), bigram(1)
    learn = METHODS["tilted_mle"]

    def loss_fn(params, frozen, batch, key):
        return learn(jax.tree.map(jnp.add, params, frozen), None, batch, key)

    step = pmap_step(functools.partial(train_step, loss_fn=loss_fn, tx=TX))
    sent = run(step, fresh_state(params), batch, frozen)
    state, frozen = distributed.localize((fresh_state(params), frozen))

    def places(state):
        parts = [part.data for leaf in jax.tree.leaves(state.params) for part in leaf.addressable_shards]
        return [part.unsafe_buffer_pointer() for part in parts]

    before = places(state)
    assert len(set(before)) == 8 * len(jax.tree.leaves(params))
    with jax.transfer_guard_device_to_device("disallow"):
        for i in range(3):
            last = state
            state, scalars = step(last, batch, jax.random.key(i), frozen)
            assert all(x.is_deleted() for x in jax.tree.leaves(last))
            assert places(state) == before
    chex.assert_trees_all_equal(jax.device_get((state, scalars)), sent)


def surrogate_batch(num_candidates=2):
    """Candidates of an older policy, with the log-ratio of every token to a reference."""
    batch = ragged_candidates(num_candidates=num_candidates)
    old, ref = (bigram(seed).score(batch.prompt, batch.prompt_mask, batch.completion).logp for seed in (0, 1))
    noise = 0.1 * np.random.default_rng(4).normal(size=old.shape).astype(np.float32)
    batch = dataclasses.replace(batch, old_token_logp=np.asarray(old) + noise)
    return batch, kl_k1(old, ref, batch.completion_mask)


def reinforce_pp(axis_name=None):
    """Advantages at mean 0 and variance 1 over the tokens of the whole batch, which every device needs."""

    def loss_fn(params, frozen, batch, key):
        (batch, token_kl), mask = batch, batch[0].completion_mask
        token_logp = params.score(batch.prompt, batch.prompt_mask, batch.completion).logp
        advantage = reinforce_pp_advantage(batch.reward, token_kl, mask, beta=0.1, axis_name=axis_name)
        values = ppo_clip_loss(token_logp, batch.old_token_logp, advantage, mask)
        return aggregate(values, mask, mode="token_mean"), {"advantage": average(jnp.square(advantage), mask)}

    return loss_fn


def test_statistics_of_a_policy_gradient_span_all_devices():
    batch, params = surrogate_batch(), bigram()
    expected = run(one_device(reinforce_pp()), init_state(params, TX), batch)
    assert abs(expected[1]["advantage"] - 1) < 0.02

    mapped = functools.partial(train_step, loss_fn=reinforce_pp("data"), tx=TX)
    close(run(pmap_step(mapped), fresh_state(params), batch), expected)
    names, whole, mesh = ("data", "fsdp"), PartitionSpec(), make_mesh("data:4,fsdp:2")
    mapped = functools.partial(train_step, loss_fn=reinforce_pp(names), tx=TX, axis_name=names)
    over = jax.shard_map(mapped, mesh=mesh, in_specs=(whole, BATCH, whole, whole), out_specs=whole)
    close(run(jax.jit(over), init_state(params, TX), batch), expected)
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    state = shard(init_state(params, TX), mesh)
    step = sharded_step(functools.partial(train_step, loss_fn=reinforce_pp(), tx=TX), state, None, mesh)
    close(run(step, state, jax.device_put(batch, batch_sharding(mesh))), expected)


def test_a_round_on_a_mesh_equals_one_device():
    record, (candidates, _), key = get_method("reinforce_pp"), surrogate_batch(4), jax.random.key(0)
    players, feedback = rounds.init_players(record, tiny_model(), TX), Feedback(reward=candidates.reward)

    def fit(players, candidates, feedback, key):
        options = {"view": model_view(), "tx": TX, "beta": 0.1, "minibatches": 2}
        return rounds.fit(record, players, candidates, feedback, key, **options)

    expected = jax.jit(fit)(players, candidates, feedback, key)
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    batch = jax.device_put((candidates, feedback), batch_sharding(mesh))
    places, whole = shardings(players, mesh), NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        over = jax.jit(fit, in_shardings=(places, *[batch_sharding(mesh)] * 2, whole), out_shardings=(places, whole))
        actual = over(shard(players, mesh), *batch, key)
    close(*jax.device_get((actual, expected)))
    before, after = jax.device_get((players.state.params, expected[0].state.params))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.square(a - b).sum(), after, before))
    assert np.sqrt(sum(moved)) > 0.01


@pytest.mark.parametrize(("method", "microbatches"), [*((m, 8) for m in METHODS), ("sft", 2)])
def test_gradient_accumulation_is_the_big_batch(method, microbatches):
    loss_fn, batch, params = METHODS[method], ragged_candidates(), bigram()
    tx = optax.sgd(1.0)
    (whole, one), (parts, many) = (
        jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx, microbatches=m))(
            init_state(params, tx), batch, jax.random.key(0)
        )
        for m in (1, microbatches)
    )
    scale = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (whole.params, params)), strict=True))
    chex.assert_trees_all_close(parts.params, whole.params, atol=3e-6 * max(1.0, scale), rtol=0)
    chex.assert_trees_all_close(many, one, atol=1e-6, rtol=1e-5)


def test_token_counts_of_the_accumulated_parts_really_differ():
    tokens = ragged_candidates().completion_mask.sum((1, 2)).reshape(8, 2).sum(0)
    assert tokens[0] != tokens[1]


def test_only_adapters_move_and_their_gradient_is_that_of_the_merged_model():
    model = lora.add(jax.random.key(1), tiny_model(), rank=2)
    trained, frozen = lora.partition(model, lora.is_adapter)
    before = jax.device_get(frozen)
    state, _ = run(one_device(TILTED), init_state(trained, TX), ragged_candidates(), frozen)
    chex.assert_trees_all_equal(jax.device_get(frozen), before)
    assert {len(jax.tree.leaves(t)) for t in (state.params, trained)} == {14}
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(jax.device_get(trained)), strict=True)
    ]
    assert min(moved) > 0
    batch = ragged_candidates()
    both = [
        m.score(batch.prompt, batch.prompt_mask, batch.completion).logp
        for m in (lora.combine(state.params, frozen), lora.merge(lora.combine(state.params, frozen)))
    ]
    chex.assert_trees_all_close(*both, atol=1e-5)


def test_clipping_schedule_and_metrics():
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(optax.linear_schedule(0.0, 1.0, 2)))
    params = {"w": jnp.asarray([3.0, 4.0])}
    loss_fn = lambda p, frozen, batch, key: (
        average(jnp.sum(batch * p["w"][None], -1)),
        {"twice": average(2 * batch[:, 0])},
    )
    batch = jnp.asarray([[3.0, 4.0], [3.0, 4.0]])
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx))
    state, scalars = step(init_state(params, tx), batch, jax.random.key(0))
    chex.assert_trees_all_close(state.params, params)  # warm-up starts at 0
    chex.assert_trees_all_close(scalars, {"loss": 25.0, "grad_norm": 5.0, "twice": 6.0})
    state, _ = step(state, batch, jax.random.key(0))
    chex.assert_trees_all_close(state.params["w"], params["w"] - 0.5 * 0.5 * jnp.asarray([0.6, 0.8]), rtol=1e-6)
    assert int(state.step) == 2


def test_bad_microbatches_are_refused():
    state = init_state({"w": jnp.zeros(())}, optax.sgd(1.0))
    loss_fn = lambda p, frozen, batch, key: (average(batch * p["w"]), {})
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        train_step(state, jnp.zeros(4), jax.random.key(0), loss_fn=loss_fn, tx=optax.sgd(1.0), microbatches=0)
    with pytest.raises(AssertionError):
        train_step(state, jnp.zeros(4), jax.random.key(0), loss_fn=loss_fn, tx=optax.sgd(1.0), microbatches=3)
