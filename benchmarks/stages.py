"""What surrounds an elementwise op, operands that enter and results that leave: in one pass, beside compositions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from aqnsim import backends
from aqnsim.backends.compose import compositions
from aqnsim.emulation.sites import Norm
from benchmarks.kernels import RELATIVE, STEP, Setting
from benchmarks.records import Row
from benchmarks.timing import Call, alternate

TOKENS, WIDTH = 2048, 8960  # the MLP of Qwen2.5-1.5B
FORMAT = "mxfp8_e4m3"
KEYS = list(range(6))

Stage = Callable[..., tuple[Tensor, Tensor]]


def rows(s: Setting) -> Iterator[Row]:
    """Each op with its stages in one pass, beside the same with them as compositions of ``cast`` and ``perturb``."""
    ops = backends.get(s.backend).ops
    x = torch.randn((64, 96) if s.quick else (TOKENS, WIDTH)).to(s.device)
    fused = _ops(ops["stage"], x)
    composed = _ops(compositions(ops["cast"], ops["perturb"], ops["gemm"])["stage"], x)
    for name, run in fused.items():
        seconds = alternate({"fused": run, "composed": composed[name]}, s.repeats, s.clock)
        yield Row(
            suite=s.suite,
            kernel=f"stage {name}",
            elements=x.numel(),
            threads=s.threads,
            seconds=seconds["fused"],
            beside="compositions",
            beside_seconds=seconds["composed"],
            metric="of plain",
        )


def _ops(stage: Stage, x: Tensor) -> dict[str, Call]:
    narrow, gate, weight, norm = x.bfloat16(), x.flip(0), torch.ones_like(x[0]), Norm(False, 0.0, 1e-6)

    def enter(t: Tensor, fmt: str = "") -> Tensor:
        return stage(t, [fmt, "", ""], torch.float32, KEYS, STEP, None)[0]

    def leave(t: Tensor, error: str = "", fmt: str = "") -> Tensor:
        return stage(t, ["", error, fmt], torch.bfloat16, KEYS, STEP, None)[0]

    return {
        "bf16, cast, fp32": lambda: enter(narrow, FORMAT),
        "fp32, error, bf16": lambda: leave(x, RELATIVE),
        "fp32, cast, bf16": lambda: leave(x, "", FORMAT),
        "fp32, error, cast, bf16": lambda: leave(x, RELATIVE, FORMAT),
        "rmsnorm, error, bf16": lambda: leave(norm(enter(narrow), weight, None), RELATIVE),
        "cast, rmsnorm, error, cast, bf16": lambda: leave(norm(enter(narrow, FORMAT), weight, None), RELATIVE, FORMAT),
        "softmax, error, bf16": lambda: leave(functional.softmax(enter(narrow), -1), RELATIVE),
        "silu, multiply, cast, bf16": lambda: leave(functional.silu(enter(narrow)) * gate, "", FORMAT),
    }
