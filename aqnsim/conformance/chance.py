"""What only statistics can hold: noise is normal and independent, stochastic rounding is fair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aqnsim import formats
from aqnsim.conformance.compare import within_chance
from aqnsim.conformance.registry import KEY, STEP, Subject, Violation, law
from aqnsim.formats import element_of
from aqnsim.rng import clock


@law("normal", "statistical", "perturb")
def _normal(s: Subject, case: str) -> str:
    """Noise has the moments of a standard normal and does not repeat itself along rows, columns, steps or keys."""
    size = (512, 512) if s.quick else (2048, 2048)

    def noise(key: int, at: int) -> Tensor:
        arguments = (torch.zeros(size), "absolute-gaussian(sigma=1)", key, torch.tensor(at), None, None, None, False)
        return s("perturb", *arguments)[0].double()

    z, n = noise(KEY, 1), math.prod(size)
    moments = {"mean": (z.mean(), 0, 1), "variance": (z.var(), 1, 2), "skew": ((z**3).mean(), 0, 15)}
    moments["kurtosis"] = ((z**4).mean(), 3, 96)
    for name, (got, expected, variance) in moments.items():
        within_chance(name, float(got), expected, math.sqrt(variance / n))
    others = {"the next column": z.roll(1, 1), "the column after it": z.roll(2, 1), "the next row": z.roll(1, 0)}
    others |= {
        "the next step": noise(KEY, 2),
        "another phase": noise(KEY, clock(1, "eval")),
        "another key": noise(KEY + 1, 1),
    }
    for name, other in others.items():
        for power in (1, 2):  # squares too: pairs of normals share a radius
            r = torch.corrcoef(torch.stack([z.flatten() ** power, other.flatten() ** power]))[0, 1]
            within_chance(f"correlation with {name}", float(r), 0, 1 / math.sqrt(n))
    return f"{n} normals"


@law("stochastic mean", "statistical", "cast", lambda quick: ("fp4_e2m1", "fp8_e4m3", "hif8", "int8", "bf16"))
def _stochastic_mean(s: Subject, name: str) -> str:
    """A value between two numbers of a format becomes the upper as often as it is near to it."""
    fmt, n = element_of(formats.get(name)), 1 << 14
    for low in (0.0, 1.0, fmt.min_subnormal, 2.0):
        high = fmt.next_up(low)
        for share in (1 / 8, 1 / 2, 7 / 8):
            x = torch.full((64, n // 64), low + share * (high - low))
            y = s("cast", x, f"{name}(rounding=stochastic)", -1, KEY, STEP, None, False)[0]
            if not bool(((y == low) | (y == high)).all()):
                raise Violation(f"{low + share * (high - low)!r} became neither {low!r} nor {high!r}")
            ups = float((y == high).double().mean())
            within_chance(f"share that went up from {low:g}", ups, share, math.sqrt(share * (1 - share) / n))
    return f"12 values, {n} times each"
