"""Codes and scales in the layouts in which tensors are stored, in torch's own ops: what kernels must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aqnsim import reference
from aqnsim._errors import ConfigError
from aqnsim.formats import AnyFormat, BlockFormat, Format, element_of, get, scale_shape

Order = Literal["low-first", "high-first"]

Parts = tuple[Tensor, Tensor, Tensor]
"""Packed codes, stored scales and the tensor's scale; a 1 for scales that a format lacks."""

_PIECE = 1 << 20  # values that are encoded at a time

_SCALE_DTYPES = {"e8m0": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn, "fp32": torch.float32, "hif4": torch.int32}


# ---- tensors --------------------------------------------------------------------------------------------------------


def encoded(elements: Tensor, scales: Tensor, tensor_scale: Tensor, fmt: AnyFormat, axis: int) -> Parts:
    """The parts of a tensor of which ``torch.ops.aqnsim.elements`` gave the elements and scales.

    Raises:
        ConfigError: an element is NaN and neither the element format nor the block's scale has a code for it.
    """
    element = element_of(fmt)
    if not element.has_nan:
        check_no_nan_is_lost(elements, scales, tensor_scale, fmt, axis)
        elements = elements.where(~elements.isnan(), 0.0)  # inside a block whose scale says NaN
    codes = pack(_encoded(elements, element), element.bits)
    return codes, stored_scales(scales, fmt) if isinstance(fmt, BlockFormat) else scales, tensor_scale


def check_no_nan_is_lost(elements: Tensor, scales: Tensor, tensor_scale: Tensor, fmt: AnyFormat, axis: int) -> None:
    """For an element format without a code for NaN.

    Raises:
        ConfigError: an element is NaN and its block's scale does not say so.
    """
    lost = elements.isnan()
    if isinstance(fmt, BlockFormat) and bool(lost.any()):
        lost &= ~scaled(torch.zeros_like(elements), fmt, stored_scales(scales, fmt), tensor_scale, axis).isnan()
    if bool(lost.any()):
        raise nan_is_lost(fmt)


def nan_is_lost(fmt: AnyFormat) -> ConfigError:
    return ConfigError(
        f"quantize: {fmt} cannot store the NaN values of the input; remove them first, or choose nan=zero or nan=max"
    )


