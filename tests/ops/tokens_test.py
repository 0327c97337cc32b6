import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import log_softmax

from tiltjax.ops.collectives import pmean
from tiltjax.ops.matmul import dot
from tiltjax.ops.tokens import eos_mask, sequence_logp, token_logp
from tiltjax.train.sharding import make_mesh

V, D = 37, 8
RNG = np.random.default_rng(0)
HIDDEN, HEAD = RNG.normal(size=(2, 3, D)), RNG.normal(size=(V, D)) / 2
TOKEN = RNG.integers(0, V, (2, 3))
TOKEN[0, 0], TOKEN[1, 2] = 0, V - 1
COTANGENTS = RNG.normal(size=(3, 2, 3))


def exact(hidden, head, token, temperature):
    """The three fields in float64, from the whole ``[.., V]``."""
    logp = log_softmax(np.float64(hidden) @ np.float64(head).T / temperature, axis=-1)
    entropy = -(np.exp(logp) * logp).sum(-1)
    return np.take_along_axis(logp, token[..., None], -1)[..., 0], entropy, -np.log(len(head)) - logp.mean(-1)


def plain(hidden, head, token, temperature):
    """The same for JAX to differentiate."""
    logp = jax.nn.log_softmax(jnp.einsum("...d,vd->...v", hidden, head) / temperature)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    chosen = jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0]
    return chosen, entropy, -jnp.log(1.0 * len(head)) - jnp.mean(logp, axis=-1)


def fields(stats):
    return stats.logp, stats.entropy, stats.self_certainty


@functools.partial(jax.jit, static_argnums=3, static_argnames=("chunk", "rows", "dtype"))
def chunked(hidden, head, token, temperature=1.0, **options):
    return fields(token_logp(hidden, head, token, temperature=temperature, **options))


def divergence(hidden, head, ref_hidden, ref_head, **options):
    token = np.zeros(hidden.shape[:-1], int)
    return token_logp(hidden, head, token, reference=(ref_hidden, ref_head), **options).kl


def pulled_back(function, *, dtype=jnp.float64):
    """Gradient with respect to hidden states and head of the fields, weighted by random cotangents."""
    cotangents = tuple(jnp.asarray(COTANGENTS, dtype))

    def total(hidden, head):
        return sum(jnp.sum(c * field) for c, field in zip(cotangents, function(hidden, head), strict=True))

    return jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(HIDDEN, dtype), jnp.asarray(HEAD, dtype))


@pytest.mark.parametrize(("chunk", "rows"), [(8, 2), (3072, None), (5, 4)])
def test_a_support_restricts_every_field_and_every_gradient(chunk, rows):
    """Of policy and reference: the softmax of the tokens that are in it; bits behind the last may be anything."""
    rng = np.random.default_rng(3)
    kept = rng.random((2, 3, V)) < 0.3
    kept[0, 0], kept[0, 0, V - 1], kept[1, 1] = False, True, True
    token = np.where(kept[..., -1], V - 1, kept.argmax(-1))
    support = np.packbits(kept, axis=-1, bitorder="little")
    support[..., -1] |= 256 - (1 << V % 8)
    arrays = [jnp.asarray(x, jnp.float32) for x in (HIDDEN, HEAD, HIDDEN[..., :4], HEAD[:, 3:7])]
    weights = rng.normal(size=(5, 2, 3)).astype(np.float32)

    def ours(hidden, head, ref_hidden, ref_head):
        reference, options = (ref_hidden, ref_head), {"chunk": chunk, "rows": rows, "temperature": 0.7}
        stats = token_logp(hidden, head, jnp.asarray(token), reference=reference, support=support, **options)
        return jnp.stack([*fields(stats), stats.ref_logp, stats.kl])

    def whole(hidden, head, ref_hidden, ref_head):
        logits = jnp.stack([hidden @ head.T, ref_hidden @ ref_head.T]) / 0.7
        ours, theirs = jax.nn.log_softmax(jnp.where(kept[None], logits, -1e30))
        p, one = jnp.exp(ours), token[..., None]
        size = kept.sum(-1)
        return jnp.stack([
            jnp.take_along_axis(ours, one, -1)[..., 0],
            -jnp.sum(jnp.where(kept, p * ours, 0), -1),
            -jnp.sum(jnp.where(kept, ours, 0), -1) / size - jnp.log(size),
            jnp.take_along_axis(theirs, one, -1)[..., 0],
            jnp.sum(jnp.where(kept, p * (ours - theirs), 0), -1),
        ])  # fmt: skip

    def both(function):
        total = lambda *x: (jnp.sum(weights * (out := function(*x))), out)
        return jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(*arrays)

    (grads, found), (expected_grads, expected) = both(ours), both(whole)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
    outside = (~kept).argmax(-1)
    logp = chunked(*arrays[:2], outside, support=support)[0]
    np.testing.assert_array_equal(np.isneginf(logp), ~kept.all(-1))


