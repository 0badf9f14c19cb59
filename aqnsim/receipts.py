"""Receipts: what really happened at each site, requested beside realised.

Every op returns what it measured of its own effect as a vector of :data:`STATS`; an emulation
adds the vectors up by site, phase and stream. Nothing here synchronises a device until a receipt is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STATS = (
    "calls",
    "count",
    "changed",
    "error2",
    "reference2",
    "injected2",
    "injected_n",
    "saturated",
    "nonfinite",
    "hits",
    "requested2",
    "expected_hits",
)
"""What an op measures; see ``Stats`` in ``csrc/cpu/kernels.h``. The last two are what was asked for: sigma^2 times
``injected_n``, and the rate times ``count``."""

PHASES = ("attach", "rollout", "train", "eval", "reference")
"""When: ``attach`` is the one cast of frozen weights; the others are what a trainer does."""

DIRECTIONS = ("forward", "grad-input", "grad-weight")
"""The three products of an op in a training step, each with four streams."""

STREAMS = (
    *("weight", "input", "output", "output-cast"),
    *("grad-input.weight", "grad-input.grad", "grad-input", "grad-input-cast"),
    *("grad-weight.input", "grad-weight.grad", "grad-weight", "grad-weight-cast"),
    "aqn",
)
"""Which tensor of a site: for each direction its second operand, its first, its error and the cast of its result."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What happened to one tensor of one site in one phase.

    Attributes:
        site: the op's place in the model.
        role: last part of the site's name.
        phase: one of :data:`PHASES`.
        stream: one of :data:`STREAMS`.
        requested: the format or the error model, as text.
        calls: how often the op ran.
        elements: values that went through.
        measurable: of these, those whose miss can be measured: a relative error leaves a 0 alone. 0 without a sigma.
        changed: share of stored values that differ from what they would have been.
        requested_sigma: for errors, the root mean square of the sigmas that the calls asked for. None for formats
            and for any error but one Gaussian.
        realised_sigma: for errors, the root mean square of what was injected, in units of what a relative error is
            relative to; measured before the output is rounded. None for formats and for any error but one Gaussian.
        requested_rate: hits that models with a rate asked for, an element. None without such models.
        realised_rate: hits that happened, an element. None without such models.
        sqnr_db: signal to noise of what was stored, in dB; inf when nothing changed.
        saturated: share of values beyond the element format's range.
        nonfinite: count of NaN and Inf values that came out.
    """

    site: str
    role: str
    phase: str
    stream: str
    requested: str
    calls: int
    elements: int
    measurable: int
    changed: float
    requested_sigma: float | None
    realised_sigma: float | None
    requested_rate: float | None
    realised_rate: float | None
    sqnr_db: float | None
    saturated: float
    nonfinite: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values; an infinite SQNR is None, as JSON has no infinity."""
        d = dataclasses.asdict(self)
        if self.sqnr_db is not None and not math.isfinite(self.sqnr_db):
            d["sqnr_db"] = None
        return d


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def from_stats(stats: Sequence[float], *, site: str, role: str, phase: str, stream: str, requested: str) -> Receipt:
    """A receipt from a vector of :data:`STATS`."""
    s = dict(zip(STATS, stats, strict=True))
    count = s["count"]

    def sigma(sum2: str) -> float | None:
        return math.sqrt(s[sum2] / s["injected_n"]) if s["injected_n"] else None

    def rate(hits: str) -> float | None:
        return s[hits] / count if s["expected_hits"] else None

    sqnr = None
    if count:
        sqnr = _decibel(s["reference2"], s["error2"])
    return Receipt(
        site=site,
        role=role,
        phase=phase,
        stream=stream,
        requested=requested,
        calls=int(s["calls"]),
        elements=int(count),
        measurable=int(s["injected_n"]),
        changed=s["changed"] / count if count else 0.0,
        requested_sigma=sigma("requested2"),
        realised_sigma=sigma("injected2"),
        requested_rate=rate("expected_hits"),
        realised_rate=rate("hits"),
        sqnr_db=sqnr,
        saturated=s["saturated"] / count if count else 0.0,
        nonfinite=int(s["nonfinite"]),
    )


def merge(receipts: Sequence[Receipt]) -> Receipt:
    """One receipt for several of the same phase, stream and request: site and role become ``*``.

    Counts add up; shares and rates are weighted by elements, sigma is the root mean square over what is measurable,
    the SQNR that of the worst site.
    """
    first, elements = receipts[0], sum(r.elements for r in receipts)

    def share(name: str) -> float:
        return sum(getattr(r, name) * r.elements for r in receipts) / elements if elements else 0.0

    def mean(name: str, power: int, of: str) -> float | None:
        known = [(getattr(r, name), getattr(r, of)) for r in receipts if getattr(r, name) is not None]
        weight = sum(n for _, n in known)
        return (sum(v**power * n for v, n in known) / weight) ** (1 / power) if weight else None

    roles = {r.role for r in receipts}
    return dataclasses.replace(
        first,
        site="*" if len(receipts) > 1 else first.site,
        role="*" if len(roles) > 1 else first.role,
        calls=sum(r.calls for r in receipts),
        elements=elements,
        measurable=sum(r.measurable for r in receipts),
        changed=share("changed"),
        requested_sigma=mean("requested_sigma", 2, "measurable"),
        realised_sigma=mean("realised_sigma", 2, "measurable"),
        requested_rate=mean("requested_rate", 1, "elements"),
        realised_rate=mean("realised_rate", 1, "elements"),
        sqnr_db=min((r.sqnr_db for r in receipts if r.sqnr_db is not None), default=None),
        saturated=share("saturated"),
        nonfinite=sum(r.nonfinite for r in receipts),
    )


_RATES = ("rate asked", "rate realised")
_HEADER = (
    "phase",
    "stream",
    "requested",
    "sites",
    "calls",
    "elements",
    "changed",
    "sigma asked",
    "realised",
    *_RATES,
    "SQNR dB",
    "saturated",
    "non-finite",
)


def by_request(receipts: Sequence[Receipt]) -> list[list[Receipt]]:
    """Receipts that share phase, stream and request, in the order of their first appearance."""
    groups: dict[tuple[str, str, str], list[Receipt]] = {}
    for r in receipts:
        groups.setdefault((r.phase, r.stream, r.requested), []).append(r)
    return list(groups.values())


def table(receipts: Sequence[Receipt]) -> str:
    """Receipts merged over sites, one line for each phase, stream and request; rates only where any has one."""
    rows = [_HEADER]
    for group in by_request(receipts):
        m = merge(group)
        measured = m.elements > 0
        rows.append(
            (
                m.phase,
                m.stream,
                m.requested,
                str(len(group)),
                str(m.calls),
                str(m.elements),
                f"{m.changed:.1%}" if measured else "-",
                _number(m.requested_sigma),
                _number(m.realised_sigma),
                _number(m.requested_rate),
                _number(m.realised_rate),
                f"{m.sqnr_db:.2f}" if m.sqnr_db is not None else "-",
                f"{m.saturated:.2%}" if measured else "-",
                str(m.nonfinite),
            )
        )
    rated = any(r.requested_rate is not None for r in receipts)
    kept = [i for i, name in enumerate(_HEADER) if rated or name not in _RATES]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    lines = ["  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths.values()), *lines[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
