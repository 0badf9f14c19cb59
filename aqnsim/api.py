"""The functions that users call on tensors: :func:`cast`, :func:`quantize`, :func:`perturb`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from aqnsim import ops  # noqa: F401  (defines torch.ops.aqnsim)
from aqnsim._errors import ConfigError
from aqnsim.backends.checks import DTYPES
from aqnsim.errors import ErrorModel, chain_text
from aqnsim.formats import AnyFormat, BlockFormat, Format, element_of, get, random_bits, with_rounding
from aqnsim.quantized import Quantized
from aqnsim.rng import NoiseKey


def _check_tensor(x: Tensor, what: str) -> None:
    if not isinstance(x, Tensor):
        raise ConfigError(f"{what}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise ConfigError(f"{what}: expected a float32, bfloat16 or float16 tensor, got {x.dtype}: convert it first")


def _check_axis(x: Tensor, axis: int) -> int:
    dims = max(x.dim(), 1)
    if not -dims <= axis < dims:
        raise ConfigError(f"axis {axis} is out of range for a tensor of {x.dim()} dimensions")
    return axis % dims


class _Asked(NamedTuple):
    """A format as it is asked for."""

    text: str
    has_scales: bool
    rounding: str
    draws: bool


@lru_cache(maxsize=1024)
def _read(format: str | AnyFormat, rounding: str | None) -> _Asked:
    fmt = with_rounding(get(format), rounding)
    return _Asked(str(fmt), isinstance(fmt, BlockFormat), element_of(fmt).rounding, random_bits(fmt) > 0)


def _asked(format: str | AnyFormat, rounding: str | None) -> _Asked:
    return _read(format if isinstance(format, (str, Format, BlockFormat)) else get(format), rounding)


def _needs_function(x: Tensor) -> bool:
    """Whether autograd, a compiler or a subclass of Tensor must see the op as a function."""
    return type(x) is not Tensor or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())


def _room(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _without_gradient(what: str, x: Tensor, out: Tensor) -> Tensor:
    """``out``, where no gradient is lost by writing to it."""
    if not isinstance(out, Tensor):
        raise ConfigError(f"{what}: expected a torch.Tensor as out, got {type(out).__name__}")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ConfigError(
            f"{what}: out= has no gradient, but a tensor requires one: leave out= away, or call it under "
            "torch.no_grad()"
        )
    return out


def _check_key(what: str, fmt: _Asked, key: NoiseKey | None, rows: Tensor | None) -> tuple[int, Tensor | None]:
    """The Philox key and the clock of a stochastic rounding; 0 and None where nothing is drawn."""
    rounding = fmt.rounding
    if not fmt.draws:
        if key is not None or rows is not None:
            raise ConfigError(f"{what}: rounding {rounding!r} draws no random bits; do not pass a key or rows")
        return 0, None
    if not isinstance(key, NoiseKey):
        raise ConfigError(f"{what}: rounding {rounding!r} draws random bits: pass key=NoiseKey(...), got {key!r}")
    return key.value, torch.tensor(key.clock)


def cast(
    x: Tensor,
    format: str | AnyFormat,
    axis: int = -1,
    rounding: str | None = None,
    key: NoiseKey | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Bring values to a format and back: same shape and dtype, straight-through gradient.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        format: a text of :func:`aqnsim.formats.get`, such as ``mxfp4`` or ``nvfp4(scale=torchao)``, or a format.
        axis: the axis along which blocks run; the last block may be shorter. For a GEMM: the contraction. Tiles lie in
            the last two axes.
        rounding: one of :data:`aqnsim.formats.ROUNDINGS` or ``stochastic-N``; None for the format's own.
        key: where the random bits of a stochastic rounding come from; must be None for any other.
        rows: int64, one logical row for each row of ``x`` (all axes but the last), for the random bits, or ``[n, 2]``
            with the column at which each row begins; default 0, 1, 2, ... An element's bits depend on the key, its
            logical row and its column alone.
        out: where to write the result, which is then returned: contiguous, of the shape, dtype and device of ``x``, and
            ``x`` itself if you like; without a gradient. None for a new tensor.

    Raises:
        ConfigError: another dtype, an axis out of range, a key that nothing uses or that is
            missing, rows of the wrong number, an ``out`` that does not fit or where a gradient is required.
        UnknownNameError: no such format or rounding.

    Formula: OCP MX v1.0 section 6.3 for ``mx*``; see docs/semantics.md and :mod:`aqnsim.reference` for all.

    >>> import torch
    >>> cast(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]), "mxfp4").tolist()
    [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    >>> cast(torch.full((4,), 1.25), "fp4_e2m1", rounding="stochastic", key=NoiseKey(seed=1)).tolist()
    [1.5, 1.0, 1.5, 1.5]
    """
    _check_tensor(x, "cast")
    fmt, axis = _asked(format, rounding), _check_axis(x, axis)
    value, step = _check_key("cast", fmt, key, rows)
    if out is None and _needs_function(x):
        result: Tensor = torch.ops.aqnsim.cast.default(x, fmt.text, axis, value, step, rows, False)[0]
        return result
    out = _room(x) if out is None else _without_gradient("cast", x, out)
    torch.ops.aqnsim.cast_out.default(x, fmt.text, axis, value, step, rows, out)
    return out


