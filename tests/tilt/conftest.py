import itertools
import math

import numpy as np
import pytest

ARMS = np.array([0.55, 0.3, 0.15])
REWARD = np.array([0.0, 0.5, 1.0])


@pytest.fixture(scope="session")
def every_draw():
    """``every_draw(N) -> (reward [C, N], chance [C])``: all multisets of N draws from a law on three arms."""

    def draws(N):
        counts = np.array([(a, b, N - a - b) for a, b in itertools.product(range(N + 1), repeat=2) if a + b <= N])
        log_chance = [math.lgamma(N + 1) - sum(math.lgamma(c + 1) for c in row) + row @ np.log(ARMS) for row in counts]
        reward = np.stack([np.repeat(REWARD, row) for row in counts])
        return reward, np.exp(log_chance)

    return draws


@pytest.fixture(scope="session")
def truth():
    """``truth(beta)``: log Z, chi2, m3, KL, mean reward, and what their biases are made of, in float64."""

    def at(beta):
        w = np.exp(REWARD / beta)
        w /= ARMS @ w
        square = ARMS * w * w / (ARMS @ (w * w))
        chi2 = ARMS @ (w - 1) ** 2
        mean = ARMS @ (w * REWARD)
        return {
            "log_z": np.log(ARMS @ np.exp(REWARD / beta)),
            "chi2": chi2,
            "m3": ARMS @ (w - 1) ** 3,
            "kl": ARMS @ (w * np.log(w)),
            "mean": mean,
            "half_beta_gap": square @ REWARD - mean,
        }

    return at
