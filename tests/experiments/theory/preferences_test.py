import pytest

from experiments.theory import misspecification
from tests.experiments.theory.page import check

FAMILIES = (
    "all_roads",
    "direct_preference",
    "f_divergence",
    "misspecification",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_claim_fails(name, tmp_path, monkeypatch):
    monkeypatch.setattr(misspecification, "WORLDS", 100)
    check(name, tmp_path)
