"""Who may import whom: kernels know no torch, the nouns neither, and the library does not know its application."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aqnsim"
NOUNS = ["formats", "accumulator", "approximation", "errors", "_errors", "rng", "receipts", "aqn", "profiles"]
STDLIB_ONLY = [path for name in NOUNS for path in [*PACKAGE.glob(f"{name}.py"), *PACKAGE.glob(f"{name}/*.py")]]
KERNELS = sorted(p for folder in ("core", "cpu", "cuda") for p in (ROOT / "csrc" / folder).iterdir())


def imported(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere: in functions and for type checking, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("aqnsim" if node.level else str(node.module).partition(".")[0])
    return found


def included(source: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.MULTILINE)


def test_imports_are_found_wherever_they_stand() -> None:
    assert imported("def f():\n  import torch.nn as nn\nfrom numpy import x\nfrom . import y") == {
        "torch",
        "numpy",
        "aqnsim",
    }
    assert included('#include "../core/a.h"\n  # include <torch/extension.h>') == ["../core/a.h", "torch/extension.h"]


def test_every_noun_has_a_module() -> None:
    assert {p.stem if p.parent == PACKAGE else p.parent.name for p in STDLIB_ONLY} == set(NOUNS)


@pytest.mark.parametrize("path", STDLIB_ONLY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_nouns_import_the_standard_library_only(path: Path) -> None:
    assert imported(path.read_text()) - sys.stdlib_module_names <= {"aqnsim"}


def test_the_nouns_load_neither_torch_nor_numpy() -> None:
    code = f"import sys; from aqnsim import {', '.join(NOUNS)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "aqnsim.receipts" in loaded
    assert {"torch", "numpy"}.isdisjoint(loaded)


def test_the_reference_needs_numpy_only() -> None:
    modules = sorted((PACKAGE / "reference").iterdir())
    found = set().union(*(imported(p.read_text()) for p in modules if p.suffix == ".py"))
    assert found - sys.stdlib_module_names == {"aqnsim", "numpy"}


def test_the_library_never_imports_its_application() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 10
    assert [str(p) for p in modules if imported(p.read_text()) & {"training", "benchmarks", "tests"}] == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_kernels_include_neither_torch_nor_python(path: Path) -> None:
    foreign = ("torch", "ATen", "c10", "pybind11", "Python.h", "numpy")
    assert [name for name in included(path.read_text()) if name.startswith(foreign)] == []


@pytest.mark.parametrize("path", [p for p in KERNELS if p.parent.name == "core"], ids=lambda p: p.name)
def test_the_core_includes_itself_and_integers_and_a_square_root(path: Path) -> None:
    assert path.suffix == ".h"
    system = {name for name in included(path.read_text()) if not (path.parent / name).exists()}
    assert system <= {"cstdint", "cmath"}
