import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tiltjax.train.reference import hard_update, soft_update, update_reference

RNG = np.random.default_rng(0)


def params(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "layers": [jnp.asarray(rng.normal(size=5), dtype)]}


class SoftTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_mixes(self):
        ref, new = params(0), params(1)
        out = self.variant(lambda r, p: soft_update(r, p, alpha=0.3))(ref, new)
        expected = jax.tree.map(lambda r, p: 0.3 * np.float64(p) + 0.7 * np.float64(r), ref, new)
        chex.assert_trees_all_close(out, jax.tree.map(np.float32, expected), rtol=1e-6, atol=1e-7)
        chex.assert_trees_all_equal(self.variant(lambda r, p: soft_update(r, p, alpha=1.0))(ref, new), new)

    @chex.variants(with_jit=True, without_jit=True)
    def test_updates_only_when_due(self):
        step = self.variant(lambda r, p, i: update_reference(r, p, i, every=3, alpha=0.5))
        ref, new = params(0), params(1)
        changed = []
        for i in range(1, 8):
            out = step(ref, new, i)
            expected = soft_update(ref, new, alpha=0.5) if i % 3 == 0 else ref
            chex.assert_trees_all_close(out, expected, rtol=1e-6)
            changed.append(not np.array_equal(out["w"], ref["w"]))
            ref = out
        assert changed == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("update", [hard_update, lambda r, p: soft_update(r, p, alpha=1.0)])
def test_copies_and_never_aliases(update):
    """Donating or overwriting the policy's buffers afterwards leaves the reference as it was."""
    new = params(1) | {"host": np.ones(7, np.float32)}
    out = update(params(0) | {"host": np.zeros(7, np.float32)}, new)
    expected = jax.tree.map(np.array, new)
    overwrite = jax.jit(lambda w: w * 0 + 9, donate_argnums=0)
    new["w"] = overwrite(new["w"])
    new["host"][:] = -1
    chex.assert_trees_all_equal(out, expected)
    assert out["layers"][0].unsafe_buffer_pointer() != new["layers"][0].unsafe_buffer_pointer()


def test_keeps_the_precision_of_the_reference():
    ref, new = params(0, jnp.bfloat16), params(1)
    for out in (hard_update(ref, new), soft_update(ref, new, alpha=0.5)):
        assert jax.tree.leaves(jax.tree.map(lambda x: x.dtype == jnp.bfloat16, out)) == [True, True]
    mixed = (0.5 * new["w"] + 0.5 * ref["w"].astype(jnp.float32)).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(soft_update(ref, new, alpha=0.5)["w"], mixed)
    counters = {"count": jnp.int32(3)}, {"count": jnp.int32(8)}
    assert int(soft_update(*counters, alpha=0.5)["count"]) == 8


def test_takes_a_flax_module():
    ref, policy = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(hard_update(ref, policy)(x), policy(x))
    half = soft_update(ref, policy, alpha=0.5)(x)
    np.testing.assert_allclose(half, (ref(x) + policy(x)) / 2, rtol=1e-5)


def test_bad_options_are_named():
    ref, new = params(0), params(1)
    for call, message in (
        (lambda: soft_update(ref, new, alpha=0.0), r"alpha must lie in \(0, 1\], got 0.0"),
        (lambda: update_reference(ref, new, 1, every=0), "every must be at least 1, got 0"),
        (lambda: update_reference(ref, new, 1, every=2, alpha=2.0), r"alpha must lie in \(0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
