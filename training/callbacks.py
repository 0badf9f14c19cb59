"""What runs beside a training step: the schedule's clock, a clean way to stop, a look at the gradients."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.adapters import check_finite_gradients, check_gradient_flow
from training.sharding import attest_sharding

if TYPE_CHECKING:
    from aqnsim import Emulation
    from training.dapo import DapoTrainer

logger = logging.getLogger(__name__)


class AqnCallback(TrainerCallback):
    """Tells the emulation the step, from the trainer's own count of updates: right after a resume, too."""

    def __init__(self, emulation: Emulation, updates_per_step: int = 1) -> None:
        self.emulation, self.updates = emulation, updates_per_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.emulation.begin_step(state.global_step // self.updates, state.max_steps // self.updates)


class InterruptCallback(TrainerCallback):
    """Ctrl-C or a request to terminate: finish the step, save, stop. A second Ctrl-C stops at once.

    A context manager around the training; the ranks agree on the step at which they stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.requested = False
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without one")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            votes = torch.tensor(float(self.requested), device=args.device)
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
            self.requested = bool(votes)
        if self.requested:
            control.should_save = control.should_training_stop = True


class ShardingGuard(TrainerCallback):
    """Checks, before the first step, that weights are in shards where the run asked for it, and only there."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        attest_sharding(model, asked=bool(args.fsdp))


class UpdateGuard(TrainerCallback):
    """Looks at the gradients before each update."""

    def __init__(self, trainer: DapoTrainer) -> None:
        self.trainer = trainer
        self.flow_checked = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if self.trainer.nothing_to_learn:
            # A zero gradient would still let momentum and weight decay move the parameters; torch's optimizers
            # leave a parameter alone, and its state, where there is no gradient.
            model.zero_grad(set_to_none=True)
            return
        check_finite_gradients(model)
        if not self.flow_checked:
            check_gradient_flow(model)
            self.flow_checked = True
