"""DAPO (arXiv 2503.14476) on TRL's GRPOTrainer, with rollouts and loss on emulated hardware.

TRL has the asymmetric clip, the token-level loss and the group advantage. Added here are dynamic sampling, the phases
and sequence ids that the emulation needs, and a run that is a pure function of its config and seed: which problems a
step sees, and with which random numbers, depends neither on the number of ranks, nor on the split into micro-batches,
nor on whether the run was interrupted and resumed.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, load_fsdp_model  # type: ignore[import-untyped]
from accelerate.utils.constants import FSDP_MODEL_NAME  # type: ignore[import-untyped]
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl.rewards.other_rewards import get_soft_overlong_punishment
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from aqnsim._errors import ConfigError
from training import checkpoints
from training.callbacks import AqnCallback, InterruptCallback, ShardingGuard, UpdateGuard
from training.config import Algorithm
from training.generation import TokenIds, generate, keyed_uniforms, pad_left
from training.prompts import PromptSchedule
from training.sharding import FSDP_CONFIG, admit_cpus, gathered, trained_state
from training.tasks import Problem

if TYPE_CHECKING:
    from aqnsim import Emulation

logger = logging.getLogger(__name__)

PROFILE_FILE = "profile.json"
"""In each checkpoint: the profile that it was trained under."""


Score = Callable[[str, str], bool]
"""score(completion, answer): whether the completion answers the problem."""


def grpo_config(
    algorithm: Algorithm,
    *,
    output_dir: str | Path,
    seed: int,
    save_every: int = 10,
    keep_checkpoints: int = 2,
    gradient_checkpointing: bool = False,
    report_to: Sequence[str] = ("tensorboard",),
    world_size: int | None = None,
    fsdp: bool = False,
    engine: str = "model",
) -> GRPOConfig:
    """DAPO's settings for TRL: one generation batch is one optimizer step.

    Args:
        algorithm: the settings of the experiment.
        output_dir: where checkpoints and TensorBoard logs go.
        seed: of the problems' order, of the sampling and of LoRA's dropout.
        save_every: steps between checkpoints; the last step always has one.
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
    if algorithm.prompts_per_step % ranks:
        raise ConfigError(
            f"algorithm.prompts_per_step = {algorithm.prompts_per_step} is not a multiple of the {ranks} ranks: "
            "a prompt's group stays on one rank"
        )
    per_rank = algorithm.prompts_per_step * algorithm.group_size // ranks
    if per_rank % algorithm.micro_batch_size:
        raise ConfigError(
            f"algorithm.micro_batch_size = {algorithm.micro_batch_size} does not divide the {per_rank} completions "
            f"of a rank (prompts_per_step {algorithm.prompts_per_step} * group_size {algorithm.group_size} / "
            f"{ranks} ranks)"
        )
    return GRPOConfig(
        output_dir=str(output_dir),
        seed=seed,
        # DAPO
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
        max_steps=algorithm.steps or -1,
        num_train_epochs=algorithm.epochs,
        learning_rate=algorithm.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=algorithm.warmup_steps,
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
        save_steps=save_every,
        save_total_limit=keep_checkpoints,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(report_to),
        disable_tqdm=True,
    )


@dataclass(frozen=True)
class Completion:
    """One sampled completion. Its id is its position among all completions of the step, over all ranks."""

    sequence_id: int
    prompt: TokenIds
    tokens: TokenIds
    advantage: float
    correct: float


Group = Sequence[Completion]
"""The completions of one prompt."""


def is_informative(group: Group) -> bool:
    """Whether the completions differ in accuracy: 0 < correct < G (the constraint of DAPO's eq. 8)."""
    return len({completion.correct for completion in group}) > 1


