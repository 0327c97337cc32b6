"""A tiny run of the digits, which the test of the rewards starts from."""

import pytest

from experiments import diffusion_digits


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """Configuration and results; its figures mean nothing."""
    config = diffusion_digits.DigitsConfig(output=str(tmp_path_factory.mktemp("digits")), quick=True)
    return config, diffusion_digits.run(config, progress=False)
