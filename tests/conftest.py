"""Every test runs on 8 fake CPU devices, with implicit rank promotion an error."""

import gc
import os

from tests.compiler import xla_flags

os.environ["XLA_FLAGS"] = xla_flags()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish(session):
    """Tracing makes many objects that live on: looking through them less often saves a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8, "the tests need 8 fake devices"


@pytest.fixture(scope="session", autouse=True)
def undisturbed():
    """A program that a test calls in this process sets nothing for the others, and writes into nobody's cache."""
    from experiments.common import launch  # Not before the types are watched.

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "prepare_process", lambda: None)
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def compilations():
    """How many programs were compiled so far."""
    seen = []

    def listen(name, duration, **_):
        if name.endswith("backend_compile_duration"):
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(seen)
    jax.monitoring.unregister_event_duration_listener(listen)
