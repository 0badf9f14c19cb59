"""Tensors in codes and scales: packed, saved, and brought back to the values that :func:`aqnsim.cast` gives."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from aqnsim import ops  # noqa: F401  (defines torch.ops.aqnsim)
from aqnsim._errors import ConfigError
from aqnsim.backends.checks import check_out
from aqnsim.formats import element_of, get
from aqnsim.packing import pack, swizzle, unpack, unswizzle

__all__ = ["Quantized", "load", "pack", "save", "swizzle", "unpack", "unswizzle"]


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
        one, element = torch.ones((), device=self.codes.device), str(element_of(get(self.format)))
        values: Tensor = torch.ops.aqnsim.dequantize(self.codes, one, one, element, 0, self.shape, torch.float32)
        return values

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The values, in the original's shape and dtype.

        Args:
            out: where to write them, contiguous, of that shape and dtype; None for a new tensor.

        Raises:
            ConfigError: another shape, dtype or device of ``out``, or one that is not contiguous.
        """
        parts = (self.codes, self.tensor_scale if self.scales is None else self.scales, self.tensor_scale)
        if out is None:
            values: Tensor = torch.ops.aqnsim.dequantize(*parts, self.format, self.axis, self.shape, self.dtype)
            return values
        check_out("dequantize", out, self.shape, self.dtype)
        torch.ops.aqnsim.dequantize_out(*parts, self.format, self.axis, out)
        return out


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
