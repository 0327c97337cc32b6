import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tiltjax.tilt.temperature import beta_for_ess, beta_for_kl
from tiltjax.tilt.weights import tilt

RNG = np.random.default_rng(0)
REWARD = np.concatenate(
    [
        RNG.normal(size=(3, 24)),
        RNG.standard_t(2, size=(2, 24)),
        RNG.exponential(size=(1, 24)),
        (RNG.random((1, 24)) < 0.3),
        1e3 + 1e-2 * RNG.normal(size=(1, 24)),
    ]
).astype(np.float32)
WHERE = RNG.random(REWARD.shape) < 0.7
DIRTY = np.where(WHERE, REWARD, RNG.choice([np.nan, np.inf, -np.inf, 1e30], size=REWARD.shape)).astype(np.float32)


def achieved(row, beta):
    """KL and effective sample size of a tilt, float64."""
    x = row.astype(np.longdouble)
    w = np.exp((x - x.max()) / np.longdouble(beta))
    w /= w.sum()
    return float((w * np.log(len(w) * np.where(w > 0, w, 1))).sum()), float(1 / (w * w).sum())


class BetaTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_reaches_the_wanted_kl(self):
        find = self.variant(lambda r, kl: beta_for_kl(r, kl=kl))
        for kl in (1e-5, 1e-3, 0.1, 0.5, 1.0):
            beta = find(jnp.asarray(REWARD), jnp.float32(kl))
            found = [achieved(row, b)[0] for row, b in zip(REWARD, np.asarray(beta), strict=True)]
            np.testing.assert_allclose(found, np.full(8, kl), rtol=1e-4)

    @chex.variants(with_jit=True)
    def test_reaches_the_wanted_ess(self):
        find = self.variant(lambda r, ess: beta_for_ess(r, ess=ess))
        for ess in (8.0, 12.0, 20.0, 23.9):
            beta = find(jnp.asarray(REWARD), jnp.float32(ess))
            found = [achieved(row, b)[1] for row, b in zip(REWARD, np.asarray(beta), strict=True)]
            np.testing.assert_allclose(found, np.full(8, ess), rtol=1e-4)

    @chex.variants(with_jit=True)
    def test_masked_is_sliced(self):
        kl = self.variant(lambda r, w: beta_for_kl(r, kl=0.2, where=w))(jnp.asarray(DIRTY), jnp.asarray(WHERE))
        ess = self.variant(lambda r, w: beta_for_ess(r, ess=9.0, where=w))(jnp.asarray(DIRTY), jnp.asarray(WHERE))
        for row, where, b, c in zip(REWARD, WHERE, np.asarray(kl), np.asarray(ess), strict=True):
            np.testing.assert_allclose(achieved(row[where], b)[0], 0.2, rtol=1e-4)
            np.testing.assert_allclose(achieved(row[where], c)[1], 9, rtol=1e-4)


for_kl, for_ess, tilted = jax.jit(beta_for_kl), jax.jit(beta_for_ess), jax.jit(tilt)


def test_small_effective_sample_sizes_and_large_kls():
    rows = np.tile(REWARD[:1], (3, 1))
    ess, kl = jnp.asarray([1.01, 1.5, 3.0]), jnp.asarray([2.0, 3.0, 0.999 * np.log(24)])
    np.testing.assert_allclose(tilted(rows, beta=for_ess(rows, ess=ess)).ess, ess, rtol=1e-4)
    found = [achieved(REWARD[0], b)[0] for b in np.asarray(for_kl(rows, kl=kl))]
    np.testing.assert_allclose(found, kl, rtol=1e-4)


def test_shift_leaves_and_scale_scales_it():
    row = jnp.asarray(np.round(REWARD[:4] * 64) / 64)  # so that shifts are exact
    for find in (jax.jit(lambda r: for_kl(r, kl=0.3)), jax.jit(lambda r: for_ess(r, ess=6.0))):
        base = find(row)
        np.testing.assert_allclose(find(row - 512), base, rtol=1e-5)
        np.testing.assert_array_equal(find(row * 2.0**40), base * 2.0**40)
        np.testing.assert_array_equal(find(row * 2.0**-40), base * 2.0**-40)
        np.testing.assert_allclose(find(3e-7 * row), 3e-7 * base, rtol=1e-5)


