import pytest

from tests.experiments.theory.page import check

FAMILIES = (
    "kl_estimators",
    "grpo_dynamics",
    "games",
    "kuhn",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_claim_fails(name, tmp_path):
    check(name, tmp_path)
