"""Memory faults: one bit of a stored code or of a block's scale is the other one when it is read.

A fault is a pure function of the key, the step and the coordinates of what it hits: of an element, its logical row and
its column; of a scale, the logical row of its block's first element and the block's index along the last axis. A word
below ``rate 2^32`` is a hit. The words of hits, of bits and of a stochastic rounding have keys of their own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim import formats
from aqnsim._errors import ConfigError, unknown
from aqnsim.formats import AnyFormat, BlockFormat, element_of
from aqnsim.reference.blocks import blocks_of
from aqnsim.reference.codes import decode, encode
from aqnsim.reference.noise import philox, random_words
from aqnsim.reference.rounding import F32, U32, round_to

I64 = npt.NDArray[np.int64]

TARGETS = ("codes", "scales")
"""What a fault hits: codes of elements, or codes of blocks' scales."""

_SCALE_BITS = {"e8m0": 8, "fp8_e4m3": 8, "fp32": 32, "hif4": 32}


def code_width(fmt: AnyFormat, target: str) -> int:
    """How many bits the codes of a target have; for ``hif4``, all three levels of a scale are one code.

    Raises:
        UnknownNameError: no such target.
        ConfigError: the format has no scales, or one for the whole tensor, which lies in no row.

    >>> code_width(formats.get("mxfp4"), "codes"), code_width(formats.get("mxfp4"), "scales")
    (4, 8)
    """
    if target not in TARGETS:
        raise unknown("target of a fault", target, TARGETS)
    if target == "codes":
        return element_of(fmt).bits
    if not isinstance(fmt, BlockFormat):
        raise ConfigError(f"fault in scales: {fmt} has none; use target='codes' or a format with blocks")
    if fmt.block == "tensor":
        raise ConfigError(f"fault in scales: the scale of {fmt} is the whole tensor's, in no row; use target='codes'")
    return _SCALE_BITS[fmt.scale_format]


def threshold(rate: float) -> int:
    """The integer, 0 .. 2^32, below which a word is a hit: ``rate 2^32`` to the nearest.

    Raises:
        ConfigError: not a share, or one that words cannot express.

    >>> threshold(0.25) == 1 << 30, threshold(1.0) == 1 << 32
    (True, True)
    """
    if not isinstance(rate, (int, float)) or not 0 <= rate <= 1 or 0 < rate < 2.0**-32:
        raise ConfigError(f"fault: rate must be 0, or a share from 2^-32 to 1, got {rate!r}")
    return round(rate * 2**32)


def check_bit(bit: int | None, width: int) -> int | None:
    """``bit``, if codes of ``width`` bits have it; None stands for one drawn for each hit.

    Raises:
        ConfigError: they have not.
    """
    if bit is not None and (type(bit) is not int or not 0 <= bit < width):
        raise ConfigError(f"fault: bit must be 0 (the lowest) .. {width - 1} or None for a random one, got {bit!r}")
    return bit


