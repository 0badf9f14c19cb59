"""An experiment's tables as a profile and as noise, for models of another depth than their layer numbers are of."""

from __future__ import annotations

import pytest

from aqnsim import ConfigError
from aqnsim.aqn import Constant, EpochAware, KStage, Scaled, Zone
from training.config import load
from training.hardware import build_aqn, build_profile, scaled_layers


@pytest.mark.parametrize(
    ("overrides", "schedule"),
    [
        (['aqn.schedule="constant"', "aqn.sigma=0.01"], Constant(0.01)),
        (
            ['aqn.schedule="k-stage"', "aqn.sigma_start=0.1", "aqn.sigma_end=0.01", "aqn.stages=4"],
            KStage(0.1, 0.01, 4),
        ),
        (["algorithm.epochs=2", "aqn.warmup=false"], EpochAware(0.05, 0.0005, 10, epochs=2, warmup=False)),
    ],
)
def test_the_noise_has_every_key_of_the_table(overrides: list[str], schedule: object) -> None:
    where = ["aqn.multipliers.1=0.5", "aqn.default_multiplier=0.25", 'aqn.phases=["train"]', 'aqn.targets="linear"']
    aqn = build_aqn(load("e12", "smoke", [*overrides, *where]), layers=2)
    assert aqn is not None
    assert aqn.schedule == schedule
    assert (aqn.targets, aqn.phases) == ("linear", ("train",))
    assert (aqn.multipliers, aqn.default_multiplier) == ({1: 0.5}, 0.25)


def test_no_noise() -> None:
    assert build_aqn(load("e6a-lora-mxfp4", "smoke"), layers=2) is None


@pytest.mark.parametrize(
    ("first", "last", "to", "layers"),
    [
        (14, 17, 28, [14, 15, 16, 17]),
        (14, 17, 30, [15, 16, 17, 18]),
        (14, 17, 56, [28, 29, 30, 31, 32, 33, 34, 35]),
        (14, 17, 3, [1]),  # none of three has its centre there: the one that holds the part's centre
        (0, 0, 3, [0]),
        (27, 27, 3, [2]),
        (6, 22, 3, [1]),
        (0, 27, 3, [0, 1, 2]),
    ],
)
def test_layers_keep_their_place_in_the_depth(first: int, last: int, to: int, layers: list[int]) -> None:
    assert list(scaled_layers(first, last, of=28, to=to)) == layers


def test_multipliers_that_fall_on_one_layer_are_averaged() -> None:
    overrides = ["aqn.layers_of=28", "aqn.multipliers={12=1.0, 13=2.0, 14=3.0, 0=0.5}"]
    aqn = build_aqn(load("e12", "smoke", overrides), layers=3)
    assert aqn is not None
    assert aqn.multipliers == {0: 0.5, 1: 2.0}


def test_a_zone_scales_the_schedule_of_the_run() -> None:
    overrides = ["aqn.layers_of=28", "aqn.zones=[{first=6, last=22, factors=[[0.0, 1.0], [0.5, 0.5]]}]"]
    aqn = build_aqn(load("e12", "smoke", overrides), layers=3)
    assert aqn is not None
    assert aqn.zones == (Zone(1, 1, schedule=Scaled(aqn.schedule, ((0.0, 1.0), (0.5, 0.5)))),)


def test_random_layers_are_drawn_by_the_seed_and_in_proportion() -> None:
    experiment = load("e12", "smoke", ["aqn.random_layers=4", "aqn.layers_of=28", "aqn.default_multiplier=0.0"])
    draws = {}
    for seed in range(20):
        aqn = build_aqn(experiment, layers=28, seed=seed)
        assert aqn is not None
        assert set(aqn.multipliers.values()) == {1.0}
        draws[seed] = tuple(aqn.multipliers)
        assert len(draws[seed]) == 4
    assert len(set(draws.values())) > 15
    assert len({layer for draw in draws.values() for layer in draw}) > 20  # of 28: not always the same part
    small = build_aqn(experiment, layers=3)
    assert small is not None
    assert len(small.multipliers) == 1


def test_directions_keep_the_errors_of_one_pass() -> None:
    base = ['profile.name="noise-5pct-matmul"']
    both = build_profile(load("e6a-lora-mxfp4", "smoke", base), layers=3).rules[0].spec
    for direction, kept in (("forward", (True, False, False)), ("backward", (False, True, True))):
        profile = build_profile(load("e6a-lora-mxfp4", "smoke", [*base, f'profile.directions="{direction}"']), layers=3)
        spec = profile.rules[0].spec
        parts = ("forward", "grad_input", "grad_weight")
        assert tuple(getattr(spec, part) == getattr(both, part) for part in parts) == kept
        assert [bool(getattr(spec, part).asked) for part in parts] == list(kept)


def test_a_direction_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"directions = 'backward' leaves nothing of profile 'mxfp4-w4a16'"):
        build_profile(load("e6a-lora-mxfp4", "smoke", ['profile.directions="backward"']), layers=3)


def test_kept_layers_are_excluded_and_no_others() -> None:
    profile = build_profile(load("e6a-lora-mxfp4", "smoke", ["profile.keep_layers=[0, -1]"]), layers=12)
    excluded = [i for i in range(12) if profile.excludes(f"model.layers.{i}.mlp.up_proj", "up_proj")]
    assert excluded == [0, 11]
    assert profile.excludes("transformer.h.11.mlp.c_fc")
    assert not profile.excludes("transformer.h.10.mlp.c_fc")


@pytest.mark.parametrize(
    ("layers", "message"),
    [("[0, 3]", r"names \[3\], but the model has the layers 0 to 2"), ("[0, 1, -1]", "keeps all 3 layers")],
)
def test_layers_that_cannot_be_kept_are_refused(layers: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_profile(load("e6a-lora-mxfp4", "smoke", [f"profile.keep_layers={layers}"]), layers=3)


def test_evaluations_run_on_another_profile() -> None:
    profile = build_profile(load("e6a-lora-mxfp4", "smoke", ['profile.evaluate_on="nvfp4-w4a4"']), layers=3)

    def weight(phase: str) -> str | None:
        rule = profile.rule_for("linear", "model.layers.0.mlp.up_proj", "up_proj", phase)
        return None if rule is None else profile.rules[rule].spec.forward.weight

    assert [weight(phase) for phase in ("rollout", "train", "reference", "eval")] == ["mxfp4"] * 3 + ["nvfp4"]
    ideal = build_profile(load("e6a-lora-mxfp4", "smoke", ['profile.evaluate_on="ideal"']), layers=3)
    assert ideal.rule_for("linear", "model.layers.0.mlp.up_proj", "up_proj", "eval") is None
