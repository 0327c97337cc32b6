import types

import jax
import pytest

from tiltjax.train import hardware


@pytest.fixture(autouse=True)
def restored():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_have_a_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hardware.compilation_cache("") is None
    assert jax.config.jax_compilation_cache_dir is None
    assert hardware.compilation_cache() == str(tmp_path / ".cache" / "tiltjax") == jax.config.jax_compilation_cache_dir
    assert (tmp_path / ".cache" / "tiltjax").is_dir()


def test_what_jax_was_told_before_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert hardware.compilation_cache() == str(tmp_path)


def test_a_place_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert hardware.compilation_cache(str(tmp_path / "file" / "cache")) is None
    assert jax.config.jax_compilation_cache_dir is None


def test_what_a_long_compilation_has_freed_is_given_back(monkeypatch):
    trimmed, event = [], "/jax/core/compile/backend_compile_duration"
    library = types.SimpleNamespace(malloc_trim=trimmed.append)
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: library)
    assert hardware.return_memory_after_compiling.__wrapped__()
    for seconds in (0.01, 1.0):
        jax.monitoring.record_event_duration_secs(event, seconds)
    jax.monitoring.record_event_duration_secs("/something/else", 1.0)
    assert trimmed == [0]


def test_a_c_library_that_cannot_is_no_error(monkeypatch):
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not hardware.return_memory_after_compiling.__wrapped__()
