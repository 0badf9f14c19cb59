"""What a run is going to do, before it does it: its steps, its noise, its sites, its memory and its time."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import aqnsim
from aqnsim import Emulation
from training.adapters import attach_lora, trainable
from training.architectures import architecture, narrowed, saved_bytes, without_weights
from training.config import Difference, Experiment, Lora, covers, diff, load
from training.hardware import build_aqn, build_profile
from training.records import METRICS, StepMetrics
from training.rundir import RunDirectory, RunDirectoryError
from training.statistics import minimum_detectable_effect

PROMPT_TOKENS = {"arithmetic": 64, "gsm8k": 256}
"""Length of a prompt by task, assumed for memory and time: above that of most of them."""

DISCORDANCE = 0.2
"""Share of the held-out problems that two arms are assumed to answer differently."""


@dataclass(frozen=True)
class Count:
    """What is made in the run; `most` is with every refill that dynamic sampling may ask for."""

    least: int
    most: int


@dataclass(frozen=True)
class Size:
    """Steps, batches and updates of the run."""

    steps: int
    updates: int
    generation_batches: Count
    prompts: Count
    completions: Count
    eval_problems: int


@dataclass(frozen=True)
class NoiseOf:
    """Sigma by step, from step 0, on the sites `where`."""

    where: str
    sigma: tuple[float, ...]


@dataclass(frozen=True)
class Sites:
    """How many sites there are of one role that are asked for one thing in one direction."""

    kind: str
    role: str
    asked: str
    count: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, without sharding; see `MEMORY_FORMULA`."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


MEMORY_FORMULA = (
    "weights, adapters included, in their dtypes; a gradient and two moments of AdamW for each that is trained; what "
    "autograd keeps of one micro-batch up to the last norm, counted on the meta device; its logits and their gradient. "
    "No sharding, no recomputation, no caches."
)


@dataclass(frozen=True)
class Duration:
    """Seconds, and what they are estimated from."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Plan:
    """All that can be told of a run before it starts."""

    experiment: Experiment
    seed: int
    size: Size
    noise: tuple[NoiseOf, ...]
    sites: tuple[Sites, ...]
    memory: Memory
    duration: Duration
    differences: tuple[Difference, ...] | None
    discordance: float
    detectable: float


def plan(
    experiment: str, preset: str | None, overrides: list[str], *, seed: int = 0, runs: Path = Path("runs")
) -> Plan:
    """Plan a run; nothing is trained, fetched or written.

    Args:
        experiment, preset, overrides: as for a run.
        seed: of the run.
        runs: where finished runs are looked for, whose speed tells the duration.

    Raises:
        ConfigError, UnknownNameError: the run would be refused, or the model's shapes are not known.
    """
    e = load(experiment, preset, overrides)
    config = architecture(e.model.name)
    emulation = attached(e, narrowed(config), seed)
    real = _adapted(without_weights(config, e.model.dtype), e)
    control = e.question.control
    n = e.task.eval_problems
    return Plan(
        experiment=e,
        seed=seed,
        size=size_of(e),
        noise=noise_of(emulation, e.total_steps),
        sites=sites_of(emulation),
        memory=memory_of(e, real),
        duration=_from_runs(e, runs) or _from_flops(e, real),
        differences=None if control is None else tuple(diff(e, load(control, preset, _shared(e, overrides)))),
        discordance=DISCORDANCE,
        detectable=minimum_detectable_effect(n, DISCORDANCE),
    )


def _shared(e: Experiment, overrides: list[str]) -> list[str]:
    """The overrides that the control gets too: all but those of what the experiment asks about."""
    return [text for text in overrides if not covers(e.question.differs_in, text.partition("=")[0].strip())]


# ---- parts -----------------------------------------------------------------------------------------------------------


def size_of(e: Experiment) -> Size:
    """Steps, batches and updates."""
    a, steps = e.algorithm, e.total_steps
    batches = Count(steps, steps * (a.max_generation_batches if a.dynamic_sampling else 1))
    prompts = Count(batches.least * a.prompts_per_step, batches.most * a.prompts_per_step)
    completions = Count(prompts.least * a.group_size, prompts.most * a.group_size)
    return Size(steps, steps * a.updates_per_step, batches, prompts, completions, e.task.eval_problems)


