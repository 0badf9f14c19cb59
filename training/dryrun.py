"""A rehearsal of a large run: its profile, noise, adapters and algorithm, at the scale of a test."""

from __future__ import annotations

import json

from training.config import Experiment, from_json
from training.sources import PRESETS, find, over_preset

TINY = {"Qwen/Qwen2.5-1.5B-Instruct": "tiny-qwen2"}
"""The tiny model of the same architecture; that of the smoke preset for all others."""

STEPS = 3


def shrunk(experiment: Experiment, processes: int) -> Experiment:
    """The experiment with a tiny model of the same architecture and the smoke preset's task, for a few steps.

    Profile, AQN, adapters but for their rank, the optimizer, the loss and dynamic sampling are the experiment's own.

    Args:
        experiment: resolved.
        processes: each gets four groups a step.
    """
    tables = experiment.model_dump(mode="json")
    kind = {"algorithm": {"name": experiment.algorithm.name}, "lora": {"method": experiment.lora.method}}
    smoke = over_preset(kind, find(PRESETS, "smoke"))
    prompts = 4 * processes
    epochs = tables["algorithm"]["epochs"]
    tables["preset"] = f"{experiment.preset or 'default'}-dry-run"
    tables["model"]["name"] = TINY.get(experiment.model.name, smoke["model"]["name"])
    tables["task"] = smoke["task"] | {"prompts": STEPS * prompts, "eval_problems": 4 * processes}
    if "rank" in tables["lora"]:
        tables["lora"]["rank"] = min(8, tables["lora"]["rank"])
    tables["algorithm"] |= {
        "group_size": 4,
        "prompts_per_step": prompts,
        "micro_batch_size": 4,
        "max_new_tokens": smoke["algorithm"]["max_new_tokens"],
        "overlong_buffer": smoke["algorithm"]["overlong_buffer"],
        "max_generation_batches": 2,
        "steps": STEPS * epochs,
    }
    return from_json(json.dumps(tables), f"the dry run of {experiment.id!r}")


def outline(experiment: Experiment, processes: int) -> str:
    """What the full run does, by step and by process."""
    algorithm = experiment.algorithm
    completions = algorithm.prompts_per_step * algorithm.group_size
    sampled = completions * (algorithm.max_generation_batches if algorithm.dynamic_sampling else 1)
    share = completions // processes
    return (
        f"{experiment.model.name} ({experiment.model.dtype}) on {processes} processes, profile "
        f"{experiment.profile.name}, {experiment.total_steps} steps\n"
        f"a step: {algorithm.prompts_per_step} prompts, {completions} completions kept of up to {sampled} sampled, "
        f"each of up to {algorithm.max_new_tokens} tokens\n"
        f"a process: {share} completions, {share / algorithm.micro_batch_size:g} micro-batches of "
        f"{algorithm.micro_batch_size}"
    )
