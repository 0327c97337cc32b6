import pytest

from experiments.theory import search
from tests.experiments.theory.page import check

FAMILIES = (
    "process_rewards",
    "search",
    "voting",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_claim_fails(name, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "SIMULATIONS", (1, 30, 100, 1000))
    monkeypatch.setattr(search, "SEARCHES", 64)
    check(name, tmp_path)
