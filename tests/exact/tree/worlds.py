"""Random token trees as NumPy arrays, and what a loop over all completions says of them."""

import itertools

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

V, H = 3, 3
K = V**H
TOKENS = np.array(list(itertools.product(range(V), repeat=H)))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_levels(seed, *, V=V, H=H, batch=(), scale=1.0):
    rng = np.random.default_rng(seed)
    return [log_softmax(scale * rng.normal(size=(*batch, V**t, V)), -1) for t in range(H)]


def random_reward(seed, *, K=K, batch=()):
    return np.random.default_rng(seed).normal(size=(*batch, K))


def path_total(levels, completion):
    """The sum along one completion, prefix by prefix."""
    V, prefix, total = levels[0].shape[-1], 0, 0.0
    for level, token in zip(levels, completion, strict=True):
        total = total + level[..., prefix, token]
        prefix = prefix * V + token
    return total


def sequence_logp(levels):
    V, H = levels[0].shape[-1], len(levels)
    return np.stack([path_total(levels, y) for y in itertools.product(range(V), repeat=H)], -1)


def tilt(logp, reward, beta):
    return np.exp(log_softmax(logp + reward / beta, -1))
