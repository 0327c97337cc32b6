import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests.grids import mesh_over
from tiltjax.ops.collectives import all_gather, axis_index, axis_size, pmax, pmean, pmin, psum

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
GRID = mesh_over(("data", "fsdp"))
REDUCTIONS = [(psum, np.sum), (pmean, np.mean), (pmax, np.max), (pmin, np.min)]


@pytest.mark.parametrize(("collective", "reduce"), REDUCTIONS)
def test_reduces_every_leaf_under_every_map(collective, reduce):
    def tree(x):
        return collective({"a": x, "b": (2 * x,)}, "d")

    expected = reduce(X, 0)
    pmapped = jax.pmap(tree, axis_name="d")(X)
    vmapped = jax.vmap(tree, axis_name="d")(X)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    sharded = jax.shard_map(tree, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec())(X)
    for out in (pmapped, vmapped):
        np.testing.assert_allclose(out["a"], np.broadcast_to(expected, (8, 3)), rtol=1e-6)
        np.testing.assert_allclose(out["b"][0], np.broadcast_to(2 * expected, (8, 3)), rtol=1e-6)
    np.testing.assert_allclose(sharded["a"], expected[None], rtol=1e-6)


@pytest.mark.parametrize(("collective", "reduce"), REDUCTIONS)
def test_reduces_over_two_axes_what_is_split_over_both_or_over_one(collective, reduce):
    """A value that is the same along one axis counts there as often as there are devices."""

    def run(both, one):
        return collective({"both": both, "one": one}, names)

    for names in (("data", "fsdp"), ("fsdp", "data")):
        places, whole = (PartitionSpec(names), PartitionSpec("fsdp")), PartitionSpec()
        out = jax.jit(jax.shard_map(run, mesh=GRID, in_specs=places, out_specs=whole))(X, X)
        np.testing.assert_allclose(out["both"], reduce(X, 0)[None], rtol=1e-6)
        times = 4 if collective is psum else 1
        np.testing.assert_allclose(out["one"], times * reduce(X.reshape(2, 4, 3), 0), rtol=1e-5)


@pytest.mark.parametrize("names", [("data", "fsdp"), ("fsdp", "data"), ("data",)])
def test_several_axes_are_one_long_axis(names):
    """Places and gathered parts in the order that a `PartitionSpec` of these names puts them in."""
    size, split = np.prod([GRID.shape[name] for name in names]), PartitionSpec(names)

    def run(x):
        return axis_index(names)[None], jnp.full(1, axis_size(names)), all_gather(x, names)[None]

    index, sizes, gathered = jax.jit(jax.shard_map(run, mesh=GRID, in_specs=split, out_specs=split))(X)
    np.testing.assert_array_equal(index, np.arange(size))
    np.testing.assert_array_equal(sizes, np.full(size, size))
    np.testing.assert_array_equal(gathered, np.broadcast_to(X, (size, 8, 3)))


@pytest.mark.parametrize("collective", [psum, pmean, pmax, pmin])
def test_is_the_identity_on_one_device(collective):
    out = collective({"a": jnp.asarray(X), "b": [jnp.arange(3)]}, None)
    np.testing.assert_array_equal(out["a"], X)
    np.testing.assert_array_equal(out["b"][0], np.arange(3))


def test_the_extremes_carry_no_gradient_with_or_without_an_axis():
    for collective in (pmax, pmin):
        alone = jax.grad(lambda x, c=collective: jnp.sum(c(x, None)))(X)
        mapped = jax.pmap(jax.grad(lambda x, c=collective: jnp.sum(c(x, "d"))), axis_name="d")(X)
        split = PartitionSpec(("data", "fsdp"))
        grad = jax.grad(lambda x, c=collective: jnp.sum(c(x, ("data", "fsdp"))))
        over = jax.shard_map(grad, mesh=GRID, in_specs=split, out_specs=split)(X)
        for out in (alone, mapped, over):
            np.testing.assert_array_equal(out, np.zeros_like(X))


def test_every_device_knows_its_place():
    place = jax.pmap(lambda _: (axis_index("d"), axis_size("d")), axis_name="d")(X)
    np.testing.assert_array_equal(place[0], np.arange(8))
    np.testing.assert_array_equal(place[1], np.full(8, 8))
    assert (int(axis_index(None)), axis_size(None)) == (0, 1)
