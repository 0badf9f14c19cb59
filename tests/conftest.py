"""Every test starts with the backends that a fresh process has."""

from __future__ import annotations

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
