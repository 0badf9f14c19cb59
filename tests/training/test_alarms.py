"""Alarms go off exactly when they should; a run that cannot learn is refused before it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stubs import Run

from aqnsim._errors import ConfigError
from training.alarms import RULES, AlarmError, Watch
from training.batch import Completion
from training.preflight import examine, refuse
from training.records import Mismatch, StepMetrics
from training.run import run
from training.tables import Alarms

GOOD: dict[str, Any] = {
    "reward": 0.5,
    "accuracy": 0.5,
    "sigma_requested": None,
    "sigma_realised": None,
    "kept_groups": 4,
    "generation_batches": 1,
    "starved": False,
    "loss": 0.0,
    "grad_norm": 1.0,
    "completion_length": 10.0,
    "seconds": 1.0,
    "truncated": 0.1,
    "entropy": 1.0,
    "clipped": 0.01,
    "kl": 0.01,
    "mismatch": Mismatch(mean=0, std=0, max=0, k1=0, k3=0.01, beyond=0),
}
BAD = {
    "entropy-collapse": {"entropy": 0.0},
    "entropy-explosion": {"entropy": 6.0},
    "clipping": {"clipped": 0.6},
    "truncation": {"truncated": 0.95},
    "length-collapse": {"completion_length": 0.5},
    "uninformative": {"kept_groups": 0},
    "reward-collapse": {"reward": 0.1},
    "kl-explosion": {"kl": 2.0},
    "mismatch": {"mismatch": Mismatch(mean=0, std=0, max=0, k1=0, k3=2.0, beyond=0)},
}


def raised(series: list[dict[str, Any]], patience: int = 3) -> list[tuple[int, str]]:
    watch = Watch(Alarms(patience=patience), prompts_per_step=8)
    rows = (StepMetrics(step=i, **(GOOD | changes)) for i, changes in enumerate(series, start=1))
    return [(alarm.step, alarm.rule) for row in rows for alarm in watch.look(row)]


def test_every_rule_is_tried() -> None:
    assert set(BAD) == set(RULES)
    assert {rule.key for rule in RULES.values()} | {"patience", "stop"} == set(Alarms.model_fields)


@pytest.mark.parametrize("rule", [r for r in BAD if r != "reward-collapse"])
def test_a_rule_goes_off_once_where_it_held_for_as_long_as_its_patience(rule: str) -> None:
    good, bad = {}, BAD[rule]  # type: ignore[var-annotated]
    assert raised([good] * 20) == []
    assert raised([good, bad, bad, good, bad, bad, good]) == []
    assert raised([good, good, bad, bad, bad, bad, bad]) == [(5, rule)]
    assert raised([good, bad, bad, bad, good, bad, bad, bad]) == [(4, rule), (8, rule)]


def test_a_reward_that_is_lost_is_told_from_one_that_was_never_there() -> None:
    good, bad = {"reward": 0.6}, {"reward": 0.1}
    assert raised([bad] * 20) == []
    found = raised([good] * 5 + [bad] * 10)
    assert found == [(9, "reward-collapse")]  # means of three: below by 0.33 in step 7, and for three steps in 9


def test_values_that_were_not_measured_raise_nothing() -> None:
    unknown = dict.fromkeys(("reward", "truncated", "entropy", "clipped", "kl", "mismatch", "completion_length"))
    assert raised([unknown] * 10) == []


def test_a_run_records_its_alarms_and_stops_where_it_is_told_to(tmp_path: Path) -> None:
    overrides = ["algorithm.steps=3", "alarms.patience=2", "alarms.entropy_high=0.001", "task.eval_problems=8"]
    path = run("e6a-lora-mxfp4", preset="smoke", overrides=overrides, runs=tmp_path / "on")
    (alarm,) = [json.loads(line) for line in (path / "alarms.jsonl").read_text().splitlines()]
    assert (alarm["step"], alarm["rule"], alarm["threshold"]) == (2, "entropy-explosion", 0.001)
    with pytest.raises(AlarmError, match="step 2: entropy-explosion"):
        run("e6a-lora-mxfp4", preset="smoke", overrides=[*overrides, "alarms.stop=true"], runs=tmp_path / "off")
    (stopped,) = (tmp_path / "off").iterdir()
    assert json.loads((stopped / "status.json").read_text())["state"] == "failed"
    assert not (stopped / "evaluation.json").exists()


# ---- pre-flight -----------------------------------------------------------------------------------------------------


def group(*correct: float, ends: bool = True, flexible: float | None = None) -> list[Completion]:
    tokens = [5, 2] if ends else [5, 5]
    return [
        Completion(i, [1], tokens, [0.0, 0.0], 0.0, c, c if flexible is None else flexible)
        for i, c in enumerate(correct)
    ]


def test_what_the_first_rollout_says() -> None:
    found = examine([group(1, 0, 1, 0), group(0, 0, 0, 0), group(1, 1, 1, 1, ends=False)], ends=[2])
    assert found.model_dump() == {
        "completions": 12,
        "groups": 3,
        "accuracy": 0.5,
        "flexible": 0.5,
        "informative": pytest.approx(1 / 3),
        "reward_sd": pytest.approx(0.5 / 3),
        "truncated": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group(1, 0, ends=False)], "none ended: raise algorithm.max_new_tokens"),
        ([group(1, 1), group(0, 0)], "no group's answers differ.*Choose an easier or a harder task"),
        (
            [group(0, 0, flexible=1.0)],
            "0% are right by the strict scorer and 100% by the flexible.*show it in the prompt",
        ),
    ],
)
def test_a_run_that_cannot_learn_is_refused_with_its_numbers(groups: list[list[Completion]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse(examine(groups, ends=[2]))


def test_the_first_rollout_is_looked_at_once_and_before_any_update(tmp_path: Path) -> None:
    seen: list[int] = []
    made = Run(tmp_path, steps=2, on_first_rollout=lambda groups: seen.append(len(groups)))
    before = made.adapters
    made.train()
    assert len(seen) == 1
    assert any((a != b).any() for a, b in zip(before.values(), made.adapters.values(), strict=True))


def test_a_run_records_its_preflight_and_one_that_cannot_learn_fails(tmp_path: Path) -> None:
    path = run("e6a-lora-mxfp4", preset="smoke", overrides=["algorithm.steps=1"], runs=tmp_path / "on")
    found = json.loads((path / "preflight.json").read_text())
    assert found["informative"] > 0
    with pytest.raises(ConfigError, match="none ended"):
        run(
            "e6a-lora-mxfp4",
            preset="smoke",
            overrides=["algorithm.max_new_tokens=1", "algorithm.overlong_buffer=0"],
            runs=tmp_path / "off",
        )
