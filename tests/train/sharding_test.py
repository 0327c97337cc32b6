import functools
import pathlib

import chex
import jax
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.models.layers import NARROW, WIDEN
from tiltjax.models.pretrained import load
from tiltjax.train.objectives import sft_objective
from tiltjax.train.sharding import batch_sharding, make_mesh, param_spec, shard, sharded_step, shardings
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

GOLDEN = pathlib.Path(__file__).parents[1] / "models" / "golden"
ARCHITECTURES = ("llama", "gpt_neox", "gpt2")


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [("", (8, 1, 1)), ("data:8", (8, 1, 1)), ("fsdp:4,data:2", (2, 4, 1)), ("data:-1,tensor:4", (2, 1, 4))],
)
def test_mesh(spec, sizes):
    assert tuple(make_mesh(spec).shape.values()) == sizes


@pytest.mark.parametrize(
    ("spec", "message"),
    [("data:3", "3 places for 8 devices"), ("rows:8", "rows:8"), ("data:x", "data:x"), ("data:0", "data:0"),
     ("data:-1,fsdp:-1", "one size open"), ("data:2,data:4", "every axis once, got data twice"), ("data:-2", "data:-2"),
     ("data:8,", "got ''"), ("data", "got 'data'"), ("fsdp:16", "16 places"), ("data:\u0662", "got 'data:")],
)  # fmt: skip
@pytest.mark.robustness("Flags", given="a mesh with an axis twice, unknown, or of size 0", outcome="one line names it")
def test_bad_mesh_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rules_reach_every_matrix(family):
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    places = shardings(load(GOLDEN / family), mesh)
    rows, columns, vocabulary = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor"), ("tensor", "fsdp")
    expected = {
        **{f".blocks.{name}.kernel": rows for name in WIDEN},
        **{f".blocks.{name}.bias": columns for name in WIDEN},
        **{f".blocks.{name}.kernel": PartitionSpec(None, "tensor", "fsdp") for name in NARROW},
        ".embedding": PartitionSpec(*vocabulary),
        ".head": PartitionSpec(*vocabulary),
        ".position_embedding": PartitionSpec(None, "fsdp"),
    }
    seen = {jax.tree_util.keystr(path): place for path, place in jax.tree_util.tree_flatten_with_path(places)[0]}
    for path, place in seen.items():
        name = path.removesuffix(".value")
        small = "norm" in name or ".out.bias" in name or ".down.bias" in name
        assert place.spec == (PartitionSpec() if small else expected[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # With and without biases, gates and learned positions.
def test_loss_and_gradient_over_three_axes_are_those_of_one_device(family):
    model, batch, tx, key = load(GOLDEN / family), ragged_candidates(), optax.sgd(1.0), jax.random.key(0)
    step = functools.partial(train_step, loss_fn=sft_objective(), tx=tx)
    state = init_state(model, tx)
    expected = jax.jit(step)(state, batch, key)
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    sharded = sharded_step(step, state, None, mesh)
    actual = sharded(shard(state, mesh), jax.device_put(batch, batch_sharding(mesh)), key, None)
    assert float(expected[1]["grad_norm"]) > 0.1
    chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(expected), rtol=0, atol=1e-5)


def test_optimizer_state_lies_where_its_parameters_do():
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    state = shardings(init_state(tiny_model(), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))), mesh)
    params = jax.tree.leaves(state.params)
    assert jax.tree.leaves(state.opt_state[1][0].mu) == params
    assert jax.tree.leaves(state.opt_state[1][0].nu) == params


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = make_mesh("fsdp:4,tensor:2")
    assert param_spec("blocks.up.kernel", (2, 6, 8), mesh) == PartitionSpec(None, None, "tensor")
    assert param_spec("blocks.down.kernel", (2, 8, 6), mesh) == PartitionSpec(None, "tensor", None)
