"""Forward and backward of the embedded model in bf16, emulated beside plain: 4-bit operands and errors of 5 %."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import aqnsim
from aqnsim import backends
from aqnsim.backends.compose import compositions
from aqnsim.backends.cpu import finish, missed
from aqnsim.profiles import Profile, Rule
from benchmarks.kernels import Setting
from benchmarks.products import SPEC
from benchmarks.records import Row
from benchmarks.timing import Call, alternate
from training.adapters import attach_lora
from training.config import Lora, load
from training.models import load_model

BATCH, LENGTH = 8, 128
LIMIT = 1.5  # of plain
PROFILE = Profile(
    name="mxfp4-w4a4 with errors of 5 %",
    description="what this benchmark asks for",
    source={"definition": "4-bit operands and errors of 5 % in every product of every linear layer"},
    exclude=("lm_head",),
    rules=(Rule(kind="linear", spec=SPEC),),
)


def rows(s: Setting) -> Iterator[Row]:
    """A training step emulated, and emulated without receipts, beside a plain one, with adapters and in full."""
    for mode in ("lora",) if s.quick else ("lora", "full"):
        with backends.registered(_unmeasured()) as unmeasured:
            seconds = alternate(_candidates(mode, unmeasured, s.quick), s.repeats)
        for name in ("emulated", "emulated without receipts"):
            yield Row(
                suite=s.suite,
                kernel=f"train step {mode}, {name}",
                dtype="bfloat16",
                threads=s.threads,
                seconds=seconds[name],
                beside="plain step",
                beside_seconds=seconds["plain"],
                metric="of plain",
                target=LIMIT if name == "emulated" else None,
            )


def _candidates(mode: str, unmeasured: str, quick: bool) -> dict[str, Call]:
    experiment = load("e12", "smoke" if quick else "embedded")
    assert isinstance(experiment.lora, Lora)
    base, _ = load_model(experiment.model.name, dtype="bfloat16")
    models: dict[str, Any] = {name: copy.deepcopy(base) for name in ("plain", "emulated")}
    for name, model in models.items():
        if mode == "lora":
            models[name] = attach_lora(model, experiment.lora, seed=0).train()
        else:
            model.train().requires_grad_(True)
    aqnsim.emulate(models["emulated"], PROFILE)
    batch = (1, 16) if quick else (BATCH, LENGTH)
    return {
        "plain": lambda: _step(models["plain"], batch),
        "emulated": lambda: _step(models["emulated"], batch),
        "emulated without receipts": lambda: _with(unmeasured, lambda: _step(models["emulated"], batch)),
    }


def _unmeasured() -> backends.Backend:
    """The cpu backend, with nothing measured."""
    cpu = backends.get("cpu").ops

    def quiet(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: op(*args[:-1], False)

    ops = {
        **cpu,
        **compositions(quiet(cpu["cast"]), quiet(cpu["perturb"]), cpu["gemm"], quiet(missed), quiet(finish)),
    }
    return backends.Backend(name="cpu-unmeasured", devices=("cpu",), ops=ops)


def _with(backend: str, run: Callable[[], object]) -> None:
    backends.use(backend)
    try:
        run()
    finally:
        backends.use("cpu")


def _step(model: Any, batch: tuple[int, int]) -> None:
    ids = torch.arange(math.prod(batch)).reshape(batch) % model.config.vocab_size
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