def test_makes_no_wide_copy_of_a_narrow_head():
    """Of 16 bits, whole chunks or not; what the tail is cut from neither."""
    hidden, token = jnp.ones((8, 64), jnp.bfloat16), jnp.zeros(8, int)
    for size in (2048, 2050):
        head = jnp.ones((size, 64), jnp.bfloat16)
        compiled = jax.jit(functools.partial(token_logp, chunk=64)).lower(hidden, head, token).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < head.nbytes / 2


@pytest.mark.parametrize(("chunk", "temperature"), [(8, 0.7), (37, 1.0), (1, 2.0)])
def test_is_the_float64_log_softmax(chunk, temperature):
    expected = exact(HIDDEN, HEAD, TOKEN, temperature)
    single = chunked(np.float32(HIDDEN), np.float32(HEAD), TOKEN, temperature, chunk=chunk)
    np.testing.assert_allclose(single, expected, rtol=2e-5, atol=2e-6)
    assert {x.dtype for x in single} == {np.dtype("float32")}
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            chunked(HIDDEN, HEAD, TOKEN, temperature, chunk=chunk), expected, rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize(("chunk", "rows", "temperature"), [(8, None, 0.7), (64, 4, 1.0), (8, 2, 0.7)])
def test_gradient_is_that_of_the_plain_formula(chunk, rows, temperature):
    """Also with positions in blocks: 2 of 3 positions, where 6 divide evenly, and 4, where they need padding."""
    with jax.enable_x64(True):
        expected = pulled_back(lambda h, w: plain(h, w, TOKEN, temperature))
        actual = pulled_back(lambda h, w: chunked(h, w, TOKEN, temperature, chunk=chunk, rows=rows))
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    single = pulled_back(lambda h, w: chunked(h, w, TOKEN, temperature, chunk=chunk, rows=rows), dtype=jnp.float32)
    for a, b in zip(single, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_operands_and_float32_sums():
    hidden, head = (jnp.asarray(x, jnp.bfloat16) for x in (HIDDEN, HEAD))
    expected = exact(np.asarray(hidden, np.float64), np.asarray(head, np.float64), TOKEN, 0.7)
    for operands in ((hidden, head), (np.float32(HIDDEN), np.float32(HEAD))):
        out = chunked(*operands, TOKEN, 0.7, chunk=8, dtype="bfloat16")
        assert {x.dtype for x in out} == {np.dtype("float32")}
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    actual = pulled_back(lambda h, w: chunked(h, w, TOKEN, 0.7, chunk=8, dtype="bfloat16"), dtype=jnp.float32)
    expected = pulled_back(lambda h, w: plain(h, w, TOKEN, 0.7), dtype=jnp.float32)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        assert 0 < np.abs(a - b).max() < 0.02 * np.abs(b).max()


@pytest.mark.parametrize("shape", [(), (6,), (2, 1, 3)])
def test_leading_dimensions_are_free(shape):
    size = int(np.prod(shape))
    hidden, token = np.float32(HIDDEN).reshape(-1, D)[:size], TOKEN.reshape(-1)[:size]
    out = chunked(hidden.reshape(*shape, D), np.float32(HEAD), token.reshape(shape), chunk=8)
    assert {x.shape for x in out} == {shape}
    np.testing.assert_allclose(np.stack(out).reshape(3, -1), exact(hidden, HEAD, token, 1.0), rtol=2e-5, atol=2e-6)


def test_logits_far_from_zero():
    hidden = np.float32(30 * HIDDEN)
    out = chunked(hidden, np.float32(HEAD), TOKEN, chunk=8)
    np.testing.assert_allclose(out, exact(hidden, HEAD, TOKEN, 1.0), rtol=1e-5, atol=1e-4)


def shapes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)


