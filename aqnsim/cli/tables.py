"""The registries as tables: formats, profiles, backends. The standard library only, until backends are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from aqnsim import formats, profiles
from aqnsim.cli.output import Section, Table
from aqnsim.formats import AnyFormat, BlockFormat, element_of
from aqnsim.profiles import Profile


def format_list() -> list[dict[str, Any]]:
    """Every named format as data; max, min, rounding and overflow are those of the element, before its scale."""
    return [_summary(fmt) for fmt in formats.ALL.values()]


def _summary(fmt: AnyFormat) -> dict[str, Any]:
    element = element_of(fmt)
    return {
        "name": fmt.name,
        "bits": fmt.bits,
        "element": element.name,
        "block": block_text(fmt),
        "scale": scale_text(fmt),
        "max": element.max,
        "min normal": element.min_normal,
        "min subnormal": element.min_subnormal,
        "rounding": element.rounding,
        "overflow": element.overflow,
        "verified": not fmt.unverified,
        "source": fmt.source,
    }


def format_table() -> Table:
    """:func:`format_list` as a table."""
    rows = format_list()
    return [tuple(rows[0]), *(tuple(_cell(key, value) for key, value in row.items()) for row in rows)]


def _cell(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.startswith("min"):
        return f"2^{math.frexp(value)[1] - 1}"
    return value if isinstance(value, str) else f"{value:.6g}"


def block_text(fmt: AnyFormat) -> str:
    """Which values share a scale: ``32``, ``16x16``, ``axis``, ``tensor``, or ``-``."""
    if not isinstance(fmt, BlockFormat):
        return "-"
    return "x".join(map(str, fmt.block)) if isinstance(fmt.block, tuple) else str(fmt.block)


def scale_text(fmt: AnyFormat) -> str:
    """The scale's format and rule, such as ``e8m0 floor``, or ``-``."""
    if not isinstance(fmt, BlockFormat):
        return "-"
    return fmt.scale if fmt.scale == fmt.scale_format else f"{fmt.scale_format} {fmt.scale}"


def profile_table() -> Table:
    """Every profile that comes with the package, with the formats and errors of its rules."""
    header = ("name", "weight", "input", "error", "gradient errors", "fingerprint", "description")
    return [header, *(_profile_row(profiles.load(name)) for name in profiles.names())]


def _profile_row(profile: Profile) -> tuple[str, ...]:
    specs = [rule.spec for rule in profile.rules]
    return (
        profile.name,
        _distinct(s.forward.weight for s in specs),
        _distinct(s.forward.input for s in specs),
        _distinct(s.forward.error for s in specs),
        _distinct(part.error for s in specs for part in (s.grad_input, s.grad_weight)),
        profile.fingerprint,
        profile.description,
    )


def _distinct(values: Iterator[str | None]) -> str:
    return ", ".join(dict.fromkeys(v for v in values if v)) or "-"


def backend_table() -> Table:
    """Every backend: where it can run, what it implements, and the devices that it serves now."""
    from aqnsim import backends  # here, so that the other commands do not load torch

    chosen = backends.chosen()
    rows: Table = [("name", "devices", "serves", "ops")]
    for name in backends.names():
        backend = backends.get(name)
        serves = [device for device, server in chosen.items() if server == name]
        rows.append((name, ", ".join(backend.devices), ", ".join(serves) or "-", ", ".join(backend.ops)))
    return rows


def profile_page(profile: Profile) -> list[Section]:
    """All that a profile says, and its fingerprint."""
    page = [
        Section(f"profile {profile.name} ({profile.fingerprint})", profile.description),
        Section("source", "\n".join(f"  {key}: {value}" for key, value in profile.source.items())),
        Section("exclude", f"  {', '.join(profile.exclude) or 'nothing'}"),
    ]
    for number, rule in enumerate(profile.rules, 1):
        lines = [f"  {key} = {value}" for key, value in _flat(json.loads(rule.spec.text))]
        page.append(Section(f"rule {number}: {rule.kind}, sites {', '.join(rule.sites)}", "\n".join(lines)))
    if not profile.rules:
        page.append(Section("", "no rule: nothing is emulated"))
    return page


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
