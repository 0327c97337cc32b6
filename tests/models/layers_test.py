import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.models.layers import entry


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


def test_sixteen_bits_are_not_widened_to_take_some_of_them():
    """Of a stack of 16-bit matrices the loop over layers makes no float32 copy."""
    stack = jnp.zeros((30, 64, 64), jnp.bfloat16)

    def product(x, stack):
        def layer(x, i):
            return jnp.dot(x, entry(stack, i), preferred_element_type=jnp.float32).astype(x.dtype), None

        return jax.lax.scan(layer, x, jnp.arange(30))[0]

    compiled = jax.jit(product).lower(jnp.zeros((4, 64), jnp.bfloat16), stack).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < stack.nbytes / 2
