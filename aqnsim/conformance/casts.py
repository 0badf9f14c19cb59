"""Laws of ``cast``: every format bit for bit, whatever the shape, the axis, the strides and the dtype."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aqnsim import formats
from aqnsim.conformance.compare import kind, same, same_stats
from aqnsim.conformance.inputs import (
    axes,
    blocks,
    choices,
    edges,
    every_bf16,
    every_magnitude,
    named,
    normal_values,
    random_patterns,
    roundings,
    some_rows,
    stochastic,
)
from aqnsim.conformance.registry import KEY, STEP, Subject, law, truth
from aqnsim.formats import element_of


def _cast_agrees(
    s: Subject, x: Tensor, text: str, axis: int = -1, rows: Tensor | None = None, what: str = "", sums: bool = False
) -> Tensor:
    """Hold a cast and what it counts to the reference's; the result."""
    arguments = (x, text, axis, KEY, STEP, rows, True)
    (got, stats), (expected, true_stats) = s("cast", *arguments), truth("cast", *arguments)
    what = f"{what} in {kind(x)} along axis {axis}".strip()
    same(got, expected, what, x)
    same_stats(stats, true_stats, what, sums)
    return got


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.bfloat16(), x.half()


@law("edges", "bit", "cast", named)
def _edges(s: Subject, text: str) -> str:
    """The numbers of a format, their midpoints and one ulp around each, alone and where a block's scale is fixed."""
    element = element_of(formats.get(text))
    x = edges(element)
    finite = x[x.isfinite()]
    inside = finite[finite.abs() <= element.max]
    with_largest = [torch.stack([v, torch.full_like(v, element.max)], 1) for v in (finite, inside)]
    tensors = [x, *with_largest] if text in blocks(s.quick) else [x]
    for t in tensors:
        for half in _halves(t):
            _cast_agrees(s, half, text, what="edges")
    return f"{3 * sum(t.numel() for t in tensors)} values"


@law("every bf16", "bit", "cast", named)
def _every_bf16(s: Subject, text: str) -> str:
    """All 65536 inputs of 16 bits: finite ones in order, then all shuffled, so that specials meet others in blocks."""
    x = every_bf16()
    order = torch.from_numpy(np.random.default_rng(1).permutation(1 << 16))
    tensors = (x[x.isfinite()], x[order]) if text in blocks(s.quick) else (x,)
    held = (torch.bfloat16,) if s.quick else (torch.float32, torch.bfloat16)
    for t in tensors:
        for dtype in held:
            _cast_agrees(s, t.to(dtype), text, what="every bf16")
    return f"{len(held) * sum(t.numel() for t in tensors)} values"


@law("random bits", "bit", "cast", named)
def _random_bits(s: Subject, text: str) -> str:
    """fp32 of all exponents; half without NaN and Inf, which would hide the rest of a block."""
    x = random_patterns(1 << (13 if s.quick else 16), seed=2).view(-1, 64)
    for t in (x, x.nan_to_num(0.0, 1.0, -1.0)):
        _cast_agrees(s, t, text, what="random bits")
    return f"{2 * x.numel()} values"


@law("blocks", "bit", "cast", blocks)
def _block_magnitudes(s: Subject, text: str) -> str:
    """Blocks of every magnitude, of zeros, and with Inf and NaN in them, along both axes."""
    x = every_magnitude()
    for axis in axes(formats.get(text)):
        for t in (x, x[20:], x[60:90].bfloat16()):  # the second has no NaN that would hide a whole tensor
            _cast_agrees(s, t, text, axis, what="blocks")
    return f"{x.numel()} values"


@law("shapes", "bit", "cast", named)
def _shapes(s: Subject, text: str) -> str:
    """Odd sizes, more dimensions, scalars and nothing at all."""
    shapes = ((), (0,), (3, 0), (1,), (33,), (5, 7, 37), (129, 70))
    for shape in shapes:
        x = normal_values(*shape, seed=3).reshape(shape)
        for axis in axes(formats.get(text)) if len(shape) > 1 else (-1,):
            _cast_agrees(s, x, text, axis, what="shapes")
    return f"{len(shapes)} shapes"


@law("choices", "bit", "cast", choices)
def _choice(s: Subject, text: str) -> str:
    """Every choice that formats leave open."""
    return _three_inputs(s, text)


@law("roundings", "bit", "cast", roundings)
def _rounding(s: Subject, text: str) -> str:
    """Every rounding."""
    return _three_inputs(s, text)


def _three_inputs(s: Subject, text: str, rows: Tensor | None = None) -> str:
    x = edges(element_of(formats.get(text)))
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(-1, 16)
    for t in (x, x.bfloat16()):
        _cast_agrees(s, t, text, what="edges")
    for axis in axes(formats.get(text)):
        _cast_agrees(s, every_magnitude(), text, axis, what="blocks")
        _cast_agrees(s, normal_values(67, 70, seed=4), text, axis, what="normals")
    return f"{2 * x.numel()} values"


@law("stochastic", "bit", "cast", stochastic)
def _stochastic_rows(s: Subject, text: str) -> str:
    """Random bits come from key, clock, logical row and column, and a row may begin anywhere."""
    for columns in (1, 127, 130):
        x = normal_values(17, columns, seed=5)
        for rows in (None, some_rows(17, False), some_rows(17, True)):
            for t in (x, x.bfloat16()):
                _cast_agrees(s, t, text, rows=rows, what="rows" if rows is not None else "no rows")
    _cast_agrees(s, every_magnitude(), text, what="blocks")
    return "17 rows of 1, 127 and 130 columns"


@law("strides", "bit", "cast", named)
def _strides(s: Subject, text: str) -> str:
    """A cast of a view is the cast of its copy."""
    base = normal_values(64, 96, seed=14)
    for dtype in (torch.float32, torch.bfloat16):
        x = base.to(s.device, dtype)
        for view in (x.t(), x[::2, 1::3], x[:, 5].expand(4, 64)):
            got, expected = (s("cast", t, text, -1, KEY, STEP, None, False)[0] for t in (view, view.cpu().contiguous()))
            same(got, expected, f"view of {kind(x)}")
    return "3 views in 2 dtypes"
