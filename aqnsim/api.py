"""The functions that users call on tensors: :func:`cast`, :func:`quantize`, :func:`perturb`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aqnsim import ops  # noqa: F401  (defines torch.ops.aqnsim)
from aqnsim._errors import ConfigError
from aqnsim.errors import ErrorModel
from aqnsim.formats import AnyFormat, BlockFormat, Format, check_rounding, element_of, get
from aqnsim.rng import NoiseKey

_DTYPES = (torch.float32, torch.bfloat16)


def _check_tensor(x: Tensor, what: str) -> None:
    if not isinstance(x, Tensor):
        raise ConfigError(f"{what}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise ConfigError(f"{what}: expected a float32 or bfloat16 tensor, got {x.dtype}: convert it first")


def _check_axis(x: Tensor, axis: int) -> int:
    dims = max(x.dim(), 1)
    if not -dims <= axis < dims:
        raise ConfigError(f"axis {axis} is out of range for a tensor of {x.dim()} dimensions")
    return axis % dims


def cast(
    x: Tensor,
    format: str | AnyFormat,
    axis: int = -1,
    rounding: str | None = None,
    key: NoiseKey | None = None,
) -> Tensor:
    """Bring values to a format and back: same shape and dtype, straight-through gradient.

    Args:
        x: float32 or bfloat16, any shape and strides.
        format: a name of :data:`aqnsim.formats.ALL`, ``e{E}m{M}``, or a format.
        axis: the axis along which blocks run; the last block may be shorter. For a GEMM: the contraction.
        rounding: None for the format's own: ``nearest-even``.
        key: for stochastic rounding; must be None for a rounding that draws nothing.

    Raises:
        ConfigError: a dtype other than float32 and bfloat16, an axis out of range, a key that nothing uses.
        UnknownNameError: no such format or rounding.

    Formula: OCP MX v1.0 section 6.3 for ``mx*``; see :mod:`aqnsim.reference`.

    >>> import torch
    >>> cast(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]), "mxfp4").tolist()
    [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    """
    _check_tensor(x, "cast")
    name, rounding = get(format).name, check_rounding(rounding)
    if key is not None:
        raise ConfigError(f"cast: rounding {rounding!r} draws no random bits; do not pass a key")
    out: Tensor = torch.ops.aqnsim.cast(x, name, _check_axis(x, axis), rounding, False)[0]
    return out


def perturb(y: Tensor, error: ErrorModel, key: NoiseKey, rows: Tensor | None = None) -> Tensor:
    """Add an op's error to its result: a pure function of the key and each element's logical row and column.

    Args:
        y: float32 or bfloat16; the last axis is the column, all others together the row.
        error: such as :class:`aqnsim.RelativeGaussian`; computed in fp32, then rounded to ``y``'s dtype.
        key: seed, site, step, phase and stream of the noise.
        rows: int64, one logical row for each row of ``y``; default 0, 1, 2, ...

    Raises:
        ConfigError: a dtype other than float32 and bfloat16, not an error model or a key, rows of the wrong number.

    The gradient is straight-through: an error is not a function that training may exploit.

    >>> import torch
    >>> from aqnsim.errors import RelativeGaussian
    >>> y, key = torch.ones(2, 4), NoiseKey(seed=0, site="demo", step=0)
    >>> torch.equal(perturb(y, RelativeGaussian(0.05), key)[:1], perturb(y[:1], RelativeGaussian(0.05), key))
    True
    """
    _check_tensor(y, "perturb")
    if not isinstance(error, ErrorModel):
        raise ConfigError(f"perturb: expected an error model such as RelativeGaussian(0.05), got {error!r}")
    if not isinstance(key, NoiseKey):
        raise ConfigError(f"perturb: expected a NoiseKey, got {key!r}")
    step = torch.tensor(key.step)
    out: Tensor = torch.ops.aqnsim.perturb(y, str(error), key.value, step, rows, None, False)[0]
    return out


@dataclass(frozen=True)
class Quantized:
    """A tensor in codes and scales; :meth:`dequantize` is bit-equal to :func:`cast`.

    Attributes:
        codes: uint8. Formats of 4 bits hold two codes a byte along the last axis, the even index in the low nibble.
        scales: uint8 E8M0 exponents (MX), float8_e4m3fn (NVFP4), or None for a format without a scale.
        tensor_scale: fp32 scalar, ``amax / 2688`` for NVFP4 and 1 otherwise.
        format: the format's name.
        shape, dtype, axis: of the original.
    """

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor
    format: str
    shape: torch.Size
    dtype: torch.dtype
    axis: int

    def dequantize(self) -> Tensor:
        """The values, in the original's shape and dtype."""
        fmt = get(self.format)
        element = element_of(fmt)
        codes = self.codes
        if element.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
            codes = codes[..., : self.shape[-1] if self.shape else 1].reshape(self.shape)
        table = torch.tensor([element.decode(c) for c in range(1 << element.bits)])
        values = table[codes.long()]
        if isinstance(fmt, BlockFormat) and self.scales is not None:
            scales = _scale_values(self.scales).repeat_interleave(fmt.block, dim=self.axis)
            length = self.shape[self.axis] if self.shape else 1
            scales = scales.narrow(self.axis, 0, length).reshape(self.shape)
            values = (values * scales) * self.tensor_scale
        return values.to(self.dtype)


def _scale_values(scales: Tensor) -> Tensor:
    if scales.dtype != torch.uint8:
        return scales.float()
    exponent = torch.where(scales > 0, scales.int() << 23, 0x00400000)
    values = exponent.view(torch.float32)
    return torch.where(scales == 255, torch.nan, values)


def _scale_codes(scales: Tensor, fmt: BlockFormat) -> Tensor:
    if fmt.scale == "e4m3-two-level":
        return scales.to(torch.float8_e4m3fn)
    return torch.where(scales.isnan(), 255, (scales.view(torch.int32) >> 23) & 255).to(torch.uint8)


def _encode(values: Tensor, fmt: Format) -> Tensor:
    """Codes of values that the format holds exactly; NaN (inside a NaN block) becomes code 0."""
    table = torch.tensor(fmt.values())
    code = torch.searchsorted(table, values.nan_to_num().abs())
    return (code | (values.signbit().long() << (fmt.bits - 1))).to(torch.uint8)


def quantize(x: Tensor, format: str | AnyFormat, axis: int = -1) -> Quantized:
    """Codes and scales of a tensor, packed; ``quantize(x, f).dequantize()`` is bit-equal to ``cast(x, f)``.

    Args:
        x: float32 or bfloat16.
        format: one whose elements have at most 8 bits.
        axis: the axis along which blocks run.

    Raises:
        ConfigError: a dtype other than float32 and bfloat16, an axis out of range, a format wider than 8 bits, or
            NaN or Inf in a format without codes for them.
        UnknownNameError: no such format.

    >>> import torch
    >>> x = torch.linspace(-3, 3, 40)
    >>> q = quantize(x, "mxfp4")
    >>> q.codes.shape, q.scales.shape, torch.equal(q.dequantize(), cast(x, "mxfp4"))
    (torch.Size([20]), torch.Size([2]), True)
    """
    _check_tensor(x, "quantize")
    fmt, axis = get(format), _check_axis(x, axis)
    element = element_of(fmt)
    if element.bits > 8:
        raise ConfigError(f"quantize: {fmt.name} has {element.bits}-bit codes; expected a format of at most 8 bits")
    if not isinstance(fmt, BlockFormat) and not bool(x.isfinite().all()):
        raise ConfigError(f"quantize: {fmt.name} cannot store the NaN or Inf values of the input; remove them first")
    elements, scales, tensor_scale = torch.ops.aqnsim.quantize(x.detach(), fmt.name, axis)
    codes = _encode(elements, element)
    if element.bits == 4:
        if codes.dim() == 0:
            codes = codes.reshape(1)
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return Quantized(
        codes=codes,
        scales=_scale_codes(scales, fmt) if isinstance(fmt, BlockFormat) else None,
        tensor_scale=tensor_scale,
        format=fmt.name,
        shape=x.shape,
        dtype=x.dtype,
        axis=axis,
    )
