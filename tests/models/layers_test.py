import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.models.layers import entry, scan_layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_entry_is_that_of_the_array_bit_by_bit(dtype):
    """NaN, infinities and the sign of zero included; its gradient is that of indexing."""
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(dtype)
    x[1] = np.array([np.nan, np.inf, -np.inf, -0.0, 3e-39], dtype)
    index = np.array([[1, 5], [1, 0]])

    def entries(function, x):
        return jnp.sum(function(x, index).astype(jnp.float32)[1] * 2) + jnp.sum(function(x, 3).astype(jnp.float32))

    @jax.jit
    def run(x):
        seen = jax.lax.scan(lambda _, i: (None, entry(x, i)), None, jnp.arange(6))[1]
        return seen, entry(x, index), jax.grad(lambda x: entries(entry, x))(x)

    seen, rows, grad = run(x)
    bits = f"uint{8 * x.itemsize}"
    np.testing.assert_array_equal(np.asarray(seen).view(bits), x.view(bits))
    np.testing.assert_array_equal(np.asarray(rows).view(bits), x[index].view(bits))
    chex.assert_trees_all_equal(grad, jax.grad(lambda x: entries(lambda x, i: x[i], x))(jnp.asarray(x)))


@pytest.mark.parametrize("remat", [False, True])
def test_layers_are_scanned_with_their_gradients(remat):
    """Of a stack that mixes widths."""
    rng = np.random.default_rng(1)
    stack = {"w": rng.normal(size=(4, 3, 3)).astype("bfloat16"), "b": rng.normal(size=(4, 3)).astype("float32")}
    stack, x = jax.tree.map(jnp.asarray, stack), jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def layer(x, one):
        x = jnp.tanh(x @ one["w"].astype(jnp.float32) + one["b"][None])
        return x, jnp.sum(x)

    def scanned(x, stack):
        x, sums = scan_layers(jax.checkpoint(layer) if remat else layer, x, stack)
        return jnp.sum(x * jnp.sum(sums)), sums

    def unrolled(x, stack):
        sums = []
        for i in range(4):
            x, total = layer(x, jax.tree.map(lambda a: a[i], stack))  # noqa: B023
            sums.append(total)
        return jnp.sum(x * sum(sums)), jnp.stack(sums)

    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(x, stack) for f in (scanned, unrolled))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["index", "scan"])
def test_sixteen_bits_are_not_widened_to_take_some_of_them(by):
    """Of a stack of 16-bit matrices the loop over layers makes no float32 copy."""
    stack = jnp.zeros((30, 64, 64), jnp.bfloat16)

    def product(x, stack):
        def layer(x, w):
            return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype), None

        if by == "scan":
            return scan_layers(layer, x, stack)[0]
        return jax.lax.scan(lambda x, i: layer(x, entry(stack, i)), x, jnp.arange(30))[0]

    compiled = jax.jit(product).lower(jnp.zeros((4, 64), jnp.bfloat16), stack).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < stack.nbytes / 2
