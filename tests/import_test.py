import configparser
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import tiltjax

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(tiltjax.__path__, "tiltjax.")]
PUBLIC = ["tiltjax", *(name for name in MODULES if not any(part.startswith("_") for part in name.split(".")))]
HEAVY = ("flax", "jax", "matplotlib", "numpy", "optax", "orbax", "tensorflow_datasets", "transformers")


@pytest.fixture
def interpreter(tmp_path):
    """Runs code in a fresh interpreter where importing torch or TensorFlow is an error."""
    for name in ("torch", "tensorflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise AssertionError('{name} was imported')\n")

    def run(code):
        code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        return done.returncode, done.stdout.strip(), done.stderr

    return run


def test_neither_torch_nor_tensorflow(interpreter):
    names = [*PUBLIC, "experiments.align"]
    status, out, err = interpreter(
        f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    assert (status, out) == (0, "[]"), err
    status, _, err = interpreter("import torch")
    assert status == 1
    assert "torch was imported" in err


def test_importing_the_library_loads_nothing_and_subpackages_come_when_asked(interpreter):
    status, out, err = interpreter(
        f"import tiltjax\nbefore = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert set(tiltjax.__all__) <= set(dir(tiltjax))\n"
        f"print(before, tiltjax.ops.__name__, tiltjax.citation.__name__, sorted(set({HEAVY!r}) & set(sys.modules)))\n"
        "print(tiltjax.types.__name__, 'jax' in sys.modules)"
    )
    assert (status, out) == (0, "[] tiltjax.ops citation []\ntiltjax.types True"), err
    with pytest.raises(AttributeError, match="module 'tiltjax' has no attribute 'trainers'"):
        tiltjax.trainers  # noqa: B018


def test_all_names_every_subpackage():
    """And beside them one function, because every user needs it once."""
    assert sorted({*tiltjax.__all__} - {"citation"}) == sorted(m.name for m in pkgutil.iter_modules(tiltjax.__path__))
    assert tiltjax.citation is tiltjax.papers.citation


def rank(name):
    """Constants, then classes, then functions, each in the order of the alphabet."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


FACES = sorted(path.parent.name for path in ROOT.glob("tiltjax/*/__init__.pyi"))
# A module of that name, or functions of two modules that one name would hide: their path is the module's.
WITHOUT_FACE = {"align": {"compare", "feedback"}, "data": {"gguf_tokenizer"},
                "models": {"attention", "load", "save"}, "ops": {"matmul"},
                "rewards": {"sentiment"}, "samplers": {"best_of_n", "decode", "resample"}, "tilt": {"f_divergence"},
                "train": {"collect", "fit"}}  # fmt: skip


@pytest.mark.parametrize("package", FACES)
def test_a_face_has_what_its_modules_make_public(package):
    """If not: a line ``from .module import name as name`` in the package's ``__init__.pyi``, which says what it has."""
    face = importlib.import_module(f"tiltjax.{package}")
    inside = [importlib.import_module(f"tiltjax.{package}.{m.name}") for m in pkgutil.iter_modules(face.__path__)]
    modules = {module.__name__.rpartition(".")[2]: module for module in inside}
    owners = {name: module for module in inside for name in getattr(module, "__all__", ())}
    assert set(face.__all__) == (set(owners) - WITHOUT_FACE.get(package, set())) | set(modules)
    for name in face.__all__:
        assert getattr(face, name) is (modules[name] if name in modules else getattr(owners[name], name))
    assert WITHOUT_FACE.get(package, set()) <= set(owners)


def test_kernels_and_types_are_found_by_their_short_paths_and_load_what_they_need_only(interpreter):
    status, out, err = interpreter(
        "import tiltjax\nnames = ['tilt.tilt', 'losses.dpo_loss', 'samplers.soft_best_of_n', 'data.Candidates']\n"
        "print(all(callable(getattr(getattr(tiltjax, p), n)) for p, n in (name.split('.') for name in names)))\n"
        "print({'flax', 'transformers', 'tiltjax.losses.game', 'tiltjax.samplers.steer'} & set(sys.modules))"
    )
    assert (status, out) == (0, "True\nset()"), err


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_listed_exists_and_is_documented(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip()
    names = getattr(module, "__all__", None)
    if names is None:
        assert hasattr(module, "__path__"), f"{name} has no __all__"
        return
    assert name.rpartition(".")[2] in FACES or names == sorted(names, key=rank)
    assert len(names) == len(set(names))
    for public in names:
        value = getattr(module, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            text = inspect.getdoc(value) or ""
            assert text.strip(), f"{public} has no docstring"
            assert not text.startswith(f"{public}("), f"{public} has the docstring that a dataclass makes up"


def test_the_citation_file_names_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    fields = dict(line.split(": ", 1) for line in text.splitlines() if line[:1].isalpha() and ": " in line)
    assert fields["version"] == settings["metadata"]["version"] == tiltjax.__version__
    assert fields["license"] == settings["metadata"]["license"]
