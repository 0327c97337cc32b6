import pathlib
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.ops.schedule import cosine_schedule, linear_schedule
from tiltjax.samplers.denoise import ddim, ddpm, ddpm_path, levels, probability_flow, reverse_kernel, twisted_mean

RNG = np.random.default_rng(0)
X, NOISE = RNG.normal(size=(2, 4, 3))


def gaussian(variance, mean=0.0):
    """The exact denoiser of N(mean, variance)."""

    def denoiser(x, alpha_bar):
        return jnp.sqrt(1 - alpha_bar) * (x - jnp.sqrt(alpha_bar) * mean) / (alpha_bar * variance + 1 - alpha_bar)

    return denoiser


class ReverseKernelTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_ddpm_is_bayes_rule_given_the_clean_prediction(self):
        before, after = np.array([0.1, 0.3, 0.5, 0.05]), np.array([0.2, 0.31, 0.99, 0.9])
        a, b = before[:, None], after[:, None]
        clean = (X - np.sqrt(1 - a) * NOISE) / np.sqrt(a)
        # Precision of x' given x_0 and x: of the prior N(sqrt(b) x_0, 1 - b) and of x = sqrt(a / b) x' + noise.
        precision = 1 / (1 - b) + (a / b) / (1 - a / b)
        mean = (np.sqrt(b) * clean / (1 - b) + np.sqrt(a / b) * X / (1 - a / b)) / precision
        found = self.variant(reverse_kernel)(X, NOISE, before, after)
        np.testing.assert_allclose(found[0], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], precision**-0.5, rtol=1e-4)

    @chex.variants(with_jit=True)
    def test_ddim_moves_along_the_prediction_and_the_last_step_is_clean(self):
        kernel = self.variant(lambda x, e, a, b: reverse_kernel(x, e, a, b, eta=0.0))
        mean, std = kernel(X, NOISE, 0.3, 0.6)
        clean = (X - np.sqrt(0.7) * NOISE) / np.sqrt(0.3)
        np.testing.assert_allclose(mean, np.sqrt(0.6) * clean + np.sqrt(0.4) * NOISE, rtol=1e-5, atol=1e-6)
        assert std == 0
        mean, std = self.variant(reverse_kernel)(X, NOISE, 0.3, 1.0)
        np.testing.assert_allclose(mean, clean, rtol=1e-5, atol=1e-6)
        assert (std == 0).all()


def test_ddim_of_a_gaussian_is_the_product_of_its_steps():
    alpha_bar = np.asarray(linear_schedule(30), np.float64)
    x = X.copy()
    for a, b in zip(alpha_bar[:0:-1], alpha_bar[-2::-1], strict=True):
        noise = np.sqrt(1 - a) * x / (2 * a + 1 - a)
        x = np.sqrt(b / a) * (x - np.sqrt(1 - a) * noise) + np.sqrt(1 - b) * noise
    out = jax.jit(lambda x: ddim(jax.random.key(0), gaussian(2.0), x, linear_schedule(30)))(X)
    np.testing.assert_allclose(out, x, rtol=1e-3, atol=1e-4)


def test_probability_flow_is_of_second_order():
    def error(num_steps):
        schedule = linear_schedule(num_steps)
        out = jax.jit(lambda x: probability_flow(gaussian(2.0, 0.5), x, schedule))(X)
        # Quantiles are mapped to quantiles: from the law at the last level to N(0.5, 2).
        last = float(schedule[-1])
        quantile = (X - np.sqrt(last) * 0.5) / np.sqrt(2 * last + 1 - last)
        return np.abs(np.asarray(out) - (0.5 + np.sqrt(2) * quantile)).max()

    coarse, fine = error(20), error(80)
    assert fine < coarse / 8
    assert fine < 0.01


def test_ddpm_ends_in_the_data_and_its_path_in_the_sample():
    schedule = cosine_schedule(100)
    x = jax.random.normal(jax.random.key(0), (4000, 2))

    @jax.jit
    def run(x):
        chain = jax.random.key(1), gaussian(0.25, 1.0), x, schedule
        return ddpm_path(*chain), ddpm(*chain)

    path, end = run(x)
    assert path.shape == (101, 4000, 2)
    chex.assert_trees_all_equal(path[-1], x)
    chex.assert_trees_all_close(end, path[0], rtol=1e-6, atol=1e-6)
    assert abs(float(path[0].mean()) - 1) < 0.03
    assert abs(float(path[0].var()) - 0.25) < 0.02
    half = 0.25 * float(schedule[50]) + 1 - float(schedule[50])
    assert abs(float(path[50].var()) / half - 1) < 0.08


def test_a_twist_moves_the_tilted_law():
    """exp(2 x) turns N(0, 1) into N(2, 1); its soft value at level a has slope 2 sqrt(a)."""
    schedule = cosine_schedule(200)

    def twist(x, alpha_bar):
        return 2 * jnp.sqrt(alpha_bar) * x[:, 0]

    x = jax.random.normal(jax.random.key(0), (4000, 1))
    out = jax.jit(lambda x: ddpm(jax.random.key(1), gaussian(1.0), x, schedule, twist=twist))(x)
    assert abs(float(out.mean()) - 2) < 0.08
    assert abs(float(out.var()) - 1) < 0.1


def test_twisted_mean_skips_the_last_level():
    mean = jnp.array([[1.0, -2.0]])

    def bad_at_one(x, alpha_bar):
        return jnp.sum(jnp.square(x), -1) * jnp.where(alpha_bar < 1, 1.0, jnp.nan)

    moved = twisted_mean(mean, jnp.float32(0.5), bad_at_one, 0.7)
    np.testing.assert_allclose(moved, mean + 0.25 * 2 * mean, rtol=1e-6)
    np.testing.assert_array_equal(twisted_mean(mean, jnp.float32(0.0), bad_at_one, 1.0), mean)


def test_levels_run_from_noise_to_clean():
    k, before, after = levels(np.array([1.0, 0.5, 0.1], np.float32))
    assert k.tolist() == [2, 1]
    np.testing.assert_allclose([before, after], [[0.1, 0.5], [0.5, 1.0]])


@pytest.mark.robustness(
    "Kernels",
    given="a diffusion schedule that ends at alpha_bar = 0 exactly",
    outcome="refused: the noise alone says nothing",
)
def test_a_schedule_of_zero_terminal_snr_is_refused():
    case = pathlib.Path(__file__).parents[1] / "cases" / "zero-terminal-snr" / "sample.py"
    with pytest.raises(ValueError, match="noise predictions cannot start at alpha_bar = 0"):
        runpy.run_path(str(case))
    x, zero = jnp.ones((1, 3)), jnp.array([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="noise predictions cannot start at alpha_bar = 0"):
        probability_flow(lambda x, _: x, x, zero)
    levels = jnp.array([1.0, 0.5, 0.1])
    constant = jax.jit(lambda x: probability_flow(lambda x, _: x, x, levels))(x)  # A program closes over it.
    np.testing.assert_allclose(constant, probability_flow(lambda x, _: x, x, levels), rtol=1e-5)
