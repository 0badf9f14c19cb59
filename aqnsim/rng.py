"""The only place where noise coordinates are made.

A standard normal is a pure function of (seed, site, phase, stream, step, logical row, column):

* the first four are hashed into the 64-bit key of Philox4x32-10,
* the counter is ``(column // 4, row low, row high, step)``, and ``column % 4`` picks one of the block's four normals.

Nothing else enters: no tile, thread count, batch layout, rank, call order or global generator.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from aqnsim._errors import ConfigError

PHASES = ("rollout", "train", "eval", "reference")
"""What a trainer does, in the order of their numbers in the counter."""

POSITION_BITS = 20
"""Low bits of a logical row that hold the token's position; the sequence's id stands above them."""

MAX_SEQUENCE_BITS = 63 - POSITION_BITS
"""Bits of a sequence's id: a logical row is a non-negative int64."""


@lru_cache(maxsize=65536)
def key_of(seed: int, site: str, stream: str) -> int:
    """The Philox key, as a signed 64-bit integer (torch schemas have no unsigned one)."""
    text = "\x1f".join((str(seed), site, stream)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class NoiseKey:
    """Where noise comes from, apart from the element's row and column.

    Attributes:
        seed: the run's seed.
        site: the op's name, such as ``model.layers.0.mlp.up_proj``.
        step: the training step, 0 <= step < 2^32.
        phase: ``rollout``, ``train``, ``eval`` or ``reference``.
        stream: which of the site's results is perturbed, such as ``output`` or ``grad-input``.

    >>> NoiseKey(seed=0, site="demo").value == NoiseKey(seed=0, site="demo", step=7).value
    True
    """

    seed: int = 0
    site: str = ""
    step: int = 0
    phase: str = "train"
    stream: str = "output"

    def __post_init__(self) -> None:
        check_step(self.step)

    @property
    def value(self) -> int:
        """The 64-bit Philox key; the step is part of the counter, not of the key."""
        return key_of(self.seed, self.site, self.stream)


def check_step(step: int) -> int:
    """``step``, if the counter can hold it.

    Raises:
        ConfigError: step is not an integer in 0 .. 2^32 - 1.
    """
    if not isinstance(step, int) or not 0 <= step < 1 << 32:
        raise ConfigError(f"step must be an integer in 0..2^32-1, got {step!r}")
    return step


def clock(step: int, phase: str, run: int = 0) -> int:
    """Run, phase and step as one number."""
    return run << 32 | PHASES.index(phase) << 30 | step
