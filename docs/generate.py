"""Rewrite the tables of the documentation from the registries; ``--check`` only says whether they are current.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; ``<!-- table: NAME (column, ...) -->``
keeps some of its columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import archived
import families
import measurements
import numerics

from aqnsim import accumulator, errors, profiles
from aqnsim._errors import AqnsimError, ConfigError, unknown
from aqnsim.cli.output import Table
from aqnsim.cli.tables import backend_table, format_table, profile_table
from aqnsim.profiles.texts import FIELD_MEANINGS, KIND_MEANINGS, fields_by_kind

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/semantics.md",
    "docs/coverage.md",
    "docs/profiles.md",
    "docs/performance.md",
    "docs/results.md",
)

_BLOCK = re.compile(r"(<!-- table: ([\w-]+)(?: \((.*?)\))? -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def error_table() -> Table:
    """Every error model: its kind in a profile, its parameters and the first line of its documentation."""
    rows: Table = [("kind", "parameters", "definition")]
    for kind, model in errors.MODELS.items():
        fields = ", ".join(f.name for f in dataclasses.fields(model))
        rows.append((kind, fields, (model.__doc__ or "").splitlines()[0].replace("``", "`")))
    return rows


def unit_table() -> Table:
    """Every matrix unit: the formats it is for, its accumulator and where the figures come from."""
    rows: Table = [("unit", "formats", "accumulator", "verified", "source")]
    for name, unit in accumulator.MATRIX_UNITS.items():
        text = str(unit.accumulator).removeprefix("accumulator")[1:-1]
        rows.append((name, ", ".join(unit.formats), text, "yes" if unit.verified else "no", unit.source))
    return rows


def source_table() -> Table:
    """What every profile is and is not a model of: what it says itself."""
    rows: Table = [("name", "what it models", "source", "what it does not model")]
    for profile in map(profiles.load, profiles.names()):
        source = {**profile.source}
        left_out = source.pop("not_modelled", "-")
        rows.append((profile.name, profile.description, "; ".join(source.values()), left_out))
    return rows


TABLES: dict[str, Callable[[], Table]] = {
    "backends": backend_table,
    "coverage": families.coverage_table,
    "coverage-kinds": families.kind_table,
    "confirmations": numerics.confirmation_table,
    "errors": error_table,
    "exhaustive": numerics.exhaustive_table,
    "formats": format_table,
    "nvfp4": numerics.nvfp4_table,
    "profile-fields": lambda: [("field", "meaning"), *FIELD_MEANINGS.items()],
    "profile-fields-by-kind": lambda: [("kinds", "fields"), *fields_by_kind()],
    "profile-kinds": lambda: [("kind", "op"), *KIND_MEANINGS.items()],
    "profile-sources": source_table,
    "profiles": profile_table,
    "scales": numerics.scale_table,
    "ties": numerics.tie_table,
    "units": unit_table,
    **archived.TABLES,
    **measurements.TABLES,
}


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in table[0]) + " |", *lines[1:]]) + "\n"


def selected(table: Table, columns: Sequence[str]) -> Table:
    """Some columns of a table, in the order asked for.

    Raises:
        UnknownNameError: there is no such column.
    """
    for column in columns:
        if column not in table[0]:
            raise unknown("column", column, table[0])
    places = [table[0].index(column) for column in columns]
    return [tuple(row[i] for i in places) for row in table]


def generated(text: str) -> str:
    """A page with its tables as the registries have them now.

    Raises:
        ConfigError: the page has no table.
        UnknownNameError: there is no such table or column.
    """

    def replace(match: re.Match[str]) -> str:
        start, name, columns, _, end = match.groups()
        if name not in TABLES:
            raise unknown("table", name, TABLES)
        table = TABLES[name]()
        if columns:
            table = selected(table, columns.split(", "))
        return f"{start}{markdown(table)}{end}"

    text, count = _BLOCK.subn(replace, text)
    if not count:
        raise ConfigError("no table is marked: expected <!-- table: NAME --> and <!-- end of table -->")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Rewrite the tables of the documentation from the registries.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table is stale")
    only_check = parser.parse_args().check
    stale = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        try:
            after = generated(before)
        except AqnsimError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 2
        if after == before:
            continue
        stale.append(page)
        if not only_check:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(after, encoding="utf-8")
            os.replace(temporary, path)
    if stale:
        print(f"{'stale' if only_check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and only_check else 0


if __name__ == "__main__":
    sys.exit(main())
