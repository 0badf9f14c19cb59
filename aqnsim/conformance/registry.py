"""Laws by name, what a check says, and the backend under test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqnsim import backends
from aqnsim._errors import BackendError, unknown
from aqnsim.rng import clock, key_of

GRADES = ("bit", "bound", "statistical")
"""How a law is held: bit for bit; within an error bound, where an order of addition is free; or as chance allows."""

KEY = key_of(0, "conformance", "output")
CLOCK = clock(5, "eval", run=3)
STEP = torch.tensor(CLOCK)


@dataclass(frozen=True)
class Check:
    """One law on one case.

    Attributes:
        law: the law's name.
        case: what it was held on, such as a format; may be empty.
        grade: one of :data:`GRADES`.
        passed: whether the law held.
        detail: what was compared, or how the law broke.
    """

    law: str
    case: str
    grade: str
    passed: bool
    detail: str

    @property
    def name(self) -> str:
        """The law and the case."""
        return f"{self.law} {self.case}".strip()


class Violation(Exception):  # noqa: N818  (it is what a law finds, not an error of the suite)
    """A law does not hold; the text says where."""


@dataclass(frozen=True)
class Subject:
    """The backend under test: its ops take tensors of any device and give results on the CPU.

    Attributes:
        backend: its name.
        device: a torch device that it serves.
        quick: whether laws run on fewer cases and smaller tensors.
    """

    backend: str
    device: str
    quick: bool

    def __call__(self, op: str, *args: Any) -> tuple[Tensor, ...]:
        run = backends.get(self.backend).ops[op]
        return _on_cpu(run(*(self._placed(a) for a in args)))

    def _placed(self, value: Any) -> Any:
        """A tensor on the device; a clock, which is a scalar integer, stays on the CPU, as an emulation has it."""
        if not isinstance(value, Tensor) or (value.dim() == 0 and value.dtype == torch.int64):
            return value
        return value.to(self.device)


def _on_cpu(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    parts = (result,) if isinstance(result, Tensor) else result
    return tuple(t.detach().cpu() for t in parts)


def truth(op: str, *args: Any) -> tuple[Tensor, ...]:
    """The reference's result."""
    return _on_cpu(backends.get("reference").ops[op](*args))


# ---- the registry ---------------------------------------------------------------------------------------------------

Cases = Callable[[bool], Iterable[str]]


@dataclass(frozen=True)
class Law:
    """A law by name.

    Attributes:
        name: what a check's name begins with.
        grade: one of :data:`GRADES`.
        needs: the ops that it runs; it does not apply to a backend that offers not all of them.
        cases: by ``quick``; a law without cases has one, the empty text.
        holds: of subject and case; returns what was compared and raises Violation.
    """

    name: str
    grade: str
    needs: tuple[str, ...]
    cases: Cases
    holds: Callable[[Subject, str], str]


Progress = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]


@contextmanager
def _silent(label: str, total: int) -> Iterator[Callable[[str], None]]:
    yield lambda _: None


LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which they run."""


def _once(quick: bool) -> tuple[str, ...]:
    return ("",)


def law(name: str, grade: str, needs: str, over: Cases = _once) -> Callable[..., Any]:
    """Register a function of a :class:`Subject` and a case; ``needs`` lists ops, separated by spaces."""

    def add(holds: Callable[[Subject, str], str]) -> Callable[[Subject, str], str]:
        LAWS[name] = Law(name, grade, tuple(needs.split()), over, holds)
        return holds

    return add


def run(
    backend: str = "cpu",
    device: str = "cpu",
    quick: bool = False,
    laws: Sequence[str] | None = None,
    progress: Progress = _silent,
) -> list[Check]:
    """Every law that applies, on every case.

    Args:
        backend: a name of :func:`aqnsim.backends.names`.
        device: where tensors are put; the backend must serve its type.
        quick: fewer cases and smaller tensors, for a gate before a benchmark on a CPU.
        laws: names of :data:`LAWS`; None for all.
        progress: a context of a label and a number of steps; what it gives is called before each of them.

    Raises:
        UnknownNameError: no such backend or law.
        BackendError: the backend does not serve the device.
    """
    found = backends.get(backend)
    served = torch.device(device).type
    if served not in found.devices:
        raise BackendError(f"backend {backend!r} serves {', '.join(found.devices)}, not {device!r}")
    for name in laws or ():
        if name not in LAWS:
            raise unknown("law", name, LAWS)
    subject, offered = Subject(backend, device, quick), set(found.ops)
    rules = [rule for rule in map(LAWS.__getitem__, laws or LAWS) if offered.issuperset(rule.needs)]
    cases = [(rule, case) for rule in rules for case in rule.cases(quick)]
    checks = [_offers(offered)]
    with progress("conformance", len(cases)) as step:
        for rule, case in cases:
            step(f"{rule.name} {case}".strip())
            checks.append(_checked(rule, case, subject))
    return checks


def _offers(offered: set[str]) -> Check:
    """A backend is one from ``cast`` and ``perturb`` on; laws of ops that it lacks do not apply to it."""
    lacking = [op for op in backends.OPS if op not in offered and op != "native_linear"]  # that is for devices
    detail = f"no {', '.join(lacking)}" if lacking else "every op"
    return Check("offers", "", "bit", {"cast", "perturb"} <= offered, detail)


def _checked(rule: Law, case: str, subject: Subject) -> Check:
    try:
        return Check(rule.name, case, rule.grade, True, rule.holds(subject, case))
    except Violation as violation:
        return Check(rule.name, case, rule.grade, False, str(violation))
    except Exception as error:  # whatever a backend raises is a law broken, and no reason to leave the others unchecked
        return Check(rule.name, case, rule.grade, False, f"{type(error).__name__}: {error}")
