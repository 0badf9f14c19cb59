"""A profile from what was found: formats, error and results of every product, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping

from aqnsim.calibrate.fitting import Calibration
from aqnsim.profiles import Profile, Rule
from aqnsim.profiles.spec import GEMMS, Forward, GradInput, GradWeight, OpSpec

FORMATS = {"bfloat16": "bf16", "float16": "fp16"}
"""What a dtype is called as a format; fp32 is what everything is computed in."""


def to_profile(found: Calibration, name: str, source: Mapping[str, str]) -> Profile:
    """The products of a device as rules.

    Operands have the dtype, the error enters the fp32 sum, the result is rounded to the dtype. Where a matrix unit of
    :data:`aqnsim.accumulator.MATRIX_UNITS` gave every value bit for bit, it takes the place of an error. Gradients
    are taken to be computed as the forward is.

    Args:
        found: of one dtype.
        name: of the profile.
        source: what was measured, when and where; what was fitted is added.
    """
    fmt = FORMATS.get(found.dtype)
    unit = found.units[0] if found.units else None
    error = None if unit else found.fit.error
    spec = OpSpec(
        forward=Forward(input=fmt, weight=fmt, accumulator=unit, error=error, output=fmt),
        grad_input=GradInput(grad=fmt, accumulator=unit, error=error, output=fmt),
        grad_weight=GradWeight(grad=fmt, accumulator=unit, error=error, output=fmt),
    )
    return Profile(
        name=name,
        description=f"products of {found.dtype} as they were measured on a device",
        source={**source, **_fitted(found)},
        rules=(Rule(kind=GEMMS, spec=spec),),
    )


def _fitted(found: Calibration) -> dict[str, str]:
    fit = found.fit
    by_k = ", ".join(f"{f.sigma:.3g} at K = {f.k}" for f in found.by_k)
    right = ", ".join(f"{e.rounded_right:.4%} at K = {k}" for k, e in found.errors.items())
    told = {
        "fitted": f"sigma {fit.sigma:.4g} of {fit.reference}, of {fit.n} values before rounding; p = {fit.p_value:.2g}",
        "by_k": by_k,
        "rounded_right": right,
        "not_modelled": "; ".join(found.warnings)
        or "nothing that was looked for: bias, tails, dead zone, growth with K",
        "gradients": "taken to be computed as the forward is; not measured",
    }
    if found.units:
        told["accumulator"] = "every value of a part equals, bit for bit, that of " + ", ".join(found.units)
    return told