class DapoTrainer(GRPOTrainer):
    """GRPOTrainer with dynamic sampling, on emulated hardware.

    A step with fewer informative groups than it wants, after `max_generation_batches`, proceeds with what there is:
    the others keep their place with a weight of zero, and the mean is over the tokens of the informative ones. With
    none at all the update is skipped: neither momentum nor weight decay moves a parameter.

    Args:
        model: with its adapters attached (`adapters.attach_lora`).
        tokenizer: of the model.
        algorithm: the settings that `args` was made from.
        args: from `grpo_config`.
        problems: to train on.
        score: the reward, 1 or 0, before the overlong punishment.
        emulation: attached to `model`.
        on_metrics: is given one dict after each optimizer step, on rank 0: the fields of `records.StepMetrics` but
            for the sigmas. `step` is the number of updates with this one, as in the names of checkpoints.
        callbacks: further callbacks of transformers.

    Raises:
        ConfigError: see `refuse_uncovered_lm_head` and `PromptSchedule`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        algorithm: Algorithm,
        args: GRPOConfig,
        problems: Sequence[Problem],
        score: Score,
        emulation: Emulation,
        on_metrics: Callable[[dict[str, Any]], None] = lambda metrics: None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        refuse_uncovered_lm_head(emulation, model)

        def accuracy(completions: list[str], answer: list[str], **_: Any) -> list[float]:
            return [float(score(c, a)) for c, a in zip(completions, answer, strict=True)]

        overlong = get_soft_overlong_punishment(algorithm.max_new_tokens, algorithm.overlong_buffer)
        self.emulation = emulation
        self.algorithm = algorithm
        self.schedule = PromptSchedule(len(problems), algorithm.prompts_per_step, args.seed)
        self.interrupt = InterruptCallback()
        self._on_metrics = on_metrics
        self._policy = model
        self._rows: list[dict[str, Any]] = [{"prompt": p.prompt, "answer": p.answer} for p in problems]
        self._directory = self._writing_to = Path(str(args.output_dir))
        super().__init__(
            model=model,
            reward_funcs=[accuracy, overlong],  # type: ignore[list-item]
            args=args,
            train_dataset=Dataset.from_list(self._rows),
            processing_class=tokenizer,
            callbacks=[AqnCallback(emulation), ShardingGuard(), UpdateGuard(self), self.interrupt, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        if self.use_vllm:
            from training.engines.vllm import AttestedGeneration

            self.engine = AttestedGeneration.adopt(self.vllm_generation, emulation)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            admit_cpus(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer.train does; Ctrl-C ends the run after the current step, with a checkpoint."""
        with self.interrupt:
            return super().train(*args, **kwargs)

    @property
    def interrupted(self) -> bool:
        """Whether the run was ended by Ctrl-C: `train` has returned, and there are steps left."""
        return self.interrupt.requested and self.state.global_step < self.state.max_steps

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Sample the step's completions until enough groups are informative; return this rank's share.

        `inputs` is not read: Trainer's data loader keeps the count of the steps, `PromptSchedule` says what is in
        them. All ranks see all groups, hence take the same decisions, and none waits for a collective alone.
        """
        algorithm = self.algorithm
        wanted, step = algorithm.prompts_per_step, self.state.global_step
        groups = self._sample_groups(step, batch=0)
        batches = 1
        if algorithm.dynamic_sampling:
            while sum(map(is_informative, groups)) < wanted and batches < algorithm.max_generation_batches:
                groups += self._sample_groups(step, batches)
                batches += 1
            groups = sorted(groups, key=is_informative, reverse=True)[:wanted]  # stable: in order of sampling
        kept = sum(map(is_informative, groups))
        self._starved = algorithm.dynamic_sampling and kept < wanted
        self.nothing_to_learn = algorithm.dynamic_sampling and kept == 0
        if self._starved and self.is_world_process_zero():
            logger.warning(
                "step %d is starved: %d of %d groups are informative after %d generation batches; %s",
                *(step + 1, kept, wanted, batches),
                "the update is skipped" if self.nothing_to_learn else "the update is made with these",
            )
        for name, value in [
            ("kept_groups", kept),
            ("generation_batches", batches),
            ("starved", self._starved),
        ]:
            self._metrics["train"][f"dapo/{name}"].append(float(value))
        return self._collate(groups)

    def _sample_groups(self, step: int, batch: int) -> list[Group]:
        """One generation batch, scored: its groups on all ranks, in the order of the schedule."""
        size = self.algorithm.group_size
        rows = [self._rows[i] for i in self.schedule.indices(step, batch) for _ in range(size)]
        share = len(rows) // self.accelerator.num_processes
        start = share * self.accelerator.process_index
        first_id = batch * len(rows) + start
        self._sequence_ids = list(range(first_id, first_id + share))
        scored = super()._generate_and_score_completions(rows[start : start + share])
        prompts = _unpad(scored["prompt_ids"], scored["prompt_mask"])
        tokens = _unpad(scored["completion_ids"], scored["completion_mask"])
        correct = self._correct[start : start + share].tolist()
        columns = (self._sequence_ids, prompts, tokens, scored["advantages"].tolist(), correct)
        completions = gather_object(list(itertools.starmap(Completion, zip(*columns, strict=True))))
        return [completions[i : i + size] for i in range(0, len(completions), size)]

    def _collate(self, groups: list[Group]) -> dict[str, torch.Tensor]:
        """This rank's share of the groups as TRL's generation batch, with a column of sequence ids.

        The normaliser of the token-level loss is the number of tokens, over all ranks, that have a weight.
        """
        weighs = [not self.algorithm.dynamic_sampling or is_informative(group) for group in groups]
        tokens = sum(len(c.tokens) for g, has in zip(groups, weighs, strict=True) if has for c in g)
        share = len(groups) // self.accelerator.num_processes
        local = slice(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1))
        completions = list(itertools.chain.from_iterable(groups[local]))
        weight = torch.tensor(weighs[local]).repeat_interleave(self.algorithm.group_size)
        padding = self._tokenizer.pad_token_id
        prompt_ids, prompt_mask = pad_left([c.prompt for c in completions], padding)
        # Right padding is left padding in the mirror.
        ids, mask = pad_left([c.tokens[::-1] for c in completions], padding)
        columns = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": ids.flip(1),
            "completion_mask": mask.flip(1) * weight[:, None],
            "advantages": torch.tensor([c.advantage for c in completions]),
            "sequence_ids": torch.tensor([c.sequence_id for c in completions]),
            "num_items_in_batch": torch.tensor(tokens),
        }
        return {name: column.to(self.accelerator.device) for name, column in columns.items()}

    def _generate_single_turn(
        self, prompt_ids: list[TokenIds], *args: Any, **kwargs: Any
    ) -> tuple[list[TokenIds], None]:
        """Sample one completion of each prompt on the emulated hardware, noise and all."""
        if self.use_vllm:
            self.engine.hold(self.state.global_step, noisy=True)
            return self.engine.generate(prompt_ids, None, self.algorithm.group_size)[1], None
        uniforms = keyed_uniforms(
            self.args.seed, self.state.global_step, self._sequence_ids, self.algorithm.max_new_tokens
        )
        ids = torch.tensor(self._sequence_ids, device=self.accelerator.device)
        with gathered(self._policy), self.emulation.phase("rollout"), self.emulation.sequences(ids):
            completions = generate(
                self._policy,
                self._tokenizer,
                prompt_ids,
                max_new_tokens=self.algorithm.max_new_tokens,
                uniforms=uniforms,
                temperature=self.algorithm.temperature,
            )
        return completions, None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rewards [completions of all ranks, functions]; accuracy is kept apart.

        Groups are dropped by accuracy, as in DAPO: the overlong punishment makes the sum differ in groups whose
        answers all agree.
        """
        rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        self._correct = rewards[:, 0]
        return rewards

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The phase and the ids that compute_loss sets hold until the backward is done, which may recompute.
        with ExitStack() as self._micro_batch:
            loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        self._micro_batch.enter_context(self.emulation.phase("train"))
        self._micro_batch.enter_context(self.emulation.sequences(inputs["sequence_ids"]))
        return super().compute_loss(model, inputs, *args, **kwargs)

    # Records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
            del metrics[name]  # such as the clip ratio of no tokens: trackers have no word for "no value"
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            self._on_metrics(
                {
                    "step": self.state.global_step,
                    "reward": logs["reward"],
                    "accuracy": logs["rewards/accuracy/mean"],
                    "kept_groups": int(logs["dapo/kept_groups"]),
                    "generation_batches": int(logs["dapo/generation_batches"]),
                    "starved": bool(logs["dapo/starved"]),
                    "loss": logs["loss"],
                    "grad_norm": logs["grad_norm"],
                    "completion_length": logs["completions/mean_length"],
                    "seconds": logs["step_time"],
                }
            )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        with checkpoints.explained(self._directory, step):
            if self.args.should_save:
                checkpoints.clear_staging(self._directory)
            self.accelerator.wait_for_everyone()
            self._writing_to = self._directory / checkpoints.STAGING
            super(GRPOTrainer, self)._save_checkpoint(model, trial)  # past TRL's model card
            self._writing_to = self._directory
            self.accelerator.wait_for_everyone()
            staged = self._directory / checkpoints.STAGING / f"checkpoint-{step}"
            save_file(self.emulation.state_dict(), self._receipts_file(staged))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.publish(self._directory, step, self.args.save_total_limit or 1)
            self.accelerator.wait_for_everyone()

    def _receipts_file(self, checkpoint: Path) -> Path:
        """This rank's counters: a resumed run ends with the receipts of an uninterrupted one."""
        return checkpoint / f"receipts-rank{self.accelerator.process_index}.safetensors"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapters, and the profile they were trained under; a frozen base is never written."""
        state_dict = trained_state(self._policy)
        if not self.args.should_save:
            return
        path = Path(output_dir or self._directory)
        if isinstance(self._policy, PeftModel):
            self._policy.save_pretrained(str(path), state_dict=state_dict, save_embedding_layers=False)
        else:
            self._policy.save_pretrained(str(path), state_dict=state_dict)
        profile = self.emulation.profile
        (path / PROFILE_FILE).write_text(
            json.dumps({"profile": profile.name, "fingerprint": profile.fingerprint}), encoding="utf-8"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load what `_save` wrote, into the dtypes that are there (PEFT's loader makes bfloat16 float32)."""
        path = Path(resume_from_checkpoint)
        trained = json.loads((path / PROFILE_FILE).read_text(encoding="utf-8"))
        profile = self.emulation.profile
        if trained["fingerprint"] != profile.fingerprint:
            raise ConfigError(
                f"{path.name} was trained under profile {trained['profile']!r} ({trained['fingerprint'][:12]}), not "
                f"under {profile.name!r} ({profile.fingerprint[:12]}): a run is resumed under its own profile"
            )
        receipts = self._receipts_file(path)
        if not receipts.exists():
            raise ConfigError(
                f"{path.name} has no {receipts.name}: the run had fewer processes; resume it with as many as it had"
            )
        was_sharded = (path / f"{FSDP_MODEL_NAME}.bin").exists()
        if was_sharded != self.is_fsdp_enabled:
            raise ConfigError(
                f"{path.name} is of a run {'with' if was_sharded else 'without'} --fsdp: resume it in the same way"
            )
        self.emulation.load_state_dict(load_file(receipts))
        if self.is_fsdp_enabled:
            load_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, model, str(path), adapter_only=True)
        elif isinstance(self._policy, PeftModel):
            set_peft_model_state_dict(self._policy, load_peft_weights(str(path), device="cpu"))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def refuse_uncovered_lm_head(emulation: Emulation, model: PreTrainedModel | PeftModel) -> None:
    """Refuse an emulated lm_head: what is emulated in the rollout must be emulated in the loss.

    TRL's loss multiplies the hidden states by `lm_head.weight` and never calls `lm_head.forward`.

    Raises:
        ConfigError: a site is the lm_head, or shares its weight with a tied one.
    """
    head = model.get_output_embeddings()
    for site in emulation.sites:
        if site.module is head or site.name.endswith("lm_head"):
            reason = "is the lm_head, whose forward the loss never calls: it multiplies by its weight"
        elif head is not None and site.module.weight is head.weight:
            reason = "shares its weight with the tied lm_head, which the loss reads directly"
        else:
            continue
        raise ConfigError(
            f"site {site.name!r} {reason}. Its emulation would be live in the rollout and absent in the loss; "
            "exclude it in the profile, and from AQN"
        )


def _unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[TokenIds]:
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
