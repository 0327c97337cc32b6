import pytest

from tests.experiments.theory.page import check

FAMILIES = (
    "soft_best_of_n",
    "log_partition",
    "rlhf_rlif",
    "weighted_mle",
    "over_optimisation",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_claim_fails(name, tmp_path):
    check(name, tmp_path)
