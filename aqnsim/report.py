"""The report of an emulation: receipts as a table, plain values and a picture; and where they break a promise."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from aqnsim import receipts as rc
from aqnsim._errors import ConfigError
from aqnsim.aqn import Survival, layer_of
from aqnsim.receipts import Receipt

VALUES = {
    "realised_sigma": "sigma injected",
    "sqnr_db": "SQNR of what was stored, dB",
    "changed": "share of values changed",
    "saturated": "share of values out of range",
    "nonfinite": "NaN and Inf",
}
"""What a heat map can show of a receipt."""


@dataclass(frozen=True)
class Report:
    """Receipts with what they are receipts of. Printing it gives a table.

    Attributes:
        profile: name.
        fingerprint: of the profile.
        seed: of the noise.
        sites: number of emulated sites.
        receipts: one for each site, phase and stream that was called.
        survival: of AQN's noise, were it added in place; empty without AQN, and before the first step.
    """

    profile: str
    fingerprint: str
    seed: int
    sites: int
    receipts: tuple[Receipt, ...]
    survival: tuple[Survival, ...] = ()

    def __str__(self) -> str:
        head = f"profile {self.profile} ({self.fingerprint}), {self.sites} sites, seed {self.seed}"
        if not self.sites:
            return f"{head}: nothing is emulated"
        return "\n".join([head, rc.table(self.receipts), *self._survival_line()])

    def _survival_line(self) -> list[str]:
        """What noise in place would do in the steps in which it does least."""
        noisy = [s for s in self.survival if s.sigma]
        if not noisy:
            return []
        worst = min(noisy, key=lambda s: s.share)
        return [
            f"AQN added in place would change {worst.share:.1%} of the stored weights in steps {worst.first} to "
            f"{worst.last}, where sigma is {worst.sigma:.3g}"
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return {
            "profile": self.profile,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "sites": self.sites,
            "receipts": [r.to_dict() for r in self.receipts],
            "survival": [s._asdict() for s in self.survival],
        }

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def violations(self, false_alarm: float = 1e-6) -> list[str]:
        """Where what was injected is not what was asked for, in words; empty where all is well.

        A sum of n squares of standard normals is chi-square with n degrees of freedom, and hits of a rate are binomial.
        The intervals are two-sided, the first by Wilson and Hilferty's approximation, the second by Bernstein's
        inequality, at ``false_alarm`` for all receipts together (Bonferroni). n is the elements of one call, as several
        calls with one step may draw the same numbers again. The last bits of fp32 arithmetic, 2^-23 of a value, are
        allowed on top.

        Args:
            false_alarm: probability that a report without fault names one.
        """
        sigmas = [(r, "sigma", r.requested_sigma, r.realised_sigma, r.measurable) for r in self.receipts]
        rates = [(r, "rate", r.requested_rate, r.realised_rate, r.elements) for r in self.receipts]
        asked = [c for c in (*sigmas, *rates) if c[2] and c[3] is not None]
        found = []
        for r, what, requested, realised, count in asked:
            assert requested is not None
            assert realised is not None
            interval = sigma_interval if what == "sigma" else rate_interval
            low, high = interval(requested, count // max(r.calls, 1), false_alarm / len(asked))
            if not low <= realised <= high:
                found.append(
                    f"site {r.site!r}, {r.stream} in phase {r.phase}: asked for {what} {requested:.6g}, "
                    f"injected {realised:.6g}, outside {low:.6g} .. {high:.6g}"
                )
        return found

    def heatmap(self, path: str | Path, value: str = "sqnr_db", stream: str = "output", phase: str = "train") -> None:
        """Write a picture of one value, layers by roles, as a PNG (or what the path's suffix says).

        Args:
            value: one of :data:`VALUES`.
            stream: one of :data:`aqnsim.receipts.STREAMS`.
            phase: one of :data:`aqnsim.receipts.PHASES`.

        Raises:
            ConfigError: no such value, no receipt of that stream and phase, or matplotlib is not installed.
        """
        if value not in VALUES:
            raise ConfigError(f"heatmap: expected a value of {', '.join(VALUES)}, got {value!r}")
        cells = self._cells(value, stream, phase)
        if not cells:
            streams = sorted({f"{r.stream} in {r.phase}" for r in self.receipts})
            raise ConfigError(f"heatmap: no receipt of {stream} in {phase}; there are: {', '.join(streams) or 'none'}")
        draw_cells(cells, f"{VALUES[value]}: {stream} in {phase}, {self.profile}", Path(path))

    def _cells(self, value: str, stream: str, phase: str) -> dict[tuple[str, str], float]:
        """The value by (layer, role); sites that share both are merged."""
        groups: dict[tuple[str, str], list[Receipt]] = {}
        for r in self.receipts:
            if (r.stream, r.phase) == (stream, phase):
                layer = layer_of(f"{r.site}.")
                groups.setdefault(("-" if layer is None else str(layer), r.role), []).append(r)
        merged = {key: getattr(rc.merge(group), value) for key, group in groups.items()}
        return {key: float(v) for key, v in merged.items() if v is not None}


def sigma_interval(sigma: float, count: int, false_alarm: float) -> tuple[float, float]:
    """Bounds of the root mean square of ``count`` normals of standard deviation ``sigma``.

    >>> low, high = sigma_interval(0.05, 10_000, 0.001)
    >>> f"{low:.4f} {high:.4f}"
    '0.0488 0.0512'
    """
    z, n = NormalDist().inv_cdf(1 - false_alarm / 2), max(count, 1)
    spread = z * math.sqrt(2 / (9 * n))
    low, high = (max(0.0, 1 - 2 / (9 * n) + s) ** 1.5 for s in (-spread, spread))
    slack = 2.0**-23
    return max(0.0, sigma * low - slack), sigma * high + slack


def rate_interval(rate: float, count: int, false_alarm: float) -> tuple[float, float]:
    """Bounds of the share of ``count`` elements that are hit with probability ``rate``, by Bernstein's inequality.

    >>> low, high = rate_interval(0.01, 10_000, 0.001)
    >>> f"{low:.4f} {high:.4f}"
    '0.0056 0.0144'
    """
    exponent, n = math.log(2 / false_alarm), max(count, 1)
    spread = math.sqrt(2 * exponent * rate * (1 - rate) / n) + 2 * exponent / (3 * n)
    return max(0.0, rate - spread), rate + spread


def draw_cells(cells: dict[tuple[str, str], float], title: str, path: Path) -> None:
    """A picture of values by (layer, role), both texts.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("heatmap needs matplotlib: pip install 'aqnsim[plot]'") from error
    layers = _in_order([layer for layer, _ in cells])
    roles = _in_order([role for _, role in cells])
    grid = [[cells.get((layer, role), math.nan) for role in roles] for layer in layers]
    size = (2.5 + 0.55 * len(roles), 1.8 + 0.28 * len(layers))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained", dpi=150)
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set(title=title, ylabel="layer")
    axes.title.set_fontsize(9)
    axes.set_xticks(range(len(roles)), roles, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    figure.colorbar(image, ax=axes)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    figure.savefig(temporary)
    temporary.replace(path)


def _in_order(names: Sequence[str]) -> list[str]:
    """Each name once, numbers by their size and before words."""
    unique = list(dict.fromkeys(names))
    return sorted(unique, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0))
