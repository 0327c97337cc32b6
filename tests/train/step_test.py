import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.models import lora
from tiltjax.ops.masked import average
from tiltjax.train.objectives import VarBatch, likelihood_objective, method_kernel, sft_objective, var_objective
from tiltjax.train.sharding import batch_sharding, make_mesh, pmap_step, shard, sharded_step
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
METHODS = {
    "sft": sft_objective(),
    "tilted_mle": likelihood_objective(method_kernel("tilted_mle", beta=0.3)),
    "dpo": likelihood_objective(method_kernel("dpo", beta=0.1)),
}


def var_batch(num_prompts=16, num_candidates=2):
    rng = np.random.default_rng(3)
    shape = (num_prompts, num_candidates, num_prompts)
    return VarBatch(
        candidates=ragged_candidates(num_prompts, num_candidates),
        ref_logp=rng.normal(-9, 1, shape).astype(np.float32),
        reward=rng.normal(size=shape).astype(np.float32),
        own=np.arange(num_prompts),
    )


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
    loss_fn, batch, params = METHODS[method], ragged_candidates(), tiny_model()
    expected = run(one_device(loss_fn), init_state(params, TX), batch)
    pmapped = run(pmap_step(functools.partial(train_step, loss_fn=loss_fn, tx=TX)), fresh_state(params), batch)
    close(pmapped, expected)
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    state = shard(init_state(params, TX), mesh)
    step = sharded_step(functools.partial(train_step, loss_fn=loss_fn, tx=TX), state, None, mesh)
    close(run(step, state, jax.device_put(batch, batch_sharding(mesh))), expected)


def test_var_in_batch_spans_all_devices():
    batch, params = var_batch(), tiny_model()
    expected = run(one_device(var_objective(beta=0.3)), init_state(params, TX), batch)

    mapped = functools.partial(train_step, loss_fn=var_objective(beta=0.3), tx=TX)
    close(run(pmap_step(mapped), fresh_state(params), batch), expected)
    mesh = make_mesh("data:4,fsdp:2")
    state = shard(init_state(params, TX), mesh)
    step = sharded_step(functools.partial(train_step, loss_fn=var_objective(beta=0.3), tx=TX), state, None, mesh)
    close(run(step, state, jax.device_put(batch, batch_sharding(mesh))), expected)


@pytest.mark.parametrize(("method", "microbatches"), [*((m, 8) for m in METHODS), ("sft", 2)])
def test_gradient_accumulation_is_the_big_batch(method, microbatches):
    loss_fn, batch, params = METHODS[method], ragged_candidates(), tiny_model()
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
    loss_fn = likelihood_objective(method_kernel("tilted_mle", beta=0.3))
    state, _ = run(one_device(loss_fn), init_state(trained, TX), ragged_candidates(), frozen)
    chex.assert_trees_all_equal(jax.device_get(frozen), before)
    assert {len(jax.tree.leaves(t)) for t in (state.params, trained)} == {14}
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(trained), strict=True)
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
    state, scalars = train_step(init_state(params, tx), batch, jax.random.key(0), loss_fn=loss_fn, tx=tx)
    chex.assert_trees_all_close(state.params, params)  # warm-up starts at 0
    chex.assert_trees_all_close(scalars, {"loss": 25.0, "grad_norm": 5.0, "twice": 6.0})
    state, _ = train_step(state, batch, jax.random.key(0), loss_fn=loss_fn, tx=tx)
    chex.assert_trees_all_close(state.params["w"], params["w"] - 0.5 * 0.5 * jnp.asarray([0.6, 0.8]), rtol=1e-6)
    assert int(state.step) == 2


def test_bad_microbatches_are_refused():
    state = init_state({"w": jnp.zeros(())}, optax.sgd(1.0))
    loss_fn = lambda p, frozen, batch, key: (average(batch * p["w"]), {})
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        train_step(state, jnp.zeros(4), jax.random.key(0), loss_fn=loss_fn, tx=optax.sgd(1.0), microbatches=0)
    with pytest.raises(AssertionError):
        train_step(state, jnp.zeros(4), jax.random.key(0), loss_fn=loss_fn, tx=optax.sgd(1.0), microbatches=3)
