import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import rosen

from tests.exact.tree.worlds import x64  # noqa: F401
from tiltjax.exact import tree


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@pytest.mark.usefixtures("x64")
class TestMinimise:
    def test_a_curved_valley_to_rounding_from_two_starts_at_once(self):
        starts = jnp.array([[-1.2, 1.0, 0.7], [3.0, 3.0, -2.0]])
        found = jax.jit(jax.vmap(lambda x: tree.minimise(rosenbrock, x)))(starts)
        np.testing.assert_allclose(found.params, 1, atol=1e-12)
        np.testing.assert_allclose(rosenbrock(starts[0]), rosen(starts[0]), rtol=1e-12)
        assert found.gradient.max() < 1e-10
        assert found.steps.max() < 60

    def test_leaves_a_saddle_and_directions_that_change_nothing_alone(self):
        def fn(params):
            x, y = params["x"], params["y"]
            return x**4 / 4 - x**2 / 2 + y[0] ** 2 + 0 * y[1]

        start = {"x": jnp.array(1e-3), "y": jnp.array([2.0, 5.0])}
        found = tree.minimise(fn, start)
        np.testing.assert_allclose(found.params["x"], 1, atol=1e-12)
        np.testing.assert_allclose(found.params["y"], [0, 5], atol=1e-12)
        np.testing.assert_allclose(found.value, -0.25, atol=1e-15)

    def test_without_a_minimum_the_gradient_tells(self):
        found = tree.minimise(lambda x: jnp.sum(jax.nn.softplus(-x)), jnp.zeros(1), max_steps=5)
        assert found.steps == 5
        assert found.gradient > 1e-4
        assert found.params[0] > 3


def test_bad_max_steps_is_named():
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        tree.minimise(rosenbrock, jnp.zeros(2), max_steps=0)
