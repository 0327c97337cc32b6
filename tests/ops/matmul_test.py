import ast
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import tiltjax
from tests.grids import each_grid, mesh_over
from tiltjax.ops.bits import KEPT, gradient_at_rounded
from tiltjax.ops.collectives import pmean
from tiltjax.ops.matmul import (
    dot,
    matmul,
    outer,
    product,
    scale_rows,
    transposed_outer,
    turned_is_faster,
    turned_matmul,
)

RNG = np.random.default_rng(0)
X, W, G = RNG.normal(size=(2, 3, 5)), RNG.normal(size=(5, 4)), RNG.normal(size=(2, 3, 4))


def rounded(x, dtype):
    return np.asarray(np.asarray(x, dtype), np.float64)


def exact_product(x, w, sums, batch):
    """`jax.lax.dot_general` in float64."""
    left, right = list("abcd"[: x.ndim]), list("efgh"[: w.ndim])
    for i, j in zip((*batch[0], *sums[0]), (*batch[1], *sums[1]), strict=True):
        right[j] = left[i]
    free = [letter for letter in left + right if (letter in left) != (letter in right)]
    out = [left[i] for i in batch[0]] + free
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", np.float64(x), np.float64(w))


@each_grid
def test_gradients_of_shared_operands_sum_over_devices(names):
    """Under `shard_map` the rules of narrow gradients give each device's part."""
    x, w, b = (np.float32(RNG.normal(size=shape)) for shape in ((16, 5), (5, 4), (1, 4)))

    def total(w, b, x, axis_name=None):
        rows = matmul(x, w, jnp.bfloat16)
        return pmean(jnp.mean(gradient_at_rounded(lambda y, b: jnp.tanh(y + b), jnp.bfloat16, rows, b)), axis_name)

    grad, whole = jax.grad(total, argnums=(0, 1)), PartitionSpec()
    places = (whole, whole, PartitionSpec(names))
    mapped = jax.shard_map(lambda *x: grad(*x, names), mesh=mesh_over(names), in_specs=places, out_specs=whole)
    chex.assert_trees_all_close(jax.jit(mapped)(w, b, x), jax.jit(grad)(w, b, x), atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products_and_gradients_are_those_of_rounded_operands(dtype):
    """In float64, and with a gradient that is rounded like every operand."""

    @jax.jit
    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, dtype), x, w)
        return y, *pull(g)

    y, grad_x, grad_w = both(*map(np.float32, (X, W, G)))
    x, w, g = (rounded(a, dtype) for a in (X, W, G))
    assert {a.dtype for a in (y, grad_x, grad_w)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_x, g @ w.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_w, np.einsum("abi,abo->io", x, g), rtol=1e-5, atol=1e-6)
    dots = jax.jit(dot, static_argnums=2)(np.float32(X[0]), np.float32(W.T), dtype)
    np.testing.assert_allclose(dots, x[0] @ w, rtol=1e-5, atol=1e-6)


def test_the_gradient_keeps_the_type_of_what_it_is_of():
    x, w = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    grads = jax.jit(jax.grad(lambda x, w: jnp.sum(matmul(x, w, jnp.bfloat16)), argnums=(0, 1)))(x, w)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


def test_a_transposed_copy_gives_the_same_outer_product():
    x, y = X.astype(jnp.bfloat16), G.astype(jnp.bfloat16)
    flat = jax.jit(transposed_outer)(x.reshape(6, 5), y.reshape(6, 4))
    np.testing.assert_allclose(flat, jax.jit(outer)(x, y), rtol=1e-6)
    np.testing.assert_allclose(flat, np.einsum("abi,abo->io", np.float64(x), np.float64(y)), rtol=1e-6)


def test_one_row_is_multiplied_without_a_wide_copy_of_the_matrix():
    x, w = (RNG.normal(size=shape).astype(jnp.bfloat16) for shape in ((1, 1, 64), (64, 300)))
    compiled = jax.jit(lambda x, w: matmul(x, w, jnp.bfloat16)).lower(x, w).compile()
    assert "f32[64,300]" not in compiled.as_text()
    np.testing.assert_allclose(compiled(x, w), np.float64(x) @ np.float64(w), rtol=1e-5, atol=1e-5)
    assert jax.eval_shape(lambda x, w: dot(x, w, jnp.bfloat16), x[0], w.T).shape == (1, 300)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_a_turned_matrix_gives_the_same_products(rows, axis, dtype):
    x, w = (RNG.normal(size=shape).astype(np.float32) for shape in ((rows, 5), (5, 4)))
    y = np.asarray(jax.jit(lambda w, x: turned_matmul(w, x, dtype, axis=axis))(w.T, x if axis else x.T))
    assert (y.shape, y.dtype) == ((4, rows), jnp.dtype("float32"))
    np.testing.assert_allclose(y.T, rounded(x, dtype) @ rounded(w, dtype), rtol=1e-5, atol=1e-6)


