"""What an experiment emulates: its tables as a profile and as adaptive quantization noise, for a model's depth."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aqnsim import AQN, ConfigError, profiles
from aqnsim.aqn import Constant, EpochAware, KStage, Scaled, Schedule, Zone, targeted
from aqnsim.profiles import OpSpec, Profile, Rule
from aqnsim.rng import PHASES
from training import config

if TYPE_CHECKING:
    from training.config import Experiment, Noise, ProfileTable

LAYER_WORDS = ("layers", "layer", "blocks", "h")
"""What stands before a layer's number in the names of modules, as in `aqnsim.aqn.layer_of`."""

EVALUATION = "eval"

LOSS = "loss"
"""The kind of op that training computes itself, from log-probabilities: no loss of the model's own is ever called."""


# ---- profile ---------------------------------------------------------------------------------------------------------


def build_profile(experiment: Experiment, *, layers: int) -> Profile:
    """The emulated hardware that an experiment asks for.

    Args:
        experiment: its [profile] names the profile, the directions and layers of it, and what evaluations run on.
        layers: decoder layers of the model.

    Raises:
        UnknownNameError: no such profile.
        ConfigError: a layer that the model has not got, nothing is left of the profile, or the profile for
            evaluations has other exclusions.
    """
    table = experiment.profile
    profile = profiles.load(table.name)
    if table.evaluate_on is not None:
        profile = _with_evaluation(profile, profiles.load(table.evaluate_on))
    rules = tuple(
        dataclasses.replace(rule, kind=kinds, spec=_in_directions(rule.spec, table.directions))
        for rule in profile.rules
        if (kinds := tuple(kind for kind in rule.kinds if kind != LOSS))
    )
    if profile.rules and all(rule.spec.is_empty for rule in rules):
        raise ConfigError(
            f"profile.directions = {table.directions!r} leaves nothing of profile {table.name!r}, which has no "
            "error and no cast there"
        )
    kept = [f"{word}.{layer}.*" for layer in _kept_layers(table, layers) for word in LAYER_WORDS]
    return dataclasses.replace(profile, rules=rules, exclude=(*profile.exclude, *kept))


def _in_directions(spec: OpSpec, directions: str) -> OpSpec:
    match directions:
        case "forward":
            return OpSpec(forward=spec.forward)
        case "backward":
            return OpSpec(grad_input=spec.grad_input, grad_weight=spec.grad_weight)
    return spec


def _kept_layers(table: ProfileTable, layers: int) -> list[int]:
    if outside := [i for i in table.keep_layers if not -layers <= i < layers]:
        raise ConfigError(f"profile.keep_layers names {outside}, but the model has the layers 0 to {layers - 1}")
    kept = sorted({i % layers for i in table.keep_layers})
    if len(kept) == layers:
        raise ConfigError(
            f"profile.keep_layers = {list(table.keep_layers)} keeps all {layers} layers: nothing would be emulated"
        )
    return kept


def _with_evaluation(profile: Profile, other: Profile) -> Profile:
    """A profile with another's rules in evaluations; a rule may come to hold in no phase, and is dropped."""
    if set(profile.exclude) != set(other.exclude) and profile.rules and other.rules:
        raise ConfigError(
            f"profile.evaluate_on: {other.name!r} excludes {', '.join(other.exclude) or 'nothing'}, but "
            f"{profile.name!r} {', '.join(profile.exclude) or 'nothing'}: expected the same"
        )
    training = _in_phases(profile, [phase for phase in PHASES if phase != EVALUATION])
    return dataclasses.replace(
        profile,
        name=f"{profile.name}, evaluated on {other.name}",
        source={**profile.source, **{f"evaluation.{key}": text for key, text in other.source.items()}},
        exclude=profile.exclude or other.exclude,
        rules=(*training, *_in_phases(other, [EVALUATION])),
    )


def _in_phases(profile: Profile, phases: list[str]) -> Iterator[Rule]:
    for rule in profile.rules:
        if common := tuple(phase for phase in rule.phases if phase in phases):
            yield dataclasses.replace(rule, phases=common)


# ---- adaptive quantization noise -------------------------------------------------------------------------------------


def build_schedule(experiment: Experiment) -> Schedule | None:
    """Sigma by step, before any layer's factor; None where the experiment asks for no noise."""
    aqn = experiment.aqn
    match aqn:
        case config.NoAqn():
            return None
        case config.Constant():
            return Constant(aqn.sigma)
        case config.KStage():
            return KStage(aqn.sigma_start, aqn.sigma_end, aqn.stages)
        case config.EpochAware():
            return EpochAware(
                aqn.sigma_start,
                aqn.sigma_end,
                stages_per_epoch=aqn.stages,
                epochs=experiment.algorithm.epochs,
                warmup=aqn.warmup,
            )


def build_aqn(experiment: Experiment, *, layers: int, seed: int = 0) -> AQN | None:
    """The noise that an experiment asks for; None where it asks for none.

    Args:
        experiment: its [aqn] says where and when.
        layers: decoder layers of the model.
        seed: of the run; `random_layers` are drawn with it, so that each seed has a draw of its own.

    Raises:
        ConfigError: a layer that the model has not got, zones that come to overlap.
    """
    aqn, schedule = experiment.aqn, build_schedule(experiment)
    if schedule is None or isinstance(aqn, config.NoAqn):
        return None
    return AQN(
        schedule,
        targets=aqn.targets,
        multipliers=_multipliers(aqn, layers, seed),
        default_multiplier=aqn.default_multiplier,
        phases=aqn.phases,
        zones=tuple(_zones(aqn, schedule, layers)),
    )


def scaled_layers(first: int, last: int, *, of: int, to: int) -> range:
    """Layers `first` to `last` of a model of `of` layers, in a model of `to` layers.

    Those are the layers whose centre lies in the same part of the depth; where there is none, the one that holds the
    part's centre.

    >>> scaled_layers(14, 17, of=28, to=56), scaled_layers(14, 17, of=28, to=28), scaled_layers(14, 17, of=28, to=3)
    (range(28, 36), range(14, 18), range(1, 2))
    """
    begin, end = first * to / of, (last + 1) * to / of
    found = range(math.ceil(begin - 0.5), math.ceil(end - 0.5))
    return found or range(centre := math.floor((begin + end) / 2), centre + 1)


def _multipliers(aqn: Noise, layers: int, seed: int) -> dict[int, float]:
    """Factors by layer of the model; the mean of those that fall on one layer."""
    of = aqn.layers_of or layers
    if aqn.random_layers:
        count = max(1, round(aqn.random_layers * layers / of))
        drawn = random.Random(f"random_layers/{seed}").sample(range(layers), min(count, layers))
        return targeted(sorted(drawn))["multipliers"]
    factors: dict[int, list[float]] = {}
    for layer, factor in sorted(aqn.multipliers.items()):
        for scaled in scaled_layers(layer, layer, of=of, to=layers):
            factors.setdefault(scaled, []).append(factor)
    return {layer: math.fsum(values) / len(values) for layer, values in factors.items()}


def _zones(aqn: Noise, schedule: Schedule, layers: int) -> Iterator[Zone]:
    for zone in aqn.zones:
        inside = scaled_layers(zone.first, zone.last, of=aqn.layers_of or layers, to=layers)
        scaled = None if zone.factors is None else Scaled(schedule, zone.factors)
        yield Zone(inside[0], inside[-1], schedule=scaled, multiplier=zone.multiplier)
