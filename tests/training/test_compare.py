"""Comparing two runs: no winner without a finding, and no finding without a fair comparison."""

from __future__ import annotations

import json
from io import StringIO

import fake_runs
import pytest
from fake_runs import WriteRun
from rich.console import Console

from training import rundir
from training.compare import SINGLE_SEED, Comparison, ComparisonError, compare, render
from training.config import load
from training.records import EVALUATION, PROBLEMS
from training.rundir import RunDirectory

write_run = fake_runs.write_run


def solved(share: float, n: int = 200) -> list[bool]:
    return [i < share * n for i in range(n)]


def text(comparison: Comparison) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(render(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined]


def edit(run: RunDirectory, name: str, **changes: object) -> None:
    path = run.path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_small_difference_is_no_finding(write_run: WriteRun) -> None:
    a = write_run("e12", correct=solved(0.515))
    b = write_run("e6a-lora-mxfp4", correct=solved(0.5))
    comparison = compare(a.path, b.path)
    assert comparison.verdict.kind == "no finding"
    assert comparison.verdict.text == (
        "no finding: the difference of +1.5 points is below the minimum detectable effect of 3.9 points at n=200"
    )
    assert comparison.verdict.text in text(comparison)


def test_equal_arms_are_no_finding(write_run: WriteRun) -> None:
    a, b = write_run("e12"), write_run("e6a-lora-mxfp4")
    assert "difference of +0.0 points" in compare(a.path, b.path).verdict.text


def test_a_large_declared_difference_is_a_finding(write_run: WriteRun) -> None:
    a = write_run("e12", correct=solved(0.7))
    b = write_run("e6a-lora-mxfp4", correct=solved(0.5))
    for first, second in ((a, b), (b, a)):
        comparison = compare(first.path, second.path)
        assert comparison.verdict.kind == "finding"
        assert "e12 is ahead" in comparison.verdict.text
        assert {item.key.split(".")[0] for item in comparison.declared} == {"aqn"}
        assert comparison.undeclared == ()
    emulated = compare(a.path, b.path).effects[1]
    assert emulated.paired.difference == pytest.approx(0.2)
    assert 0.2 in emulated.paired.interval


def test_the_emulated_score_decides(write_run: WriteRun) -> None:
    a = write_run("e12", correct=solved(0.5), clean=solved(0.9))
    b = write_run("e6a-lora-mxfp4", correct=solved(0.5), clean=solved(0.1))
    comparison = compare(a.path, b.path)
    assert comparison.effects[0].is_detected
    assert comparison.verdict.kind == "no finding"


def test_the_single_seed_is_always_said(write_run: WriteRun) -> None:
    comparison = compare(write_run("e12").path, write_run("e6a-lora-mxfp4").path)
    assert SINGLE_SEED in comparison.caveats
    assert "training seed" in text(comparison)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"experiment": load("e6a-lora-mxfp4", "smoke", ["lora.rank=8"])}, "lora.rank"),
        ({"fingerprint": "ff" * 32}, "profile.fingerprint"),
    ],
)
def test_an_undeclared_difference_takes_the_finding_away(
    write_run: WriteRun, options: dict[str, object], key: str
) -> None:
    a = write_run("e12", correct=solved(0.7))
    b = write_run(**{"experiment": "e6a-lora-mxfp4", "correct": solved(0.5), **options})
    comparison = compare(a.path, b.path)
    assert [item.key for item in comparison.undeclared] == [key]
    assert comparison.verdict.kind == "not attributable"
    assert f"also differ in {key}" in comparison.verdict.text


