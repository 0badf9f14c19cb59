"""Forward and backward of the linear layers of Qwen2.5-1.5B in bf16, emulated beside plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import aqnsim.ops  # noqa: F401
from aqnsim.receipts import STREAMS
from aqnsim.rng import clock, key_of
from benchmarks.timing import alternate
from benchmarks.train import SPEC

TOKENS = 2048
SHAPES = {  # inputs, outputs
    "q_proj, o_proj": (1536, 1536),
    "k_proj, v_proj": (1536, 256),
    "gate_proj, up_proj": (1536, 8960),
    "down_proj": (8960, 1536),
}


def rows(repeats: int) -> list[dict[str, Any]]:
    """Median seconds of ``F.linear`` and of the emulated layer, each forward and backward, and their ratio."""
    found = []
    for name, (inputs, outputs) in SHAPES.items():
        seconds = alternate(_candidates(inputs, outputs), repeats)
        found.append(
            {
                "layer": name,
                "plain": f"{seconds['plain']:.4f}",
                "emulated": f"{seconds['emulated']:.4f}",
                "of plain": f"{seconds['emulated'] / seconds['plain']:.2f}",
            }
        )
    return found


def _candidates(inputs: int, outputs: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x, weight = normal(TOKENS, inputs).requires_grad_(), normal(outputs, inputs).requires_grad_()
    grad, step = normal(TOKENS, outputs), torch.tensor(clock(0, "train"))
    keys = [key_of(0, "linear", stream) for stream in STREAMS]

    def run(forward: Callable[[], Tensor]) -> None:
        forward().backward(grad)
        x.grad = weight.grad = None

    def emulated() -> Tensor:
        y: Tensor = torch.ops.aqnsim.linear(x, weight, None, SPEC.text, True, keys, step, None, None)[0]
        return y

    return {"plain": lambda: run(lambda: F.linear(x, weight)), "emulated": lambda: run(emulated)}
