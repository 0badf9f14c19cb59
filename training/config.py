"""What an experiment is: strict tables from TOML, resolved to one frozen value with a digest.

Sources are merged in this order, the later one winning: the parent that it `extends`, the
experiment, the preset (which supplies the model, the task and the scale), `--set key=value`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from aqnsim._errors import ConfigError, did_you_mean, unknown
from training.sources import (
    DESCRIPTIVE,
    EXPERIMENTS,
    PRESETS,
    find,
    flatten,
    identifier,
    inherit,
    merge,
    names,
    parse_overrides,
    read_preset,
)

if TYPE_CHECKING:
    import aqnsim

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Table(BaseModel):
    """A TOML table: unknown keys, NaN and infinity are refused, and no value changes its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Question(Table):
    """What the experiment asks, and against which control.

    `differs_in` holds the dotted keys (or whole tables) in which it may differ from its control.
    """

    ask: str
    control: str | None = None
    differs_in: tuple[str, ...] = ()

    @property
    def control_id(self) -> str | None:
        """The id of the control, whether `control` is a name or a path to a TOML."""
        return None if self.control is None else identifier(self.control)

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.control is None) != (not self.differs_in):
            raise ValueError("name a control together with what the experiment differs from it in")
        return self


class ProfileTable(Table):
    """The emulated hardware: the name of a profile or a path to its TOML."""

    name: str


class NoAqn(Table):
    """No noise."""

    schedule: Literal["none"]


class Noise(Table):
    """Where and when noise acts; what its sigma does over time is up to the subclass."""

    targets: str = "rmsnorm"
    phases: tuple[Literal["rollout", "train", "eval", "reference"], ...] = ("rollout",)
    multipliers: dict[NonNegativeInt, NonNegativeFloat] = {}
    default_multiplier: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _acts_somewhere(self) -> Self:
        if not self.phases:
            raise ValueError("phases is empty: name at least one, or use schedule = 'none'")
        if self.default_multiplier == 0 and not any(self.multipliers.values()):
            raise ValueError("every multiplier is 0: no layer gets noise; use schedule = 'none'")
        return self


class Constant(Noise):
    """The same sigma at every step."""

    schedule: Literal["constant"]
    sigma: PositiveFloat


class Decay(Noise):
    """A geometric staircase from `sigma_start` down to `sigma_end`."""

    sigma_start: PositiveFloat
    sigma_end: PositiveFloat

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.sigma_end > self.sigma_start:
            raise ValueError(
                f"sigma_end = {self.sigma_end} exceeds sigma_start = {self.sigma_start}: "
                "the schedule decays, so it must not"
            )
        return self


class KStage(Decay):
    """`stages` intervals over the whole run, the first of them without noise."""

    schedule: Literal["k-stage"]
    stages: int

    @model_validator(mode="after")
    def _has_a_trend(self) -> Self:
        if self.stages <= 2:
            raise ValueError(
                f"stages = {self.stages}, but k-stage needs at least 3: the first stage has no "
                "noise, and a decay needs two more"
            )
        return self


class EpochAware(Decay):
    """`stages` stages in each epoch; every epoch starts without noise where `warmup` is true."""

    schedule: Literal["epoch-aware"]
    stages: PositiveInt
    warmup: bool = True


Aqn = Annotated[NoAqn | Constant | KStage | EpochAware, Field(discriminator="schedule")]
SCHEDULES: dict[str, type[Table]] = {
    "none": NoAqn,
    "constant": Constant,
    "k-stage": KStage,
    "epoch-aware": EpochAware,
}


class Lora(Table):
    """The adapters: they are trained, and never emulated."""

    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: Literal["float32", "bfloat16"]
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Algorithm(Table):
    """DAPO: clip-higher, token-level loss, no KL term, dynamic sampling, overlong shaping.

    Lengths are in tokens. `steps` counts generation batches; left out, it follows from the epochs.
    """

    name: Literal["dapo"]
    clip_low: Fraction
    clip_high: PositiveFloat
    epochs: PositiveInt
    group_size: Annotated[int, Field(ge=2)]
    prompts_per_step: PositiveInt
    micro_batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    temperature: PositiveFloat
    max_new_tokens: PositiveInt
    overlong_buffer: NonNegativeInt
    overlong_penalty: NonNegativeFloat
    dynamic_sampling: bool
    max_generation_batches: PositiveInt
    steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.overlong_buffer >= self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} must be below max_new_tokens = {self.max_new_tokens}"
            )
        completions = self.prompts_per_step * self.group_size
        if completions % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} does not divide the {completions} "
                "completions of a step (prompts_per_step * group_size)"
            )
        return self


