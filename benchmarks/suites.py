"""The suites by name: what each times, on which backend, and the gate that it has to pass first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from aqnsim import conformance
from aqnsim._errors import unknown
from benchmarks import kernels, products, stages
from benchmarks.kernels import Setting
from benchmarks.records import Row


def _train(s: Setting) -> Iterator[Row]:
    from benchmarks import train  # the application, which a machine with a GPU may lack

    yield from train.rows(s)


def _step(s: Setting) -> Iterator[Row]:
    from benchmarks import step

    yield from step.rows(s)


@dataclass(frozen=True)
class Suite:
    """What is timed.

    Attributes:
        backend, device: where, unless another is asked for.
        parts: each gives rows.
    """

    backend: str
    device: str
    parts: tuple[Callable[[Setting], Iterator[Row]], ...]


_GPU = (kernels.rows, products.linear, products.accumulators, kernels.overhead)
SUITES = {
    "cpu": Suite("cpu", "cpu", (kernels.rows,)),
    "overhead": Suite("cpu", "cpu", (kernels.overhead,)),
    "scaling": Suite("cpu", "cpu", (kernels.scaling,)),
    "linear": Suite("cpu", "cpu", (products.linear,)),
    "stages": Suite("cpu", "cpu", (stages.rows,)),
    "train": Suite("cpu", "cpu", (_train,)),
    "e2e": Suite("cpu", "cpu", (products.linear, _train)),
    "step": Suite("cpu", "cpu", (_step,)),
    "cuda": Suite("cuda", "cuda", _GPU),
    "triton": Suite("triton", "cuda", _GPU),
}


def setting(
    name: str,
    backend: str | None = None,
    device: str | None = None,
    repeats: int = 9,
    quick: bool = False,
    only: str = "*",
    dtypes: str = "float32,bfloat16",
) -> Setting:
    """A suite's setting.

    Raises:
        UnknownNameError: no such suite.
        SystemExit: the suite needs a GPU and there is none; that is a failure, never a reason to time something else.
    """
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    suite = SUITES[name]
    device = device or suite.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"suite {name!r} needs a GPU, and torch {torch.__version__} sees none")
    held = tuple(getattr(torch, d) for d in dtypes.split(","))
    return Setting(name, backend or suite.backend, device, repeats, quick, held, only)


def gate(s: Setting) -> None:
    """Refuse to time a backend that breaks a law.

    Raises:
        SystemExit: it does; names the first checks that failed.
    """
    quick = s.quick or s.threads > 0
    _pass(s.backend, s.device, quick)


@cache  # several suites of a run share one backend
def _pass(backend: str, device: str, quick: bool) -> None:
    start = time.perf_counter()
    checks = conformance.run(backend, device, quick)
    failed = [c for c in checks if not c.passed]
    if failed:
        shown = "\n".join(f"  {c.name}: {c.detail}" for c in failed[:10])
        raise SystemExit(
            f"gate: backend {backend!r} on {device} fails {len(failed)} of {len(checks)} checks, nothing was timed\n"
            + shown
        )
    spent = time.perf_counter() - start
    has = checks[0].detail
    print(f"gate: backend {backend!r} on {device}, {has}, passes {len(checks)} checks in {spent:.0f} s", flush=True)


def rows(s: Setting, peers: bool = False) -> Iterator[Row]:
    """What the suite times, and, if asked for, the casts of other libraries beside ours."""
    for part in SUITES[s.suite].parts:
        yield from part(s)
    if peers:
        from benchmarks import peers as others

        yield from others.rows(s)
