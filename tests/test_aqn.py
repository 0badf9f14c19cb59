"""Noise schedules: the exact values and change points of their formulas, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest

from aqnsim import AQN, ConfigError, UnknownNameError
from aqnsim.aqn import Constant, EpochAware, KStage, Schedule, layer_of

K10 = KStage(sigma_start=0.05, sigma_end=0.0005, stages=10)
STAIRS = [0.05, 0.028117, 0.015811, 0.008891, 0.005, 0.002812, 0.001581, 0.000889, 0.0005]
TWO_EPOCHS = EpochAware(sigma_start=0.05, sigma_end=0.0005, stages_per_epoch=5, epochs=2)


def run(schedule: Schedule, total: int) -> list[float]:
    return [schedule.sigma(t, total) for t in range(total)]


def changes(values: list[float]) -> list[int]:
    return [t for t in range(1, len(values)) if values[t] != values[t - 1]]


def stairs(values: list[float]) -> list[float]:
    return [values[0], *[values[t] for t in changes(values)]]


@pytest.mark.parametrize(
    ("total", "points"),
    [
        (29, [3, 6, 9, 12, 15, 18, 21, 24, 27]),
        (58, [6, 12, 18, 24, 29, 35, 41, 47, 53]),
        (116, [12, 24, 35, 47, 58, 70, 82, 93, 105]),
    ],
)
def test_k_stage_changes_where_its_formula_says(total: int, points: list[int]) -> None:
    values = run(K10, total)
    assert changes(values) == points
    assert values[: points[0]] == [0.0] * points[0]  # the warm-up
    assert stairs(values)[1:] == pytest.approx(STAIRS, abs=5e-7)


def test_k_stage_over_29_steps() -> None:
    values = run(K10, 29)
    assert values[:6] == [0, 0, 0, 0.05, 0.05, 0.05]
    assert values[-2:] == pytest.approx([0.0005, 0.0005])
    assert K10.sigma(29, 29) == pytest.approx(0.0005)
    assert K10.sigma(500, 29) == K10.sigma(29, 29)  # a run that goes on keeps the last stage


def test_k_stage_is_geometric() -> None:
    values = stairs(run(K10, 100))[1:]
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert ratios == pytest.approx([0.01 ** (1 / 8)] * 8)
    assert values[0] == 0.05
    assert values[-1] == pytest.approx(0.0005, rel=1e-12)


def test_k_stage_with_three_stages_and_few_steps() -> None:
    three = KStage(sigma_start=0.1, sigma_end=0.01, stages=3)
    assert run(three, 3) == pytest.approx([0, 0.1, 0.01])
    assert run(three, 2) == pytest.approx([0, 0.1])
    assert run(KStage(sigma_start=0.1, sigma_end=0.1, stages=4), 4) == pytest.approx([0, 0.1, 0.1, 0.1])


def test_epoch_aware_over_two_epochs() -> None:
    total = 2 * 58
    values = run(TWO_EPOCHS, total)
    first, second = values[:58], values[58:]
    assert first[:10] == [0.0] * 10
    assert second[:10] == [0.0] * 10  # every epoch warms up again
    assert first[10] == 0.05
    assert stairs(first)[1:] == pytest.approx([0.05, 0.028117, 0.015811, 0.008891, 0.005], abs=5e-7)
    assert stairs(second)[1:] == pytest.approx([0.005, 0.0028117, 0.0015811, 0.0008891, 0.0005], abs=5e-8)
    # floor(u (S + 1) / N) steps up at u = ceil(j N / 6)
    assert changes(first) == [math.ceil(j * 58 / 6) for j in range(1, 6)]


def test_epoch_aware_without_warm_up_fills_the_epoch() -> None:
    schedule = EpochAware(sigma_start=0.05, sigma_end=0.0005, stages_per_epoch=5, epochs=2, warmup=False)
    values = run(schedule, 20)
    assert all(v > 0 for v in values)
    assert stairs(values[:10]) == pytest.approx([0.05, 0.028117, 0.015811, 0.008891, 0.005], abs=5e-7)


def test_epoch_aware_with_one_stage_is_the_epoch_s_first_value() -> None:
    one = EpochAware(sigma_start=0.1, sigma_end=0.001, stages_per_epoch=1, epochs=2)
    assert run(one, 4) == pytest.approx([0, 0.1, 0, 0.01])


def test_epoch_aware_refuses_epochs_of_unequal_length() -> None:
    with pytest.raises(ConfigError, match="7 steps do not divide into 2 epochs"):
        TWO_EPOCHS.sigma(0, 7)


def test_constant() -> None:
    assert run(Constant(0.02), 3) == [0.02, 0.02, 0.02]


@pytest.mark.parametrize("start", [0.0, -0.05, math.nan, math.inf, "0.05"])
def test_a_start_that_is_no_size_is_refused(start: float) -> None:
    for make in (
        lambda: KStage(sigma_start=start, sigma_end=0.0005, stages=10),
        lambda: EpochAware(sigma_start=start, sigma_end=0.0005, stages_per_epoch=5),
        lambda: Constant(start),
    ):
        with pytest.raises(ConfigError, match="must be a finite number > 0"):
            make()


@pytest.mark.parametrize("end", [0.0, -0.1, math.nan])
def test_an_end_that_is_no_size_is_refused(end: float) -> None:
    with pytest.raises(ConfigError, match="sigma_end must be a finite number > 0"):
        KStage(sigma_start=0.05, sigma_end=end, stages=10)
    with pytest.raises(ConfigError, match="sigma_end must be a finite number > 0"):
        EpochAware(sigma_start=0.05, sigma_end=end, stages_per_epoch=5)


def test_an_end_above_the_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sigma_end \(0.06\) must not exceed sigma_start \(0.05\)"):
        KStage(sigma_start=0.05, sigma_end=0.06, stages=10)


@pytest.mark.parametrize("stages", [2, 1, 0, -3])
def test_too_few_stages_are_refused(stages: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 3 stages, got {stages}"):
        KStage(sigma_start=0.05, sigma_end=0.0005, stages=stages)


def test_an_epoch_without_stages_is_refused() -> None:
    for bad in ({"stages_per_epoch": 0}, {"epochs": 0}):
        with pytest.raises(ConfigError, match="at least one stage and one epoch"):
            EpochAware(**{"sigma_start": 0.05, "sigma_end": 0.0005, "stages_per_epoch": 5, "epochs": 1, **bad})


def test_steps_outside_a_run_are_refused() -> None:
    for step, total in ((-1, 10), (0, 0), (3, -2)):
        with pytest.raises(ConfigError, match="expected 0 <= step and 0 < total_steps"):
            K10.sigma(step, total)


def test_a_schedule_that_would_stay_at_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="is 0 at every one of 1 steps: the run would ask for noise and get none"):
        K10.check(1)
    with pytest.raises(ConfigError, match="is 0 at every one of 2 steps"):
        TWO_EPOCHS.check(2)
    K10.check(2)
    K10.check(29)


# ---- where the noise goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        ("model.layers.14.input_layernorm", 14),
        ("model.layers.3.self_attn.q_norm", 3),
        ("transformer.h.2.ln_1", 2),
        ("encoder.layer.5.norm", 5),
        ("blocks.7.norm", 7),
        ("layers.0.norm", 0),
        ("model.norm", None),
        ("graph.3.norm", None),  # ends in h, but is no layer
    ],
)
def test_layers_are_read_from_names(site: str, layer: int | None) -> None:
    assert layer_of(site) == layer


def test_multipliers_by_layer() -> None:
    aqn = AQN(K10, multipliers={1: 0.5, 2: 0.0}, default_multiplier=2.0)
    assert aqn.multiplier("model.layers.1.input_layernorm") == 0.5
    assert aqn.multiplier("model.layers.2.input_layernorm") == 0.0
    assert aqn.multiplier("model.layers.3.input_layernorm") == 2.0
    assert aqn.multiplier("model.norm") == 2.0
    assert AQN(K10).multiplier("model.layers.1.input_layernorm") == 1.0
    assert AQN(K10).phases == ("rollout",)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_multipliers_that_are_no_factor_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="multiplier of layer 3 must be finite"):
        AQN(K10, multipliers={3: bad})
    with pytest.raises(ConfigError, match="multiplier of layer default must be finite"):
        AQN(K10, default_multiplier=bad)


def test_multipliers_under_names_that_no_layer_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer index must be an integer >= 0, got '3'"):
        AQN(K10, multipliers={"3": 1.0})  # type: ignore[dict-item]


def test_other_targets_and_phases_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown AQN target 'rmsnorms' .did you mean 'rmsnorm'"):
        AQN(K10, targets="rmsnorms")
    with pytest.raises(UnknownNameError, match=r"unknown phase 'rolout' .did you mean 'rollout'"):
        AQN(K10, phases=("rolout",))
    with pytest.raises(ConfigError, match="phases is empty"):
        AQN(K10, phases=())
