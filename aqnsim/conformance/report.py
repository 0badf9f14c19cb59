"""What a run of the suite found, as text, JSON and a page that can be handed over."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch

from aqnsim import __version__
from aqnsim.conformance.registry import LAWS, Check, Progress, _silent, run
from aqnsim.profiles import SEMANTICS

Table = list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """One run of the suite.

    Attributes:
        backend, device, quick: what was run.
        checks: one a law and case.
        seconds: that it took.
        environment: versions, and the device's own name.
    """

    backend: str
    device: str
    quick: bool
    checks: tuple[Check, ...]
    seconds: float
    environment: dict[str, str]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not hold."""
        return tuple(c for c in self.checks if not c.passed)

    @property
    def not_run(self) -> tuple[str, ...]:
        """Laws that did not apply, as the backend lacks an op that they need, or that were not asked for."""
        return tuple(name for name in LAWS if name not in {c.law for c in self.checks})

    @property
    def verdict(self) -> str:
        """One sentence."""
        held = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} checks hold"
        return f"{self.backend} on {self.environment['device']}: {'conforms' if not self.failed else 'FAILS'}, {held}"

    def by_law(self) -> Table:
        """A header, and a row a law: its grade, how many of its checks hold, and what it means."""
        rows: Table = [("law", "grade", "holds", "what it says")]
        for name in dict.fromkeys(c.law for c in self.checks):
            own = [c for c in self.checks if c.law == name]
            says = (LAWS[name].holds.__doc__ or "").split("\n")[0] if name in LAWS else own[0].detail
            rows.append((name, own[0].grade, f"{sum(c.passed for c in own)} of {len(own)}", says))
        return rows

    def failures(self, at_most: int | None = None) -> Table:
        """A header, and a row a check that failed: where, and how."""
        rows = [(c.name, c.grade, c.detail) for c in self.failed[:at_most]]
        return [("check", "grade", "how it broke"), *rows]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "backend": self.backend,
            "device": self.device,
            "quick": self.quick,
            "conforms": not self.failed,
            "checks": [
                {"law": c.law, "case": c.case, "grade": c.grade, "passed": c.passed, "detail": c.detail}
                for c in self.checks
            ],
            "not_run": list(self.not_run),
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
        }

    def to_html(self) -> str:
        """One page without references to anything outside of it."""
        environment: Table = [("", ""), *self.environment.items()]
        skipped = ", ".join(self.not_run)
        parts = [
            f"<h1>Conformance of {escape(self.backend)}</h1>",
            f'<p class="{"fails" if self.failed else "holds"}">{escape(self.verdict)}.</p>',
            "<p>Grades: bit, equal in every bit; bound, within the error that an order of addition is free to make; "
            "statistical, as chance allows.</p>",
            "<h2>Laws</h2>" + _html(self.by_law()),
            f"<p>Not run, for want of an op or because they were not asked for: {escape(skipped)}.</p>"
            if skipped
            else "",
            "<h2>What failed</h2>" + _html(self.failures()) if self.failed else "",
            "<h2>Where</h2>" + _html(environment),
        ]
        return f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(self.verdict)}</title>{_STYLE}" + (
            "\n".join(p for p in parts if p) + "</html>\n"
        )


def report(
    backend: str = "cpu",
    device: str = "cpu",
    quick: bool = False,
    laws: Sequence[str] | None = None,
    progress: Progress = _silent,
) -> Report:
    """Run the suite (see :func:`aqnsim.conformance.run`) and say where.

    >>> found = report("reference", quick=True, laws=["stage"])
    >>> found.failed, found.by_law()[1][:3]
    ((), ('offers', 'bit', '1 of 1'))

    Raises:
        UnknownNameError, BackendError: see :func:`aqnsim.conformance.run`.
    """
    start = time.perf_counter()
    checks = run(backend, device, quick, laws, progress)
    spent = time.perf_counter() - start
    return Report(backend, device, quick, tuple(checks), spent, _environment(device))


def _environment(device: str) -> dict[str, str]:
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    return {
        "device": name,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "aqnsim": __version__,
        "semantics": str(SEMANTICS),
    }


_STYLE = """<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; }
.holds { border-left: .4rem solid #009E73; padding-left: .8rem; }
.fails { border-left: .4rem solid #D55E00; padding-left: .8rem; }
</style>"""


def _html(table: Table) -> str:
    head, *rows = table
    cells = "".join(f"<th scope=col>{escape(c)}</th>" for c in head)
    lines = ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
