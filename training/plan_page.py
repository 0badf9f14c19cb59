"""A plan as a page for the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from training.plan import MEMORY_FORMULA, PROMPT_TOKENS, Count, NoiseOf, Plan, Sites

_BARS = "▁▂▃▄▅▆▇█"
_MOST_GROUPS = 6


def as_text(plan: Plan) -> str:
    """The plan as JSON; sizes in bytes, times in seconds."""
    tables = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "experiment"}
    plain = {name: _plain(value) for name, value in tables.items()}
    plain["memory"]["total"] = plan.memory.total
    return json.dumps({"experiment": plan.experiment.model_dump(mode="json"), **plain}, indent=2)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def page(plan: Plan) -> RenderableType:
    """The plan as a page of 80 columns and more."""
    e, table = plan.experiment, Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in [
        ("question", escape(e.question.ask)),
        ("model", f"{e.model.name}, {e.model.dtype}, {_method(plan)}"),
        *_size(plan),
        *_noise(plan),
        *_sites(plan.sites),
        *_memory(plan),
        ("time", f"{_duration(plan.duration.seconds)}: {escape(plan.duration.source)}"),
        *_differences(plan),
        *_published(plan),
        (
            "detectable",
            f"{plan.detectable:.1%} between two runs, on {plan.size.eval_problems} problems of which "
            f"{plan.discordance:.0%} are answered differently (two-sided 5 %, power "
            "80 %); the spread of seeds is not in it",
        ),
    ]:
        table.add_row(name, text)
    return Group(f"[bold]{e.id}[/bold] ({e.preset or 'no preset'}), seed {plan.seed}", table)


def _method(plan: Plan) -> str:
    e = plan.experiment
    lora = e.lora.model_dump()
    trained = f"LoRA of rank {lora['rank']}" if lora["method"] == "lora" else "all weights trained"
    return f"{trained}, {e.algorithm.name.upper()}"


def _size(plan: Plan) -> list[tuple[str, str]]:
    size, a, problems = plan.size, plan.experiment.algorithm, plan.experiment.task.prompts
    completions = f"{_count(size.completions)} completions of up to {a.max_new_tokens} tokens"
    return [
        ("steps", f"{size.steps}, {a.epochs} epoch{'s' if a.epochs > 1 else ''} of {problems} problems"),
        ("updates", f"{size.updates}, {a.updates_per_step} a step"),
        ("generation", f"{_count(size.generation_batches)} batches of {a.prompts_per_step} prompts"),
        ("prompts", f"{_count(size.prompts)}, {completions}"),
    ]


def _count(count: Count) -> str:
    return f"{count.least}" if count.least == count.most else f"{count.least} to {count.most}"


def _noise(plan: Plan) -> list[tuple[str, str]]:
    if not plan.noise:
        return [("sigma", "no noise")]
    first, *others = sorted(plan.noise, key=lambda group: -max(group.sigma))
    highest = max(first.sigma)
    rows = [f"{_bars(first.sigma)}  steps 1 to {plan.size.steps}, {first.where}", _stages(first)]
    if len(others) >= _MOST_GROUPS:
        peaks = ", ".join(f"{max(group.sigma):.3g} ({group.where})" for group in plan.noise)
        return [("sigma", rows[0]), ("", rows[1]), ("", f"by layer, at most: {peaks}")]
    for group in others:
        rows.append(f"{_bars(group.sigma, highest)}  up to {max(group.sigma):.3g}, {group.where}")
    return [("sigma" if i == 0 else "", row) for i, row in enumerate(rows)]


def _stages(group: NoiseOf) -> str:
    """Sigma by stretches of equal value: "0 (1-3), 0.05 (4-6)"."""
    texts, start = [], 0
    for step in range(1, len(group.sigma) + 1):
        if step == len(group.sigma) or group.sigma[step] != group.sigma[start]:
            texts.append(f"{group.sigma[start]:.3g} ({start + 1}{f'-{step}' if step - start > 1 else ''})")
            start = step
    return ", ".join(texts)


def _bars(values: Sequence[float], top: float | None = None) -> str:
    """A bar a step, or where there are more than 48, the mean of as many stretches; a dot is no noise."""
    count = min(48, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    highest = top or max(means) or 1.0
    return "".join("·" if mean == 0 else _BARS[min(7, int(8 * mean / highest))] for mean in means)


def _sites(sites: Sequence[Sites]) -> list[tuple[str, str]]:
    """What is asked for, with the roles that it is asked of."""
    by_asked: dict[str, list[Sites]] = {}
    for site in sites:
        by_asked.setdefault(site.asked, []).append(site)
    rows = [(f"{sum(s.count for s in found)} sites: {escape(asked)}", found) for asked, found in by_asked.items()]
    texts = [f"{text}\n[dim]{', '.join(f'{s.count} {s.role or s.kind}' for s in found)}[/dim]" for text, found in rows]
    return [("emulated" if i == 0 else "", text) for i, text in enumerate(texts)] or [("emulated", "nothing")]


def _memory(plan: Plan) -> list[tuple[str, str]]:
    m, tokens = plan.memory, PROMPT_TOKENS[plan.experiment.task.name]
    parts = f"weights {_bytes(m.weights)} (trained {_bytes(m.trained)}), gradients {_bytes(m.gradients)}, AdamW "
    parts += f"{_bytes(m.optimizer)}, activations {_bytes(m.activations)}, logits {_bytes(m.logits)}"
    formula = f"{MEMORY_FORMULA} Prompts of {tokens} tokens are assumed."
    return [("memory", f"{_bytes(m.total)} on one device: {parts}\n[dim]{formula}[/dim]")]


def _differences(plan: Plan) -> list[tuple[str, str]]:
    if plan.differences is None:
        return [("control", "none: a reference")]
    rows = [f"{d.key}: {_value(d.a)}, there {_value(d.b)}" for d in plan.differences]
    shown = rows if len(rows) <= 8 else [*rows[:7], f"and {len(rows) - 7} more"]
    return [("control", escape("\n".join([f"{plan.experiment.question.control_id}, which differs in", *shown])))]


def _published(plan: Plan) -> list[tuple[str, str]]:
    claim = plan.experiment.published
    return [] if claim is None else [("published", escape(f"{claim.score:.2f}, a claim: {claim.caveat}"))]


def _value(value: object) -> str:
    return "unset" if value is None else str(value)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
