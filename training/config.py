"""What an experiment is: strict tables from TOML, resolved to one frozen value with a digest.

Sources are merged in this order, the later one winning: the parent that it `extends`, the
experiment, the preset (which supplies the model, the task and the scale), `--set key=value`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

from pydantic import ValidationError, model_validator

from aqnsim._errors import ConfigError, did_you_mean, unknown
from training.sources import (
    DESCRIPTIVE,
    EXPERIMENTS,
    KIND_KEYS,
    PRESETS,
    find,
    flatten,
    identifier,
    inherit,
    merge,
    names,
    over_preset,
    parse_overrides,
)
from training.tables import (
    Adapters,
    Alarms,
    Algorithm,
    AnyTask,
    Aqn,
    ArithmeticTask,
    Constant,
    EpochAware,
    Gsm8kTask,
    KStage,
    Lora,
    ModelTable,
    NoAqn,
    Noise,
    NoLora,
    ProfileTable,
    Published,
    Question,
    Rollout,
    Table,
    TaskTable,
    ZoneTable,
)

__all__ = [
    "Adapters",
    "Alarms",
    "Algorithm",
    "AnyTask",
    "Aqn",
    "ArithmeticTask",
    "Constant",
    "Difference",
    "EpochAware",
    "Experiment",
    "Gsm8kTask",
    "KStage",
    "Lora",
    "ModelTable",
    "NoAqn",
    "NoLora",
    "Noise",
    "ProfileTable",
    "Published",
    "Question",
    "Rollout",
    "Table",
    "TaskTable",
    "ZoneTable",
    "covers",
    "diff",
    "digest_of",
    "from_json",
    "load",
]

KINDS: dict[str, tuple[type[Table], ...]] = {
    "aqn": (NoAqn, Constant, KStage, EpochAware),
    "lora": (Lora, NoLora),
    "task": (ArithmeticTask, Gsm8kTask),
}
"""The tables that come in several kinds, told apart by the key that `KIND_KEYS` names."""


class Experiment(Table):
    """One experiment, resolved: all that is needed to run it, but the seed."""

    id: str
    preset: str | None = None
    question: Question
    profile: ProfileTable
    aqn: Aqn
    lora: Adapters
    algorithm: Algorithm
    model: ModelTable
    task: AnyTask
    rollout: Rollout = Rollout()
    alarms: Alarms = Alarms()
    published: Published | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the run, each one generation batch; an epoch drops its incomplete last batch."""
        algorithm = self.algorithm
        per_epoch = self.task.prompts // algorithm.prompts_per_step
        return algorithm.steps or algorithm.epochs * per_epoch

    def settings(self) -> dict[str, Any]:
        """All that decides what a run computes, under flattened dotted keys."""
        return _settings_of(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings: equal iff `diff` finds nothing."""
        return digest_of(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        if self.total_steps == 0:
            raise ValueError(
                f"task.prompts = {self.task.prompts} does not fill one step of "
                f"algorithm.prompts_per_step = {self.algorithm.prompts_per_step}"
            )
        if isinstance(self.aqn, EpochAware) and self.total_steps % self.algorithm.epochs:
            raise ValueError(
                f"algorithm.steps = {self.total_steps} is not a multiple of "
                f"algorithm.epochs = {self.algorithm.epochs}, which an epoch-aware schedule needs"
            )
        return self


@dataclass(frozen=True)
class Difference:
    """A setting in which two experiments differ; None where one of them has no such setting."""

    key: str
    a: Any
    b: Any


def load(experiment: str, preset: str | None = None, overrides: Sequence[str] = ()) -> Experiment:
    """Resolve an experiment, and check that it differs from its control only as declared.

    Args:
        experiment: name of an experiment of this package, or path to a TOML.
        preset: name of a preset of this package, or path to a TOML.
        overrides: `table.key=value` each, the value in TOML.

    Raises:
        UnknownNameError: there is no such experiment or preset.
        ConfigError: a key or a value is not valid; the message names all of them.
    """
    resolved = _resolve(experiment, preset, overrides)
    if resolved.question.control is not None:
        beside = find(EXPERIMENTS, experiment).parent
        control = str(find(EXPERIMENTS, resolved.question.control, beside))
        # Overrides stay out of this check: they are the user's own departure, which compare shows.
        _check_declared(_resolve(experiment, preset, ()), _resolve(control, preset, ()))
    return resolved


def digest_of(tables: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the settings among an experiment's tables, as canonical JSON.

    Of tables as they were stored, it does not depend on the settings that were added since.
    """
    canonical = json.dumps(_settings_of(tables), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def from_json(text: str, origin: str) -> Experiment:
    """The experiment that `model_dump_json` wrote; `origin` names the text in errors."""
    try:
        return Experiment.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from error


def diff(a: Experiment, b: Experiment) -> list[Difference]:
    """The settings in which two experiments differ, sorted by key."""
    left, right = a.settings(), b.settings()
    return [
        Difference(key, left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def covers(declared: Iterable[str], key: str) -> bool:
    """Whether a dotted key is one of the declared keys or lies in one of the declared tables."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in declared)


def _settings_of(tables: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({name: table for name, table in tables.items() if name not in DESCRIPTIVE})


def _resolve(experiment: str, preset: str | None, overrides: Sequence[str]) -> Experiment:
    settable = [name for name in Experiment.model_fields if name not in DESCRIPTIVE]
    tables = inherit(find(EXPERIMENTS, experiment))
    if preset is not None:
        tables = over_preset(tables, find(PRESETS, preset))
    tables = merge(tables, parse_overrides(overrides, settable))
    for name in ("id", "preset"):
        if name in tables:
            raise ConfigError(f"experiment {experiment!r}: {name}: not a key of the file")
    tables |= {"id": identifier(experiment), "preset": preset and identifier(preset)}
    missing = [name for name in ("model", "task") if name not in tables]
    if preset is None and missing:
        raise ConfigError(
            f"experiment {experiment!r} leaves [{'] and ['.join(missing)}] to a preset: "
            f"name one of {', '.join(names(PRESETS))}"
        )
    origin = f"experiment {tables['id']!r}" + (f" with preset {preset!r}" if preset else "")
    # By way of JSON: its strict mode still takes an array for a tuple and "14" for an integer key.
    return from_json(json.dumps(tables, default=str), origin)


def _check_declared(experiment: Experiment, control: Experiment) -> None:
    declared = experiment.question.differs_in
    differing = [difference.key for difference in diff(experiment, control)]
    undeclared = [key for key in differing if not covers(declared, key)]
    if undeclared:
        raise ConfigError(
            f"experiment {experiment.id!r} differs from its control {control.id!r} in "
            f"{', '.join(undeclared)}, but question.differs_in declares only {', '.join(declared)}"
        )
    idle = [entry for entry in declared if not any(covers([entry], key) for key in differing)]
    if idle:
        raise ConfigError(
            f"experiment {experiment.id!r} declares that it differs from its control "
            f"{control.id!r} in {', '.join(idle)}, but there they are equal"
        )


def _explain(error: ValidationError) -> str:
    """All that pydantic objects to, in one line, under dotted keys."""
    return "; ".join(_explain_one(detail) for detail in error.errors())


def _explain_one(detail: Mapping[str, Any]) -> str:
    place = [str(part) for part in detail["loc"] if part != "[key]"]
    kind = place.pop(1) if len(place) > 1 and place[0] in KINDS else None
    key, context = ".".join(place), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            known = _keys(place[:-1], kind)
            where = f" for {KIND_KEYS[place[0]]} {kind!r}" if kind else ""
            hint = did_you_mean(place[-1], known) or f"; known: {', '.join(known)}"
            return f"{key}: unknown key{where}{hint}"
        case "union_tag_invalid":
            choice = KIND_KEYS[key]
            what = key if choice == "name" else choice
            return f"{key}.{choice}: {unknown(what, context['tag'], _kinds(key))}"
        case "union_tag_not_found":
            return f"{key}.{KIND_KEYS[key]}: missing; known: {', '.join(_kinds(key))}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {context['error']}" if key else str(context["error"])
    return f"{key} = {detail['input']!r}: {detail['msg'].lower()}"


def _keys(place: Sequence[str], kind: str | None) -> list[str]:
    """The keys that are known at a place: of the experiment, or of one of its tables."""
    if not place:
        return [name for name in Experiment.model_fields if name not in ("id", "preset")]
    if len(place) > 1:
        return [*ZoneTable.model_fields]  # the only tables within a table
    if kind:
        return [*_kinds(place[0])[kind].model_fields]
    annotation = Experiment.model_fields[place[0]].annotation
    options = (annotation, *get_args(annotation))
    table = next(option for option in options if hasattr(option, "model_fields"))
    return [*table.model_fields]


def _kinds(table: str) -> dict[str, type[Table]]:
    """The kinds of a table by the value that chooses them."""
    key = KIND_KEYS[table]
    return {get_args(kind.model_fields[key].annotation)[0]: kind for kind in KINDS[table]}
