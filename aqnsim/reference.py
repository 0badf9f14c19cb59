"""The meaning of every word, in numpy: bit-exact, slow, readable.

Every backend is compared with this file. It follows the specifications in the order in which they state things, in
fp32, and uses only operations that IEEE 754 fixes to the last bit. bfloat16 enters and leaves as fp32 values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aqnsim.errors import AbsoluteGaussian, ErrorModel, RelativeGaussian
from aqnsim.formats import AnyFormat, BlockFormat, Format, element_of

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]

_FLOAT_MAX = np.finfo(np.float32).max


def round_to(x: F32, fmt: Format) -> F32:
    """Round each value to the nearest of ``fmt``, ties to even; beyond ``max`` as ``fmt.overflow`` says.

    NaN stays NaN, the sign of zero is kept, Inf counts as beyond ``max``.
    """
    x = np.asarray(x, np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = np.abs(x).astype(np.float64)
    finite = np.where(np.isfinite(wide), wide, 0.0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, fmt.min_exponent)
    quantum = np.ldexp(1.0, exponent - fmt.mantissa_bits)
    steps = finite / quantum  # exact in float64
    whole = np.rint(steps)  # ties to even
    if fmt.mantissa_bits == 0:  # codes are exponents: the even code is the even exponent field
        whole = np.where((steps == 1.5) & ((exponent + fmt.bias) % 2 == 0), 1.0, whole)
    nearest = whole * quantum
    beyond = {"saturate": fmt.max, "inf": np.inf, "nan": np.nan}[fmt.overflow]
    magnitude = np.where((nearest > fmt.max) | np.isinf(wide), beyond, nearest)
    magnitude = np.where(np.isnan(wide), np.nan, magnitude)
    return np.copysign(magnitude.astype(np.float32), x)


@dataclass(frozen=True)
class Blocks:
    """A cast in its parts: ``values = (elements * scales) * tensor_scale``, all fp32.

    ``elements`` has the input's shape, ``scales`` and ``factors`` one entry for each block along the axis (which comes
    last); an input times its block's factor is what was rounded to the element format.
    """

    elements: F32
    scales: F32
    factors: F32
    tensor_scale: np.float32


def blocks_of(x: F32, fmt: BlockFormat) -> Blocks:
    """Quantise ``x``, blocks along the last axis."""
    n = x.shape[-1]
    count = -(-n // fmt.block)
    padded = np.zeros((*x.shape[:-1], count * fmt.block), np.float32)
    padded[..., :n] = x
    blocked = padded.reshape(*x.shape[:-1], count, fmt.block)
    block_max = np.abs(blocked).max(axis=-1, initial=0.0)
    with np.errstate(all="ignore"):
        if fmt.scale == "e8m0-floor":
            factor, scales = _mx_floor(block_max, fmt.element)
            tensor_scale = np.float32(1)
        else:
            factor, scales, tensor_scale = _nvfp4(block_max)
        elements = round_to(blocked * factor[..., None], fmt.element)
    return Blocks(elements.reshape(padded.shape)[..., :n], scales, factor, tensor_scale)


def _mx_floor(block_max: F32, element: Format) -> tuple[F32, F32]:
    """OCP MX v1.0 section 6.3: X = 2^(floor(log2 amax) - emax), clamped to E8M0's 2^-127 .. 2^127.

    A block with a NaN or an Inf gets the scale NaN, and so becomes NaN as a whole. A block of zeros gets 2^-127.
    """
    finite = np.where(np.isfinite(block_max), block_max, 1.0)
    exponent = np.frexp(finite)[1] - 1 - element.max_exponent
    exponent = np.where(finite == 0, -127, np.clip(exponent, -127, 127))
    nan = np.where(np.isfinite(block_max), 1.0, np.nan)
    factor = (np.ldexp(1.0, -exponent) * nan).astype(np.float32)
    return factor, (np.ldexp(1.0, exponent) * nan).astype(np.float32)


def _nvfp4(block_max: F32) -> tuple[F32, F32, np.float32]:
    """NVIDIA TransformerEngine: S_enc = 2688 / amax, s = E4M3(amax_b (S_enc / 6)), q = E2M1(x / (s / S_enc))."""
    e4m3 = Format(name="scale", exponent_bits=4, mantissa_bits=3, bias=7, max=448.0)
    one = np.float32(1)
    amax = np.float32(block_max.max(initial=0.0))
    encode = np.minimum(np.float32(2688) / amax, _FLOAT_MAX)
    if amax == 0 or encode == 0:
        encode = one
    scales = round_to(block_max * (encode * np.float32(1 / 6)), e4m3)
    inverse = one / (scales * (one / encode))
    return np.minimum(inverse, _FLOAT_MAX), scales, amax / np.float32(2688)


def cast(x: F32, fmt: AnyFormat, axis: int = -1) -> F32:
    """``x`` in the format and back, fp32; blocks run along ``axis``.

    >>> from aqnsim import formats
    >>> cast(np.float32([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, 6]), formats.get("mxfp4")).tolist()
    [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    """
    x = np.asarray(x, np.float32)
    if isinstance(fmt, Format):
        return round_to(x, fmt)
    if x.ndim == 0:
        return cast(x.reshape(1), fmt).reshape(())
    moved = np.moveaxis(x, axis, -1)
    b = blocks_of(moved, fmt)
    scales = np.repeat(b.scales, fmt.block, axis=-1)[..., : moved.shape[-1]]
    with np.errstate(all="ignore"):
        values = (b.elements * scales) * b.tensor_scale
    return np.moveaxis(values, -1, axis)


def encode(x: F32, fmt: Format) -> npt.NDArray[np.uint8]:
    """Codes of values that ``fmt`` holds exactly (at most 8 bits wide); see :meth:`Format.decode`."""
    table = np.array(fmt.values(), np.float32)
    magnitude = np.searchsorted(table, np.abs(x))
    return (magnitude | (np.signbit(x).astype(np.int64) << (fmt.bits - 1))).astype(np.uint8)


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


def normal(rows: npt.NDArray[np.int64], columns: int, key: int, step: int) -> F32:
    """Standard normals ``[len(rows), columns]`` of the logical ``rows`` (see :mod:`aqnsim.rng`)."""
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
    z = np.stack([*box_muller(words[0], words[1]), *box_muller(words[2], words[3])], axis=-1)
    return z.reshape(len(ids), 4 * blocks)[:, :columns]


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


def to_bf16(x: F32) -> F32:
    """fp32 values rounded to bfloat16 (nearest, ties to even), kept as fp32."""
    bf16 = Format(
        name="bf16",
        exponent_bits=8,
        mantissa_bits=7,
        bias=127,
        max=2.0**128 - 2.0**120,
        overflow="inf",
    )
    return round_to(x, bf16)


__all__ = [
    "Blocks",
    "blocks_of",
    "box_muller",
    "cast",
    "element_of",
    "encode",
    "normal",
    "perturb",
    "philox",
    "round_to",
    "to_bf16",
]
