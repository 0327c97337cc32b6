"""What labels of production compute, held to the exact worlds, which share no code with them."""

import jax.numpy as jnp
import numpy as np

from tiltjax.exact.game import bradley_terry
from tiltjax.train.methods.labels import preferences


def test_preferences_are_those_of_the_exact_game():
    reward = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 5)), jnp.float32)
    np.testing.assert_allclose(preferences(reward), bradley_terry(reward), rtol=1e-6)
    np.testing.assert_allclose(preferences(jnp.log(jnp.array([[1.0, 3.0]])))[0], [[0.5, 0.25], [0.75, 0.5]], rtol=1e-6)
