"""AQN as a description: exact values and change points of schedules, where noise goes, what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqnsim import AQN, ConfigError, UnknownNameError, aqn
from aqnsim.aqn import Constant, Custom, EpochAware, KStage, KStagePaper, Scaled, Schedule, Zone, layer_of, survives

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
    assert TWO_EPOCHS.sigma(total, total) == values[-1]  # the end is no third epoch, which would warm up again
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


def test_the_paper_s_staircase_has_no_warm_up_and_one_stage_more() -> None:
    paper = KStagePaper(sigma_start=0.05, sigma_end=0.0005, stages=10)
    values = run(paper, 30)
    assert changes(values) == [3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert stairs(values) == pytest.approx([0.05 * 0.01 ** (k / 9) for k in range(10)])
    assert paper.sigma(30, 30) == paper.sigma(29, 30) == pytest.approx(0.0005)
    assert run(KStagePaper(0.1, 0.01, 2), 3) == pytest.approx([0.1, 0.1, 0.01])
    for stages in (1, 0):
        with pytest.raises(ConfigError, match=f"at least 2 stages, got {stages}"):
            KStagePaper(0.1, 0.01, stages)


def test_stages_that_are_no_integers_are_refused() -> None:
    for bad in (10.0, True, "10"):
        with pytest.raises(ConfigError, match="stages must be an integer"):
            KStage(0.05, 0.0005, bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="stages must be an integer"):
            KStagePaper(0.05, 0.0005, bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="stages_per_epoch must be an integer"):
            EpochAware(0.05, 0.0005, bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="warmup must be true or false, got 1"):
        EpochAware(0.05, 0.0005, 5, warmup=1)  # type: ignore[arg-type]


@given(st.integers(3, 20), st.integers(1, 200))
def test_a_custom_staircase_can_repeat_any_other(stages: int, total: int) -> None:
    schedule = KStage(0.05, 0.0005, stages)
    points = ((0, 0.0), *((j / stages, sigma) for j, sigma in enumerate(schedule.levels(), 1)))
    assert run(Custom(points), total) == run(schedule, total)


def test_custom_positions_are_fractions_or_steps() -> None:
    assert run(Custom(((0, 0.1), (0.5, 0.0), (0.75, 0.2))), 8) == [0.1] * 4 + [0.0] * 2 + [0.2] * 2
    assert run(Custom(((0, 0.0), (3, 0.2)), unit="step"), 5) == [0, 0, 0, 0.2, 0.2]
    hundredths = Custom(((0, 0.0), (0.07, 0.1), (0.29, 0.2)))
    assert changes(run(hundredths, 100)) == [7, 29]  # though 0.07 * 100 > 7, and 0.29 * 100 < 29
    assert Custom([[0, 0.1]]) == Custom(((0, 0.1),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("points", "unit", "message"),
    [
        ((), "fraction", "expected the first at 0"),
        (((0.1, 0.1),), "fraction", "expected the first at 0"),
        (((0, 0.1), (0.5, 0.2), (0.5, 0.3)), "fraction", "must ascend"),
        (((0, 0.1), (3, 0.2)), "fraction", "below 1, got 3; for steps use unit='step'"),
        (((0, 0.1), (0.5, 0.2)), "step", "whole steps, got .*; for fractions of the run use unit='fraction'"),
        (((0, 0.0), (0.5, 0.0)), "fraction", "every value is 0"),
        (((0, -0.1),), "fraction", "finite numbers >= 0"),
        (((0, math.nan),), "fraction", "finite numbers >= 0"),
        (((0, "0.1"),), "fraction", "finite numbers >= 0"),
        ((0.1, 0.2), "fraction", r"\(position, value\) pairs"),
        (0.1, "fraction", r"\(position, value\) pairs"),
    ],
)
def test_staircases_that_are_none_are_refused(points: aqn.schedules.Points, unit: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Custom(points, unit)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        Scaled(Constant(0.1), points, unit)  # type: ignore[arg-type]


def test_a_unit_that_is_none_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'steps' .did you mean 'step'"):
        Custom(((0, 0.1),), "steps")  # type: ignore[arg-type]


def test_a_scaled_schedule_departs_from_another() -> None:
    half = Scaled(K10, ((0, 1.0), (14, 0.5)), unit="step")
    plain = run(K10, 29)
    assert run(half, 29) == plain[:14] + [s / 2 for s in plain[14:]]
    assert half.skipped(29) == ()
    assert Scaled(K10, ((0, 1.0), (0.5, 0.0))).skipped(29) == K10.levels()[4:]
    with pytest.raises(ConfigError, match="is 0 at every one of 10 steps"):
        Scaled(Constant(0.1), ((0, 0.0), (10, 1.0)), unit="step").check(10)
    with pytest.raises(ConfigError, match=r"expected a schedule to scale, got 0\.1"):
        Scaled(0.1, ((0, 1.0),))  # type: ignore[arg-type]


# ---- what a schedule tells of a run ---------------------------------------------------------------------------------

EVERY = [
    K10,
    KStagePaper(0.05, 0.0005, 10),
    TWO_EPOCHS,
    EpochAware(0.05, 0.0005, 3, epochs=2, warmup=False),
    Constant(1e-5),
    Custom(((0, 0.0), (0.25, 0.02), (0.5, 0.03))),
    Custom(((0, 0.02), (3, 0.0)), unit="step"),
    Scaled(TWO_EPOCHS, ((0, 1.0), (0.5, 0.25))),
]


def test_every_kind_of_schedule_is_among_those_tested() -> None:
    assert {type(s) for s in EVERY} == set(aqn.SCHEDULES.values())


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: s.kind)
@pytest.mark.parametrize("total", [2, 6, 116])
def test_intervals_cover_the_run_once_and_differ_from_their_neighbours(schedule: Schedule, total: int) -> None:
    found = schedule.intervals(total)
    assert [sigma for first, last, sigma in found for _ in range(first, last + 1)] == run(schedule, total)
    assert [i.first for i in found] == [0, *(i.last + 1 for i in found[:-1])]
    assert all(a.sigma != b.sigma for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: s.kind)
def test_a_long_run_has_every_sigma_that_is_declared(schedule: Schedule) -> None:
    assert schedule.skipped(116) == ()
    if not isinstance(schedule, Scaled):
        assert set(schedule.levels()) == {s for s in run(schedule, 116) if s}


def test_a_run_with_fewer_steps_than_stages_tells_what_it_skips_and_is_no_error() -> None:
    assert run(K10, 5) == [0.0, *(K10.levels()[i] for i in (1, 3, 5, 7))]
    assert K10.skipped(5) == tuple(K10.levels()[i] for i in (0, 2, 4, 6, 8))  # the first and the last among them
    K10.check(5)
    assert Custom(((0, 0.1), (8, 0.05)), unit="step").skipped(8) == (0.05,)
    assert K10.skipped(1) == K10.levels()


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: s.kind)
def test_a_schedule_s_text_gives_it_back(schedule: Schedule) -> None:
    assert aqn.parse(schedule.text) == schedule
    assert aqn.parse(f" {schedule.text} ").text == schedule.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k-stage", "expected kind"),
        ("k-stage(0.05, 0.0005, 10)", "expected kind"),
        ("k-stage(sigma_start=0.05", "expected kind"),
        ("constant(value=0.1).sigma", "expected kind"),
        ("constant(value=x)", "expected kind"),
        ("k-stage(sigma_start=0.05)", "k-stage needs sigma_end, stages"),
        ("k-stage(sigma_strt=0.05)", "unknown field of schedule 'k-stage' 'sigma_strt' .did you mean 'sigma_start'"),
        ("constant(value=0.1, value=0.2)", "given twice"),
        ("constnt(value=0.1)", "unknown schedule 'constnt' .did you mean 'constant'"),
        ("constant(value=-1)", "finite number > 0, got -1"),
        ("scaled(schedule=0.1, factors=((0, 1),))", "expected a schedule to scale"),
        ("custom(points=5)", "pairs, got 5"),
        ("", "expected kind"),
    ],
)
def test_texts_that_are_no_schedule_are_refused(text: str, message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        aqn.parse(text)


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
    noise = AQN(K10, multipliers={1: 0.5, 2: 0.0}, default_multiplier=2.0)
    assert noise.multiplier("model.layers.1.input_layernorm") == 0.5
    assert noise.multiplier("model.layers.2.input_layernorm") == 0.0
    assert noise.multiplier("model.layers.3.input_layernorm") == 2.0
    assert noise.multiplier("model.norm") == 2.0
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


RELATIVE_ERRORS = {13: 1.12, 14: 1.16, 15: 1.17, 26: 0.79}


def test_targeted_leaves_all_else_alone() -> None:
    noise = AQN(K10, **aqn.targeted([14, 15]))
    sites = [f"model.layers.{i}.input_layernorm" for i in (13, 14, 15, 16)]
    assert [noise.multiplier(s) for s in [*sites, "model.norm"]] == [0, 1, 1, 0, 0]
    with pytest.raises(ConfigError, match="no layer is given"):
        aqn.targeted([])


def test_variable_multipliers_come_with_an_explicit_default() -> None:
    noise = AQN(K10, **aqn.variable(RELATIVE_ERRORS, default_multiplier=0.5))
    assert noise.multiplier("model.layers.26.input_layernorm") == 0.79
    assert noise.multiplier("model.layers.0.input_layernorm") == noise.multiplier("model.norm") == 0.5


def test_inverse_mirrors_at_1_and_ceiling_lowers_the_highest_to_1() -> None:
    mirrored = aqn.inverse(RELATIVE_ERRORS)
    assert mirrored["multipliers"] == pytest.approx({13: 0.88, 14: 0.84, 15: 0.83, 26: 1.21})
    assert mirrored["default_multiplier"] == 1
    lowered = aqn.ceiling(**mirrored)
    assert lowered["multipliers"] == pytest.approx({i: m / 1.21 for i, m in mirrored["multipliers"].items()})
    assert lowered["default_multiplier"] == pytest.approx(1 / 1.21)
    assert aqn.ceiling({3: 0.25}, default_multiplier=0.5) == aqn.variable({3: 0.5}, default_multiplier=1.0)


@given(st.dictionaries(st.integers(0, 40), st.floats(0, 2)), st.floats(0.01, 2))
def test_inverse_undoes_itself_and_ceiling_never_exceeds_1(multipliers: dict[int, float], default: float) -> None:
    twice = aqn.inverse(**aqn.inverse(multipliers, default))
    assert twice["multipliers"] == pytest.approx(multipliers, abs=1e-12)
    lowered = aqn.ceiling(multipliers, default)
    assert max([*lowered["multipliers"].values(), lowered["default_multiplier"]]) == 1


def test_factors_that_cannot_be_inverted_or_scaled_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiplier of layer 3 is 2\.5, and 2 - 2\.5 is negative"):
        aqn.inverse({3: 2.5})
    with pytest.raises(ConfigError, match="multiplier of layer default is 3"):
        aqn.inverse({}, default_multiplier=3)
    with pytest.raises(ConfigError, match="every multiplier is 0"):
        aqn.ceiling({3: 0.0}, default_multiplier=0.0)
    for build in (aqn.variable, aqn.inverse, aqn.ceiling):
        with pytest.raises(ConfigError, match="multiplier of layer 3 must be finite and >= 0"):
            build({3: -1.0})
        with pytest.raises(ConfigError, match="layer index must be an integer"):
            build({"3": 1.0})  # type: ignore[dict-item]


def site_of(layer: int) -> str:
    return f"model.layers.{layer}.input_layernorm"


def test_zones_have_a_factor_or_a_schedule_of_their_own() -> None:
    """The middle layers get half as much in the second half of the run; all others follow the common schedule."""
    middle = Zone(6, 22, schedule=Scaled(K10, ((0, 1.0), (14, 0.5)), unit="step"))
    noise = AQN(K10, zones=(Zone(0, 5, multiplier=1.0), middle), multipliers={30: 0.1}, default_multiplier=2.0)
    for step in (0, 5, 13, 14, 28):
        sigma = K10.sigma(step, 29)
        found = [noise.sigma(site_of(i), step, 29) for i in (0, 5, 6, 22, 23, 30)]
        inside = sigma / 2 if step >= 14 else sigma
        assert found == [sigma, sigma, inside, inside, 2 * sigma, 0.1 * sigma]
    assert noise.sigma("model.norm", 5, 29) == 2 * K10.sigma(5, 29)
    assert noise.multiplier(site_of(6)) == 1
    assert noise.schedule_of(site_of(6)) == middle.schedule
    assert noise.schedule_of(site_of(5)) == noise.schedule_of("model.norm") == K10


def test_a_zone_with_a_schedule_that_never_acts_is_refused() -> None:
    noise = AQN(Constant(0.1), zones=(Zone(0, 1, schedule=K10),))
    noise.check(10)
    with pytest.raises(ConfigError, match="is 0 at every one of 1 steps"):
        noise.check(1)


@pytest.mark.parametrize(
    ("zone", "message"),
    [
        ({"first": 5, "last": 4, "multiplier": 1.0}, "expected layers 0 <= first <= last, got 5 to 4"),
        ({"first": -1, "last": 4, "multiplier": 1.0}, "got -1 to 4"),
        ({"first": 0, "last": 4.0, "multiplier": 1.0}, "got 0 to 4.0"),
        ({"first": 0, "last": 4}, "either a schedule of its own or a multiplier"),
        ({"first": 0, "last": 4, "multiplier": 1.0, "schedule": K10}, "either a schedule of its own or a multiplier"),
        ({"first": 0, "last": 4, "schedule": 0.1}, "expected a schedule, got 0.1"),
        ({"first": 0, "last": 4, "multiplier": -1.0}, "finite and >= 0, got -1.0"),
        ({"first": 0, "last": 4, "multiplier": math.nan}, "finite and >= 0, got nan"),
    ],
)
def test_zones_that_are_none_are_refused(zone: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Zone(**zone)  # type: ignore[arg-type]


def test_zones_that_overlap_or_hide_a_multiplier_are_refused() -> None:
    """Where zones were given, multipliers were ignored, and nothing said so."""
    low, high = Zone(0, 5, multiplier=1.0), Zone(5, 9, multiplier=0.5)
    with pytest.raises(ConfigError, match="must ascend and not overlap, but 5 to 9 follows 0 to 5"):
        AQN(K10, zones=(low, high))
    with pytest.raises(ConfigError, match="must ascend"):
        AQN(K10, zones=(Zone(6, 9, multiplier=0.5), low))
    with pytest.raises(ConfigError, match=r"layers \[2, 5\] have a zone and a multiplier"):
        AQN(K10, zones=(low,), multipliers={2: 1.0, 5: 1.0, 7: 1.0})


@dataclass(frozen=True)
class Place:
    name: str
    kind: str

    @property
    def role(self) -> str:
        return self.name.rpartition(".")[2]


LAYERS = range(12)
NORMS = [
    *(Place(f"model.layers.{i}.{n}_layernorm", "norm") for i in LAYERS for n in ("input", "post_attention")),
    Place("model.norm", "norm"),
]
LINEARS = [
    *(Place(f"model.layers.{i}.{n}", "linear") for i in LAYERS for n in ("self_attn.q_proj", "mlp.up_proj")),
    Place("lm_head", "linear"),
]


def reached(noise: AQN, feeds_router: bool | None = None) -> list[Place]:
    places = [*NORMS, *LINEARS, Place("model.embed_tokens", "embedding")]
    return [p for p in places if noise.reaches(p.name, p.kind, p.role, feeds_router)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("rmsnorm", NORMS),
        ("linear", LINEARS),
        (("rmsnorm", "linear"), NORMS + LINEARS),
        (("q_proj",), [p for p in LINEARS if p.role == "q_proj"]),
        (("layers.1.*",), [p for p in NORMS + LINEARS if p.name.startswith("model.layers.1.")]),  # and no 10 or 11
        (("model.norm", "*.up_proj"), [NORMS[-1], *(p for p in LINEARS if p.role == "up_proj")]),
        (("norm",), [NORMS[-1]]),
        (("*",), NORMS + LINEARS),  # what has no weight of these kinds is never reached
    ],
)
def test_targets_are_kinds_or_globs_of_names(targets: str | tuple[str, ...], expected: list[Place]) -> None:
    assert reached(AQN(K10, targets=targets)) == expected


def test_excluded_names_are_not_reached() -> None:
    noise = AQN(K10, targets="linear", exclude=("lm_head", "no_such_name"))
    assert reached(noise) == LINEARS[:-1]
    with pytest.raises(ConfigError, match=r"exclude is a tuple of globs, such as \('lm_head',\)"):
        AQN(K10, exclude="lm_head")  # type: ignore[arg-type]


def test_a_role_that_the_name_does_not_show_is_matched_too() -> None:
    noise = AQN(K10, targets=("q_proj",))
    assert noise.reaches("transformer.h.0.attention.query", "linear", "q_proj")
    assert not noise.reaches("transformer.h.0.attention.query", "linear", "k_proj")


def test_the_router_s_norm_is_the_one_behind_attention() -> None:
    """A rule to protect the router left out the norm before attention, and put noise on the one before the router."""
    before, behind = "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"
    facts = ((before, False), (behind, True), ("model.norm", False))
    admitted = {
        rule: [aqn.moe_admits(rule, site, feeds) for site, feeds in facts]  # type: ignore[arg-type]
        for rule in ("all", "post_attention_only", "protect_router")
    }
    assert admitted == {
        "all": [True, True, True],
        "post_attention_only": [False, True, False],
        "protect_router": [True, False, True],
    }
    # in another layout the router stands behind attention alone, and the fact decides, not the name
    assert not aqn.moe_admits("protect_router", "model.layers.0.ffn_norm", True)


def test_targets_follow_the_moe_rule() -> None:
    assert reached(AQN(K10, moe="protect_router"), feeds_router=True) == []
    assert reached(AQN(K10, moe="protect_router"), feeds_router=False) == NORMS
    assert {p.role for p in reached(AQN(K10, moe="post_attention_only"))} == {"post_attention_layernorm"}
    with pytest.raises(ConfigError, match="needs to know whether 'model"):
        reached(AQN(K10, moe="protect_router"))
    with pytest.raises(UnknownNameError, match=r"unknown moe rule 'protect_routers' .did you mean 'protect_router'"):
        AQN(K10, moe="protect_routers")  # type: ignore[arg-type]


def test_a_description_that_would_do_nothing_somewhere_is_refused_for_that_model() -> None:
    def check(**fields: object) -> None:
        noise = AQN(K10, **fields)  # type: ignore[arg-type]
        noise.check_sites(reached(noise))

    check()
    check(targets=("rmsnorm", "q_proj"), zones=(Zone(0, 11, multiplier=0.0),))  # the final norm has noise
    with pytest.raises(ConfigError, match="targets k_proj, but nothing there is reached"):
        check(targets=("q_proj", "k_proj"))
    with pytest.raises(ConfigError, match="targets linear, but nothing"):
        check(targets="linear", exclude=("*",))
    with pytest.raises(ConfigError, match=r"name layers \[12, 27\], in which nothing is reached"):
        check(multipliers={0: 1.0, 27: 2.0, 12: 1.0})
    with pytest.raises(ConfigError, match=r"name layers \[12, 13\]"):
        check(zones=(Zone(10, 13, multiplier=1.0),))
    with pytest.raises(ConfigError, match="multiplier of every site is 0: no noise would be injected"):
        check(default_multiplier=0.0)


def test_other_units_of_sigma_are_refused() -> None:
    assert AQN(K10).relative_to == "absolute"
    assert AQN(K10, relative_to="rms").relative_to == "rms"
    with pytest.raises(UnknownNameError, match=r"unknown relative_to 'RMS'.*known: absolute, rms"):
        AQN(K10, relative_to="RMS")  # type: ignore[arg-type]


def test_a_glob_that_is_not_in_a_tuple_is_told_so() -> None:
    with pytest.raises(UnknownNameError, match=r"globs of names are given as a tuple: \('q_proj',\)"):
        AQN(K10, targets="q_proj")
    for empty in ((), ("",)):
        with pytest.raises(ConfigError, match="expected targets as words or globs"):
            AQN(K10, targets=empty)


def test_presets_are_those_of_their_sources() -> None:
    assert list(aqn.PRESETS) == list(aqn.SOURCES)
    assert aqn.preset("qerl_paper") == AQN(KStage(0.01, 0.0001, 10))
    assert aqn.preset("qerl_default") == AQN(KStage(0.05, 0.0005, 10))
    with pytest.raises(UnknownNameError, match=r"unknown AQN preset 'qerl' .did you mean 'qerl_"):
        aqn.preset("qerl")


# ---- what noise in place would keep ---------------------------------------------------------------------------------

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(
    ("sigma", "weight", "dtype", "share"),
    [
        (5e-4, 1.0, "bf16", 0.0000),
        (9e-4, 1.0, "bf16", 0.0150),
        (1e-3, 1.0, "bf16", 0.0254),
        (2.8e-3, 1.0, "bf16", 0.3242),
        (2.8e-3, 4.0, "bf16", 0.0026),
        (5e-4, 1.0, "fp16", 0.4771),
        (5e-4, 1.0, "fp32", 0.9999),
        (0.0, 1.0, "bf16", 0.0),
    ],
)
def test_the_low_end_of_a_schedule_does_not_exist_in_bf16(
    sigma: float, weight: float, dtype: str, share: float
) -> None:
    assert survives(sigma, [weight], dtype) == pytest.approx(share, abs=6e-5)
    assert survives(sigma, [-weight], dtype) == survives(sigma, [weight], dtype)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("relative", [0.1, 0.5, 2.0])
def test_what_survives_is_what_a_simulation_finds(dtype: str, relative: float) -> None:
    generator = torch.Generator().manual_seed(5)
    spread = torch.randn(500, dtype=torch.float64, generator=generator)
    subnormal = torch.finfo(TORCH[dtype]).smallest_normal * torch.tensor([0.0, 0.25, 1.0])
    weights = torch.cat([spread, torch.tensor([1.0, -2.0, 0.5, 1.5]), subnormal.double()]).to(TORCH[dtype])
    sigma = relative * torch.finfo(TORCH[dtype]).eps
    draws = 2000
    z = torch.randn(draws, len(weights), dtype=torch.float64, generator=generator)
    found = float(((weights.double() + sigma * z).to(TORCH[dtype]) != weights).double().mean())
    expected = survives(sigma, weights.tolist(), dtype)
    # each of the draws * 507 is an event of its own; their variances add up to at most that of one common share
    assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / (draws * len(weights)))


def test_a_histogram_is_as_good_as_its_values() -> None:
    values = [1.0] * 3 + [0.5] * 2 + [3.0]
    assert survives(1e-3, {1.0: 3, 0.5: 2, 3.0: 1}, "bf16") == survives(1e-3, values, "bf16")
    alone = {w: survives(1e-3, [w], "bf16") for w in (1.0, 0.5, 3.0)}
    assert survives(1e-3, values, "bf16") == pytest.approx((3 * alone[1.0] + 2 * alone[0.5] + alone[3.0]) / 6)


def test_weights_are_taken_as_their_dtype_stores_them() -> None:
    stored = float(torch.tensor(0.1).bfloat16())
    assert survives(1e-3, [0.1], "bf16") == survives(1e-3, [stored], "bf16") != survives(1e-3, [0.1], "fp16")
    assert survives(1e-3, [1 + 2**-9], "bf16") == survives(1e-3, [1.0], "bf16")
    assert survives(1e-3, [2 - 2**-9], "bf16") == survives(1e-3, [2.0], "bf16")  # into the next binade
    assert survives(1.0, [65504.0], "fp16") == pytest.approx(math.erfc(16 / math.sqrt(2)))


@pytest.mark.parametrize(
    ("sigma", "weights", "message"),
    [
        (-1.0, [1.0], "sigma must be a finite number >= 0, got -1.0"),
        (math.nan, [1.0], "sigma must be a finite number"),
        (1.0, [], "expected weights"),
        (1.0, {1.0: 0}, "counts above 0"),
        (1.0, [math.inf], "inf is not finite in fp16"),
        (1.0, [math.nan], "nan is not finite in fp16"),
        (1.0, [65520.0], "65520.0 is not finite in fp16"),
    ],
)
def test_what_has_no_share_is_refused(sigma: float, weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        survives(sigma, weights, "fp16")
    with pytest.raises(UnknownNameError, match=r"'bfloat16'.*known: bf16, fp16, fp32"):
        survives(1.0, [1.0], "bfloat16")
