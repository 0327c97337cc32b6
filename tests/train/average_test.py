"""The average is a loop in NumPy, and leaves the optimizer's own steps as they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tiltjax.ops.masked import average
from tiltjax.train.average import averaged
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step


def test_average_follows_the_parameters():
    plain, tx = optax.adam(0.1), averaged(optax.adam(0.1), decay=0.6)
    start = {"w": jnp.array([1.0, -2.0], jnp.float32)}

    def loss_fn(params, frozen, batch, key):
        return average(jnp.square(params["w"] - batch)), {}

    one, other = (jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=t)) for t in (tx, plain))
    state, alone = init_state(start, tx), init_state(start, plain)
    expected = np.array([1.0, -2.0])
    for t in range(12):
        batch = jnp.array([float(t), 3.0])
        state, _ = one(state, batch, jax.random.key(t), None)
        alone, _ = other(alone, batch, jax.random.key(t), None)
        np.testing.assert_array_equal(state.params["w"], alone.params["w"])
        d = min(0.6, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * np.asarray(state.params["w"], np.float64)
        np.testing.assert_allclose(state.opt_state.average["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay_is_named(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got"):
        averaged(optax.sgd(1.0), decay=decay)
