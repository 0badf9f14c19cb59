"""One training step of the embedded model, emulated beside ideal: rollout, loss, backward, update."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

import aqnsim
from benchmarks.kernels import Setting
from benchmarks.records import Row
from benchmarks.timing import Call, alternate
from training.adapters import attach_lora
from training.config import load
from training.generation import keyed_uniforms, pad_left, sample
from training.hardware import build_aqn
from training.models import load_model
from training.tasks import task_of

EXPERIMENT, STEPS = "e12", 10


def rows(s: Setting) -> Iterator[Row]:
    """A step under the experiment's profile beside one under the ideal profile.

    Both do the same work: the same prompts, completions of full length, and the same tokens in the loss.
    """
    small = ["algorithm.prompts_per_step=1", "algorithm.micro_batch_size=8"] if s.quick else []
    experiment = load(EXPERIMENT, "smoke" if s.quick else "embedded", small)
    model, tokenizer = load_model(experiment.model.name, dtype=experiment.model.dtype)
    model.generation_config.eos_token_id = None  # full length: the work must not depend on what is sampled
    plain = copy.deepcopy(model)
    aqn = build_aqn(experiment, layers=model.config.num_hidden_layers)
    candidates = {
        "ideal": _step(experiment, plain, tokenizer, "ideal", None),
        EXPERIMENT: _step(experiment, model, tokenizer, experiment.profile.name, aqn),
    }
    seconds = alternate(candidates, s.repeats)
    yield Row(
        suite=s.suite,
        kernel=f"step of {EXPERIMENT}: rollout, loss, backward, update",
        threads=s.threads,
        seconds=seconds[EXPERIMENT],
        beside="the same under the ideal profile",
        beside_seconds=seconds["ideal"],
        metric="of plain",
    )


def _step(experiment: Any, base: Any, tokenizer: Any, profile: str, aqn: Any) -> Call:
    algorithm = experiment.algorithm
    model = attach_lora(base, experiment.lora, seed=0)
    emulation = aqnsim.emulate(model, profile, seed=0, aqn=aqn)
    problems = task_of(experiment.task).problems("train", algorithm.prompts_per_step, 0)
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems for _ in range(algorithm.group_size)]
    uniforms = keyed_uniforms(0, 0, range(len(prompts)), algorithm.max_new_tokens)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
    ids, mask = pad_left(prompts, 0)
    answer = torch.randint(0, model.config.vocab_size, (len(prompts), algorithm.max_new_tokens))

    def run() -> None:
        emulation.begin_step(STEPS // 2, STEPS)  # a step with noise on
        with emulation.phase("rollout"):
            sample(model, tokenizer, prompts, uniforms=uniforms, temperature=algorithm.temperature)
        with emulation.phase("train"):
            for rows in torch.arange(len(prompts)).split(algorithm.micro_batch_size):
                tokens = torch.cat([ids[rows], answer[rows]], 1)
                attention = torch.cat([mask[rows], torch.ones_like(answer[rows])], 1)
                logits = model(
                    input_ids=tokens, attention_mask=attention, logits_to_keep=algorithm.max_new_tokens + 1
                ).logits[:, :-1]
                torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), answer[rows].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
