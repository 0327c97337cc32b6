import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tiltjax.models.layers import Linear, entry, scan_layers


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [(1,), (1, 1), (2, 3), (0,), (4, 2, 8)])
def test_a_turned_map_is_the_same_map(batch, dtype):
    """With a bias and adapters, of rows in any arrangement and of columns; compiled, as programs use it."""
    rng = np.random.default_rng(2)
    features_in, features_out = 16, 12
    plain = Linear(jax.random.key(0), features_in, features_out, bias=True, std=1.0)
    plain.bias = nnx.Param(jnp.asarray(rng.normal(size=features_out), jnp.float32))
    plain.lora_a = nnx.Param(jnp.asarray(rng.normal(size=(features_in, 8)), jnp.float32))
    plain.lora_b = nnx.Param(jnp.asarray(rng.normal(size=(8, features_out)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(*batch, features_in)), jnp.float32)

    @jax.jit
    def forms(linear, x):
        turned = linear.turn()
        rows = x.reshape(-1, features_in)
        return linear(x, dtype), turned(x, dtype), turned.columns(rows.T, dtype, axis=0).T, turned.columns(rows, dtype)

    expected, turned, columns, of_rows = forms(plain, x)
    kernel, a, b = (np.float64(w[...]) for w in (plain.kernel, plain.lora_a, plain.lora_b))
    exact = np.float64(x) @ (kernel + a @ b) + np.float64(plain.bias[...])
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.3}
    np.testing.assert_allclose(expected, exact, **close)
    np.testing.assert_allclose(turned, expected, rtol=1e-5, atol=1e-5)
    flat = expected.reshape(-1, features_out)
    for other in (columns, of_rows.T):
        np.testing.assert_allclose(other, flat, rtol=1e-5, atol=1e-5)


def test_a_turned_map_makes_no_wide_copy_of_its_kernel():
    """Of what another one gives, in the order it gives it."""
    up = Linear(jax.random.key(0), 96, 160, bias=False, std=0.1)
    down = Linear(jax.random.key(1), 160, 96, bias=False, std=0.1)
    for linear in (up, down):
        linear.kernel = nnx.Param(linear.kernel[...].astype(jnp.bfloat16).T)
        linear.turned = True

    def run(up, down, x):
        hidden = jax.nn.silu(up.columns(x, jnp.bfloat16))
        return down.columns(hidden, jnp.bfloat16, axis=0)

    text = jax.jit(run).lower(up, down, jnp.ones((64, 96))).compile().as_text()
    assert "bf16[160,96]" in text
    assert "f32[160,96]" not in text.replace("bf16[160,96]", "")
    assert "f32[96,160]" not in text.replace("bf16[96,160]", "")
