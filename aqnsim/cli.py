"""The command line ``aqnsim``: look at formats, profiles and backends. The standard library only."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from aqnsim import formats, profiles
from aqnsim._errors import AqnsimError
from aqnsim.formats import AnyFormat, BlockFormat, element_of
from aqnsim.profiles import Profile

Table = list[tuple[str, ...]]
"""A header and rows, all of the same length."""


def format_table() -> Table:
    """Every named format; max, min and overflow are those of the element, before the block's scale."""
    header = ("name", "bits", "element", "block", "scale", "max", "min normal", "min subnormal", "overflow", "source")
    return [header, *map(_format_row, formats.ALL.values())]


def _format_row(fmt: AnyFormat) -> tuple[str, ...]:
    element = element_of(fmt)
    block, scale = (str(fmt.block), fmt.scale) if isinstance(fmt, BlockFormat) else ("-", "-")
    return (
        fmt.name,
        f"{fmt.bits:g}",
        element.name,
        block,
        scale,
        f"{element.max:.6g}",
        _power_of_two(element.min_normal),
        _power_of_two(element.min_subnormal),
        element.overflow,
        fmt.source,
    )


def _power_of_two(value: float) -> str:
    return f"2^{math.frexp(value)[1] - 1}"


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


def profile_text(profile: Profile) -> str:
    """All that a profile says, and its fingerprint."""
    lines = [f"profile {profile.name} ({profile.fingerprint})", profile.description, "", "source"]
    lines += [f"  {key}: {value}" for key, value in profile.source.items()]
    lines += ["", "exclude", f"  {', '.join(profile.exclude) or 'nothing'}"]
    for number, rule in enumerate(profile.rules, 1):
        lines += ["", f"rule {number}: {rule.kind}, sites {', '.join(rule.sites)}"]
        lines += [f"  {key} = {value}" for key, value in _flat(json.loads(rule.spec.text))]
    if not profile.rules:
        lines += ["", "no rule: nothing is emulated"]
    return "\n".join(lines)


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def aligned(table: Table) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [table[0], tuple("-" * w for w in widths), *table[1:]]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aqnsim", description="Formats, profiles and backends of aqnsim.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("formats", help="list the number formats").set_defaults(
        run=lambda _: aligned(format_table()),
    )
    profile = commands.add_parser("profile", help="list or show the profiles")
    actions = profile.add_subparsers(metavar="ACTION", required=True)
    actions.add_parser("list", help="list the profiles that come with the package").set_defaults(
        run=lambda _: aligned(profile_table()),
    )
    show = actions.add_parser("show", help="show a profile's rules, source and fingerprint")
    show.add_argument("name", metavar="NAME", help="name of a profile, or path to a TOML file")
    show.set_defaults(run=lambda arguments: profile_text(profiles.load(arguments.name)))
    commands.add_parser("backends", help="list the backends and the devices that they serve").set_defaults(
        run=lambda _: aligned(backend_table()),
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 2 for an error that names its cause."""
    arguments = _parser().parse_args(argv)
    try:
        print(arguments.run(arguments))
    except AqnsimError as error:
        print(f"aqnsim: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
