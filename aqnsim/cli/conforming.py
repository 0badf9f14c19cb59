"""``aqnsim conformance``: hold a backend to the laws, and hand over what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from aqnsim.cli.output import Section, progress, show, whole_file

SHOWN = 20
"""Failures on the terminal; files have them all."""


def conformance_command(
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="The backend; default: what serves the device.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="A torch device that it serves.")] = "cpu",
    laws: Annotated[
        list[str] | None, typer.Option("--law", metavar="LAW", help="Hold it to this law alone; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and smaller tensors.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every check.", show_default=False)
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to hand over.", show_default=False)
    ] = None,
) -> int:
    """Hold a backend to the laws and to exhaustive tables; the exit status is 1 where one of them does not hold."""
    import torch

    from aqnsim import backends
    from aqnsim.conformance.report import report

    chosen = backends.chosen()
    served = torch.device(device).type
    found = report(backend or chosen.get(served, served), device, quick, laws, progress)
    texts = ((json_file, lambda: json.dumps(found.to_dict(), indent=2) + "\n"), (html_file, found.to_html))
    for path, text in texts:
        if path is not None:
            with whole_file(path) as temporary:
                temporary.write_text(text(), encoding="utf-8")
    sections = [Section("", found.by_law())]
    if found.failed:
        more = len(found.failed) - SHOWN
        sections.append(Section("What failed", found.failures(SHOWN)))
        sections += [Section("", f"and {more} more: --json FILE or --html FILE has them all")] if more > 0 else []
    if found.not_run and laws is None:
        sections.append(Section("", f"Not run, for want of an op: {', '.join(found.not_run)}"))
    show(*sections, Section("", f"{found.verdict} ({found.seconds:.0f} s)"))
    return 1 if found.failed else 0
