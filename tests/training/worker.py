"""One rank of the runs that test_distributed compares; writes what it saw on rank 0 as <directory>/<ranks>.json."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights
from stubs import Run, holds_answer, problems, same, tiny_tokenizer

import aqnsim
from training.checkpoints import require_checkpoint
from training.engines.readback import read
from training.engines.vllm import engine_weights
from training.evaluate import evaluate_modes

STEPS = 3


PROFILE = """
name = "weights-and-errors"
description = "for this test"
exclude = ["lm_head"]

[source]
definition = "for this test"

[[rule]]
kind = "linear"
forward.weight = "mxfp4"
forward.error = "relative-gaussian(sigma=0.05)"
grad_input.error = "relative-gaussian(sigma=0.05)"
"""


def emulate(model: torch.nn.Module) -> aqnsim.Emulation:
    """Weights in MXFP4, an error on every product, and noise in the rollouts."""
    path = Path(sys.argv[1]) / "weights-and-errors.toml"
    path.write_text(PROFILE)
    aqn = aqnsim.AQN(aqnsim.aqn.Constant(value=0.2))
    return aqnsim.emulate(model, path, seed=0, aqn=aqn)


def train(directory: Path) -> Run:
    return Run(directory, emulate=emulate, steps=STEPS, save_every=50, fsdp="fsdp" in sys.argv)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    straight = train(directory / "straight").train()
    rank, ranks = straight.trainer.args.process_index, straight.trainer.args.world_size
    per_step = len(straight.micro_batches) // STEPS
    seen = {  # sequences are numbered anew in each step
        f"{n // per_step}:{int(i)}": tokens[mask.bool()].tolist()
        for n, batch in enumerate(straight.micro_batches)
        for i, tokens, mask in zip(
            batch["sequence_ids"], batch["completion_ids"], batch["completion_mask"], strict=True
        )
    }

    # Ctrl-C reaches the last rank only; all have to stop at the same step.
    interrupted = train(directory / "interrupted")

    def interrupt(*_: Any) -> None:
        if rank == ranks - 1 and interrupted.emulation.step == 0 and not interrupted.trainer.interrupt.requested:
            signal.raise_signal(signal.SIGINT)

    interrupted.model.register_forward_pre_hook(interrupt)
    interrupted.train()
    checkpoint = str(require_checkpoint(directory / "interrupted"))
    resumed = train(directory / "interrupted").train(resume_from_checkpoint=checkpoint)
    adapters = straight.adapters
    exact = same(resumed.adapters, adapters)
    saved = load_peft_weights(checkpoint)

    results = evaluate_modes(
        straight.emulation,
        straight.model,
        tiny_tokenizer(),
        problems(11),
        holds_answer,
        batch_size=4,  # three batches: the second rank has one, the first two
        max_new_tokens=6,
    )
    straight.emulation.check_frozen()  # as before a sync: the shards are what counts
    pushed = {name: read(w) for name, w in engine_weights(straight.model, straight.emulation, noisy=True)}
    receipts = straight.emulation.receipts(until=straight.emulation.snapshot(reduce=True))
    gathered: list[Any] = [None] * ranks
    mine = (seen, exact, interrupted.trainer.state.global_step)
    if ranks > 1:
        torch.distributed.all_gather_object(gathered, mine)
    else:
        gathered = [mine]
    if rank == 0:
        torch.save(adapters, directory / f"{ranks}.pt")
        summary = {
            "metrics": straight.results,
            "micro_batches": len(straight.micro_batches),
            "tokens": {i: tokens for seen, _, _ in gathered for i, tokens in seen.items()},
            "resumed_exactly": [exact for _, exact, _ in gathered],
            "resumed_metrics_equal": interrupted.results + resumed.results == straight.results,
            "interrupted_at": [step for _, _, step in gathered],
            "evaluation": {m: [[r.problem_id, r.completion] for r in rows] for m, rows in results.items()},
            "receipts": [r.to_dict() for r in receipts],
            "pushed": [[name, *(reading if "norm" in name else ())] for name, reading in pushed.items()],
            "saved": [[name, list(tensor.shape)] for name, tensor in saved.items()],
        }
        (directory / f"{ranks}.json").write_text(json.dumps(summary))
    straight.trainer.accelerator.wait_for_everyone()
    straight.trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