def test_small_narrow_products_are_not_turned():
    assert not turned_is_faster(16, 576, 1536, jnp.bfloat16)
    assert all(turned_is_faster(*case) for case in [(64, 576, 1536, jnp.bfloat16), (2, 64, 64, jnp.float32)])
    assert turned_is_faster(2, 2048, 8192, jnp.bfloat16)


def test_what_is_kept_is_stored_as_bits_and_changes_no_number():
    x, w = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)

    def loss(x, w, *, keep):
        return jnp.sum(jnp.square(matmul(jnp.tanh(x), w, jnp.bfloat16, keep=keep)))

    def stored(keep):
        remembered = jax.vjp(jax.checkpoint(lambda x, w: loss(x, w, keep=keep), policy=policy), x, w)[1]
        return [leaf.shape for leaf in jax.tree.leaves(remembered) if leaf.dtype == jnp.uint16]

    assert stored(keep=True) == [X.shape]
    assert stored(keep=False) == []
    plain = jax.jit(jax.grad(lambda x, w: loss(x, w, keep=False), argnums=(0, 1)))(x, w)
    kept = jax.checkpoint(lambda x, w: loss(x, w, keep=True), policy=policy)
    kept = jax.jit(jax.grad(kept, argnums=(0, 1)))(x, w)
    chex.assert_trees_all_equal(kept, plain)


def test_scaled_rows_and_their_gradients():
    x, factor, grad = map(np.float32, (X, G[..., 0], RNG.normal(size=X.shape)))

    @jax.jit
    def both(x, factor, grad):
        y, pull = jax.vjp(scale_rows, x, factor)
        expected, plain = jax.vjp(lambda x, f: x * f[..., None], x, factor)
        return (y, pull(grad)), (expected, plain(grad))

    chex.assert_trees_all_close(*both(x, factor, grad), rtol=1e-5, atol=1e-6)


FORMS = {
    "x w": ((8, 16), (16, 12), ((1,), (0,)), ((), ())),
    "x w^T": ((8, 16), (12, 16), ((1,), (1,)), ((), ())),
    "x^T w": ((16, 8), (16, 12), ((0,), (0,)), ((), ())),
    "x^T w^T": ((16, 8), (12, 16), ((0,), (1,)), ((), ())),
    "one row": ((1, 16), (16, 12), ((1,), (0,)), ((), ())),
    "three axes": ((2, 4, 16), (16, 12), ((2,), (0,)), ((), ())),
    "two sums": ((4, 2, 16), (4, 2, 12), ((0, 1), (0, 1)), ((), ())),
    "batched": ((3, 2, 8, 16), (3, 2, 16, 12), ((3,), (2,)), ((0, 1), (0, 1))),
    "batched keys": ((3, 2, 8, 16), (3, 2, 12, 16), ((3,), (3,)), ((0, 1), (0, 1))),
}


@functools.cache
def slopes(form):
    *_, sums, batch = FORMS[form]
    return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w, sums, batch))), argnums=(0, 1)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_product_runs_whatever_is_made_of_it(form, dtype):
    """XLA folds a transposition into the product, before it or behind it, and may not be able to run the result."""
    x_shape, w_shape, sums, batch = FORMS[form]
    x, w = (np.asarray(RNG.normal(size=shape), dtype) for shape in (x_shape, w_shape))
    exact = exact_product(x, w, sums, batch)

    @jax.jit
    def uses(x, w):
        y = product(x, w, sums, batch)
        turned = jnp.swapaxes(product(jnp.swapaxes(jnp.swapaxes(x, 0, 1) * 1, 0, 1), w, sums, batch), -1, -2) * 2
        looped = jax.lax.scan(lambda carry, _: (carry + 1, None), jnp.swapaxes(y, -1, -2), None, length=2)[0]
        narrow = jnp.moveaxis(product(x, w, sums, batch), -1, 0).astype(dtype)
        return y, turned / 2, looped - 2, narrow, jnp.swapaxes(y, 0, -1).sum(axis=0)

    y, turned, looped, narrow, summed = uses(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned, np.swapaxes(exact, -1, -2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(looped, np.swapaxes(exact, -1, -2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.float64(narrow), np.moveaxis(exact, -1, 0), rtol=0.01, atol=0.01)
    np.testing.assert_allclose(summed, np.swapaxes(exact, 0, -1).sum(axis=0), rtol=1e-5, atol=1e-5)
    wide = slopes(form)(np.asarray(x, np.float32), np.asarray(w, np.float32))
    for narrow, other in zip(slopes(form)(x, w), wide, strict=True):
        assert narrow.dtype == dtype
        np.testing.assert_allclose(np.float64(narrow), other, rtol=0.02, atol=0.02)


def test_products_with_a_type_of_their_own_are_made_in_one_place():
    """Elsewhere nobody would keep XLA from a form that it cannot run; kernels of a platform are compiled for it."""
    root = pathlib.Path(tiltjax.__file__).parent
    makers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "preferred_element_type"
    }
    assert makers == {"ops/matmul.py", "models/flash.py"}
