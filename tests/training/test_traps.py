"""Every false finding is refused here, with the message that the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.rundir import CHECKOUT
from training.traps import SCENES, page

PAGE = CHECKOUT / "docs" / "traps.md"


@pytest.mark.parametrize("name", SCENES)
def test_the_naive_program_reports_and_this_one_refuses(name: str) -> None:
    reported, said = SCENES[name].played()
    assert reported
    assert said.partition(":")[0] in ("RealisationError", "ConfigError", "ComparisonError")
    assert f"```\n{said}\n```" in PAGE.read_text()


def test_the_seven_scenes_are_there() -> None:
    assert set(SCENES) == {
        "epoch-aware",
        "never-advanced",
        "multipliers",
        "bf16-evaluation",
        "below-half-an-ulp",
        "scorer",
        "step-20",
    }


def test_the_page_is_what_the_scenes_say(tmp_path: Path) -> None:
    assert PAGE.read_text() == page(), "run: python -m training traps --out docs/traps.md"
