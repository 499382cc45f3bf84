import pytest
import torch


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; the test is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, for which sizes are small, and the first GPU."""
    return request.getfixturevalue("gpu") if request.param == "cuda" else torch.device("cpu")
