"""Laws of products: forward, backward and matrix units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aqnsim.accumulator import MATRIX_UNITS
from aqnsim.conformance.compare import same, same_stats
from aqnsim.conformance.inputs import normal_values, some_rows, whole_numbers
from aqnsim.conformance.registry import STEP, Subject, Violation, law, truth
from aqnsim.profiles.spec import Forward, GradInput, GradWeight, OpSpec
from aqnsim.rng import key_of

_ERROR = "relative-gaussian(sigma=0.05)"
SPECS = {
    "w4a4": OpSpec(forward=Forward(input="mxfp4", weight="mxfp4")),
    "w4a4 with errors": OpSpec(
        forward=Forward(input="mxfp4", weight="mxfp4", error=_ERROR),
        grad_input=GradInput(error=_ERROR),
        grad_weight=GradWeight(error="absolute-gaussian(sigma=0.1)"),
    ),
    "fp8 in every direction": OpSpec(
        forward=Forward(input="mxfp8_e4m3", weight="mxfp8_e4m3", error=_ERROR, output="bf16"),
        grad_input=GradInput(grad="mxfp8_e5m2(rounding=stochastic)", weight="mxfp8_e4m3", error=_ERROR),
        grad_weight=GradWeight(grad="mxfp8_e5m2(rounding=stochastic)", input="mxfp8_e4m3", hadamard=16, error=_ERROR),
    ),
}


def _specs(quick: bool) -> list[str]:
    return list(SPECS)


@law("linear", "bit", "linear linear_backward", _specs)
def _linear(s: Subject, case: str) -> str:
    """Forward and backward equal the reference's where no order of addition can tell: on sums that are exact."""
    x, weight, grad = (whole_numbers(*shape, seed=i) for i, shape in enumerate([(3, 11, 96), (40, 96), (3, 11, 40)]))
    rows = some_rows(33, False)
    for dtype in (torch.float32, torch.bfloat16):
        results = (_linear_parts(run, case, x.to(dtype), weight.to(dtype), grad.to(dtype), rows) for run in (s, truth))
        for (name, got), (_, expected) in zip(*(r.items() for r in results), strict=True):
            if name.startswith("receipt"):
                for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                    same_stats(a, b, f"{name}, stream {i}, in {dtype}")
            else:
                same(got, expected, f"{name} in {dtype}")
    return "[3, 11, 96] by [40, 96], fp32 and bf16"


def _linear_parts(run: Any, case: str, x: Tensor, weight: Tensor, grad: Tensor, rows: Tensor) -> dict[str, Tensor]:
    keys = [key_of(0, "conformance", str(i)) for i in range(12)]
    text = SPECS[case].text
    y, forward = run("linear", x, weight, None, text, True, keys[:4], STEP, rows)
    gx, gw, backward = run("linear_backward", grad, x, weight, text, True, keys, STEP, rows, True, True)
    return {"y": y, "grad x": gx, "grad weight": gw, "receipt forward": forward, "receipt backward": backward}


@law("linear sums", "bound", "linear", _specs)
def _linear_sums(s: Subject, case: str) -> str:
    """On any data the forward is the reference's within the error that an order of addition in fp32 can make."""
    x, weight, k = normal_values(33, 96, seed=17), normal_values(40, 96, seed=18), 96
    keys = [key_of(0, "conformance", str(i)) for i in range(4)]
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (x.to(dtype), weight.to(dtype), None, SPECS[case].text, True, keys, STEP, None)
        got, expected = (run("linear", *arguments)[0].double() for run in (s, truth))
        added = x.abs().double() @ weight.abs().double().t()
        rounded = 2.0**-7 if dtype == torch.bfloat16 or SPECS[case].forward.output else 2.0**-22
        over = (got - expected).abs() - (8 * k * 2.0**-24 * added + rounded * expected.abs())
        if not bool((over <= 0).all()):
            raise Violation(
                f"{dtype}: {int((~(over <= 0)).sum())} of {over.numel()} sums are off by {float(over.max()):g} too much"
            )
    return "[33, 96] by [40, 96], fp32 and bf16"


@law("gemm", "bit", "gemm", lambda quick: list(MATRIX_UNITS))
def _gemm(s: Subject, unit: str) -> str:
    """Every matrix unit's accumulator: alignment, truncation, order of addition."""
    a, b = normal_values(2, 9, 70, seed=19), normal_values(2, 70, 11, seed=20)
    a = a * torch.exp2(normal_values(2, 9, 70, seed=21).mul(4).round())
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (a.to(dtype), b.to(dtype), unit)
        same(s("gemm", *arguments)[0], truth("gemm", *arguments)[0], f"product in {dtype}")
    return "[2, 9, 70] by [2, 70, 11]"
