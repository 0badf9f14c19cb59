"""What surrounds an elementwise op: operands that enter, results that leave, in one pass and as compositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aqnsim import backends
from aqnsim.backends import cpu
from aqnsim.backends.compose import compositions
from aqnsim.emulation.sites import Norm
from benchmarks.cast import perturb_into
from benchmarks.timing import alternate

TOKENS, WIDTH, SIGMA = 2048, 8960, 0.05  # the MLP of Qwen2.5-1.5B
ERROR, FORMAT = f"relative-gaussian(sigma={SIGMA})", "mxfp8_e4m3"
KEYS, CLOCK = list(range(6)), torch.tensor(1)
BF16, FP32 = torch.bfloat16, torch.float32

Stage = Callable[..., tuple[Tensor, Tensor]]


def rows(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each op with its stages as compositions and fused, and of peers of ``perturb`` alone."""
    stages: dict[str, Stage] = {
        "composed": compositions(cpu.cast, cpu.perturb, cpu.gemm)["stage"],
        "fused": backends.get("cpu").ops["stage"],
    }
    x = torch.randn(TOKENS, WIDTH)
    candidates = {(what, how): run for how, stage in stages.items() for what, run in _ops(stage, x).items()}
    peers = {(what, ""): run for what, run in _peers(x).items()}
    names = {f"{what}|{how}": run for (what, how), run in (candidates | peers).items()}
    seconds = alternate(names, repeats)
    table = []
    for what in dict.fromkeys(what for what, _ in candidates):
        before, after = (seconds[f"{what}|{how}"] for how in stages)
        table.append(_row(what, x, after) | {"composed ms": f"{before * 1e3:.1f}"})
    return table + [_row(what, x, seconds[f"{what}|"]) | {"composed ms": ""} for what, _ in peers]


def _row(what: str, x: Tensor, seconds: float) -> dict[str, Any]:
    return {"op": what, "ms": f"{seconds * 1e3:.1f}", "Gelt/s": f"{x.numel() / seconds / 1e9:.2f}"}


def _ops(stage: Stage, x: Tensor) -> dict[str, Callable[[], object]]:
    narrow, gate, weight, norm = x.bfloat16(), x.flip(0), torch.ones(WIDTH), Norm(False, 0.0, 1e-6)

    def enter(t: Tensor, fmt: str = "") -> Tensor:
        return stage(t, [fmt, "", ""], FP32, KEYS, CLOCK, None)[0]

    def leave(t: Tensor, error: str = "", fmt: str = "") -> Tensor:
        return stage(t, ["", error, fmt], BF16, KEYS, CLOCK, None)[0]

    return {
        "bf16, cast, fp32": lambda: enter(narrow, FORMAT),
        "fp32, error, bf16": lambda: leave(x, ERROR),
        "fp32, cast, bf16": lambda: leave(x, "", FORMAT),
        "fp32, error, cast, bf16": lambda: leave(x, ERROR, FORMAT),
        "rmsnorm, error, bf16": lambda: leave(norm(enter(narrow), weight, None), ERROR),
        "cast, rmsnorm, error, cast, bf16": lambda: leave(norm(enter(narrow, FORMAT), weight, None), ERROR, FORMAT),
        "softmax, error, bf16": lambda: leave(functional.softmax(enter(narrow), -1), ERROR),
        "silu, multiply, cast, bf16": lambda: leave(functional.silu(enter(narrow)) * gate, "", FORMAT),
    }


def _peers(x: Tensor) -> dict[str, Callable[[], object]]:
    """``perturb`` into memory that is there already, as ``normal_`` has it, and what torch takes for the formula."""
    found: dict[str, Callable[[], object]] = {}
    for name, y in (("fp32", x), ("bf16", x.bfloat16())):
        out = torch.empty_like(y)
        found[f"perturb {name}"] = perturb_into(out, y)
        found[f"perturb {name}, measured"] = perturb_into(out, y, measure=True)
        found[f"perturb {name}, allocated, measured"] = lambda y=y: cpu.perturb(  # type: ignore[misc]
            y, ERROR, 0, CLOCK, None, None, None, True
        )
        found[f"torch normal_ {name}"] = out.normal_
        found[f"torch y + randn_like(y) * y.abs() * s {name}"] = (
            lambda y=y: y + torch.randn_like(y) * y.abs() * SIGMA  # type: ignore[misc]
        )
    return found
