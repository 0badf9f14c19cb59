"""Random words, normals and errors of logical coordinates (see :mod:`aqnsim.rng`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim.errors import (
    AbsoluteGaussian,
    BitFlip,
    DeadZone,
    ErrorModel,
    RelativeGaussian,
    Saturation,
    Spike,
    Stuck,
    SystematicBias,
)
from aqnsim.reference.rounding import F32, U32, to_bf16
from aqnsim.rng import coordinates

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def philox(counter: U32, key: tuple[int, int]) -> U32:
    """Philox4x32-10 (Salmon et al., SC'11) of counters ``[4, ...]`` under one 64-bit key; the same shape out."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(w, np.uint64) for w in counter]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & mask, high0 ^ c[3] ^ np.uint64(k1), p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c).astype(np.uint32)


def box_muller(radius_word: U32, angle_word: U32) -> tuple[F32, F32]:
    """Two standard normals from two words: Box-Muller with polynomials in fp32, in the order of core/normal.h."""

    def poly(x: F32, *coefficients: float) -> F32:
        acc = np.full_like(x, coefficients[0])
        for c in coefficients[1:]:
            acc = acc * x + np.float32(c)
        return acc

    # -ln(u) for u = m / 2^31, m = (word >> 1) | 1
    u = ((radius_word >> 1) | 1).astype(np.int32).astype(np.float32).view(np.uint32)
    exponent = (u - np.uint32(0x3F3504F3)).view(np.int32) >> 23
    x = (u - (exponent.astype(np.uint32) << np.uint32(23))).view(np.float32) - np.float32(1)
    q = poly(
        x,
        0.09272214025259018,
        -0.1411842554807663,
        0.14676396548748016,
        -0.16592855751514435,
        0.19985127449035645,
        -0.2500092089176178,
        0.3333340883255005,
    )
    x2 = x * x
    log1p = (x - np.float32(0.5) * x2) + (x2 * x) * q
    neg_log = (31 - exponent).astype(np.float32) * np.float32(0.6931471805599453) - log1p
    radius = np.sqrt(np.maximum(np.float32(2) * neg_log, np.float32(0)))
    # the angle: top two bits the quadrant, the rest f in [-1/2, 1/2) quarter turns
    quadrant = angle_word >> 30
    f = (angle_word << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2.0**-32)
    g = f * f
    s = f * poly(g, -0.004602163098752499, 0.07968021929264069, -0.6459634900093079, 1.5707963705062866)
    c = poly(
        g,
        0.0009092451655305922,
        -0.020862624049186707,
        0.2536695599555969,
        -1.2337005138397217,
        1.0,
    )
    odd = (quadrant & 1).astype(bool)
    cos = np.where(odd, s, c) * np.where((quadrant + 1) & 2, np.float32(-1), np.float32(1))
    sin = np.where(odd, c, s) * np.where(quadrant & 2, np.float32(-1), np.float32(1))
    return radius * cos, radius * sin


def random_words(rows: I64, columns: int, key: int, word: int) -> U32:
    """One random word for each column of each of the logical ``rows``, ``[len(rows), columns]``.

    Args:
        rows: ``[n]``, or ``[n, 2]`` with the column at which each row begins.
        key, word: of :func:`aqnsim.rng.coordinates`.
    """
    return _columns(_blocks(rows, columns, key, word), rows, columns)


def normal(rows: I64, columns: int, key: int, word: int) -> F32:
    """Standard normals ``[len(rows), columns]`` of the logical ``rows``: two from each pair of random words."""
    words = _blocks(rows, columns, key, word)
    z = np.stack(box_muller(words[..., 0::2], words[..., 1::2]), axis=-1).reshape(words.shape)
    return _columns(z, rows, columns)


def _first(rows: I64) -> I64:
    return rows[:, 1] if rows.ndim == 2 else np.zeros(len(rows), np.int64)


def _blocks(rows: I64, columns: int, key: int, word: int) -> U32:
    """The Philox blocks ``[rows, blocks, 4]`` that so many columns need, wherever in a block they begin."""
    first, ids = _first(rows) // 4, (rows[:, 0] if rows.ndim == 2 else rows).view(np.uint64)
    shape = (len(ids), (columns + 6) // 4)
    counter = np.stack(
        [
            (first[:, None] + np.arange(shape[1])).astype(np.uint32),
            np.broadcast_to((ids & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None], shape),
            np.broadcast_to((ids >> np.uint64(32)).astype(np.uint32)[:, None], shape),
            np.full(shape, word, np.uint32),
        ]
    )
    return np.moveaxis(philox(counter, (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF)), 0, -1)


def _columns(blocks: npt.NDArray[Any], rows: I64, columns: int) -> npt.NDArray[Any]:
    taken = _first(rows)[:, None] % 4 + np.arange(columns)
    return np.take_along_axis(blocks.reshape(len(rows), 4 * blocks.shape[1]), taken, axis=1)


@dataclass(frozen=True)
class _Draws:
    """What one model of a chain draws for its elements."""

    model: ErrorModel
    place: int
    key: int
    clock: int
    rows: I64
    columns: int

    def at(self, part: int) -> tuple[int, int]:
        return coordinates(self.key, self.clock, self.model.draw, self.place, part)  # type: ignore[attr-defined]

    def normal(self, part: int = 0) -> F32:
        return normal(self.rows, self.columns, *self.at(part))

    def words(self, part: int = 0) -> U32:
        return random_words(self.rows, self.columns, *self.at(part))

    def hits(self) -> Bool:
        """Which elements a model with a rate hits."""
        lanes = getattr(self.model, "lanes", 0)
        words = self.words() if not lanes else self._lane_words(lanes)
        return words <= np.uint32(self.model.last_hit)  # type: ignore[attr-defined]

    def _lane_words(self, lanes: int) -> U32:
        lane = (_first(self.rows)[:, None] + np.arange(self.columns)) % lanes
        used, index = np.unique(lane, return_inverse=True)
        at = np.stack([np.zeros_like(used), used], axis=1)
        return random_words(at, 1, *self.at(0)).reshape(-1)[index].reshape(lane.shape)


def _missed(y: F32, model: ErrorModel, draws: _Draws, magnitude: F32 | None, bf16: bool) -> tuple[F32, Bool | None]:
    """``y`` after one model, and the elements that a model with a rate hits."""
    match model:
        case RelativeGaussian():
            unit = y if magnitude is None or model.reference == "output" else magnitude
            return y + (np.float32(model.sigma) * draws.normal()) * np.abs(unit), None
        case AbsoluteGaussian():
            return y + np.float32(model.sigma) * draws.normal(), None
        case SystematicBias():
            return y + (np.float32(model.gain) * y + np.float32(model.offset)), None
        case DeadZone():
            return np.where(np.abs(y) < np.float32(model.threshold), np.float32(0), y), None
        case Saturation():
            return np.clip(y, -np.float32(model.limit), np.float32(model.limit)), None
        case Spike():
            hit = draws.hits()
            return np.where(hit, np.float32(model.size) * draws.normal(part=1), y), hit
        case Stuck():
            hit = draws.hits()
            return np.where(hit, np.float32(model.value), y), hit
        case BitFlip():
            hit, low = draws.hits(), 16 if bf16 else 0  # bf16 is the upper half of the pattern
            bit = model.bit if model.bit >= 0 else draws.words(part=1) >> np.uint32(28 if bf16 else 27)
            flipped = y.view(np.uint32) ^ np.uint32(1) << np.asarray(bit + low, np.uint32)
            return np.where(hit, flipped.view(np.float32), y), hit
    raise NotImplementedError(f"the reference has no branch for {model}")


def perturb(
    y: F32,
    models: Sequence[ErrorModel],
    key: int,
    clock: int,
    rows: I64 | None = None,
    magnitude: F32 | None = None,
    bf16: bool = False,
) -> tuple[F32, int]:
    """``y`` after a chain of error models, in fp32, and the number of hits by models that have a rate.

    Infinities and NaNs pass each model unchanged, and are never hit.

    Args:
        y: the last axis is the column, all others together the row.
        key, clock: see :mod:`aqnsim.rng`.
        rows: int64 ``[n]`` or ``[n, 2]``; default 0, 1, 2, ...
        magnitude: ``|A| @ |B|`` of a product, as ``y``; for ``reference=absdot``.
        bf16: whether the result is stored in bfloat16, whose pattern a bit flip then changes.
    """
    y = np.asarray(y, np.float32)
    if y.size == 0:
        return y, 0
    columns = y.shape[-1] if y.ndim else 1
    flat, total = y.reshape(-1, columns), 0
    rows = np.arange(len(flat)) if rows is None else rows
    magnitude = None if magnitude is None else magnitude.reshape(flat.shape)
    for place, model in enumerate(models):
        if isinstance(model, BitFlip) and bf16:
            flat = to_bf16(flat)
        with np.errstate(all="ignore"):
            missed, hit = _missed(flat, model, _Draws(model, place, key, clock, rows, columns), magnitude, bf16)
        finite = np.isfinite(flat)
        total += 0 if hit is None else int(np.sum(hit & finite))
        flat = np.where(finite, missed, flat)
    return flat.reshape(y.shape), total