def test_neither_pass_holds_all_logits():
    M, chunk = 64, 8
    hidden, head, token = np.ones((M, D), np.float32), np.float32(HEAD), np.zeros(M, int)

    def largest(function):
        def total(hidden, head):
            return sum(jnp.sum(field) for field in function(hidden, head))

        jaxprs = [jax.make_jaxpr(f)(hidden, head).jaxpr for f in (total, jax.grad(total, argnums=(0, 1)))]
        return [max(map(math.prod, shapes(jaxpr))) for jaxpr in jaxprs]

    assert min(largest(lambda h, w: plain(h, w, token, 1.0))) == M * V
    assert largest(lambda h, w: fields(token_logp(h, w, token, chunk=chunk))) == [M * chunk] * 2


def test_blocks_of_positions_change_no_number():
    """Prime numbers of positions, so that every block size needs padding; each block is a strided part."""
    hidden, token = np.float32(RNG.normal(size=(11, D))), RNG.integers(0, V, 11)
    out = chunked(hidden, np.float32(HEAD), token, chunk=8, rows=3)
    np.testing.assert_allclose(out, exact(hidden, HEAD, token, 1.0), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("how", ["alone", "pmap", "shard_map", "two of three axes", "sharded jit", "traced in a mesh"])
def test_a_block_is_2048_positions_of_every_device(how):
    """Shapes are those of one device, or of all that the compiler of a sharded jit splits the batch over."""
    mesh, batch = make_mesh("data:2,fsdp:2,tensor:2"), PartitionSpec(("data", "fsdp"))
    hidden, token = np.ones((8, 2**12, D), np.float32), np.zeros((8, 2**12), int)
    run = lambda hidden, token: token_logp(hidden, np.float32(HEAD), token).logp
    mapped = functools.partial(jax.shard_map, run, mesh=mesh)
    whole = PartitionSpec(mesh.axis_names)
    program = {
        "pmap": jax.pmap(run),
        "shard_map": mapped(in_specs=whole, out_specs=whole),
        "two of three axes": mapped(in_specs=batch, out_specs=batch, axis_names={"data", "fsdp"}, check_vma=False),
    }.get(how, jax.jit(run))

    def blocks(hidden, token):
        if how == "sharded jit":
            hidden, token = jax.device_put((hidden, token), NamedSharding(mesh, batch))
        context = mesh.abstract_mesh if how == "traced in a mesh" else jax.sharding.get_abstract_mesh()
        with jax.sharding.use_abstract_mesh(context):
            jaxpr = jax.make_jaxpr(program)(hidden, token).jaxpr
        return max(shape[0] for shape in shapes(jaxpr) if len(shape) == 2 and shape[1] == V)

    split = "jit" in how or "traced" in how
    assert blocks(hidden, token) == (4 if split else 1) * 2048
    if split:  # 4 blocks would need no padding either, but no device would hold as much of each as the others.
        assert blocks(hidden[:, :4095], token[:, :4095]) == 8 * 4095 // 5


@pytest.mark.parametrize("asked", ["policy", "kl", "all"])
def test_gradient_of_a_shared_head_sums_over_devices(asked):
    """Under `shard_map`, in several blocks and chunks: it checks of every loop what differs between devices."""
    mesh, names = make_mesh("data:4,fsdp:2"), ("data", "fsdp")
    hidden, token = np.float32(RNG.normal(size=(32, D))), RNG.integers(0, V, 32)
    head, other = np.float32(HEAD), np.float32(HEAD[::-1])

    def total(hidden, head, other, token, axis_name=None):
        reference = None if asked == "policy" else (hidden, other if asked == "all" else np.float32(HEAD[::-1]))
        stats = token_logp(hidden, head, token, reference=reference, chunk=8, rows=2)
        value = stats.kl if asked == "kl" else stats.logp + stats.entropy**2
        if asked == "all":
            value += stats.self_certainty * stats.kl + jnp.sin(stats.ref_logp)
        return pmean(jnp.mean(value), axis_name)

    grad = jax.value_and_grad(total, argnums=(0, 1, 2))
    split, whole = PartitionSpec(names), PartitionSpec()
    mapped = jax.shard_map(
        lambda *x: grad(*x, names),
        mesh=mesh,
        in_specs=(split, whole, whole, split),
        out_specs=(whole, (split, whole, whole)),
    )
    actual, expected = (jax.jit(f)(hidden, head, other, token) for f in (mapped, grad))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert bool(jnp.any(expected[1][2])) == (asked == "all")


REF_HIDDEN, REF_HEAD = RNG.normal(size=(2, 3, 5)), RNG.normal(size=(V, 5)) / 2


def dense_kl(hidden, head, ref_hidden, ref_head, temperature):
    logp = jax.nn.log_softmax(jnp.einsum("...d,vd->...v", hidden, head) / temperature)
    logq = jax.nn.log_softmax(jnp.einsum("...d,vd->...v", ref_hidden, ref_head) / temperature)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


@pytest.mark.parametrize(("chunk", "rows", "temperature"), [(8, None, 1.0), (37, 2, 0.7)])
def test_kl_and_its_gradients_are_those_of_the_dense_formula(chunk, rows, temperature):
    """In float64 against NumPy and automatic differentiation; in float32 and bfloat16 against float64."""
    operands = (HIDDEN, HEAD, REF_HIDDEN, REF_HEAD)
    options = {"temperature": temperature, "chunk": chunk, "rows": rows}
    logp, logq = (log_softmax(h @ w.T / temperature, axis=-1) for h, w in (operands[:2], operands[2:]))
    expected = (np.exp(logp) * (logp - logq)).sum(-1)

    @functools.partial(jax.jit, static_argnums=1)
    def value_and_grad(operands, dtype):
        function = lambda *x: (jnp.sum(COTANGENTS[0] * (kl := divergence(*x, dtype=dtype, **options))), kl)
        return jax.grad(function, argnums=(0, 1, 2, 3), has_aux=True)(*operands)

    with jax.enable_x64(True):
        total = lambda *x: jnp.sum(COTANGENTS[0] * dense_kl(*x, temperature))
        wanted = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*map(jnp.asarray, operands))
        grads, kl = value_and_grad(operands, None)
        np.testing.assert_allclose(kl, expected, rtol=1e-11)
        for a, b in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    for dtype, tolerance in ((None, 1e-5), ("bfloat16", 0.03))[: 1 if rows else 2]:
        grads, kl = value_and_grad(tuple(map(np.float32, operands)), dtype)
        assert kl.dtype == jnp.float32
        np.testing.assert_allclose(kl, expected, rtol=tolerance, atol=tolerance)
        for a, b in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


