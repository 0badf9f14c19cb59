"""Every test starts with the backends that a fresh process has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aqnsim import backends


@pytest.fixture(autouse=True)
def _default_backends() -> Iterator[None]:
    before = backends.chosen()
    yield
    backends._CHOSEN.clear()
    backends._CHOSEN.update(before)
