import pathlib
import re

import pytest

import tiltjax.losses.mle
from experiments import methods

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_committed_page_is_that_of_the_code():
    assert PAGE.read_text() == methods.render()  # If not: make docs.


def test_every_public_function_is_in_it():
    page = PAGE.read_text()
    names = [methods.short_path(module, name) for module, name, _ in methods.public_functions()]
    assert len(names) > 150
    for name in names:
        assert f"\n| `{name}(" in page, name


def test_every_loss_has_a_class_and_a_source():
    rows = re.findall(
        r"^\| `losses\.(\w+_loss)\([^`]*\)` \| (.+) \| ([^|]+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    assert len(rows) > 60
    for name, what, role, source in rows:
        assert what.endswith("."), name
        assert role != "part" or name == "value_loss", name
        assert source or name in ("sft_loss", "weighted_mle_loss"), name


def test_a_function_without_a_class_is_an_error(monkeypatch):
    def new_loss():
        """New."""

    new_loss.__module__ = "tiltjax.losses.mle"
    monkeypatch.setattr(tiltjax.losses.mle, "new_loss", new_loss, raising=False)
    monkeypatch.setattr(tiltjax.losses.mle, "__all__", [*tiltjax.losses.mle.__all__, "new_loss"])
    with pytest.raises(LookupError, match=r"no class for tiltjax\.losses\.mle\.new_loss"):
        methods.render()


def test_a_class_without_a_function_is_an_error(monkeypatch):
    monkeypatch.setitem(methods.ROLES["tiltjax.losses.regression"], "fits", "astrology_loss")
    with pytest.raises(LookupError, match="astrology_loss"):
        methods.render()