ALL = ("logp", "entropy", "self_certainty", "ref_logp", "kl")
WEIGHTS = RNG.normal(size=(len(ALL), 2, 3))


def with_reference(*operands, names=ALL, **options):
    stats = token_logp(*operands[:2], TOKEN, reference=operands[2:], **options)
    return [getattr(stats, name) for name in names]


def plain_with_reference(*operands, names=ALL, temperature=1.0):
    both = plain(*operands[:2], TOKEN, temperature), plain(*operands[2:], TOKEN, temperature)
    fields = dict(zip(ALL, (*both[0], both[1][0], dense_kl(*operands, temperature)), strict=True))
    return [fields[name] for name in names]


def all_gradients(function, *, names=ALL, argnums=(0, 1, 2, 3), **options):
    """With respect to both pairs, of the fields weighted by random cotangents."""

    def total(*operands):
        fields = function(*operands, names=names, **options)
        return sum(jnp.sum(WEIGHTS[ALL.index(n)] * field) for n, field in zip(names, fields, strict=True))

    operands = map(jnp.asarray, (HIDDEN, HEAD, REF_HIDDEN, REF_HEAD))
    return jax.jit(jax.grad(total, argnums=argnums))(*operands)


@pytest.mark.parametrize(("chunk", "rows", "temperature"), [(8, 2, 0.7), (5, 4, 1.5), (64, None, 1.0)])
def test_with_a_reference_all_fields_and_gradients_are_those_of_the_dense_formula(chunk, rows, temperature):
    """In float64, with a tail of the vocabulary, blocks that divide the positions evenly and some that need padding."""
    options = {"chunk": chunk, "rows": rows, "temperature": temperature}
    with jax.enable_x64(True):
        fields = jax.jit(functools.partial(with_reference, **options))(HIDDEN, HEAD, REF_HIDDEN, REF_HEAD)
        ours = exact(HIDDEN, HEAD, TOKEN, temperature)
        ref_logp = exact(REF_HIDDEN, REF_HEAD, TOKEN, temperature)[0]
        logp, logq = (log_softmax(h @ w.T / temperature, -1) for h, w in ((HIDDEN, HEAD), (REF_HIDDEN, REF_HEAD)))
        expected = (*ours, ref_logp, (np.exp(logp) * (logp - logq)).sum(-1))
        np.testing.assert_allclose(fields, expected, rtol=1e-11, atol=1e-12)
        actual = all_gradients(with_reference, **options)
        expected = all_gradients(plain_with_reference, temperature=temperature)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


