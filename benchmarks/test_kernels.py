"""The same kernels under pytest-benchmark, small: ``pytest benchmarks``; pytest alone does not collect this."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernels import KERNELS, Kernel, Setting

SETTING = Setting("pytest")
SINGLE = {k.name: k for k in KERNELS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", SINGLE.values(), ids=lambda k: k.name)
def test_kernel(benchmark: Any, kernel: Kernel, dtype: torch.dtype) -> None:
    x = SETTING.values(1 << 18, dtype)
    benchmark(kernel.prepare(SETTING, x))
