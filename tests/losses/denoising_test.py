"""Diffusion losses are their float64 formulas, and their minima are the laws they are said to fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads
from scipy.special import softmax
from scipy.stats import norm

from tiltjax.losses.denoising import (
    ddpo_loss,
    denoising_loss,
    transition_kl,
    transition_logp,
    weighted_denoising_loss,
)

B, N, D, K = 2, 8, 3, 4

# For the contract test of every loss: the losses whose contract is here.
COVERED = {denoising_loss, weighted_denoising_loss, ddpo_loss}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    prediction, clean, noise = rng.normal(size=(3, B, N, D)).astype(np.float32)
    alpha_bar, reward = rng.random((B, N), np.float32), rng.normal(size=(B, N)).astype(np.float32)
    where = rng.random((B, N)) < 0.6
    where[1] = False
    return prediction, clean, noise, alpha_bar, reward, where


def formula(prediction, clean, noise, alpha_bar, kind):
    prediction, clean, noise, a = (np.asarray(x, np.float64) for x in (prediction, clean, noise, alpha_bar))
    a = a[..., None]
    target = {"clean": clean, "noise": noise, "velocity": np.sqrt(a) * noise - np.sqrt(1 - a) * clean}[kind]
    return np.square(prediction - target).mean(-1)


@pytest.mark.parametrize("kind", ["clean", "noise", "velocity"])
def test_losses_are_their_formulas(kind):
    prediction, clean, noise, a, reward, where = draw()
    each = jax.jit(functools.partial(denoising_loss, kind=kind))
    one = jax.jit(functools.partial(weighted_denoising_loss, kind=kind, beta=0.5))
    expected = formula(prediction, clean, noise, a, kind)
    np.testing.assert_allclose(each(prediction, clean, noise, a), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        one(prediction, clean, noise, a, reward), (softmax(reward / 0.5, -1) * expected).sum(-1), rtol=1e-5
    )
    # Masked candidates may hold anything, here and in the gradient; a masked row is 0.
    dirty = [np.where(where[..., None], x, np.nan) for x in (prediction, clean, noise)]
    scalars = [np.where(where, x, np.nan) for x in (a, reward)]
    np.testing.assert_allclose(
        each(*dirty, scalars[0], where=where), np.where(where, expected, 0), rtol=1e-5, atol=1e-6
    )
    masked = one(*dirty, *scalars, where=where)
    weights = softmax(np.where(where[0], reward[0] / 0.5, -np.inf))
    np.testing.assert_allclose(masked, [(weights * expected[0]).sum(), 0], rtol=1e-5)
    grads = jax.jit(jax.grad(lambda *args: one(*args, where=where).sum(), argnums=range(5)))(*dirty, *scalars)
    assert all(np.isfinite(g).all() for g in grads)
    assert (np.asarray(grads[0])[where] != 0).any()
    assert all((np.asarray(g) == 0).all() for g in grads[1:])


def test_gradient_of_the_prediction():
    prediction, clean, noise, a, reward, _ = draw(1)
    run = jax.jit(lambda x: weighted_denoising_loss(x, clean, noise, a, reward, beta=0.7, kind="velocity"))
    check_grads(run, (jnp.asarray(prediction),), order=1, modes=("rev",), atol=1e-2, rtol=1e-2, eps=1e-2)


def test_candidates_over_eight_devices():
    *arrays, where = draw(2)
    run = functools.partial(weighted_denoising_loss, beta=0.3)
    split = PartitionSpec(None, "n")

    def part(*args):
        return run(*args[:-1], where=args[-1], axis_name="n")

    mesh = Mesh(np.array(jax.devices()), ("n",))
    mapped = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(split,) * 6, out_specs=PartitionSpec()))
    np.testing.assert_allclose(mapped(*arrays, where), jax.jit(run)(*arrays, where=where), rtol=1e-5)


def test_the_minimum_is_the_score_of_the_noised_tilt():
    """Standard normal data with reward x: the tilt is N(1 / beta, 1), whose denoiser is known."""
    beta, a, rng = 2.0, 0.6, np.random.default_rng(3)
    clean, noise = rng.normal(size=(2, 50_000, 1))
    x = np.sqrt(a) * clean + np.sqrt(1 - a) * noise
    with jax.enable_x64(True):

        def loss(line):
            flat = jnp.full(len(clean), a)
            return weighted_denoising_loss(line[0] + line[1] * x, clean, noise, flat, clean[:, 0], beta=beta)

        slope = jax.jit(jax.grad(loss))  # Of a quadratic: three slopes give its minimum.
        zero, first, second = (np.asarray(slope(jnp.array(p, jnp.float64))) for p in ([0, 0], [1, 0], [0, 1]))
        line = -np.linalg.solve(np.stack([first - zero, second - zero]), zero)
    # The noised tilt is N(sqrt(a) / beta, 1); noise = -sqrt(1 - a) score = sqrt(1 - a) (x - sqrt(a) / beta).
    np.testing.assert_allclose(line, np.sqrt(1 - a) * np.array([-np.sqrt(a) / beta, 1]), atol=0.02)


def test_transitions_are_those_of_scipy():
    rng = np.random.default_rng(4)
    x, mean, ref_mean = rng.normal(size=(3, K, D))
    std = rng.uniform(0.2, 2, size=K)
    logp = jax.jit(transition_logp)(*(np.float32(v) for v in (x, mean, std)))
    np.testing.assert_allclose(logp, norm.logpdf(x, mean, std[:, None]).sum(-1), rtol=1e-5)
    kl = jax.jit(transition_kl)(*(np.float32(v) for v in (mean, ref_mean, std)))
    draws = mean[:, None] + std[:, None, None] * rng.normal(size=(K, 50_000, D))
    ratio = norm.logpdf(draws, mean[:, None], std[:, None, None])
    ratio -= norm.logpdf(draws, ref_mean[:, None], std[:, None, None])
    np.testing.assert_allclose(kl, ratio.sum(-1).mean(-1), rtol=0.04)
    run = jax.jit(jax.grad(lambda *args: transition_logp(*args, 1.0).sum(), argnums=(0, 1)))
    grads = run(np.float32(x), np.float32(mean))
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_allclose(grads[1], x - mean, rtol=1e-5)


def test_ddpo_is_the_clipped_surrogate_summed_over_steps():
    rng = np.random.default_rng(5)
    old = rng.normal(size=(B, N, K)).astype(np.float32)
    new = (old + 0.2 * rng.normal(size=old.shape)).astype(np.float32)
    advantage, where = rng.normal(size=(B, N)).astype(np.float32), rng.random((B, N, K)) < 0.7
    where[0, 0] = False
    ratio, A = np.exp(np.float64(new) - old), np.float64(advantage)[..., None]
    each = np.maximum(-A * ratio, -A * np.clip(ratio, 0.9, 1.1))
    run = jax.jit(lambda new: ddpo_loss(new, old, advantage, where, clip=0.1))
    np.testing.assert_allclose(run(new), np.where(where, each, 0).sum(-1), rtol=1e-4, atol=1e-5)
    # At the old policy: minus advantage times the score, whatever the clip is.
    grad = jax.jit(jax.grad(lambda new: ddpo_loss(new, old, advantage, where).sum()))(old)
    np.testing.assert_allclose(grad, np.where(where, -A, 0), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: denoising_loss(x, x, x, s, kind="v"), "kind must be one of clean, noise, velocity; got 'v'"),
        (lambda x, s: weighted_denoising_loss(x, x, x, s, s, beta=0), "beta must be a finite number above 0, got 0"),
        (lambda x, s: ddpo_loss(x, x, s, x > 0, clip=0), r"clip_low must lie in \(0, 1\], got 0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 3)), jnp.zeros(2))
