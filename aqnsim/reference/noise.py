"""Random words, normals and errors of logical coordinates (see :mod:`aqnsim.rng`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aqnsim.errors import AbsoluteGaussian, ErrorModel, RelativeGaussian
from aqnsim.reference.rounding import F32, U32


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


def random_words(rows: npt.NDArray[np.int64], columns: int, key: int, step: int) -> U32:
    """One random word for each column of each of the logical ``rows``, ``[len(rows), columns]``; see aqnsim.rng."""
    blocks = -(-columns // 4)
    ids = np.asarray(rows, np.int64).view(np.uint64)
    shape = (len(ids), blocks)
    counter = np.stack(
        [
            np.broadcast_to(np.arange(blocks, dtype=np.uint32), shape),
            np.broadcast_to((ids & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None], shape),
            np.broadcast_to((ids >> np.uint64(32)).astype(np.uint32)[:, None], shape),
            np.full(shape, step, np.uint32),
        ]
    )
    words = philox(counter, (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))
    return np.moveaxis(words, 0, -1).reshape(len(ids), 4 * blocks)[:, :columns]


def normal(rows: npt.NDArray[np.int64], columns: int, key: int, step: int) -> F32:
    """Standard normals ``[len(rows), columns]`` of the logical ``rows``: two from each pair of random words."""
    words = random_words(rows, -(-columns // 4) * 4, key, step)
    z = np.stack(box_muller(words[:, 0::2], words[:, 1::2]), axis=-1)
    return z.reshape(len(words), -1)[:, :columns]


def perturb(y: F32, error: ErrorModel, key: int, step: int, rows: npt.NDArray[np.int64] | None = None) -> F32:
    """``y`` with the error added in fp32; the last axis is the column, all others together the row.

    Infinities and NaNs pass unchanged.
    """
    y = np.asarray(y, np.float32)
    if y.size == 0:
        return y
    columns = y.shape[-1] if y.ndim else 1
    flat = y.reshape(-1, columns)
    z = normal(np.arange(len(flat)) if rows is None else rows, columns, key, step)
    with np.errstate(all="ignore"):
        if isinstance(error, RelativeGaussian):
            missed = flat + (np.float32(error.sigma) * z) * np.abs(flat)
        elif isinstance(error, AbsoluteGaussian):
            missed = flat + np.float32(error.sigma) * z
        else:
            raise NotImplementedError(f"the reference has no branch for {error}")
    return np.where(np.isfinite(flat), missed, flat).reshape(y.shape)
