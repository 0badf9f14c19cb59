"""Throughput of the CPU kernels beside ``Tensor.copy_`` of the same bytes, on buffers of 256 MB."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aqnsim import _core, backends
from aqnsim.backends import cpu
from aqnsim.errors import RelativeGaussian
from benchmarks.timing import alternate

FORMATS = (
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp8_e4m3",
    "mxint8",
    "mxfp4(scale=rceil)",
    "mxfp4(block=32x32)",
    "nvfp4",
    "nvfp4(scale=4over6-mae, scale_max=256)",
    "hif4",
    "fp8_e4m3",
    "hif8",
    "fp8_e4m3_tensor",
    "fp8_e4m3_1x128",
    "int4_g128",
    "fp8_e4m3(rounding=stochastic)",
)
BYTES = 256 << 20
STEP = torch.tensor(0)


def gate() -> None:
    """Refuse to time a kernel that is not bit-equal to the reference."""
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(64, 4096) * torch.logspace(-6, 6, 64)[:, None]).to(dtype)
        for name in FORMATS:
            ours, _ = backends.get("cpu").ops["cast"](x, name, -1, 0, STEP, None, False)
            truth, _ = backends.get("reference").ops["cast"](x, name, -1, 0, STEP, None, False)
            if not torch.equal(ours, truth):
                raise SystemExit(f"gate: {name} in {dtype} differs from the reference; nothing was timed")


def into(out: Tensor, x: Tensor, name: str) -> Callable[[], object]:
    """A cast into a buffer that is there already, so that no allocation is timed."""
    return lambda: cpu._run_cast(x, out, None, name, -1, cpu._random_words(x, name, 0, STEP, None), False)


def perturb_into(out: Tensor, x: Tensor, measure: bool = False) -> Callable[[], object]:
    code = cpu._DTYPES[x.dtype]
    rows, columns = x.shape
    model = cpu._error_model(RelativeGaussian(0.05), 0, 1, 1, out.dtype == torch.bfloat16)
    arguments = (code, code, rows, columns, 0, False, 0, [model], measure, torch.get_num_threads())
    return lambda: _core.perturb(x.data_ptr(), out.data_ptr(), *arguments)


def rows(repeats: int) -> list[dict[str, Any]]:
    """One row for each dtype and kernel: milliseconds, Gelt/s and the ratio to copy (1 is the memory's limit)."""
    gate()
    table = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(BYTES // 4 // 4096 // 4, 4096).repeat(4, 1).to(dtype)
        x = x.repeat(math.ceil(BYTES / x.nbytes), 1)
        out = torch.empty_like(x)
        candidates: dict[str, Callable[[], object]] = {"copy_": lambda out=out, x=x: out.copy_(x)}  # type: ignore[misc]
        candidates |= {f"cast {name}": into(out, x, name) for name in FORMATS}
        candidates["perturb relative-gaussian"] = perturb_into(out, x)
        candidates["perturb relative-gaussian, measured"] = perturb_into(out, x, measure=True)
        seconds = alternate(candidates, repeats)
        for name, s in seconds.items():
            table.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": name,
                    "MB": x.nbytes >> 20,
                    "ms": f"{s * 1e3:.1f}",
                    "Gelt/s": f"{x.numel() / s / 1e9:.2f}",
                    "of copy_": f"{seconds['copy_'] / s:.2f}",
                }
            )
    return table
