import jax
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.train.worlds import tiny_model
from tiltjax.train.sharding import make_mesh, param_spec, shardings
from tiltjax.train.state import init_state


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [("", (8, 1, 1)), ("data:8", (8, 1, 1)), ("fsdp:4,data:2", (2, 4, 1)), ("data:-1,tensor:4", (2, 1, 4))],
)
def test_mesh(spec, sizes):
    assert tuple(make_mesh(spec).shape.values()) == sizes


@pytest.mark.parametrize(
    ("spec", "message"),
    [("data:3", "3 places for 8 devices"), ("rows:8", "rows:8"), ("data:x", "data:x"), ("data:0", "data:0"),
     ("data:-1,fsdp:-1", "one size open")],
)  # fmt: skip
def test_bad_mesh_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec)


def test_rules_reach_every_matrix():
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    places = shardings(tiny_model(), mesh)
    for path, place in jax.tree_util.tree_flatten_with_path(places)[0]:
        name = jax.tree_util.keystr(path)
        matrix = "kernel" in name or "embedding" in name
        assert {axis for axis in place.spec if axis} == ({"fsdp", "tensor"} if matrix else set()), name
        narrows = ".out." in name or ".down." in name
        assert not matrix or "embedding" in name or place.spec[1] == ("tensor" if narrows else "fsdp")


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