def decoded(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    fmt: AnyFormat,
    axis: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The values of a tensor of ``shape`` whose parts :func:`encoded` gave."""
    element = element_of(fmt)
    values = _values(unpack(codes, element.bits, torch.Size(shape)), element)
    if isinstance(fmt, BlockFormat):
        values = scaled(values, fmt, scales, tensor_scale, axis)
    return values.to(dtype)


def packed_shape(shape: Sequence[Any], bits: int) -> tuple[Any, ...]:
    """The shape of the codes of a tensor of ``shape``; see :func:`pack`.

    >>> packed_shape((2, 5), 4), packed_shape((), 6), packed_shape((2, 5), 8)
    ((2, 3), (3,), (2, 5))
    """
    if bits not in _SHARED:
        return tuple(shape)
    count, size = _SHARED[bits]
    *rows, columns = shape or (1,)
    return (*rows, (columns + count - 1) // count * size)


def code_dtype(bits: int) -> torch.dtype:
    """What codes of so many bits are stored as."""
    return torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.int32


def empty_parts(x: Tensor, fmt: AnyFormat, axis: int) -> Parts:
    """Room for the parts of a tensor like ``x``."""
    bits = element_of(fmt).bits
    scales = _SCALE_DTYPES[fmt.scale_format] if isinstance(fmt, BlockFormat) else torch.float32
    return (
        x.new_empty(packed_shape(x.shape, bits), dtype=code_dtype(bits)),
        x.new_empty(scale_shape(fmt, tuple(x.shape), axis), dtype=scales),
        x.new_empty((), dtype=torch.float32),
    )


# ---- codes ----------------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int, order: Order = "low-first") -> Tensor:
    """Integer codes in the narrowest storage: codes of 2, 4 and 6 bits share bytes along the last axis.

    Four codes of 2 bits or two of 4 fill a byte, four of 6 bits fill three; zeros fill the last. ``low-first``: as one
    little-endian number whose lowest bits are the first code, as torchao, compressed-tensors and OCP checkpoints have
    it. ``high-first``: as one big-endian number whose highest bits are the first code.

    Args:
        codes: integers, ``[..., n]``; a scalar counts as ``[1]`` where codes share a byte.
        bits: the width of a code.
        order: where the first of the codes that share bytes stands.

    >>> pack(torch.tensor([1, 2, 3]), 4).tolist(), pack(torch.tensor([1, 2, 3]), 4, "high-first").tolist()
    ([33, 3], [18, 48])
    >>> pack(torch.tensor([63, 0, 0, 32]), 6).tolist(), pack(torch.tensor([63, 0, 0, 32]), 6, "high-first").tolist()
    ([63, 0, 128], [252, 0, 32])
    """
    if bits not in _SHARED:
        return codes.to(torch.int32).to(code_dtype(bits))
    count, size = _SHARED[bits]
    codes = codes.reshape(1) if codes.dim() == 0 else codes
    if missing := -codes.shape[-1] % count:
        codes = torch.nn.functional.pad(codes, (0, missing))
    parts = codes.to(torch.int32).unflatten(-1, (codes.shape[-1] // count, count))
    words = (parts << _shifts(count, bits, order, codes.device)).sum(-1, keepdim=True, dtype=torch.int32)
    found: Tensor = words >> _shifts(size, 8, order, codes.device) & 255
    return found.flatten(-2).to(torch.uint8)


def unpack(codes: Tensor, bits: int, shape: torch.Size, order: Order = "low-first") -> Tensor:
    """The int64 codes of a tensor of ``shape``; the inverse of :func:`pack`."""
    if bits not in _SHARED:
        return codes.to(torch.int64).reshape(shape)
    count, size = _SHARED[bits]
    parts = codes.to(torch.int64).unflatten(-1, (codes.shape[-1] // size, size))
    words = (parts << _shifts(size, 8, order, codes.device)).sum(-1, keepdim=True)
    found: Tensor = words >> _shifts(count, bits, order, codes.device) & ((1 << bits) - 1)
    return found.flatten(-2)[..., : shape[-1] if shape else 1].reshape(shape)


_SHARED = {2: (4, 1), 4: (2, 1), 6: (4, 3)}
"""By the width of a code: so many codes share so many bytes."""


def _shifts(count: int, width: int, order: Order, device: torch.device) -> Tensor:
    shifts = torch.arange(0, count * width, width, device=device)
    return shifts if order == "low-first" else shifts.flip(0)


def _encoded(elements: Tensor, element: Format) -> Tensor:
    """The codes of values that the format holds, one each."""
    dtype = torch.uint8 if element.bits <= 8 else torch.int32
    codes = torch.empty(elements.shape, dtype=dtype, device=elements.device)
    pieces = zip(elements.reshape(-1).split(_PIECE), codes.view(-1).split(_PIECE), strict=True)
    for values, into in pieces:
        into.copy_(torch.from_numpy(reference.encode(values.cpu().numpy(), element)))
    return codes


def _values(codes: Tensor, element: Format) -> Tensor:
    return torch.from_numpy(np.asarray(reference.decode(codes.cpu().numpy(), element))).to(codes.device)


# ---- scales ---------------------------------------------------------------------------------------------------------


def stored_scales(scales: Tensor, fmt: BlockFormat) -> Tensor:
    """Scales as they are stored, of fp32 ones; a NaN, which has several codes in E4M3, as the positive one."""
    if fmt.scale_format == "fp8_e4m3":
        return scales.abs().to(torch.float8_e4m3fn)
    if fmt.scale_format == "e8m0":
        return torch.where(scales.isnan(), 255, (scales.view(torch.int32) >> 23) & 255).to(torch.uint8)
    return scales


def _e8m0_values(codes: Tensor) -> Tensor:
    exponent = torch.where(codes > 0, codes.to(torch.int32) << 23, 0x00400000)
    return torch.where(codes == 255, torch.nan, exponent.view(torch.float32))


def scaled(elements: Tensor, fmt: BlockFormat, scales: Tensor, tensor_scale: Tensor, axis: int) -> Tensor:
    """What elements stand for, in the order of operations of the format's scale rule."""
    if fmt.scale_format == "hif4":
        return elements * _hif4_factors(scales, elements.shape, axis)
    values = _e8m0_values(scales) if fmt.scale_format == "e8m0" else scales.float()
    if fmt.scale in ("torchao", "modelopt"):
        values = values * tensor_scale
    elif fmt.scale == "compressed_tensors":
        values = values / tensor_scale
    result = elements * _spread(values, fmt, elements.shape, axis)
    if fmt.scale_format == "fp8_e4m3" and fmt.scale not in ("torchao", "modelopt", "compressed_tensors"):
        result = result * tensor_scale
    return result


def _spread(scales: Tensor, fmt: BlockFormat, shape: torch.Size, axis: int) -> Tensor:
    """One scale for each element of a tensor of ``shape``."""
    if fmt.block == "tensor":
        return scales.expand(shape)
    sizes = shape or torch.Size([1])
    axis %= len(sizes)
    rows, columns = fmt.tile or (1, max(sizes[axis], 1))
    scales = _repeated(scales, columns, axis).narrow(axis, 0, sizes[axis])
    if rows > 1 and len(sizes) > 1:
        other = len(sizes) - 1 if axis == len(sizes) - 2 else len(sizes) - 2
        scales = _repeated(scales, rows, other).narrow(other, 0, sizes[other])
    return scales.reshape(shape)


def _repeated(t: Tensor, count: int, dim: int) -> Tensor:
    """As ``repeat_interleave``, which is several times slower."""
    wide = [*t.shape[: dim + 1], count, *t.shape[dim + 1 :]]
    return t.unsqueeze(dim + 1).expand(wide).flatten(dim, dim + 1)


def _hif4_factors(levels: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """2^(bits) s of each element: the UE6M2 scale in the low byte, then a bit for 8 elements and a bit for 4."""
    sizes = shape or torch.Size([1])
    axis %= len(sizes)
    levels = levels.to(torch.int64).movedim(axis, -1)[..., None]
    scale = _values(levels & 255, element_of(get("fp8_ue6m2")))
    group = torch.arange(16, device=levels.device)
    bits = (levels >> (8 + group // 2) & 1) + (levels >> (16 + group) & 1)
    factors = (torch.exp2(bits.float()) * scale).flatten(-2).repeat_interleave(4, dim=-1)
    return factors[..., : sizes[axis]].movedim(-1, axis).reshape(shape)


def swizzle(scales: Tensor) -> Tensor:
    """Scales ``[rows, blocks]`` in the order in which NVIDIA's block-scaled matrix units read them, flat.

    Tiles of 128 x 4 scales, rows r, r + 32, r + 64 and r + 96 of a tile beside each other; zeros fill the last tiles.
    Source: cuBLAS documentation, "1D Block Scaling Factors Layout".

    >>> swizzle(torch.arange(512).reshape(128, 4))[:8].tolist()
    [0, 1, 2, 3, 128, 129, 130, 131]
    """
    if scales.dim() != 2:
        raise ConfigError(f"swizzle: expected scales [rows, blocks], got shape {list(scales.shape)}")
    high, wide = -(-scales.shape[0] // 128), -(-scales.shape[1] // 4)
    padded = scales.new_zeros(high * 128, wide * 4)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    return padded.reshape(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle(flat: Tensor, rows: int, blocks: int) -> Tensor:
    """Scales ``[rows, blocks]`` of what :func:`swizzle` gave.

    Raises:
        ConfigError: ``flat`` has another number of entries than so many scales fill.
    """
    high, wide = -(-rows // 128), -(-blocks // 4)
    if flat.numel() != high * 128 * wide * 4:
        raise ConfigError(f"unswizzle: {rows} x {blocks} scales fill {high * wide * 512} entries, got {flat.numel()}")
    tiles = flat.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4)[:rows, :blocks]
