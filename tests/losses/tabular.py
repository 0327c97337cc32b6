"""Policies small enough to minimise a loss exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax


def ordered_pairs(arms):
    """Every ordered pair of ``arms`` completions, [pairs, 2]."""
    return np.array(list(itertools.permutations(range(arms), 2)))


def minimiser(loss, ref):
    """The policy over completions that minimises ``loss(log pi)``, in float64, starting at ``ref``."""
    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(lambda logits: loss(jax.nn.log_softmax(logits))))
        objective = lambda logits: tuple(np.asarray(x) for x in both(jnp.asarray(logits)))
        found = minimize(objective, np.log(ref), jac=True, method="BFGS", options={"gtol": 1e-10})
        # BFGS stops where the loss no longer changes; a few Newton steps go on to where the gradient is 0.
        newton = jax.jit(
            lambda z: (
                z
                - jnp.linalg.pinv(jax.hessian(lambda z: loss(jax.nn.log_softmax(z)))(z), rtol=1e-9)
                @ jax.grad(lambda z: loss(jax.nn.log_softmax(z)))(z)
            )
        )
        logits = jnp.asarray(found.x)
        for _ in range(3):
            logits = newton(logits)
        return softmax(np.asarray(logits))
