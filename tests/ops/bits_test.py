import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.ops.bits import KEPT, as_bits, from_bits, gradient_at_rounded, keep

RNG = np.random.default_rng(0)
X, Y, G = (jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32) for _ in range(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint16", "int32", "bool"])
def test_bits_there_and_back(dtype):
    """Floats of 16 bits are integers between, all else is what it was."""
    x = (100 * X).astype(dtype)
    stored = as_bits(x)
    assert stored.dtype == ("uint16" if dtype in ("bfloat16", "float16") else dtype)
    assert stored.shape == x.shape
    back = from_bits(stored, x.dtype)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(back, np.float64), np.asarray(x, np.float64))


def test_what_is_kept_is_the_same_number():
    x = X.astype(jnp.bfloat16)
    chex.assert_trees_all_equal(jax.jit(keep)(x), x)


def gated(gate, up):
    return jax.nn.silu(gate) * up


def test_the_gradient_is_taken_at_rounded_arguments():
    y, pull = jax.vjp(lambda *x: gradient_at_rounded(gated, jnp.bfloat16, *x), X, Y)
    chex.assert_trees_all_equal(y, gated(X, Y))
    x, y = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (X, Y))
    g, sigmoid = np.float64(G), 1 / (1 + np.exp(-x))
    expected = g * y * sigmoid * (1 + x * (1 - sigmoid)), g * x * sigmoid
    for found, wanted in zip(pull(G), expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_wide_arguments_are_left_alone():
    plain, exact = (jax.make_jaxpr(f)(X, Y) for f in (gated, lambda *x: gradient_at_rounded(gated, jnp.float32, *x)))
    assert str(plain) == str(exact)


def test_sixteen_bits_of_each_argument_are_remembered_and_nothing_else():
    policy = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(KEPT)
    )
    w = jnp.asarray(RNG.normal(size=(2, 5, 7)), jnp.float32)

    def layer(x, w):
        return gradient_at_rounded(gated, jnp.bfloat16, x @ w[0], x @ w[1])

    pull = jax.vjp(jax.checkpoint(layer, policy=policy), X, w)[1]
    stored = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull) if leaf.ndim)
    assert stored == [((2, 5, 7), "float32"), ((3, 5), "float32"), ((3, 7), "uint16"), ((3, 7), "uint16")]
