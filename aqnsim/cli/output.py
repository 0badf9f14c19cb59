"""What commands print and write: tables, pages, JSON, progress, files that are whole or not there.

A terminal gets rich's tables; anything else gets plain text that is never coloured, cut or wrapped.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqnsim._errors import ConfigError

Table = list[tuple[str, ...]]
"""A header and rows, all of the same length."""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, which may be empty, above a table or lines of text."""

    title: str
    body: Table | str


def aligned(table: Table) -> str:
    """A table in plain text: a header, a rule, one line a row."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [table[0], tuple("-" * w for w in widths), *table[1:]]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def show(*sections: Section) -> None:
    """Print a page."""
    if sys.stdout.isatty():
        _show_on_terminal(sections)
        return
    parts = []
    for section in sections:
        body = section.body if isinstance(section.body, str) else aligned(section.body)
        parts.append(f"{section.title}\n{body}" if section.title else body)
    print("\n\n".join(parts))


def _show_on_terminal(sections: tuple[Section, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    for number, section in enumerate(sections):
        if number:
            console.print()
        if section.title:
            console.print(Text(section.title, style="bold"))
        if isinstance(section.body, str):
            console.print(Text(section.body), soft_wrap=True)
            continue
        header, *rows = section.body
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for cell in header:
            table.add_column(Text(cell), overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)


def print_json(data: Any) -> None:
    """Print data as JSON, which has no number for NaN and Inf: they become the strings "nan", "inf" and "-inf"."""
    print(json.dumps(_without_specials(data), indent=2, allow_nan=False))


def _without_specials(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, Mapping):
        return {key: _without_specials(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_specials(value) for value in data]
    return data


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where that is a terminal; call what it gives before each of the ``total`` steps."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        done = -1

        def step(what: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=f"{label}: {what}")

        yield step


@contextmanager
def whole_file(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` to write; it takes the place of ``path`` unless the block raises.

    Args:
        overwrite: whether a file that is there is replaced.

    Raises:
        ConfigError: ``path`` is a folder, or cannot be written in its own, or is there and must not be replaced.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; give a file's name")
    taken = ConfigError(f"cannot write {path}: it exists already; give another name or remove it first")
    if not overwrite and path.exists():
        raise taken
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield temporary
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike replace, it fails where another process made the file meanwhile
            temporary.unlink()
    except FileExistsError as error:
        temporary.unlink(missing_ok=True)
        raise taken from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