def noise_of(emulation: Emulation, steps: int) -> tuple[NoiseOf, ...]:
    """Sigma by step on each group of layers that has the same; empty without noise."""
    aqn = emulation.aqn
    if aqn is None:
        return ()
    aqn.check(steps)
    groups: dict[tuple[float, ...], list[int]] = {}
    for site in emulation.sites:
        if site.takes_noise:
            layer = aqnsim.aqn.layer_of(site.name)
            sigma = tuple(aqn.sigma(site.name, step, steps) for step in range(steps))
            groups.setdefault(sigma, []).append(-1 if layer is None else layer)
    return tuple(NoiseOf(_layers(set(found)), sigma) for sigma, found in groups.items())


def _layers(layers: set[int]) -> str:
    """Layers in words, -1 standing for the sites outside of them."""
    inside = sorted(layers - {-1})
    runs: list[list[int]] = []
    for layer in inside:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    texts = ["-".join(map(str, run)) for run in runs]
    words = [f"layer{'s' if len(inside) > 1 else ''} {', '.join(texts)}"] if inside else []
    return " and ".join([*words, *(["the last norm"] if -1 in layers else [])])


def sites_of(emulation: Emulation) -> tuple[Sites, ...]:
    """What is emulated: each thing that is asked for, with the number of sites of each role that it is asked of."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for site in emulation.sites:
        for spec in dict.fromkeys(site.specs.values()):
            for direction, part in spec.parts:
                for field, value in part.asked.items():
                    counts[site.kind, site.role, f"{direction}.{field} = {value}"] += 1
        if site.takes_noise:
            counts[site.kind, site.role, "AQN"] += 1
    return tuple(Sites(*key, count) for key, count in sorted(counts.items()))


def memory_of(e: Experiment, model: nn.Module) -> Memory:
    """Bytes by what they hold."""
    a = e.algorithm
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for _, p in trainable(model))
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    logits = 2 * a.micro_batch_size * a.max_new_tokens * vocabulary * parameters[0].element_size()
    activations = saved_bytes(model, a.micro_batch_size, _tokens(e))
    return Memory(weights, trained, trained, 2 * trained, activations, logits)


def _from_runs(e: Experiment, runs: Path) -> Duration | None:
    """From the newest finished run of the preset, by its seconds per step."""
    for path in sorted(runs.glob("*/run.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            run = RunDirectory.open(path.parent)
            finished = run.status.state == "finished" and run.experiment.preset == e.preset
            seconds = [row.seconds for row in run.read_jsonl(METRICS, StepMetrics)] if finished else []
        except RunDirectoryError:
            continue  # a run of another version, or one that is being made
        if seconds:
            mean = sum(seconds) / len(seconds)
            source = f"training alone, at {mean:.2f} s a step as in {run.path.name} ({run.experiment.id})"
            return Duration(mean * e.total_steps, source)
    return None


def _from_flops(e: Experiment, model: nn.Module) -> Duration:
    """From the products of the linear layers and the speed of one of them here: a lower bound."""
    size, a = size_of(e), e.algorithm
    linears = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    forward = 2 * sum(linears) * _tokens(e)  # of one completion
    passes = (2 if isinstance(e.lora, Lora) else 3) + (a.kl > 0) + (a.updates_per_step > 1)
    trained = size.steps * a.prompts_per_step * a.group_size
    evaluated = 4 * e.task.eval_problems  # before and after, clean and emulated
    flops = forward * (size.completions.least + passes * trained + evaluated)
    speed = gemm_speed(getattr(torch, e.model.dtype))
    return Duration(
        flops / speed,
        f"a lower bound: {flops:.2g} FLOPs of linear layers at full length, no refills, at the {speed / 1e9:.0f} "
        f"GFLOP/s of a {e.model.dtype} product of 1024 x 1024 here",
    )


def gemm_speed(dtype: torch.dtype, size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of a square product on this machine: the best of some repeats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _tokens(e: Experiment) -> int:
    return PROMPT_TOKENS[e.task.name] + e.algorithm.max_new_tokens


def _adapted(model: nn.Module, e: Experiment) -> nn.Module:
    """The model as it is trained."""
    if isinstance(e.lora, Lora):
        with torch.device(next(model.parameters()).device):
            return attach_lora(model, e.lora, seed=0)  # type: ignore[arg-type]
    return model


def attached(e: Experiment, model: nn.Module, seed: int) -> Emulation:
    """The emulation of a run, on a small model of the same depth.

    Raises:
        ConfigError: the profile or the noise does not fit the model.
    """
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    profile, aqn = build_profile(e, layers=layers), build_aqn(e, layers=layers, seed=seed)
    return aqnsim.emulate(_adapted(model, e), profile, seed=seed, aqn=aqn, strict=True)