def quantize(
    x: Tensor,
    format: str | AnyFormat,
    axis: int = -1,
    rounding: str | None = None,
    key: NoiseKey | None = None,
    rows: Tensor | None = None,
    out: Quantized | None = None,
) -> Quantized:
    """Codes and scales of a tensor, packed; ``quantize(x, f).dequantize()`` is bit-equal to ``cast(x, f)``.

    Args:
        x: float32, bfloat16 or float16.
        format, axis, rounding, key, rows: as for :func:`cast`.
        out: of the same format and axis, and of a tensor of the same shape and dtype: its codes and scales are
            overwritten, and it is returned. None for new ones.

    Raises:
        ConfigError: as for :func:`cast`, and NaN in a format without a code for it.
        UnknownNameError: no such format or rounding.

    >>> import torch
    >>> x = torch.linspace(-3, 3, 40)
    >>> q = quantize(x, "mxfp4")
    >>> q.codes.shape, q.scales.shape, torch.equal(q.dequantize(), cast(x, "mxfp4"))
    (torch.Size([20]), torch.Size([2]), True)
    """
    _check_tensor(x, "quantize")
    fmt, axis = _asked(format, rounding), _check_axis(x, axis)
    value, step = _check_key("quantize", fmt, key, rows)
    arguments = (x.detach(), fmt.text, axis, value, step, rows)
    if out is None:
        codes, scales, tensor_scale = torch.ops.aqnsim.quantize.default(*arguments)
        kept = scales if fmt.has_scales else None
        return Quantized(codes, kept, tensor_scale, fmt.text, x.shape, x.dtype, axis)
    _check_quantized(out, x, fmt.text, axis)
    _without_gradient("quantize", x, out.codes)
    scales = x.new_empty((), dtype=torch.float32) if out.scales is None else out.scales
    torch.ops.aqnsim.quantize_out.default(*arguments, out.codes, scales, out.tensor_scale)
    return out


def _check_quantized(out: Quantized, x: Tensor, text: str, axis: int) -> None:
    if not isinstance(out, Quantized):
        raise ConfigError(f"quantize: expected a Quantized as out, got {type(out).__name__}")
    has, expected = (out.format, out.shape, out.dtype, out.axis), (text, x.shape, x.dtype, axis)
    if has != expected:
        raise ConfigError(f"quantize: expected out of (format, shape, dtype, axis) {expected}, got {has}")


def perturb(
    y: Tensor,
    error: ErrorModel | Sequence[ErrorModel],
    key: NoiseKey,
    rows: Tensor | None = None,
    magnitude: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Add an op's error to its result: a pure function of the key and each element's logical row and column.

    Args:
        y: float32, bfloat16 or float16; the last axis is the column, all others together the row.
        error: a model such as :class:`aqnsim.RelativeGaussian`, or several, which act in order; computed in fp32, then
            rounded to ``y``'s dtype once.
        key: seed, site, stream, phase, step and run of the noise.
        rows: int64, one logical row for each row of ``y``, or ``[n, 2]`` with the column at which each row begins;
            default 0, 1, 2, ...
        magnitude: float32 as ``y``, ``|A| @ |B|`` of the product that ``y`` is; for ``reference="absdot"`` alone.
        out: where to write the result, as for :func:`cast`; of another dtype than ``y`` to round to that one.

    Raises:
        ConfigError: another dtype, not an error model or a key, rows of the wrong number, a
            magnitude that is missing or not used, an ``out`` that does not fit or where a gradient is required.

    The gradient is straight-through: an error is not a function that training may exploit.

    >>> import torch
    >>> from aqnsim.errors import RelativeGaussian, Saturation
    >>> y, key = torch.ones(2, 4), NoiseKey(seed=0, site="demo", step=0)
    >>> torch.equal(perturb(y, RelativeGaussian(0.05), key)[:1], perturb(y[:1], RelativeGaussian(0.05), key))
    True
    >>> bool((perturb(y, [RelativeGaussian(0.05), Saturation(1.0)], key) <= 1).all())
    True
    """
    _check_tensor(y, "perturb")
    models = [error] if isinstance(error, ErrorModel) else error
    if not isinstance(models, Sequence) or not models or not all(isinstance(m, ErrorModel) for m in models):
        raise ConfigError(f"perturb: expected an error model such as RelativeGaussian(0.05), or several, got {error!r}")
    if not isinstance(key, NoiseKey):
        raise ConfigError(f"perturb: expected a NoiseKey, got {key!r}")
    text, clock = chain_text(models), torch.tensor(key.clock)
    if out is None and _needs_function(y):
        result: Tensor = torch.ops.aqnsim.perturb.default(y, text, key.value, clock, rows, magnitude, None, False)[0]
        return result
    out = _room(y) if out is None else _without_gradient("perturb", y, out)
    torch.ops.aqnsim.perturb_out.default(y, text, key.value, clock, rows, magnitude, out)
    return out
