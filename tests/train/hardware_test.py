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
