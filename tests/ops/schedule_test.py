import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from tiltjax.ops.schedule import (
    PREDICTIONS,
    add_noise,
    cosine_schedule,
    expand,
    from_noise,
    linear_schedule,
    log_snr,
    to_clean,
    to_noise,
    to_score,
    to_velocity,
)

RNG = np.random.default_rng(0)
CLEAN, NOISE = RNG.normal(size=(2, 5, 3, 4))
ALPHA_BAR = np.array([0.02, 0.3, 0.5, 0.9, 0.999])


def parts(alpha_bar):
    """x and every prediction of the true noise, float64."""
    a = np.asarray(alpha_bar)[:, None, None] if np.ndim(alpha_bar) else alpha_bar
    x = np.sqrt(a) * CLEAN + np.sqrt(1 - a) * NOISE
    score = -(x - np.sqrt(a) * CLEAN) / (1 - a)
    velocity = np.sqrt(a) * NOISE - np.sqrt(1 - a) * CLEAN
    return x, {"clean": CLEAN, "noise": NOISE, "score": score, "velocity": velocity}


class PredictionTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(*PREDICTIONS)
    def test_every_prediction_is_the_same_noise(self, kind):
        for alpha_bar in (0.3, ALPHA_BAR):
            x, all_kinds = parts(alpha_bar)
            noise = self.variant(lambda x, p, a: to_noise(x, p, a, kind=kind))(x, all_kinds[kind], alpha_bar)
            np.testing.assert_allclose(noise, NOISE, rtol=2e-3, atol=2e-4)
            back = self.variant(lambda x, e, a: from_noise(x, e, a, kind=kind))(x, NOISE, alpha_bar)
            np.testing.assert_allclose(back, all_kinds[kind], rtol=2e-4, atol=2e-5)


def test_named_conversions_and_noise():
    x, kinds = parts(ALPHA_BAR)
    chex.assert_trees_all_close(add_noise(CLEAN, NOISE, ALPHA_BAR), jnp.asarray(x, jnp.float32), rtol=1e-5, atol=1e-6)
    for name, value in (
        ("clean", to_clean(x, NOISE, ALPHA_BAR)),
        ("score", to_score(NOISE, ALPHA_BAR)),
        ("velocity", to_velocity(x, NOISE, ALPHA_BAR)),
    ):
        np.testing.assert_allclose(value, kinds[name], rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(log_snr(ALPHA_BAR), np.log(ALPHA_BAR / (1 - ALPHA_BAR)), rtol=1e-4)


def test_the_score_prediction_is_a_gradient():
    """Of log N(x; 0, a + 1 - a) = standard normal data: the noise is sqrt(1 - a) x."""
    x = jnp.asarray(CLEAN, jnp.float32)
    gradient = jax.grad(lambda x: -jnp.sum(jnp.square(x)) / 2)(x)
    chex.assert_trees_all_close(to_noise(x, gradient, 0.36, kind="score"), 0.8 * x, rtol=1e-6)


def test_cosine_is_the_formula():
    K, s = 50, 0.008
    f = np.cos((np.arange(K + 1) / K + s) / (1 + s) * np.pi / 2) ** 2
    expected = np.cumprod(np.concatenate([[1], np.maximum(f[1:] / f[:-1], 0.001)]))
    np.testing.assert_allclose(cosine_schedule(K), expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(cosine_schedule(K)[:-1], f[:-1] / f[0], rtol=1e-4)


def test_linear_is_the_thousand_rates_at_any_number_of_steps():
    rates = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(np.log(linear_schedule(1000)[1:]), np.cumsum(np.log1p(-rates)), rtol=0.01, atol=6e-4)
    np.testing.assert_allclose(linear_schedule(50), linear_schedule(1000)[::20], rtol=1e-5)
    np.testing.assert_allclose(linear_schedule(4, first=8.0, last=8.0), np.exp(-2.0 * np.arange(5)), rtol=1e-6)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_schedules_fall_from_one(schedule, num_steps):
    alpha_bar = np.asarray(schedule(num_steps))
    assert alpha_bar.shape == (num_steps + 1,)
    assert alpha_bar[0] == 1
    assert (np.diff(alpha_bar) < 0).all()
    assert 0 < alpha_bar[-1] < 0.01


def test_expand_keeps_scalars_and_aligns_batches():
    x = jnp.zeros((2, 3, 4))
    assert expand(0.5, x).shape == ()
    assert expand(jnp.zeros(2), x).shape == (2, 1, 1)
    assert expand(jnp.zeros((2, 3)), x).shape == (2, 3, 1)
    with pytest.raises(AssertionError):
        expand(jnp.zeros(3), x)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        cosine_schedule(0)
    with pytest.raises(ValueError, match="first must be a finite number above 0"):
        linear_schedule(3, first=0.0)
    with pytest.raises(ValueError, match="kind must be one of clean, noise, score, velocity; got 'x0'"):
        to_noise(jnp.zeros(2), jnp.zeros(2), 0.5, kind="x0")
    with pytest.raises(ValueError, match="kind must be one of"):
        from_noise(jnp.zeros(2), jnp.zeros(2), 0.5, kind="eps")
