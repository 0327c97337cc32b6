"""What pip installs: a wheel of a copy of the tree, put where nothing else of the tree is seen."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
USE = """
import doctest, importlib, importlib.resources, sys
import tiltjax
from tiltjax.align.sources import prompt_rows

files = importlib.resources.files("tiltjax")
faces = [name for name in tiltjax.__all__ if files.joinpath(name, "__init__.pyi").is_file()]
names = [getattr(getattr(tiltjax, face), name) for face in faces for name in getattr(tiltjax, face).__all__]
modules = ["tiltjax.tilt.weights", "tiltjax.losses.preference.dpo", "tiltjax.samplers.best_of_n", "tiltjax.papers"]
tried = [doctest.testmod(importlib.import_module(name)) for name in modules]
print(tiltjax.__file__)
print(files.joinpath("py.typed").is_file(), len(faces) > 5, len(names) > 500)
print(len(prompt_rows("reviews", 1, seed=0)) > 10)
print(sum(done.failed for done in tried), sum(done.attempted for done in tried) > 10)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made without isolation: by the setuptools of the extra `dev`, and without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("tiltjax", "experiments", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={source / 'dist'}", str(source))
    (made,) = source.glob("dist/*.whl")
    return made


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_library_is_installed_and_all_of_it(wheel):
    """Experiments, benchmarks and tests run from the clone; no top-level name of theirs lands in site-packages."""
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    library = {path for path in (ROOT / "tiltjax").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {path.relative_to(ROOT).as_posix() for path in library}


def test_the_installed_library_works_where_the_clone_is_not(wheel, tmp_path):
    _pip("install", "--no-deps", "--no-compile", f"--target={tmp_path / 'site'}", str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    place, files, prompts, doctests = done.stdout.splitlines()
    assert pathlib.Path(place).is_relative_to(tmp_path)
    assert (files, prompts, doctests) == ("True True True", "True", "0 True")