def test_other_code_is_an_undeclared_difference(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write_run("e12")
    changed = {"python": "3.11.7", "git": {"revision": "beef", "dirty": True}}
    monkeypatch.setattr(rundir, "environment", lambda: changed)
    comparison = compare(a.path, write_run("e6a-lora-mxfp4").path)
    assert [item.key for item in comparison.undeclared] == ["git.dirty", "git.revision"]
    assert any("B ran on uncommitted changes" in caveat for caveat in comparison.caveats)


def test_a_varied_profile_may_have_another_fingerprint(write_run: WriteRun) -> None:
    comparison = compare(write_run("e6a-lora-mxfp4").path, write_run("e7a-lora-bf16").path)
    assert {item.key for item in comparison.declared} == {"profile.name", "profile.fingerprint"}
    assert comparison.undeclared == ()


def test_arms_that_are_not_each_others_control_declare_nothing(write_run: WriteRun) -> None:
    comparison = compare(write_run("e12").path, write_run("e7a-lora-bf16").path)
    assert comparison.declared == ()
    assert any("Neither experiment names the other" in caveat for caveat in comparison.caveats)


def test_replicates_have_no_winner(write_run: WriteRun) -> None:
    a, b = write_run("e12", correct=solved(0.8)), write_run("e12", correct=solved(0.5))
    verdict = compare(a.path, b.path).verdict
    assert verdict.kind == "not attributable"
    assert "the two runs have the same settings" in verdict.text


def test_a_resume_elsewhere_is_told(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_run("e12", state="interrupted"), write_run("e6a-lora-mxfp4")
    problems = (a.path / PROBLEMS).read_bytes()
    monkeypatch.setattr(rundir, "environment", lambda: {"python": "3.12.0"})
    a.resume(12)
    (a.path / PROBLEMS).write_bytes(problems)
    a.set_status("finished")
    caveats = compare(a.path, b.path).caveats
    assert any("A was resumed in another environment" in caveat for caveat in caveats)


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_unfinished_runs_are_refused(write_run: WriteRun, state: str) -> None:
    a, b = write_run("e12"), write_run("e6a-lora-mxfp4", state=state)
    with pytest.raises(ComparisonError, match=f"is {state}: only finished runs"):
        compare(a.path, b.path)


def test_other_problems_are_refused(write_run: WriteRun) -> None:
    a = write_run("e12", correct=solved(0.5, 4))
    b = write_run("e6a-lora-mxfp4", correct=solved(0.5, 4), first_problem=1)
    with pytest.raises(ComparisonError, match="2 are in one arm only, such as 'p0'"):
        compare(a.path, b.path)


def test_a_run_is_not_compared_with_itself(write_run: WriteRun) -> None:
    run = write_run("e12")
    with pytest.raises(ComparisonError, match="are the same run"):
        compare(run.path, run.path)


def test_scores_that_do_not_fit_the_problems_are_refused(write_run: WriteRun) -> None:
    a, b = write_run("e12"), write_run("e6a-lora-mxfp4")
    score = {"accuracy": 1.0, "correct": 2, "n": 2, "wilson": [0.3, 1.0]}
    edit(a, EVALUATION, emulated=score)
    with pytest.raises(ComparisonError, match=r"says 2 of 2 emulated, its problems are 1 of 2"):
        compare(a.path, b.path)


def test_evaluation_under_another_profile_is_refused(write_run: WriteRun) -> None:
    a, b = write_run("e12"), write_run("e6a-lora-mxfp4")
    edit(a, EVALUATION, fingerprint="00" * 32)
    with pytest.raises(ComparisonError, match=r"trained under profile 4d4d.*evaluated under 0000"):
        compare(a.path, b.path)


def test_an_evaluation_that_is_not_final_is_refused(write_run: WriteRun) -> None:
    a, b = write_run("e12"), write_run("e6a-lora-mxfp4")
    edit(b, EVALUATION, is_final=False)
    with pytest.raises(ComparisonError, match="step 12 is not the final one"):
        compare(a.path, b.path)


def test_missing_or_double_problems_are_refused(write_run: WriteRun) -> None:
    a, b = write_run("e12"), write_run("e6a-lora-mxfp4")
    lines = (a.path / PROBLEMS).read_text()
    (a.path / PROBLEMS).write_text(lines + lines.splitlines()[-1] + "\n")
    with pytest.raises(ComparisonError, match="problem 'p1' is there twice"):
        compare(a.path, b.path)
    (a.path / PROBLEMS).unlink()
    with pytest.raises(ComparisonError, match="has no final clean results"):
        compare(a.path, b.path)


def test_the_rendering_shows_scores_intervals_and_differences(write_run: WriteRun) -> None:
    a = write_run("e12", correct=solved(0.7), clean=solved(0.75))
    b = write_run("e6a-lora-mxfp4", correct=solved(0.5))
    shown = text(compare(a.path, b.path))
    for part in (str(a.path), "200 held-out", "[63.3, 75.9]", "75.0", "+20.0", "40 : 0"):
        assert part in shown
    assert "aqn.sigma_start" in shown
    assert "Undeclared differences: none" in shown
