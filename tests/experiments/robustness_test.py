import pathlib

import pytest

from experiments import robustness

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_is_that_of_the_tests():
    page = (ROOT / "docs" / "robustness.md").read_text()
    assert page == robustness.render(robustness.rows(ROOT / "tests")), "run python -m experiments.robustness"


def test_a_row_is_what_a_marker_says(tmp_path):
    (tmp_path / "some_test.py").write_text(
        '@pytest.mark.robustness("Data", given="a | b", outcome="refused")\ndef test_it(): ...\n'
    )
    (row,) = robustness.rows(tmp_path)
    assert row == robustness.Row("Data", "a | b", "refused", "some_test.py::test_it")
    assert "| a \\| b | refused | `some_test.py::test_it` |" in robustness.render([row])


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ('"Data", given="x"', "takes section, given, outcome"),
        ('"Nowhere", given="x", outcome="y"', "must be one of"),
        ('"Data", given=f"{x}", outcome="y"', "literal strings"),
    ],
)
def test_a_marker_that_says_less_is_refused(tmp_path, marker, reason):
    (tmp_path / "some_test.py").write_text(f"@pytest.mark.robustness({marker})\ndef test_it(): ...\n")
    with pytest.raises(ValueError, match=reason):
        robustness.rows(tmp_path)
