"""The tables of an experiment: each key with its type, its range, and what it goes together with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from training.sources import LORA_METHOD, identifier

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Table(BaseModel):
    """A TOML table: unknown keys, NaN and infinity are refused, and no value changes its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Question(Table):
    """What the experiment asks, and against which control.

    `differs_in` holds the dotted keys (or whole tables) in which it may differ from its control; `family` is what lists
    group experiments by.
    """

    ask: str
    family: str = "others"
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
    """The emulated hardware: a profile (its name or a path to its TOML), and what is kept of it.

    `directions` says which passes keep their errors and casts. `keep_layers` are decoder layers that are not emulated,
    counted from 0, or from the end as -1, -2. `evaluate_on` is another profile, which takes over in evaluations.
    """

    name: str
    directions: Literal["both", "forward", "backward"] = "both"
    keep_layers: tuple[int, ...] = ()
    evaluate_on: str | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.evaluate_on == self.name:
            raise ValueError(f"evaluate_on = {self.name!r} is the profile itself: leave it out")
        if len(set(self.keep_layers)) < len(self.keep_layers):
            raise ValueError(f"keep_layers = {list(self.keep_layers)} names a layer twice")
        return self


# ---- adaptive quantization noise -------------------------------------------------------------------------------------


class NoAqn(Table):
    """No noise."""

    schedule: Literal["none"]


class ZoneTable(Table):
    """Layers `first` to `last`, both included: a factor on sigma, or factors by the share of the run that is over.

    `factors` is a staircase of (begin, factor) pairs: [[0.0, 1.0], [0.5, 0.5]] halves sigma in the second half.
    """

    first: NonNegativeInt
    last: NonNegativeInt
    multiplier: NonNegativeFloat | None = None
    factors: tuple[tuple[NonNegativeFloat, NonNegativeFloat], ...] | None = None

    @model_validator(mode="after")
    def _is_one_range_with_one_rule(self) -> Self:
        if self.first > self.last:
            raise ValueError(f"first = {self.first} exceeds last = {self.last}")
        if (self.multiplier is None) == (self.factors is None):
            raise ValueError("give a zone either a multiplier or factors")
        return self


class Noise(Table):
    """Where and when noise acts; what its sigma does over time is up to the subclass.

    Layers that get another share of sigma than `default_multiplier` are named one by one (`multipliers`), in ranges
    (`zones`), or drawn with the run's seed (`random_layers` of them get all of it). `layers_of` says how many layers
    the model has that their numbers are of; a model of another depth gets them in proportion.
    """

    targets: str = "rmsnorm"
    phases: tuple[Literal["rollout", "train", "eval", "reference"], ...] = ("rollout",)
    multipliers: dict[NonNegativeInt, NonNegativeFloat] = {}
    default_multiplier: NonNegativeFloat = 1.0
    zones: tuple[ZoneTable, ...] = ()
    random_layers: PositiveInt | None = None
    layers_of: PositiveInt | None = None

    @model_validator(mode="after")
    def _acts_somewhere(self) -> Self:
        if not self.phases:
            raise ValueError("phases is empty: name at least one, or use schedule = 'none'")
        if self.default_multiplier == 0 and not (any(self.multipliers.values()) or self.zones or self.random_layers):
            raise ValueError("every multiplier is 0: no layer gets noise; use schedule = 'none'")
        return self

    @model_validator(mode="after")
    def _names_layers_once(self) -> Self:
        if self.random_layers and (self.multipliers or self.zones):
            raise ValueError("random_layers draws the layers: name none in multipliers or zones")
        named = [*self.multipliers, *(zone.last for zone in self.zones), (self.random_layers or 0) - 1]
        if self.layers_of is not None:
            if max(named) < 0:
                raise ValueError(f"layers_of = {self.layers_of} has no effect: no layer is named")
            if max(named) >= self.layers_of:
                raise ValueError(f"layers_of = {self.layers_of}, but more layers are named or drawn than that")
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


# ---- what is trained, and how ----------------------------------------------------------------------------------------


class Lora(Table):
    """The adapters: they are trained, and never emulated."""

    method: Literal["lora"] = LORA_METHOD
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: Literal["float32", "bfloat16"]
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class NoLora(Table):
    """No adapters: all weights are trained."""

    method: Literal["none"]


def _method(table: Any) -> Any:
    return table.get("method", LORA_METHOD) if isinstance(table, Mapping) else getattr(table, "method", None)


Adapters = Annotated[
    Annotated[Lora, Tag("lora")] | Annotated[NoLora, Tag("none")],
    Discriminator(_method),  # not by the field's name: records of earlier versions have no method
]


Mismatch = Literal["report", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]
"""What is done about a loss whose policy is not the one that sampled; see `training.mismatch`."""


