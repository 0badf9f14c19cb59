"""Tensors in codes and scales: packed, saved, and brought back to the values that :func:`aqnsim.cast` gives."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aqnsim import reference
from aqnsim._errors import ConfigError
from aqnsim.formats import AnyFormat, BlockFormat, Format, element_of, get

Order = Literal["low-first", "high-first"]

_PIECE = 1 << 20  # values that are encoded at a time


@dataclass(frozen=True)
class Quantized:
    """A tensor in codes and scales; :meth:`dequantize` is bit-equal to :func:`aqnsim.cast`.

    Attributes:
        codes: the elements' codes in the original's shape: uint8, uint16 or int32, by the format's width. Codes of 2,
            4 and 6 bits are packed along the last axis, see :func:`pack`, the first index in the lowest bits.
        scales: one a block, see :func:`aqnsim.formats.scale_shape`: uint8 E8M0 exponents (MX), float8_e4m3fn (NVFP4),
            float32 (scaled FP8 and integers), int32 (HiF4: a UE6M2 code, 8 bits, 16 bits, from the low end); None for
            a format without a scale.
        tensor_scale: float32 scalar: the scale of the whole tensor for NVFP4, as the scale rule's library stores it
            (``amax / 2688`` but for ``compressed_tensors``, which stores ``2688 / amax``); 1 otherwise.
        format: the format's text.
        shape, dtype, axis: of the original.
    """

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor
    format: str
    shape: torch.Size
    dtype: torch.dtype
    axis: int

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and all scales.

        >>> from aqnsim import quantize
        >>> quantize(torch.ones(4, 64), "mxfp4").nbytes
        140
        """
        return sum(t.nbytes for t in (self.codes, self.scales, self.tensor_scale) if t is not None)

    def elements(self) -> Tensor:
        """The values of the codes, float32, in the original's shape; scales are not applied."""
        element = element_of(get(self.format))
        codes = unpack(self.codes, element.bits, self.shape)
        return _values(codes, element)

    def dequantize(self) -> Tensor:
        """The values, in the original's shape and dtype."""
        fmt, values = get(self.format), self.elements()
        if isinstance(fmt, BlockFormat) and self.scales is not None:
            values = scaled(values, fmt, self.scales, self.tensor_scale, self.axis)
        return values.to(self.dtype)


def quantized(
    elements: Tensor, scales: Tensor, tensor_scale: Tensor, fmt: AnyFormat, dtype: torch.dtype, axis: int
) -> Quantized:
    """Codes of the parts that ``torch.ops.aqnsim.quantize`` gives.

    Raises:
        ConfigError: an element is NaN and neither the element format nor the block's scale has a code for it.
    """
    element = element_of(fmt)
    if not element.has_nan:
        lost = elements.isnan()
        if isinstance(fmt, BlockFormat) and bool(lost.any()):
            lost &= ~scaled(torch.zeros_like(elements), fmt, stored_scales(scales, fmt), tensor_scale, axis).isnan()
        if bool(lost.any()):
            raise ConfigError(
                f"quantize: {fmt} cannot store the NaN values of the input; remove them first, or choose nan=zero or "
                "nan=max"
            )
        elements = elements.where(~elements.isnan(), 0.0)  # inside a block whose scale says NaN
    return Quantized(
        codes=pack(_encoded(elements, element), element.bits),
        scales=stored_scales(scales, fmt) if isinstance(fmt, BlockFormat) else None,
        tensor_scale=tensor_scale,
        format=str(fmt),
        shape=elements.shape,
        dtype=dtype,
        axis=axis,
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
        if bits > 16:
            return codes.to(torch.int32)
        return codes.to(torch.uint8) if bits <= 8 else codes.to(torch.int32).to(torch.uint16)
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
    if fmt.scale_format == "fp8_e4m3":
        return scales.to(torch.float8_e4m3fn)
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


# ---- files ----------------------------------------------------------------------------------------------------------

_METADATA = "aqnsim.quantized"


def save(tensors: Mapping[str, Quantized], path: str | Path) -> None:
    """Write quantized tensors to a safetensors file, which appears whole or not at all.

    Each gives the entries ``NAME.codes``, ``NAME.scales`` (if any) and ``NAME.tensor_scale``; what else is needed
    stands in the file's metadata.

    Raises:
        ConfigError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    entries: dict[str, Tensor] = {}
    about: dict[str, dict[str, object]] = {}
    for name, q in tensors.items():
        parts = {"codes": q.codes, "scales": q.scales, "tensor_scale": q.tensor_scale}
        entries |= {f"{name}.{part}": t.contiguous() for part, t in parts.items() if t is not None}
        about[name] = asdict(_About(q.format, list(q.shape), str(q.dtype).removeprefix("torch."), q.axis))
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        save_file(entries, temporary, metadata={_METADATA: json.dumps(about)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


@dataclass(frozen=True)
class _About:
    format: str
    shape: list[int]
    dtype: str
    axis: int


def load(path: str | Path) -> dict[str, Quantized]:
    """The quantized tensors of a file that :func:`save` wrote.

    Raises:
        ConfigError: the file is missing, is no safetensors file, or was written by something else.
        UnknownNameError: a format that this version does not know.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"{str(path)!r}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{str(path)!r}: not a safetensors file: {error}") from error
    if _METADATA not in metadata:
        raise ConfigError(f"{str(path)!r}: holds no quantized tensors of aqnsim; expected one written by save()")
    return {
        name: _restored(name, _About(**fields), entries) for name, fields in json.loads(metadata[_METADATA]).items()
    }


def _restored(name: str, about: _About, entries: Mapping[str, Tensor]) -> Quantized:
    return Quantized(
        codes=entries[f"{name}.codes"],
        scales=entries.get(f"{name}.scales"),
        tensor_scale=entries[f"{name}.tensor_scale"],
        format=str(get(about.format)),
        shape=torch.Size(about.shape),
        dtype=getattr(torch, about.dtype),
        axis=about.axis,
    )
