"""The only place where noise coordinates are made.

A random number is a pure function of (seed, site, stream, phase, step, run, logical row, column):

* seed, site and stream are hashed into the 64-bit key of Philox4x32-10,
* phase, step and run make a clock; an error model's ``draw`` says what of it enters (:func:`coordinates`),
* the counter is ``(column // 4, row low, row high, word of the clock)``, and ``column % 4`` picks one of the block's
  four words or normals.

Nothing else enters: no tile, thread count, batch layout, rank, call order or global generator.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from aqnsim._errors import ConfigError, unknown

PHASES = ("rollout", "train", "eval", "reference")
"""What a trainer does, in the order of their numbers in the clock."""

DRAWS = ("per_phase", "per_step", "frozen", "per_run")
"""How often a random error model draws anew; see :func:`coordinates`."""

POSITION_BITS = 20
"""Low bits of a logical row that hold the token's position; the sequence's id stands above them."""

MAX_SEQUENCE_BITS = 63 - POSITION_BITS
"""Bits of a sequence's id: a logical row is a non-negative int64."""

COLUMN_BITS = 33
"""Bits of a first column, such as that of an attention score: head << 21 | key position."""

_STEP_BITS, _RUN_BITS = 30, 31
_WORD = (1 << 32) - 1
_KEY = (1 << 64) - 1
_RUN = 0x9E3779B97F4A7C15  # odd: no two runs have one key
_PART = 0xD1342543DE82EF95  # odd: no two parts have one key
_PARTS = 4  # keys that one model of a chain may use


@lru_cache(maxsize=65536)
def key_of(seed: int, site: str, stream: str) -> int:
    """The Philox key, as a signed 64-bit integer (torch schemas have no unsigned one)."""
    text = "\x1f".join((str(seed), site, stream)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def check_step(step: int) -> int:
    """``step``, if the clock can hold it.

    Raises:
        ConfigError: step is not an integer in 0 .. 2^30 - 1.
    """
    return _within("step", step, _STEP_BITS)


def clock(step: int, phase: str, run: int = 0) -> int:
    """Run, phase and step as one number: ``run << 32 | phase << 30 | step``, the phase by its place in PHASES.

    Args:
        step: the training step, 0 <= step < 2^30.
        phase: one of PHASES.
        run: which repetition of the same run this is, 0 <= run < 2^31.

    Raises:
        ConfigError: step or run out of range.
        UnknownNameError: no such phase.

    >>> clock(7, "rollout"), clock(0, "train") == 1 << 30, clock(0, "rollout", run=1) == 1 << 32
    (7, True, True)
    """
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    return _within("run", run, _RUN_BITS) << 32 | PHASES.index(phase) << _STEP_BITS | check_step(step)


def coordinates(key: int, clock: int, draw: str = "per_phase", model: int = 0, part: int = 0) -> tuple[int, int]:
    """The Philox key, unsigned, and the counter's last word for one of the things that a call draws.

    ``draw`` says what the word holds, and so when the numbers are others:

    * ``per_phase``: phase and step,
    * ``per_step``: the step, so that all phases of a step see one hardware,
    * ``frozen``: 0, so that numbers are drawn once, as a deterministic chip misses,
    * ``per_run``: phase and step, and the key becomes ``key ^ (run * 0x9E3779B97F4A7C15)``: what differs when a run is
      repeated. Run 0 is ``per_phase``.

    Models of a chain, and the parts of what one model draws for an element, share no numbers: ``(4 model + part) *
    0xD1342543DE82EF95`` is added to the key. All of it is modulo 2^64.

    Args:
        key: of :func:`key_of`, signed or not.
        clock: of :func:`clock`.
        draw: one of DRAWS.
        model: the model's place in its chain.
        part: 0 for normals and decisions; 1 for what a hit then draws.

    >>> coordinates(-1, clock(5, "train")) == (2**64 - 1, 1 << 30 | 5)
    True
    """
    run = clock >> 32 if draw == "per_run" else 0
    word = clock & {"per_step": (1 << _STEP_BITS) - 1, "frozen": 0}.get(draw, _WORD)
    return ((key ^ run * _RUN) + (_PARTS * model + part) * _PART) & _KEY, word


@dataclass(frozen=True)
class NoiseKey:
    """Where noise comes from, apart from the element's row and column.

    Attributes:
        seed: the run's seed.
        site: the op's name, such as ``model.layers.0.mlp.up_proj``.
        step: the training step, 0 <= step < 2^30.
        phase: ``rollout``, ``train``, ``eval`` or ``reference``.
        stream: which of the site's results is perturbed, such as ``output`` or ``grad-input``.
        run: which repetition of the same run this is, 0 <= run < 2^31; only ``draw=per_run`` sees it.

    Raises:
        ConfigError: step or run out of range.
        UnknownNameError: no such phase.

    >>> NoiseKey(seed=0, site="demo").value == NoiseKey(seed=0, site="demo", step=7, phase="eval").value
    True
    """

    seed: int = 0
    site: str = ""
    step: int = 0
    phase: str = "train"
    stream: str = "output"
    run: int = 0

    def __post_init__(self) -> None:
        clock(self.step, self.phase, self.run)

    @property
    def value(self) -> int:
        """The 64-bit Philox key, of seed, site and stream."""
        return key_of(self.seed, self.site, self.stream)

    @property
    def clock(self) -> int:
        """Run, phase and step, as ops take them; see :func:`clock`."""
        return clock(self.step, self.phase, self.run)


def _within(what: str, value: int, bits: int) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise ConfigError(f"{what} must be an integer in 0..2^{bits}-1, got {value!r}")
    return value
