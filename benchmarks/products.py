"""Emulated products beside plain ones in bf16: linear layers of Qwen2.5-1.5B forward and backward, and accumulators."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from aqnsim import backends
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec
from aqnsim.receipts import STREAMS
from aqnsim.rng import key_of
from benchmarks.kernels import RELATIVE, STEP, Setting
from benchmarks.records import Row
from benchmarks.timing import Call, alternate

SPEC = OpSpec(
    forward=Forward(input="mxfp4", weight="mxfp4", error=RELATIVE),
    grad_input=GradInput(error=RELATIVE),
    grad_weight=GradWeight(error=RELATIVE),
)
"""4-bit operands and errors of 5 % in each product."""

TOKENS = 2048
SHAPES = {  # inputs, outputs
    "q_proj": (1536, 1536),
    "k_proj": (1536, 256),
    "up_proj": (1536, 8960),
    "down_proj": (8960, 1536),
}
KEYS = [key_of(0, "benchmarks", stream) for stream in STREAMS]
UNITS = ("hopper_fp8", "blackwell_fp8")
LIMIT = 1.2  # of plain, on a CPU


def linear(s: Setting) -> Iterator[Row]:
    """Forward and backward of each layer beside ``F.linear``'s."""
    backends.use(s.backend, torch.device(s.device).type)
    for name, (inputs, outputs) in SHAPES.items():
        if not fnmatch.fnmatch(f"linear {name}", s.only):
            continue
        tokens, inputs, outputs = (64, 64, 96) if s.quick else (TOKENS, inputs, outputs)
        x, weight = (_normal(s, n, inputs).requires_grad_() for n in (tokens, outputs))
        forwards = {
            "plain": lambda x=x, weight=weight: torch.nn.functional.linear(x, weight),
            "emulated": lambda x=x, weight=weight: _emulated(x, weight),
        }
        grad = _normal(s, tokens, outputs)
        calls = {which: _both_ways(forward, grad, x, weight) for which, forward in forwards.items()}
        seconds = alternate(calls, s.repeats, s.clock)
        yield Row(
            suite=s.suite,
            kernel=f"linear {name} {inputs} to {outputs}, {tokens} tokens, W4A4 mxfp4 with 5 % error",
            dtype="bfloat16",
            threads=s.threads,
            seconds=seconds["emulated"],
            beside="F.linear forward and backward in bf16",
            beside_seconds=seconds["plain"],
            metric="of plain",
            target=LIMIT if s.threads else None,
        )


def accumulators(s: Setting) -> Iterator[Row]:
    """A product by the accumulator of a matrix unit beside the plain one."""
    if "gemm" not in backends.get(s.backend).ops:
        print(f"backend {s.backend!r} has no gemm: accumulators are not timed", file=sys.stderr)
        return
    tokens, inputs, outputs = (16, 64, 32) if s.quick or s.threads else (TOKENS, *SHAPES["q_proj"])
    a, b, gemm = _normal(s, tokens, inputs), _normal(s, inputs, outputs), s.op("gemm")
    calls: dict[str, Call] = {unit: _accumulated(gemm, a, b, unit) for unit in UNITS}
    seconds = alternate({**calls, "plain": lambda: a @ b}, s.repeats, s.clock)
    for unit in [unit for unit in UNITS if unit in seconds]:
        yield Row(
            suite=s.suite,
            kernel=f"gemm {unit} [{tokens}, {inputs}] @ [{inputs}, {outputs}]",
            dtype="bfloat16",
            threads=s.threads,
            seconds=seconds[unit],
            beside="a @ b in bf16",
            beside_seconds=seconds["plain"],
            metric="of plain",
        )


def _normal(s: Setting, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(s.device, torch.bfloat16)


def _emulated(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.aqnsim.linear(x, weight, None, SPEC.text, True, KEYS, STEP, None, None)[0]
    return y


def _both_ways(forward: Callable[[], Tensor], grad: Tensor, *leaves: Tensor) -> Call:
    def run() -> None:
        forward().backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def _accumulated(gemm: Callable[..., object], a: Tensor, b: Tensor, unit: str) -> Call:
    return lambda: gemm(a, b, unit)
