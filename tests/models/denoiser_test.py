"""The denoiser says nothing at the start, sees its condition once trained, and keeps to shapes and patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.models import denoiser
from tiltjax.models.denoiser import Denoiser, DenoiserConfig, drop_label, position_features

CONFIG = DenoiserConfig(image_size=4, channels=2, patch=2, features=8, num_layers=2, num_heads=2, mlp_features=12)


@pytest.fixture(scope="module")
def models():
    """As it is made, and with every parameter moved."""
    new = jax.jit(lambda key: Denoiser(key, CONFIG))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return new, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), new)


run = jax.jit(lambda model, x, a, label: (model.output(x, a, label=label), model(x, a, label=label)))


def test_output_is_zero_at_the_start_and_the_noise_is_that_of_its_kind(models):
    x = jax.random.normal(jax.random.key(2), (3, *CONFIG.shape))
    a = jnp.array([0.1, 0.5, 0.9])
    output, noise = run(models[0], x, a, jnp.array([0, 9, 10]))
    np.testing.assert_array_equal(output, 0)
    np.testing.assert_allclose(noise, np.sqrt(1 - a)[:, None, None, None] * x, rtol=1e-6)


def test_condition_and_leading_dimensions(models):
    model = models[1]
    x = jax.random.normal(jax.random.key(3), (2, 3, *CONFIG.shape))
    a = jnp.linspace(0.1, 0.9, 6).reshape(2, 3)
    label = jnp.arange(6).reshape(2, 3)
    output, noise = run(model, x, a, label)
    assert noise.shape == x.shape
    a4 = np.asarray(a)[..., None, None, None]
    np.testing.assert_allclose(noise, np.sqrt(a4) * output + np.sqrt(1 - a4) * x, rtol=1e-4, atol=1e-5)
    flat = run(model, x.reshape(6, *CONFIG.shape), a.reshape(6), label.reshape(6))[1]
    np.testing.assert_allclose(noise.reshape(flat.shape), flat, rtol=1e-4, atol=1e-5)
    # Each image is denoised alone, whatever else is in the batch; level and label matter.
    order = jnp.array([3, 0, 5, 1, 4, 2])
    shuffled = run(model, x.reshape(6, *CONFIG.shape)[order], a.reshape(6)[order], label.reshape(6)[order])[1]
    np.testing.assert_allclose(shuffled, flat[order], rtol=1e-4, atol=1e-5)
    other = run(model, x, a, label[:, ::-1])[0]
    assert np.abs(np.asarray(other - output)[:, [0, 2]]).max() > 1e-2
    np.testing.assert_allclose(other[:, 1], output[:, 1], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(run(model, x, a[:, ::-1], label)[0] - output)).max() > 1e-2


def test_no_label_is_the_last_one(models):
    x = jax.random.normal(jax.random.key(4), (2, *CONFIG.shape))
    none, last = run(models[1], x, 0.4, None), run(models[1], x, 0.4, jnp.full(2, 10))
    np.testing.assert_allclose(none, last, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_but_not_at_the_start(models):
    x = jax.random.normal(jax.random.key(5), (2, *CONFIG.shape))

    @jax.jit
    def grads(model):
        return jax.grad(lambda m: jnp.sum(jnp.square(m.output(x, 0.4, label=jnp.array([0, 1])) - 1)))(model)

    moved = jax.tree.leaves(grads(models[1]))
    assert all(np.isfinite(g).all() and (np.asarray(g) != 0).any() for g in moved)
    start = grads(models[0])
    assert (np.asarray(start.out.kernel[...]) != 0).any()
    assert (np.asarray(start.blocks.modulation.kernel[...]) == 0).all()


def test_patches_are_squares_of_the_image():
    x = np.arange(2 * 4 * 4 * 2, dtype=np.float32).reshape(2, 4, 4, 2)
    patches = denoiser._patchify(x, 2)
    assert patches.shape == (2, 4, 8)
    np.testing.assert_array_equal(patches[1, 1], x[1, :2, 2:].ravel())
    np.testing.assert_array_equal(denoiser._unpatchify(patches, CONFIG), x)


def test_positions_tell_rows_from_columns():
    features = position_features(3, 8)
    assert features.shape == (9, 8)
    assert len({row.tobytes() for row in features}) == 9
    square = features.reshape(3, 3, 8)
    np.testing.assert_array_equal(square[:, 0, :4], square[:, 2, :4])
    np.testing.assert_array_equal(square[0, :, 4:], square[2, :, 4:])
    np.testing.assert_allclose(square[2, 1, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-6)


def test_labels_are_dropped_at_their_rate(key):
    label = jnp.arange(4000) % 10
    dropped = np.asarray(drop_label(key, label, rate=0.25, num_classes=10))
    assert set(dropped[dropped != np.asarray(label)]) == {10}
    assert abs((dropped == 10).mean() - 0.25) < 0.03
    np.testing.assert_array_equal(drop_label(key, label, rate=0.0, num_classes=10), label)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "patch must divide image_size=8, got 3"),
        ({"features": 30}, "features must be a multiple of 4 and of num_heads=4, got 30"),
        ({"prediction": "x0"}, "prediction must be one of clean, noise, velocity; got 'x0'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**options)


def test_bad_rate_is_named(key):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 2"):
        drop_label(key, jnp.arange(2), rate=2, num_classes=10)
