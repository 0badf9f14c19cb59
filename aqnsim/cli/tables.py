"""The registries as tables: formats, profiles, backends. The standard library only, until backends are asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from aqnsim import formats, profiles
from aqnsim.cli.output import Section, Table
from aqnsim.formats import AnyFormat, BlockFormat, element_of
from aqnsim.profiles import Profile, texts
from aqnsim.profiles.difference import Difference, differences, exclusions, in_words


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
    """Every profile that comes with the package, with the kinds of op, formats and errors of its rules."""
    header = (
        *("name", "kinds", "weight", "input", "gradients", "accumulator"),
        *("error", "gradient errors", "fingerprint", "description"),
    )
    return [header, *(_profile_row(profiles.load(name)) for name in profiles.names())]


def _profile_row(profile: Profile) -> tuple[str, ...]:
    specs = [rule.spec for rule in profile.rules]
    gradients = [part for s in specs for part in (s.grad_input, s.grad_weight)]
    parts = [*(s.forward for s in specs), *gradients]
    return (
        profile.name,
        _kinds_text(profile),
        _distinct(s.forward.weight for s in specs),
        _distinct(s.forward.input for s in specs),
        _distinct(value for part in gradients for value in (part.grad, part.other)),
        _distinct(part.accumulator for part in parts),
        _distinct(s.forward.error for s in specs),
        _distinct(part.error for part in gradients),
        profile.fingerprint,
        profile.description,
    )


def _kinds_text(profile: Profile) -> str:
    kinds, others = profile.kinds, [kind for kind in profiles.KINDS if kind not in profile.kinds]
    if len(kinds) > len(others):
        return f"all but {', '.join(others)}" if others else "all"
    return _distinct(kind for kind in profiles.KINDS if kind in kinds)


def _distinct(values: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(v for v in values if v)) or "-"


def backend_table() -> Table:
    """Every backend: where it can run, what it implements, the devices that it serves now, and what multiplies bf16."""
    from aqnsim import backends  # here, so that the other commands do not load torch
    from aqnsim.backends import host

    chosen = backends.chosen()
    rows: Table = [("name", "devices", "serves", "bf16 products", "ops")]
    for name in backends.names():
        if package := backends.lacks(name):
            rows.append((name, "-", "-", "-", f"needs {package}, which is not installed: aqnsim[{name}]"))
            continue
        backend = backends.get(name)
        serves = [device for device, server in chosen.items() if server == name]
        unit = host.unit() if "cpu" in backend.devices else "-"
        rows.append((name, ", ".join(backend.devices), ", ".join(serves) or "-", unit, ", ".join(backend.ops)))
    return rows


def profile_page(profile: Profile) -> list[Section]:
    """All that a profile says, and its fingerprint."""
    page = [
        Section(f"profile {profile.name} ({profile.fingerprint})", profile.description),
        Section("source", "\n".join(f"  {key}: {value}" for key, value in profile.source.items())),
        Section("exclude", f"  {', '.join(profile.exclude) or 'nothing'}"),
    ]
    for number, rule in enumerate(profile.rules, 1):
        head = {"kind": ", ".join(rule.kinds), "sites": ", ".join(rule.sites), "phases": ", ".join(rule.phases)}
        lines = [f"  {field} = {value}" for field, value in (head | texts.flat(rule.spec)).items()]
        page.append(Section(f"rule {number}", "\n".join(lines)))
    if not profile.rules:
        page.append(Section("", "no rule: nothing is emulated"))
    return page


def difference_page(a: Profile, b: Profile) -> list[Section]:
    """What two profiles do differently, in words."""
    same = a.fingerprint == b.fingerprint
    verdict = "one fingerprint: they compute the same" if same else "the fingerprints differ"
    page = [Section(f"{a.name} ({a.fingerprint}) and {b.name} ({b.fingerprint})", f"  {verdict}")]
    labels = _labels(a, b)
    only = [(label, ", ".join(globs)) for label, globs in zip(labels, exclusions(a, b), strict=True) if globs]
    if only:
        page.append(Section("exclude", "\n".join(f"  only in {name}: {globs}" for name, globs in only)))
    found: dict[str, list[str]] = {}
    for d in differences(a, b):
        found.setdefault(f"{', '.join(d.kinds)} ({_rule_numbers(d)})", []).append(f"  {in_words(d, *labels)}")
    page += [Section(title, "\n".join(lines)) for title, lines in found.items()]
    if not same and len(page) == 1:
        page.append(Section("", "they ask the same of every kind of op, in other rules or another order"))
    silent = [f for f in ("description", "source") if getattr(a, f) != getattr(b, f)]
    if silent:
        page.append(Section("", f"also differ, which changes no number: {', '.join(silent)}"))
    return page


def _labels(a: Profile, b: Profile) -> tuple[str, str]:
    """What to call two profiles, which may share a name."""
    return (a.name, b.name) if a.name != b.name else ("the first", "the second")


def _rule_numbers(difference: Difference) -> str:
    first, second = difference.rules
    if first == second:
        return f"rule {first}"
    return " and ".join("no rule" if n is None else f"rule {n}" for n in (first, second))


def difference_dict(a: Profile, b: Profile) -> dict[str, Any]:
    """:func:`difference_page` as data."""
    return {
        "profiles": [{"name": p.name, "fingerprint": p.fingerprint} for p in (a, b)],
        "same numbers": a.fingerprint == b.fingerprint,
        "exclude": exclusions(a, b),
        "rules": [dataclasses.asdict(d) | {"words": in_words(d, *_labels(a, b))} for d in differences(a, b)],
    }
