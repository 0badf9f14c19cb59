"""Laws of products: forward, backward and matrix units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aqnsim import backends
from aqnsim.accumulator import MATRIX_UNITS
from aqnsim.conformance.compare import same, same_stats
from aqnsim.conformance.inputs import normal_values, some_rows, whole_numbers
from aqnsim.conformance.registry import KEY, STEP, Subject, Violation, law, truth
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
        held = x.to(dtype), weight.to(dtype), grad.to(dtype)
        got, expected = (_linear_parts(run, case, *held, rows) for run in (s, truth))
        _same_parts(got, expected, f"in {dtype}")
    return "[3, 11, 96] by [40, 96], fp32 and bf16"


def _linear_parts(run: Any, case: str, x: Tensor, weight: Tensor, grad: Tensor, rows: Tensor) -> dict[str, Tensor]:
    text, keys = SPECS[case].text, _keys()
    y, forward = run("linear", x, weight, None, text, True, keys[:4], STEP, rows)
    gx, gw, backward = run("linear_backward", grad, x, weight, text, True, keys, STEP, rows, True, True)
    return {"y": y, "grad x": gx, "grad weight": gw, "receipt forward": forward, "receipt backward": backward}


@law("matmul", "bit", "matmul matmul_backward", _specs)
def _matmul(s: Subject, case: str) -> str:
    """The same of products of two activations, with the second as it is and transposed."""
    rows, others = some_rows(22, True), some_rows(64, False)
    for transposed in (False, True):
        shapes = [(2, 11, 96), (2, 32, 96) if transposed else (2, 96, 32), (2, 11, 32)]
        a, b, grad = (whole_numbers(*shape, seed=i) for i, shape in enumerate(shapes))
        b_rows = others if transposed else None  # rows of b where it has them: else its columns are contracted over
        for dtype in (torch.float32, torch.bfloat16):
            held = a.to(dtype), b.to(dtype), grad.to(dtype)
            got, expected = (_matmul_parts(run, case, held, transposed, rows, b_rows) for run in (s, truth))
            _same_parts(got, expected, f"in {dtype}{', transposed' if transposed else ''}")
    return "[2, 11, 96] by [2, 96, 32], fp32 and bf16"


def _matmul_parts(
    run: Any, case: str, held: tuple[Tensor, Tensor, Tensor], transposed: bool, rows: Tensor, b_rows: Tensor | None
) -> dict[str, Tensor]:
    a, b, grad = held
    text, keys = SPECS[case].text, _keys()
    y, forward = run("matmul", a, b, transposed, text, a.dtype, keys[:4], STEP, rows, rows, b_rows)
    ga, gb, backward = run("matmul_backward", grad, a, b, transposed, text, keys, STEP, rows, rows, b_rows, True, True)
    return {"y": y, "grad a": ga, "grad b": gb, "receipt forward": forward, "receipt backward": backward}


def _same_parts(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for name, part in got.items():
        if name.startswith("receipt"):
            for i, (a, b) in enumerate(zip(part, expected[name], strict=True)):
                same_stats(a, b, f"{name}, stream {i}, {what}")
        else:
            same(part, expected[name], f"{name} {what}")


def _keys() -> list[int]:
    return [key_of(0, "conformance", str(i)) for i in range(12)]


@law("linear sums", "bound", "linear", _specs)
def _linear_sums(s: Subject, case: str) -> str:
    """On any data the forward is the reference's within the error that an order of addition in fp32 can make."""
    x, weight, k = normal_values(33, 96, seed=17), normal_values(40, 96, seed=18), 96
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (x.to(dtype), weight.to(dtype), None, SPECS[case].text, True, _keys()[:4], STEP, None)
        got, expected = (run("linear", *arguments)[0].double() for run in (s, truth))
        added = x.abs().double() @ weight.abs().double().t()
        rounded = 2.0**-7 if dtype == torch.bfloat16 or SPECS[case].forward.output else 2.0**-22
        over = (got - expected).abs() - (8 * k * 2.0**-24 * added + rounded * expected.abs())
        if not bool((over <= 0).all()):
            raise Violation(
                f"{dtype}: {int((~(over <= 0)).sum())} of {over.numel()} sums are off by {float(over.max()):g} too much"
            )
    return "[33, 96] by [40, 96], fp32 and bf16"


@law("native", "bound", "native_linear")
def _native(s: Subject, case: str) -> str:
    """What a device makes of a pair of formats that it multiplies itself is near to the product of their casts."""
    pairs = backends.get(s.backend).native
    x, weight = normal_values(33, 96, seed=24).bfloat16(), normal_values(40, 96, seed=25).bfloat16()
    for given, held in pairs:
        a = x if given is None else truth("cast", x, given, -1, KEY, STEP, None, False)[0]
        b = truth("cast", weight, held, -1, KEY, STEP, None, False)[0]
        expected, added = (f(a).double() @ f(b).double().t() for f in (torch.clone, torch.abs))
        (got,) = s("native_linear", x, weight, None, given, held)
        over = (got.double() - expected).abs() - (2.0**-7 * expected.abs() + 2.0**-7 * added)
        if not bool((over <= 0).all()):
            raise Violation(
                f"{given} x {held}: off by {float(over.max()):g} more than operands rounded otherwise allow"
            )
    return f"{len(pairs)} pairs of formats"


@law("gemm", "bit", "gemm", lambda quick: list(MATRIX_UNITS))
def _gemm(s: Subject, unit: str) -> str:
    """Every matrix unit's accumulator: alignment, truncation, order of addition."""
    a, b = normal_values(2, 9, 70, seed=19), normal_values(2, 70, 11, seed=20)
    a = a * torch.exp2(normal_values(2, 9, 70, seed=21).mul(4).round())
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (a.to(dtype), b.to(dtype), unit)
        same(s("gemm", *arguments)[0], truth("gemm", *arguments)[0], f"product in {dtype}")
    return "[2, 9, 70] by [2, 70, 11]"