def sub_key(key: int, part: str) -> int:
    """A key of its own for each use of ``key``, as a signed 64-bit integer."""
    digest = hashlib.blake2b(part.encode(), digest_size=8, key=key.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little", signed=True)


def bits_at(rows: I64, columns: I64, bit: int | None, width: int, key: int, step: int) -> I64:
    """The bit that flips at each of the coordinates: ``bit``, or ``floor(word width / 2^32)`` of a word of its own."""
    if bit is not None:
        return np.full(len(rows), bit)
    ids, low = np.asarray(rows, np.int64).view(np.uint64), np.uint64(0xFFFFFFFF)
    counter = np.stack([columns.astype(np.uint64) // 4, ids & low, ids >> np.uint64(32), np.full_like(ids, step)])
    own = sub_key(key, "bits")
    words = philox(counter.astype(np.uint32), (own & 0xFFFFFFFF, own >> 32 & 0xFFFFFFFF))
    word = np.take_along_axis(words, columns[None] % 4, axis=0)[0]
    return np.asarray((word.astype(np.int64) * width) >> 32)


def block_sides(fmt: BlockFormat, shape: tuple[int, ...], axis: int) -> list[int]:
    """How far a block reaches along each axis of a tensor of ``shape``, which has at least one.

    >>> block_sides(formats.get("mxfp4(block=32x16)"), (3, 64, 64), -1)
    [1, 32, 16]
    """
    axis %= len(shape)
    rows, columns = fmt.tile or (1, max(shape[axis], 1))
    sides = [1] * len(shape)
    sides[axis] = columns
    if rows > 1 and len(shape) > 1:
        sides[-1 if axis == len(shape) - 2 else -2] = rows
    return sides


def scale_rows(rows: I64, fmt: BlockFormat, shape: tuple[int, ...], axis: int) -> I64:
    """The logical row of each row of scales: that of the first element of its blocks."""
    if not rows.size:
        return rows
    shape = shape or (1,)
    firsts = tuple(slice(None, None, side) for side in block_sides(fmt, shape, axis)[:-1])
    return rows.reshape(shape[:-1])[firsts].reshape(-1)


def faulty_cast(
    x: F32,
    fmt: AnyFormat,
    axis: int,
    *,
    target: str,
    rate: float,
    bit: int | None,
    key: int,
    step: int,
    rows: I64 | None = None,
) -> tuple[F32, npt.NDArray[np.bool_]]:
    """What is read back of ``x`` in the format, and which of its codes or scales were hit.

    The same as :func:`aqnsim.faults.faulty_cast`, by encoding everything.
    """
    x = np.asarray(x, np.float32)
    width = code_width(fmt, target)
    bit = check_bit(bit, width)
    columns = x.shape[-1] if x.ndim else 1
    rows = np.arange(x.size // columns if columns else 0) if rows is None else rows
    words = random_words(rows, columns, key, step).reshape(x.shape) if formats.random_bits(fmt) else None
    parts = blocks_of(x, fmt, axis, words) if isinstance(fmt, BlockFormat) else None
    elements = round_to(x, element_of(fmt), words) if parts is None else parts.elements
    if target == "codes":
        codes, hits = _flipped(encode(elements, element_of(fmt)), rows, rate, bit, width, key, step)
        elements = _decoded(codes, elements, element_of(fmt))
    if parts is None or not isinstance(fmt, BlockFormat):
        return elements, hits
    scales = _scale_codes(parts.scales, fmt)
    if target == "scales":
        if not fmt.element.has_nan:  # a scale that is NaN says so for its block, whose codes are then 0
            said = np.isnan(_values(np.zeros_like(x), scales, fmt, parts.tensor_scale, axis))
            elements = np.where(np.isnan(elements) & said, np.float32(0), elements)
        at = scale_rows(rows, fmt, x.shape, axis)
        scales, hits = _flipped(scales, at, rate, bit, width, key, step)
    return _values(elements, scales, fmt, parts.tensor_scale, axis), hits


def _flipped(
    codes: I64, rows: I64, rate: float, bit: int | None, width: int, key: int, step: int
) -> tuple[I64, npt.NDArray[np.bool_]]:
    """Codes with one bit flipped where they are hit, and where that is."""
    columns = codes.shape[-1] if codes.ndim else 1
    words: U32 = random_words(rows, columns, sub_key(key, "hits"), step)
    hits = words.astype(np.uint64) < np.uint64(threshold(rate))
    row, column = (index.reshape(-1) for index in np.indices(hits.shape))
    flips = np.int64(1) << bits_at(rows[row], column, bit, width, key, step)
    return codes ^ np.where(hits.reshape(-1), flips, 0).reshape(codes.shape), hits.reshape(codes.shape)


def _decoded(codes: I64, before: F32, element: formats.Format) -> F32:
    """Values of codes; a NaN that the format has no code for is not stored, and stays."""
    return np.where(np.isnan(before) & (not element.has_nan), before, decode(codes, element))


def _scale_codes(scales: npt.NDArray[Any], fmt: BlockFormat) -> I64:
    if fmt.scale_format in ("fp32", "hif4"):
        return np.asarray(scales.view(np.uint32), np.int64)
    return encode(scales, element_of(formats.get(fmt.scale_format)))


def _values(elements: F32, scales: I64, fmt: BlockFormat, tensor_scale: np.float32, axis: int) -> F32:
    """What elements stand for under codes of scales, in the order of operations of the format's scale rule."""
    shape = elements.shape or (1,)
    spread = scales
    for at, side in enumerate(block_sides(fmt, shape, axis) if scales.ndim else []):
        spread = np.repeat(spread, side, axis=at).take(range(shape[at]), axis=at)
    with np.errstate(all="ignore"):
        if fmt.scale_format == "hif4":
            return elements * _hif4_factors(spread, shape, axis).reshape(elements.shape)
        if fmt.scale_format == "fp32":
            scale = spread.astype(np.uint32).view(np.float32)
        else:
            scale = decode(spread, element_of(formats.get(fmt.scale_format)))
        scale = scale.reshape(elements.shape) if scale.ndim else scale
        if fmt.scale in ("torchao", "modelopt"):
            return elements * (scale * tensor_scale)
        if fmt.scale == "compressed_tensors":
            return elements * (scale / tensor_scale)
        return (elements * scale) * (tensor_scale if fmt.scale_format == "fp8_e4m3" else np.float32(1))


def _hif4_factors(levels: I64, shape: tuple[int, ...], axis: int) -> F32:
    sides = [1] * len(shape)
    sides[axis] = shape[axis]
    place = (np.arange(shape[axis]) % 64).reshape(sides)
    shift = (levels >> (8 + place // 8) & 1) + (levels >> (16 + place // 4) & 1)
    scale = decode(levels & 255, element_of(formats.get("fp8_ue6m2")))
    return np.ldexp(np.float32(1), shift.astype(np.int32)) * scale
