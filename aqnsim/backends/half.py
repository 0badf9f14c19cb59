"""float16 at a backend's boundary: computed in fp32, rounded once; what is measured is what float16 then stores."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.errors import BitFlip, chain
from aqnsim.receipts import STATS

Primitive = Callable[..., tuple[Tensor, Tensor]]


def casts_half(cast: Primitive) -> Primitive:
    """A backend's ``cast`` of fp32 and bf16, for float16 too."""

    @wraps(cast)
    def run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float16:
            return cast(x, *args)
        wide, stats = cast(x.float(), *args)
        out = wide.half()
        return out, _of_stored(stats, x, out, x.float()) if args[-1] else stats

    return run


def perturbs_half(perturb: Primitive) -> Primitive:
    """A backend's ``perturb`` of fp32 and bf16, for float16 too."""

    @wraps(perturb)
    def run(y: Tensor, error: str, *args: Any) -> tuple[Tensor, Tensor]:
        *given, dtype, measure = args
        dtype = dtype or y.dtype
        if torch.float16 not in (y.dtype, dtype):
            return perturb(y, error, *args)
        if dtype == torch.float16 and any(isinstance(m, BitFlip) for m in chain(error)):
            raise ConfigError(f"perturb: {error} on a float16 result: bits are flipped in float32 and bfloat16 alone")
        wide = y.float() if y.dtype == torch.float16 else y
        if dtype != torch.float16:
            return perturb(wide, error, *given, dtype, measure)
        out, stats = perturb(wide, error, *given, torch.float32, measure)
        out = out.half()
        return out, _of_stored(stats, wide.half(), out, wide.float()) if measure else stats

    return run


def _of_stored(stats: Tensor, clean: Tensor, stored: Tensor, reference: Tensor) -> Tensor:
    """The statistics with those of the result as stored: ``clean`` is what would have been, ``reference`` unrounded."""
    stats = stats.clone()
    other = (stored.view(torch.int16) != clean.view(torch.int16)) & ~(stored.isnan() & clean.isnan())
    finite = stored.isfinite()
    both = finite & clean.isfinite()
    error = stored.double() - clean.double()
    stats[STATS.index("changed")] = other.sum()
    stats[STATS.index("error2")] = error.where(both, 0.0).square().sum()
    stats[STATS.index("reference2")] = reference.double().where(finite, 0.0).square().sum()
    stats[STATS.index("nonfinite")] = (~finite).sum()
    return stats
