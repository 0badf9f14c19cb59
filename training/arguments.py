"""DAPO's and GRPO's settings in TRL's words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from trl.trainer.grpo_config import GRPOConfig

from aqnsim._errors import ConfigError
from training.config import Algorithm
from training.sharding import FSDP_CONFIG


def grpo_config(
    algorithm: Algorithm,
    *,
    output_dir: str | Path,
    seed: int,
    steps: int | None = None,
    save_every: int = 10,
    keep_checkpoints: int = 2,
    gradient_checkpointing: bool = False,
    report_to: Sequence[str] = ("tensorboard",),
    world_size: int | None = None,
    fsdp: bool = False,
    engine: str = "model",
) -> GRPOConfig:
    """The settings of an algorithm for TRL, to which one optimizer update is one generation batch.

    `DapoTrainer` divides a step's completions among its updates, so TRL's steps are updates here. TRL's own KL term
    is left off: the trainer has the reference's log-probabilities for the completions that are kept, and no others.

    Args:
        algorithm: the settings of the experiment.
        output_dir: where checkpoints and TensorBoard logs go.
        seed: of the problems' order, of the sampling and of LoRA's dropout.
        steps: generation batches of the run; None takes those that the algorithm names.
        save_every: generation batches between checkpoints; the last step always has one.
        keep_checkpoints: how many of the newest are kept.
        gradient_checkpointing: recompute activations in the backward.
        report_to: trackers of transformers, such as "tensorboard".
        world_size: ranks; None takes what torchrun says, else one.
        fsdp: keep weights in shards over the ranks, by FSDP2; else each rank has all of them.
        engine: what samples, as `Rollout.engine`.

    Raises:
        ConfigError: the step's completions cannot be divided among ranks and micro-batches.
    """
    ranks = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    if fsdp and ranks == 1:
        raise ConfigError("--fsdp shards weights over processes, and there is one: start several with torchrun")
    updates = algorithm.updates_per_step
    if algorithm.prompts_per_step % (ranks * updates):
        raise ConfigError(
            f"algorithm.prompts_per_step = {algorithm.prompts_per_step} is not a multiple of the {ranks} ranks"
            f"{f' times {updates} updates' if updates > 1 else ''}: a prompt's group stays on one rank"
            f"{' and in one update' if updates > 1 else ''}"
        )
    per_rank = algorithm.prompts_per_step * algorithm.group_size // (ranks * updates)
    if per_rank % algorithm.micro_batch_size:
        raise ConfigError(
            f"algorithm.micro_batch_size = {algorithm.micro_batch_size} does not divide the {per_rank} completions "
            f"of a rank in an update (prompts_per_step {algorithm.prompts_per_step} * group_size "
            f"{algorithm.group_size} / {ranks} ranks / {updates} updates)"
        )
    return GRPOConfig(
        output_dir=str(output_dir),
        seed=seed,
        # policy gradient: the token-level loss is DAPO's, the mean over sequences GRPO's
        loss_type=algorithm.name,
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        beta=0.0,
        scale_rewards="group",
        reward_weights=[1.0, algorithm.overlong_penalty],
        num_generations=algorithm.group_size,
        max_completion_length=algorithm.max_new_tokens,
        temperature=algorithm.temperature,
        use_vllm=engine != "model",
        vllm_mode=engine.removeprefix("vllm-") if engine != "model" else "colocate",
        vllm_importance_sampling_correction=False,
        # optimizer
        max_steps=(steps or algorithm.steps or 0) * updates or -1,
        num_train_epochs=algorithm.epochs,
        learning_rate=algorithm.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=algorithm.warmup_steps * updates,
        weight_decay=algorithm.weight_decay,
        max_grad_norm=algorithm.max_grad_norm,
        per_device_train_batch_size=algorithm.micro_batch_size,
        gradient_accumulation_steps=per_rank // algorithm.micro_batch_size,
        activation_checkpointing=gradient_checkpointing,
        # No autocast: weights, adapters and activations keep the dtypes that the experiment names.
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        fsdp=fsdp or None,  # type: ignore[arg-type]
        fsdp_config=dict(FSDP_CONFIG) if fsdp else None,
        # records
        save_strategy="steps",
        save_steps=save_every * updates,
        save_total_limit=keep_checkpoints,
        logging_steps=updates,
        logging_nan_inf_filter=False,
        report_to=list(report_to),
        disable_tqdm=True,
    )
