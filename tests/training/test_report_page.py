"""The report: a page that holds everything, loads nothing, and is read by a real browser."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import fake_runs
import matplotlib.image
import numpy as np
import pytest
from fake_runs import WriteRun
from typer.testing import CliRunner

from training.__main__ import app
from training.records import INVALID, Invalid, RobustnessPoint, Score
from training.report import ReportError, content, write_report
from training.report.browser import BrowserError, browser, open_page
from training.rundir import RunDirectory, RunDirectoryError
from training.summary import ArmSummary, arms, mean_interval, read_all

write_run = fake_runs.write_run
SECTIONS = (
    "alarms",
    "accuracy",
    "learning",
    "schedule",
    "receipts",
    "differences",
    "decisions",
    "environment",
    "claims",
)


def right(count: int, of: int = 40) -> list[bool]:
    return [i < count for i in range(of)]


def three_seeds(write_run: WriteRun) -> list[RunDirectory]:
    """e12 and its control, three seeds each: e12 solves 30, 32 and 34 of 40, the control 20, 22 and 24."""
    return [
        write_run(name, correct=right(first + 2 * seed), seed=seed)
        for name, first in (("e12", 30), ("e6a-lora-mxfp4", 20))
        for seed in range(3)
    ]


def page_of(paths: list[Path], out: Path, validation: Path | None = None) -> str:
    return write_report(paths, out, validation).read_text(encoding="utf-8")


def plain(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


@pytest.fixture
def needs_browser() -> None:
    """Without a Chromium a test is skipped, or fails where AQNSIM_REQUIRE, a list with commas, names chromium."""
    try:
        browser()
    except BrowserError as error:
        if "chromium" in os.environ.get("AQNSIM_REQUIRE", "").split(","):
            pytest.fail(f"AQNSIM_REQUIRE asks for chromium: {error}")
        pytest.skip(str(error))


@pytest.mark.usefixtures("needs_browser")
def test_a_browser_renders_the_whole_page(write_run: WriteRun, tmp_path: Path) -> None:
    runs = three_seeds(write_run)
    out = tmp_path / "page" / "report.html"
    write_report([run.path for run in runs], out)
    assert out.stat().st_size < 5_000_000
    light = open_page(out, tmp_path / "light.png")
    assert light.console == []
    for section in SECTIONS:
        assert f'<h2 id="{section}">' in light.dom
        assert f'<a href="#{section}">' in light.dom
    drawings = re.findall(r'<svg role="img" aria-label="([^"]+)"', light.dom)
    assert [words.split()[0] for words in drawings] == ["Held-out", "Learning", "Sigma"]
    assert "e12: clean 80.0 %, emulated 80.0 %" in drawings[0]
    picture = matplotlib.image.imread(light.picture)
    assert picture.shape[:2] == (2400, 1400)
    assert np.ptp(picture[..., :3]) > 0.9
    dark = matplotlib.image.imread(open_page(out, tmp_path / "dark.png", dark=True).picture)
    assert picture[5, 5, 0] > 0.95 > 0.2 > dark[5, 5, 0]


@pytest.mark.usefixtures("needs_browser")
def test_what_a_page_says_to_the_console_is_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text('<script>console.error("broken")</script>')
    assert "broken" in open_page(tmp_path / "bad.html", tmp_path / "bad.png").console[0]


def test_without_a_browser_a_picture_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BrowserError, match="apt-get install chromium-headless-shell"):
        open_page(tmp_path / "x.html", tmp_path / "x.png")


def test_the_page_loads_nothing_and_its_ids_are_unique(write_run: WriteRun, tmp_path: Path) -> None:
    html = page_of([run.path for run in three_seeds(write_run)], tmp_path / "report.html")
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)|@import', html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {link for link in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html) for link in link if link} <= set(ids)


def test_every_table_names_its_columns(write_run: WriteRun, tmp_path: Path) -> None:
    html = page_of([run.path for run in three_seeds(write_run)], tmp_path / "report.html")
    tables = re.findall(r"<table>.*?</table>", html, flags=re.DOTALL)
    assert len(tables) >= 8
    for table in tables:
        assert re.search(r"<thead><tr><th scope=\"col\"", table)


def test_means_over_seeds_have_students_interval(write_run: WriteRun, tmp_path: Path) -> None:
    html = page_of([run.path for run in three_seeds(write_run)], tmp_path / "report.html")
    mean, interval = mean_interval([0.75, 0.8, 0.85])
    assert mean == pytest.approx(0.8)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.8 - 0.1242, 0.8 + 0.1242), abs=1e-4)  # t = 4.3027
    assert "80.0 67.6 to 92.4" in plain(html)


def test_an_invalid_record_is_named_and_enters_no_mean(write_run: WriteRun, tmp_path: Path) -> None:
    runs = three_seeds(write_run)
    runs[2].write_json(INVALID, Invalid(reason="its noise was <never> injected", since="2026-01-01"))
    arm = arms(read_all([run.path for run in runs]))[0]
    assert arm.accuracies("emulated") == [0.75, 0.8]
    html = page_of([run.path for run in runs], tmp_path / "report.html")
    assert "marked invalid since 2026-01-01: its noise was &lt;never&gt; injected" in html
    assert "5 counted" in plain(html)
    assert "2 of 3 counted" in plain(html)


def test_one_unfinished_run_is_reported(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(state="running")
    for name in ("evaluation.json", "receipts.json"):
        (run.path / name).unlink()
    html = page_of([run.path], tmp_path / "report.html")
    assert "No run has finished yet" in html
    assert 'id="receipts"' not in html
    assert 'id="differences"' not in html


def test_twenty_runs_fit(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(10):
        for name in ("e12", "e6a-lora-mxfp4"):
            write_run(name, correct=right(20 + seed), seed=seed)
    out = write_report([tmp_path], tmp_path / "report.html")
    assert out.stat().st_size < 1_000_000
    assert "20 runs, 20 counted" in plain(out.read_text(encoding="utf-8"))


def test_alarms_name_what_went_wrong(write_run: WriteRun) -> None:
    run = write_run(state="failed", steps=6)
    rows = content.alarms(arms(read_all([run.path])))
    assert [row["level"] for row in rows] == ["stop", "watch"]
    assert rows[0]["text"] == "failed"
    assert rows[1]["text"] == "starved batches in 1 steps (4) of 6: too few groups with a gradient"


def test_a_sigma_that_was_not_injected_is_an_alarm(write_run: WriteRun) -> None:
    run = write_run()
    receipt = fake_runs.weight_receipt(0, "q_proj") | {
        "stream": "output",
        "requested": "relative-gaussian(sigma=0.05)",
        "measurable": 10_000,
        "elements": 10_000,
        "requested_sigma": 0.05,
        "realised_sigma": 0.02,
    }
    run.write_json("receipts.json", [receipt])
    (row,) = (row for row in content.alarms(arms(read_all([run.path]))) if row["level"] == "stop")
    assert "asked for sigma 0.05, injected 0.02" in row["text"]
    (drawn,) = (m for m in content.heat_maps(arms(read_all([run.path]))) if m.unit.startswith("realised"))
    assert drawn.rows[0][1][0] is not None
    assert drawn.rows[0][1][0].text == "0.400"


def test_heat_maps_have_layers_by_roles_and_equal_ones_are_drawn_once(write_run: WriteRun) -> None:
    found = content.heat_maps(arms(read_all([run.path for run in three_seeds(write_run)])))
    sqnr = found[0]
    assert (sqnr.unit, sqnr.roles, sqnr.arms) == ("SQNR, dB", ["q_proj", "o_proj"], ["e12", "e6a-lora-mxfp4"])
    assert [(layer, [cell.text for cell in cells if cell]) for layer, cells in sqnr.rows] == [
        (str(layer), [f"{18.5 + 0.1 * layer:.1f}"] * 2) for layer in range(4)
    ]


def test_differences_are_declared_or_not(write_run: WriteRun) -> None:
    runs = three_seeds(write_run)
    (pair,) = content.pairs(arms(read_all([run.path for run in runs])))
    assert (pair.arm, pair.control) == ("e12", "e6a-lora-mxfp4")
    assert {item.key.split(".")[0] for item in pair.declared} == {"aqn"}
    assert pair.undeclared == []
    assert [verdict["difference"] for verdict in pair.verdicts] == ["+25.0"] * 3


def labels(found: list[ArmSummary]) -> list[str]:
    return [arm.label for arm in found]


def test_arms_with_one_id_are_told_apart(write_run: WriteRun) -> None:
    from training.config import load

    base = write_run("e12")
    other = write_run(load("e12", "smoke", ["lora.rank=8"]))
    found = arms(read_all([base.path, other.path]))
    assert len(found) == 2
    assert labels(found) == [f"e12 (smoke) {run.experiment.digest[:6]}" for run in (base, other)]


def test_a_decision_matrix_is_shown_as_it_is(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run()
    decided = {"decision": "no <go>", "matrix": [{"rule": "effect above margin", "met": False, "value": 0.01234}]}
    (run.path.parent / "validate.json").write_text(json.dumps(decided))
    text = page_of([run.path], tmp_path / "out" / "report.html")
    assert "no &lt;go&gt;" in text
    assert "effect above margin no 0.01234" in plain(text)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ReportError, match="expected the JSON that"):
        write_report([run.path], tmp_path / "x.html", broken)


def test_robustness_is_drawn_where_it_was_evaluated(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run()
    assert 'id="robustness"' not in page_of([run.path], tmp_path / "without.html")
    own = {"trained_under": "mxfp4-w4a16", "trained_fingerprint": "4d", "profile": "ideal", "fingerprint": "1d"}
    found = {"sites": 14, "noisy_sites": 14, "requested": 0.05, "realised": 0.0501, "answers": "a", "logits": "b"}
    for seed, correct in ((0, 20), (1, 24)):
        point = RobustnessPoint(
            adapters="abc", step=12, merged=False, evaluated_under="2e", noise=0.05, seed=seed, draws_anything=True,
            score=Score.of(correct, 40), as_recorded=None, revision=None, **own, **found,
        )  # fmt: skip
        run.append_jsonl("robustness.jsonl", point, point)  # a point that is there twice counts once
    text = plain(page_of([run.path], tmp_path / "with.html"))
    assert "unmerged mxfp4-w4a16 ideal 2e 5 5.010 2 55.0" in text


def test_claims_stand_beside_with_their_caveats(write_run: WriteRun, tmp_path: Path) -> None:
    text = plain(page_of([write_run("e12").path], tmp_path / "report.html"))
    claims = text[text.index("Published claims", text.index("Caveats", 500)) :]
    assert "claimed 72.48" in claims
    assert "No noise was ever injected in that run" in claims
    assert "not evidence" in claims


def test_the_command_takes_folders_of_runs(write_run: WriteRun, tmp_path: Path) -> None:
    write_run()
    out = tmp_path / "new.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.exists()
    with pytest.raises(RunDirectoryError, match="holds none"):
        write_report([tmp_path / "nothing"], out)