class ModelTable(Table):
    """The model that is trained, and the dtype its frozen weights are held in."""

    name: str
    dtype: Literal["float32", "bfloat16"]


class TaskTable(Table):
    """The task, with the number of problems to train on and to hold out."""

    name: str
    prompts: PositiveInt
    eval_problems: PositiveInt
    families: dict[str, PositiveFloat]
    examples: NonNegativeInt
    held_out: Fraction


class Rollout(Table):
    """What samples: the emulated model itself, or vLLM with its weights, in each process or in a server."""

    engine: Literal["model", "vllm-colocate", "vllm-server"] = "model"


class Published(Table):
    """A published claim to compare with: never a target, never evidence."""

    score: float
    source: str
    caveat: str


class Experiment(Table):
    """One experiment, resolved: all that is needed to run it, but the seed."""

    id: str
    preset: str | None = None
    question: Question
    profile: ProfileTable
    aqn: Aqn
    lora: Lora
    algorithm: Algorithm
    model: ModelTable
    task: TaskTable
    rollout: Rollout = Rollout()
    published: Published | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the run, each one generation batch; an epoch drops its incomplete last batch."""
        algorithm = self.algorithm
        per_epoch = self.task.prompts // algorithm.prompts_per_step
        return algorithm.steps or algorithm.epochs * per_epoch

    def settings(self) -> dict[str, Any]:
        """All that decides what a run computes, under flattened dotted keys."""
        return flatten(self.model_dump(mode="json", exclude=set(DESCRIPTIVE)))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings as canonical JSON: equal iff `diff` finds nothing."""
        canonical = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

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


def build_aqn(experiment: Experiment) -> aqnsim.AQN | None:
    """The noise that an experiment asks for; None where it asks for none."""
    import aqnsim  # here, so that resolving and listing experiments does not load torch

    aqn = experiment.aqn
    schedule: aqnsim.aqn.Constant | aqnsim.aqn.KStage | aqnsim.aqn.EpochAware
    match aqn:
        case NoAqn():
            return None
        case Constant():
            schedule = aqnsim.aqn.Constant(aqn.sigma)
        case KStage():
            schedule = aqnsim.aqn.KStage(aqn.sigma_start, aqn.sigma_end, aqn.stages)
        case EpochAware():
            schedule = aqnsim.aqn.EpochAware(
                aqn.sigma_start,
                aqn.sigma_end,
                stages_per_epoch=aqn.stages,
                epochs=experiment.algorithm.epochs,
                warmup=aqn.warmup,
            )
    return aqnsim.AQN(
        schedule,
        targets=aqn.targets,
        multipliers=aqn.multipliers,
        default_multiplier=aqn.default_multiplier,
        phases=aqn.phases,
    )


def _resolve(experiment: str, preset: str | None, overrides: Sequence[str]) -> Experiment:
    settable = [name for name in Experiment.model_fields if name not in DESCRIPTIVE]
    tables = inherit(find(EXPERIMENTS, experiment))
    if preset is not None:
        tables = merge(tables, read_preset(find(PRESETS, preset)))
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
    schedule = None
    if len(place) > 1 and place[0] == "aqn":
        schedule = place.pop(1)
    key, context = ".".join(place), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            known = _keys(place[:-1], schedule)
            where = f" for schedule {schedule!r}" if schedule else ""
            hint = did_you_mean(place[-1], known) or f"; known: {', '.join(known)}"
            return f"{key}: unknown key{where}{hint}"
        case "union_tag_invalid":
            return f"{key}.schedule: {unknown('schedule', context['tag'], SCHEDULES)}"
        case "union_tag_not_found":
            return f"{key}.schedule: missing; known: {', '.join(SCHEDULES)}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {context['error']}" if key else str(context["error"])
    return f"{key} = {detail['input']!r}: {detail['msg'].lower()}"


def _keys(place: Sequence[str], schedule: str | None) -> list[str]:
    """The keys that are known at a place: of the experiment, or of one of its tables."""
    if not place:
        return [name for name in Experiment.model_fields if name not in ("id", "preset")]
    if schedule:
        return [*SCHEDULES[schedule].model_fields]
    annotation = Experiment.model_fields[place[0]].annotation
    options = (annotation, *get_args(annotation))
    table = next(option for option in options if hasattr(option, "model_fields"))
    return [*table.model_fields]