def test_one_target_per_prompt_and_vmap():
    kl = jnp.asarray([0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
    out = for_kl(jnp.asarray(REWARD), kl=kl)
    found = [achieved(row, b)[0] for row, b in zip(REWARD, np.asarray(out), strict=True)]
    np.testing.assert_allclose(found, kl, rtol=1e-4)
    vmapped = jax.jit(jax.vmap(lambda r, t: beta_for_kl(r, kl=t)))(jnp.asarray(REWARD), kl)
    np.testing.assert_allclose(vmapped, out, rtol=1e-5)
    ess = jnp.linspace(8, 23, 8)
    out = jax.jit(jax.vmap(lambda r, t: beta_for_ess(r, ess=t)))(jnp.asarray(REWARD), ess)
    np.testing.assert_allclose(tilted(jnp.asarray(REWARD), beta=out).ess, ess, rtol=1e-4)


def test_targets_out_of_reach():
    equal, nothing = jnp.full((2, 4), 3.0), jnp.zeros((2, 4), bool)
    for find in (lambda r, w: for_kl(r, kl=0.1, where=w), lambda r, w: for_ess(r, ess=2.0, where=w)):
        np.testing.assert_array_equal(find(equal, None), np.full(2, np.inf))
        np.testing.assert_array_equal(find(equal * jnp.nan, nothing), np.full(2, np.inf))
    np.testing.assert_array_equal(tilted(equal, beta=jnp.full(2, jnp.inf)).weights, np.full((2, 4), 0.25))
    tied = jnp.asarray([2.0, 2.0, 0.0, -2.0])
    smallest = 4 * np.exp(-18)
    np.testing.assert_allclose(for_kl(tied, kl=1.0), smallest, rtol=1e-4)  # at most log 2
    np.testing.assert_allclose(for_ess(tied, ess=1.5), smallest, rtol=1e-4)  # at least 2
    np.testing.assert_allclose(tilted(tied, beta=for_kl(tied, kl=1.0)).weights, [0.5, 0.5, 0, 0])
    assert float(for_ess(tied, ess=4.0)) == np.inf
    assert np.isnan(float(for_kl(jnp.asarray([0.0, jnp.nan]), kl=0.1)))


def test_carries_no_gradient():
    for find in (lambda r: beta_for_kl(r, kl=0.3), lambda r: beta_for_ess(r, ess=6.0)):
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda r, f=find: f(r).sum()))(REWARD), np.zeros((8, 24)))


def test_double_precision():
    with jax.enable_x64(True):
        row = jnp.asarray(RNG.normal(size=24))
        found = achieved(np.asarray(row), for_kl(row, kl=1e-6))[0]
    np.testing.assert_allclose(found, 1e-6, rtol=1e-9)


@pytest.mark.parametrize("name", ["kl", "ess"])
def test_candidates_over_eight_devices(name):
    def find(r, w, axis_name=None):
        options = {"where": w, "axis_name": axis_name}
        return beta_for_kl(r, kl=0.2, **options) if name == "kl" else beta_for_ess(r, ess=9.0, **options)

    expected = jax.jit(find)(DIRTY, WHERE)
    spec, mesh = PartitionSpec(None, "n"), Mesh(np.array(jax.devices()), ("n",))
    mapped = lambda r, w: find(r, w, "n")
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec()))
    np.testing.assert_allclose(sharded(DIRTY, WHERE), expected, rtol=1e-5)

    def split(x):
        return x.reshape(8, 8, 3).swapaxes(0, 1)

    out = jax.pmap(mapped, axis_name="n")(split(DIRTY), split(WHERE))
    np.testing.assert_allclose(out, np.tile(expected, (8, 1)), rtol=1e-5)
    # Prompts over one axis, candidates over another.
    grid = Mesh(np.array(jax.devices()).reshape(2, 4), ("d", "n"))
    both = jax.shard_map(mapped, mesh=grid, in_specs=(PartitionSpec("d", "n"),) * 2, out_specs=PartitionSpec("d"))
    np.testing.assert_allclose(jax.jit(both)(DIRTY, WHERE), expected, rtol=1e-5)


def test_bad_targets_are_named():
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="kl must be a finite number above 0, got"):
            beta_for_kl(jnp.zeros(3), kl=bad)
    with pytest.raises(ValueError, match=r"ess must be at least 1.*, got 0.5"):
        beta_for_ess(jnp.zeros(3), ess=0.5)
