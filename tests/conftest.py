"""Every test starts with the backends that a fresh process has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from aqnsim import backends

# The tensors of these tests are too small for two threads to help; tests that need more set them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _default_backends() -> Iterator[None]:
    before = backends.chosen()
    yield
    backends._CHOSEN.clear()
    backends._CHOSEN.update(before)


@pytest.fixture
def gpu() -> torch.device:
    """The GPU. Without one a test is skipped, or fails where AQNSIM_REQUIRE, a list with commas, names cuda."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    reason = f"torch {torch.__version__} sees no GPU"
    if "cuda" in os.environ.get("AQNSIM_REQUIRE", "").split(","):
        pytest.fail(f"AQNSIM_REQUIRE asks for cuda, but {reason}")
    pytest.skip(reason)
