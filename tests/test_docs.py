"""The documentation says what the code has: tables are generated, links and paths lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from aqnsim import ConfigError, UnknownNameError, formats

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")  # as for a script
        spec.loader.exec_module(module)
    return module


def test_the_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python docs/generate.py"


def test_a_stale_table_is_rewritten_and_nothing_else(generate: ModuleType) -> None:
    page = "before\n<!-- table: formats (name, block) -->\n| old |\n<!-- end of table -->\nafter\n"
    new = generate.generated(page)
    assert new != page
    assert generate.generated(new) == new
    assert new.startswith("before\n<!-- table: formats (name, block) -->\n| name | block |\n| --- | --- |\n")
    assert new.endswith("<!-- end of table -->\nafter\n")
    assert [f"| {f.name} |" in new for f in formats.ALL.values()] == [True] * len(formats.ALL)


def test_bars_in_cells_are_escaped(generate: ModuleType) -> None:
    assert generate.markdown([("a",), ("|y|",)]) == "| a |\n| --- |\n| \\|y\\| |\n"


def test_unknown_tables_and_columns_are_errors(generate: ModuleType) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'formats'"):
        generate.generated("<!-- table: format -->\n<!-- end of table -->")
    with pytest.raises(UnknownNameError, match="did you mean 'block'"):
        generate.generated("<!-- table: formats (name, blok) -->\n<!-- end of table -->")
    with pytest.raises(ConfigError, match="no table is marked"):
        generate.generated("no table here")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    relative = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in relative if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_in_the_text_exist(page: Path) -> None:
    """Words in code font that look like a file or a folder of this repository are one."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    tops = "aqnsim|csrc|training|tests|docs|benchmarks"
    named = re.findall(rf"`((?:{tops})/[\w./-]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