class Algorithm(Table):
    """The policy gradient, its clip, its rollouts and its optimizer.

    `dapo` has a token-level loss and may leave out groups that agree (`dynamic_sampling`); `grpo` has the mean over
    sequences, and uses every group. Lengths are in tokens. `steps` counts generation batches; left out, it follows
    from the epochs. `kl` weighs the divergence from the policy that training began with; 0 leaves it out.
    `updates_per_step` is how many optimizer updates a generation batch is divided into. `mismatch` says what is done
    about the distance between rollout and loss, and `mismatch_limit` where ratios are cut.
    """

    name: Literal["dapo", "grpo"]
    clip_low: Fraction
    clip_high: PositiveFloat
    epochs: PositiveInt
    group_size: Annotated[int, Field(ge=2)]
    prompts_per_step: PositiveInt
    updates_per_step: PositiveInt = 1
    micro_batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    kl: NonNegativeFloat = 0.0
    temperature: PositiveFloat
    max_new_tokens: PositiveInt
    overlong_buffer: NonNegativeInt
    overlong_penalty: NonNegativeFloat
    dynamic_sampling: bool
    max_generation_batches: PositiveInt
    mismatch: Mismatch = "report"
    mismatch_limit: PositiveFloat = 3.0
    steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.overlong_buffer >= self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} must be below max_new_tokens = {self.max_new_tokens}"
            )
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"updates_per_step = {self.updates_per_step} does not divide prompts_per_step = "
                f"{self.prompts_per_step}: a prompt's group belongs to one update"
            )
        completions = self.prompts_per_step // self.updates_per_step * self.group_size
        if completions % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} does not divide the {completions} "
                "completions of an update (prompts_per_step / updates_per_step * group_size)"
            )
        return self

    @model_validator(mode="after")
    def _is_that_algorithm(self) -> Self:
        if self.name == "grpo" and self.dynamic_sampling:
            raise ValueError("name = 'grpo' uses every group: set dynamic_sampling = false, or name = 'dapo'")
        return self


class Alarms(Table):
    """When a run is said to go wrong; see `training.alarms`. A rule has to hold for `patience` steps on end.

    Attributes:
        entropy_low, entropy_high: of the policy, nats a token.
        clipped: share of tokens that the clip cut.
        truncated: share of completions that were cut off.
        length_drop: mean length over that of the first step.
        uninformative: share of groups whose answers all agree.
        reward_drop: how far the mean reward of `patience` steps lies below the best such mean.
        kl: to the policy that training began with, nats a token.
        mismatch: k3 estimate of KL(rollout || loss), nats a token.
        stop: end the run with an error at the first alarm.
    """

    patience: PositiveInt = 5
    entropy_low: NonNegativeFloat = 0.001
    entropy_high: PositiveFloat = 5.0
    clipped: PositiveFloat = 0.5
    truncated: PositiveFloat = 0.9
    length_drop: NonNegativeFloat = 0.1
    uninformative: PositiveFloat = 0.99
    reward_drop: PositiveFloat = 0.3
    kl: PositiveFloat = 1.0
    mismatch: PositiveFloat = 1.0
    stop: bool = False


class ModelTable(Table):
    """The model that is trained, and the dtype its weights are held in."""

    name: str
    dtype: Literal["float32", "bfloat16"]


# ---- tasks -----------------------------------------------------------------------------------------------------------


class TaskTable(Table):
    """The number of problems to train on and to hold out; what else there is depends on the task."""

    prompts: PositiveInt
    eval_problems: PositiveInt

    @property
    def parameters(self) -> dict[str, Any]:
        """The keys of this task alone."""
        own = type(self).model_fields.keys() - TaskTable.model_fields.keys() - {"name"}
        return {key: getattr(self, key) for key in sorted(own)}


class ArithmeticTask(TaskTable):
    """Sums and products that are drawn on the spot; see `training.tasks.Arithmetic`."""

    name: Literal["arithmetic"]
    families: dict[str, PositiveFloat]
    examples: NonNegativeInt
    held_out: Fraction


class Gsm8kTask(TaskTable):
    """Word problems of GSM8K; `data` is the id of the data set on the hub, or a folder that holds it."""

    name: Literal["gsm8k"]
    data: str


AnyTask = Annotated[ArithmeticTask | Gsm8kTask, Field(discriminator="name")]


class Rollout(Table):
    """What samples: the emulated model itself, or vLLM with its weights, in each process or in a server."""

    engine: Literal["model", "vllm-colocate", "vllm-server"] = "model"


class Published(Table):
    """A published claim to compare with: never a target, never evidence."""

    score: float
    source: str
    caveat: str