# Every field with every choice of operands that can change it; two that stand for pairs of fields.
@pytest.mark.parametrize(
    ("names", "argnums"),
    [
        (("logp",), (0, 1)),
        (("entropy",), (1, 2)),
        (("self_certainty",), (0, 1)),
        (("ref_logp",), (2, 3)),
        (("ref_logp",), (0, 1)),
        *((("kl",), argnums) for argnums in ((0, 1), (2, 3), (1, 2))),
        (("logp", "kl"), (1, 2)),
        (("logp", "kl"), (2, 3)),
        (("entropy", "ref_logp"), (1, 2)),
    ],
)
def test_gradient_of_some_fields_to_some_operands(names, argnums):
    """What nobody differentiates is left out, and changes nothing that somebody does."""
    with jax.enable_x64(True):
        actual = all_gradients(with_reference, names=names, argnums=argnums, chunk=8, rows=2)
        expected = all_gradients(plain_with_reference, names=names, argnums=argnums)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_of_each_row_under_vmap():
    def total(hidden, ref_hidden, token):
        stats = token_logp(hidden, HEAD, token, reference=(ref_hidden, REF_HEAD), chunk=8, rows=2)
        return jnp.sum(stats.kl + stats.logp * stats.ref_logp)

    with jax.enable_x64(True):
        grad = jax.grad(total, argnums=(0, 1))
        actual, expected = (jax.jit(f)(HIDDEN, REF_HIDDEN, TOKEN) for f in (jax.vmap(grad), grad))
        chex.assert_trees_all_close(actual, expected, rtol=1e-11)


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_masked_positions_of_any_size_leave_gradients_finite(scale):
    """Those of the real positions are as if the others did not exist."""
    mask = np.array([[True, False, True], [False, True, True]])
    far = lambda x: np.float32(np.where(mask[..., None], x, scale * x))

    def grads(function, *operands):
        def total(*operands):
            return sum(jnp.sum(jnp.where(mask, w * x, 0)) for w, x in zip(WEIGHTS, function(*operands), strict=True))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*operands)

    chunked = functools.partial(with_reference, chunk=8, rows=2)
    actual = grads(chunked, far(HIDDEN), np.float32(HEAD), far(REF_HIDDEN), np.float32(REF_HEAD))
    expected = grads(plain_with_reference, *map(np.float32, (HIDDEN, HEAD, REF_HIDDEN, REF_HEAD)))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_reference_there_is_nothing_to_tell_of_it():
    hidden, head, ref_hidden, ref_head = map(np.float32, (HIDDEN, HEAD, REF_HIDDEN, REF_HEAD))
    stats = token_logp(hidden, head, TOKEN)
    assert (stats.ref_logp, stats.kl) == (None, None)
    for reference in ((ref_hidden[:1], ref_head), (ref_hidden, ref_head[1:])):
        with pytest.raises((AssertionError, TypeError)):
            token_logp(hidden, head, TOKEN, reference=reference)


