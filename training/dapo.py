"""DAPO (arXiv 2503.14476) and GRPO with KL on TRL's GRPOTrainer, with rollouts and loss on emulated hardware.

TRL has the asymmetric clip, the token-level loss and the group advantage. Added here are dynamic sampling, the phases
and sequence ids that the emulation needs, and a run that is a pure function of its config and seed: which problems a
step sees, and with which random numbers, depends neither on the number of ranks, nor on the split into micro-batches,
nor on whether the run was interrupted and resumed.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from training.batch import Completion, Group, collate, deal, is_informative, share
from training.callbacks import AqnCallback, InterruptCallback, ShardingGuard, UpdateGuard
from training.config import Algorithm
from training.generation import Sample, TokenIds, evaluating, keyed_uniforms, sample
from training.mismatch import TokenTally, importance_weights
from training.prompts import PromptSchedule
from training.sharding import admit_cpus, gathered, trained_state
from training.tasks import Problem

if TYPE_CHECKING:
    from aqnsim import Emulation

logger = logging.getLogger(__name__)

ROLLED_OUT = ("prompt_ids", "prompt_mask", "completion_ids", "whole_mask", "sequence_ids")
"""Columns of a forward over whole sequences; the mask is that of all completions, whether they count or not."""

PROFILE_FILE = "profile.json"
"""In each checkpoint: the profile that it was trained under."""


Score = Callable[[str, str], bool]
"""score(completion, answer): whether the completion answers the problem."""


class DapoTrainer(GRPOTrainer):
    """GRPOTrainer with dynamic sampling, on emulated hardware.

    A step with fewer informative groups than it wants, after `max_generation_batches`, proceeds with what there is:
    the others keep their place with a weight of zero, and the mean is over the tokens of the informative ones. With
    none at all the update is skipped: neither momentum nor weight decay moves a parameter.

    A step's groups are dealt out to `updates_per_step` updates, as many whatever was filtered. Where there are several,
    the ratio of the clip is to the policy before the first of them, under the loss's own noise. The KL term is to the
    policy that training began with, emulated as the policy is, in the phase "reference" and so with noise of its own.

    Args:
        model: with its adapters attached (`adapters.attach_lora`).
        tokenizer: of the model.
        algorithm: the settings that `args` was made from.
        args: from `grpo_config`.
        problems: to train on.
        score: the reward, 1 or 0, before the overlong punishment.
        flexible: a scorer that is not particular about the format, for the records; `score` where there is none.
        emulation: attached to `model`.
        on_metrics: is given one dict after each optimizer step, on rank 0: the fields of `records.StepMetrics` but
            for the sigmas. `step` is the number of generation batches with this one; the names of checkpoints count
            updates.
        on_first_rollout: is given all groups of the first step, on every rank, before anything is trained.
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
        flexible: Score | None = None,
        emulation: Emulation,
        on_metrics: Callable[[dict[str, Any]], None] = lambda metrics: None,
        on_first_rollout: Callable[[list[Group]], None] = lambda groups: None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        refuse_uncovered_lm_head(emulation, model)

        def accuracy(completions: list[str], answer: list[str], **_: Any) -> list[float]:
            strict = [float(score(c, a)) for c, a in zip(completions, answer, strict=True)]
            loose = [float(flexible(c, a)) for c, a in zip(completions, answer, strict=True)] if flexible else strict
            self._flexible = loose
            return strict

        overlong = get_soft_overlong_punishment(algorithm.max_new_tokens, algorithm.overlong_buffer)
        self.emulation = emulation
        self.algorithm = algorithm
        self.schedule = PromptSchedule(len(problems), algorithm.prompts_per_step, args.seed)
        self.interrupt = InterruptCallback()
        self._on_metrics, self._on_first_rollout = on_metrics, on_first_rollout
        self._policy = model
        self._rows: list[dict[str, Any]] = [{"prompt": p.prompt, "answer": p.answer} for p in problems]
        self._directory = self._writing_to = Path(str(args.output_dir))
        super().__init__(
            model=model,
            reward_funcs=[accuracy, overlong],  # type: ignore[list-item]
            args=args,
            train_dataset=Dataset.from_list(self._rows),
            processing_class=tokenizer,
            callbacks=[
                AqnCallback(emulation, algorithm.updates_per_step),
                ShardingGuard(),
                UpdateGuard(self),
                self.interrupt,
                *callbacks,
            ],
        )
        self.remove_callback(PrinterCallback)
        self._first: nn.Module | None = None
        if algorithm.kl and not isinstance(model, PeftModel):
            self._first = copy.deepcopy(model).requires_grad_(False)
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

    @property
    def step(self) -> int:
        """The generation batch that is trained on, from 0; TRL counts its updates."""
        return int(self.state.global_step) // self.algorithm.updates_per_step

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """This rank's share of the completions of the next update; the first update of a step samples for all.

        `inputs` is not read: Trainer's data loader keeps the count of the updates, `PromptSchedule` says what is in
        them.
        """
        update = int(self.state.global_step) % self.algorithm.updates_per_step
        if update == 0:
            self._dealt = deal(self._rollout(), self.algorithm.updates_per_step)
            self._tally = TokenTally(self.accelerator.device)
            self._columns = [self._collate(groups) for groups in self._dealt]
        self.nothing_to_learn = not any(map(self._weighs, self._dealt[update]))
        return self._columns[update]

    def _rollout(self) -> list[Group]:
        """Sample until enough groups are informative; the groups of the step, informative ones first.

        All ranks see all groups, hence take the same decisions, and none waits for a collective alone.
        """
        algorithm, step = self.algorithm, self.step
        wanted = algorithm.prompts_per_step
        groups = self._sample_groups(step, batch=0)
        batches = 1
        if algorithm.dynamic_sampling:
            while sum(map(is_informative, groups)) < wanted and batches < algorithm.max_generation_batches:
                groups += self._sample_groups(step, batches)
                batches += 1
        if step == 0:
            self._on_first_rollout(groups)
        if algorithm.dynamic_sampling:
            groups = sorted(groups, key=is_informative, reverse=True)[:wanted]  # stable: in order of sampling
        kept = sum(map(is_informative, groups))
        self._starved = algorithm.dynamic_sampling and kept < wanted
        if self._starved and self.is_world_process_zero():
            logger.warning(
                "step %d is starved: %d of %d groups are informative after %d generation batches; %s",
                *(step + 1, kept, wanted, batches),
                "updates are made with these" if kept else "the update is skipped",
            )
        for name, value in [
            ("kept_groups", kept),
            ("generation_batches", batches),
            ("starved", self._starved),
        ]:
            self._metrics["train"][f"dapo/{name}"].append(float(value))
        return groups

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
        correct = self._correct[start : start + share].tolist()
        columns = (self._sequence_ids, prompts, self._sampled, scored["advantages"].tolist(), correct, self._flexible)
        completions = gather_object(
            [
                Completion(i, prompt, s.tokens, s.log_probs, advantage, right, loosely)
                for i, prompt, s, advantage, right, loosely in zip(*columns, strict=True)
            ]
        )
        return [completions[i : i + size] for i in range(0, len(completions), size)]

    def _weighs(self, group: Group) -> bool:
        """Whether a group counts in the loss."""
        return not self.algorithm.dynamic_sampling or is_informative(group)

    def _collate(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        """This rank's share of an update's groups as TRL's generation batch.

        The normaliser of the token-level loss is the number of the update's tokens, over all ranks, that have a weight.
        """
        own = share(groups, self.accelerator.num_processes, self.accelerator.process_index)
        columns = collate(own, weighs=[self._weighs(g) for g in own], padding=self._tokenizer.pad_token_id)
        tokens = sum(len(c.tokens) for g in groups if self._weighs(g) for c in g)
        columns = {name: column.to(self.accelerator.device) for name, column in columns.items()}
        if self.algorithm.updates_per_step > 1 or self.algorithm.mismatch != "report":
            columns["old_per_token_logps"] = self._log_probs(self._policy, columns, "train")
        if self.algorithm.kl:
            with self._reference() as reference:
                columns["ref_per_token_logps"] = self._log_probs(reference, columns, "reference")
        if self.algorithm.mismatch != "report":
            weights = importance_weights(
                self.algorithm.mismatch,
                self.algorithm.mismatch_limit,
                columns["old_per_token_logps"],
                columns["sampling_per_token_logps"],
                columns["completion_mask"],
            )
            columns["advantages"] = columns["advantages"][:, None] * weights
        columns["num_items_in_batch"] = torch.tensor(tokens, device=self.accelerator.device)
        return columns

    def _log_probs(self, model: nn.Module, columns: dict[str, torch.Tensor], phase: str) -> torch.Tensor:
        """Log-probabilities of the completions, in micro-batches: the noise of a row does not depend on who shares it.

        In the phase "train" that noise is the loss's own, as its key, step and rows are: before the first update the
        ratio to these is 1.
        """
        parts = []
        for rows in torch.arange(len(columns["prompt_ids"])).split(self.args.per_device_train_batch_size):
            batch = {name: columns[name][rows] for name in ROLLED_OUT}
            with torch.no_grad(), gathered(model), evaluating(model), ExitStack() as stack:
                stack.enter_context(self.emulation.phase(phase))
                stack.enter_context(self.emulation.sequences(batch["sequence_ids"]))
                log_probs, _, _ = super()._get_per_token_logps_and_entropies(
                    model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                    torch.cat([batch["prompt_mask"], batch["whole_mask"]], 1),
                    batch["completion_ids"].shape[1],
                )
            parts.append(log_probs)
        return torch.cat(parts)

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The policy that training began with: the model without its adapters, or a copy of its first weights."""
        if self._first is not None:
            yield self._first
            return
        assert isinstance(self._policy, PeftModel)
        with self._policy.disable_adapter():
            yield self._policy

    def _generate_single_turn(
        self, prompt_ids: list[TokenIds], *args: Any, **kwargs: Any
    ) -> tuple[list[TokenIds], None]:
        """Sample one completion of each prompt on the emulated hardware, noise and all."""
        if self.use_vllm:
            self.engine.hold(self.state.global_step, noisy=True)
            _, completions, log_probs, *_ = self.engine.generate(prompt_ids, None, self.algorithm.group_size)
            self._sampled = [
                Sample(tokens, [math.nan if found is None else found for (found, *_) in row])
                for tokens, row in zip(completions, log_probs, strict=True)
            ]
            return completions, None
        uniforms = keyed_uniforms(self.args.seed, self.step, self._sequence_ids, self.algorithm.max_new_tokens)
        ids = torch.tensor(self._sequence_ids, device=self.accelerator.device)
        with gathered(self._policy), self.emulation.phase("rollout"), self.emulation.sequences(ids):
            self._sampled = sample(
                self._policy, self._tokenizer, prompt_ids, uniforms=uniforms, temperature=self.algorithm.temperature
            )
        return [s.tokens for s in self._sampled], None

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
        self.beta = self.algorithm.kl  # here alone: elsewhere TRL would make a reference of its own
        try:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.beta = 0.0
        self._count(inputs)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self._policy_now = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._policy_now

    def _count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch to what the step's records say of its tokens."""
        log_probs, entropy, _ = self._policy_now
        now = log_probs.detach()
        self._tally.add(
            mask=inputs["completion_mask"],
            rollout=inputs["sampling_per_token_logps"],
            old=inputs.get("old_per_token_logps", now),
            new=now,
            reference=inputs.get("ref_per_token_logps"),
            entropy=entropy.detach(),
            advantages=inputs["advantages"].reshape(len(now), -1),
            clip=(self.algorithm.clip_low, self.algorithm.clip_high),
            limit=self.algorithm.mismatch_limit,
        )

    # Records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
            del metrics[name]  # such as the clip ratio of no tokens: trackers have no word for "no value"
        super().log(logs, start_time)
        if "loss" not in logs:
            return
        tokens = self._tally.result()  # of all ranks
        if self.is_world_process_zero():
            self._on_metrics(
                {
                    "step": self.state.global_step // self.algorithm.updates_per_step,
                    "reward": logs["reward"],
                    "accuracy": logs["rewards/accuracy/mean"],
                    "kept_groups": int(logs["dapo/kept_groups"]),
                    "generation_batches": int(logs["dapo/generation_batches"]),
                    "starved": bool(logs["dapo/starved"]),
                    "loss": logs["loss"],
                    "grad_norm": logs["grad_norm"],
                    "completion_length": logs["completions/mean_length"],
                    "truncated": logs["completions/clipped_ratio"],
                    "seconds": logs["step_time"] * self.algorithm.updates_per_step,
                    **tokens,
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
        elif head is not None and site.parameter is head.weight:
            reason = "shares its weight with the tied lm_head, which the loss reads directly"
        else:
            continue
        raise ConfigError(
            f"site {site.name!r} {reason}. Its emulation would be live in the rollout and absent in the loss; "
            "exclude it in the profile, and from AQN"
        )


def _unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[TokenIds]:
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
