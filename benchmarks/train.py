"""Forward and backward of the embedded model in bf16, emulated beside plain: 4-bit operands and errors of 5 %."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import aqnsim
from aqnsim import backends
from aqnsim.backends.compose import compositions
from aqnsim.backends.cpu import missed
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec, Profile, Rule
from benchmarks.timing import alternate
from training.adapters import attach_lora
from training.config import load
from training.models import load_model

BATCH, LENGTH = 8, 128
ERROR = "relative-gaussian(sigma=0.05)"
SPEC = OpSpec(
    forward=Forward(input="mxfp4", weight="mxfp4", error=ERROR),
    grad_input=GradInput(error=ERROR),
    grad_weight=GradWeight(error=ERROR),
)
PROFILE = Profile(
    name="mxfp4-w4a4 with errors of 5 %",
    description="what this benchmark asks for",
    source={"definition": "4-bit operands and errors of 5 % in every product of every linear layer"},
    exclude=("lm_head",),
    rules=(Rule(kind="linear", spec=SPEC),),
)


def rows(repeats: int) -> list[dict[str, Any]]:
    """Median seconds of a training step, plain, emulated and emulated without receipts, with adapters and in full."""
    found = []
    for mode in ("lora", "full"):
        seconds = alternate(_candidates(mode), repeats)
        for name, s in seconds.items():
            share = (seconds["emulated"] - s) / seconds["emulated"] if name == "without receipts" else None
            found.append(
                {
                    "trains": mode,
                    "step": name,
                    "seconds": f"{s:.3f}",
                    "of plain": f"{s / seconds['plain']:.2f}",
                    "receipts' share": "" if share is None else f"{share:.1%}",
                }
            )
    return found


def _candidates(mode: str) -> dict[str, Callable[[], object]]:
    base, _ = load_model("smollm2-135m-instruct", dtype="bfloat16")
    models: dict[str, Any] = {name: copy.deepcopy(base) for name in ("plain", "emulated")}
    for name, model in models.items():
        if mode == "lora":
            models[name] = attach_lora(model, load("e12", "embedded").lora, seed=0).train()
        else:
            model.train().requires_grad_(True)
    aqnsim.emulate(models["emulated"], PROFILE)
    unmeasured = _unmeasured()
    return {
        "plain": lambda: _step(models["plain"]),
        "emulated": lambda: _step(models["emulated"]),
        "without receipts": lambda: _with(unmeasured, lambda: _step(models["emulated"])),
    }


def _unmeasured() -> str:
    """A backend that measures nothing; its name."""
    name, cpu = "cpu-unmeasured", backends.get("cpu").ops
    if name not in backends.names():

        def quiet(op: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: op(*args[:-1], False)

        ops = {**cpu, **compositions(quiet(cpu["cast"]), quiet(cpu["perturb"]), cpu["gemm"], quiet(missed))}
        backends.register(backends.Backend(name=name, devices=("cpu",), ops=ops))
    return name


def _with(backend: str, run: Callable[[], object]) -> None:
    backends.use(backend)
    try:
        run()
    finally:
        backends.use("cpu")


def _step(model: Any) -> None:
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 1000
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
