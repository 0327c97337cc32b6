import pytest

from tests.experiments.theory.page import check

FAMILIES = (
    "process_rewards",
    "search",
    "voting",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_claim_fails(name, tmp_path):
    check(name, tmp_path)