def test_a_frozen_reference_costs_no_backward_pass():
    """Three products per logit of the policy, one of the reference: none that makes a gradient of the reference."""

    def products(argnums, names=("kl",)):
        function = lambda *x: sum(map(jnp.sum, with_reference(*x, names=names, chunk=V)))
        text = str(jax.make_jaxpr(jax.grad(function, argnums=argnums))(HIDDEN, HEAD, REF_HIDDEN, REF_HEAD))
        return text.count("dot_general")

    assert (products((0, 1)), products((0, 1, 2, 3))) == (2 + 2 + 2, 2 + 2 + 4)
    assert (products((0, 1), ALL), products((0, 1, 2, 3), ALL)) == (2 + 2 + 2, 2 + 2 + 4)
    # Where its log-probability is all that is used, the backward pass does not look at it.
    assert products((0, 1), ("logp", "ref_logp")) == 2 + 1 + 2


def test_memory_depends_neither_on_positions_nor_on_the_vocabulary():
    """Scratch memory of the compiled gradients, beyond their arguments and results."""

    @functools.partial(jax.jit, static_argnums=0)
    def grad(kl, hidden, head, token, ref_hidden, ref_head):
        options = {"chunk": 128, "rows": 64}

        def total(hidden, head):
            if kl:
                reference = ref_hidden, ref_head
                return jnp.sum(token_logp(hidden, head, token, reference=reference, **options).kl)
            return jnp.sum(token_logp(hidden, head, token, **options).logp)

        return jax.grad(total, argnums=(0, 1))(hidden, head)

    def scratch(kl, positions, vocabulary):
        floats = [jax.ShapeDtypeStruct((n, 16), jnp.float32) for n in (positions, vocabulary)]
        token = jax.ShapeDtypeStruct((positions,), int)
        return grad.lower(kl, *floats, token, *floats).compile().memory_analysis().temp_size_in_bytes

    few = 4 * 4 * (1024 - 256)  # A few numbers per position are kept: log-normalisers and the like.
    for kl in (False, True):
        small, large = scratch(kl, 256, 512), scratch(kl, 1024, 2048)
        assert small < 6 * 64 * 128 * 4
        assert large - small <= few + 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        token_logp(jnp.zeros((2, D)), jnp.zeros((V, D)), jnp.zeros(2, int), **options)


def test_dot_sums_in_float32():
    x, w = jnp.ones((1, 129), jnp.bfloat16), jnp.full((1, 129), 1 + 2**-7, jnp.bfloat16)
    out = dot(x, w, jnp.bfloat16)
    assert out.dtype == jnp.float32
    assert float(out[0, 0]) == 129 + 129 / 128  # bfloat16 has whole numbers only from 128 on


def test_sequence_logp_ignores_what_the_padding_holds():
    mask = jnp.asarray([[True, True, False], [True, False, False], [False] * 3])
    logp = jnp.asarray([[-1.0, -2.0, jnp.nan], [-3.0, jnp.inf, -jnp.inf], [jnp.nan] * 3])
    np.testing.assert_array_equal(sequence_logp(logp, mask), [-3.0, -3.0, 0.0])
    np.testing.assert_array_equal(jax.grad(lambda x: sequence_logp(x, mask).sum())(logp), mask)
    assert sequence_logp(logp.astype(jnp.bfloat16), mask).dtype == jnp.float32


def test_eos_mask_ends_with_the_first_of_several():
    token = jnp.asarray([[4, 2, 4, 2], [2, 2, 2, 2], [4, 9, 2, 4], [4, 4, 4, 4], [4, 4, 4, 9]])
    ends = {2: [2, 1, 3, 4, 4], (2, 9): [2, 1, 2, 4, 4], (9,): [4, 4, 2, 4, 4]}
    for eos_id, lengths in ends.items():
        expected = np.arange(4) < np.array(lengths)[:, None]
        np.testing.assert_array_equal(eos_mask(token, eos_id), expected)
    assert eos_mask(token[:, None], 2).shape == (5, 1, 4)
