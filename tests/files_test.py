"""What is said of a file that could not be written."""

import errno
import os

import pytest

from tiltjax.files import naming
from tiltjax.train.config import write_text


def test_an_error_of_the_system_names_the_file_that_was_asked_for(tmp_path):
    full = naming(tmp_path / "x.npz", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert str(full) == f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: '{tmp_path / 'x.npz'}'"
    other = OSError("told by a library")
    assert naming("x", other) is other
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/gone/config\.json'$"):
        write_text(tmp_path / "gone" / "config.json", "{}")
