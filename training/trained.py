"""The adapters of a run, of its end or of a checkpoint, loaded to be evaluated."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from aqnsim import ConfigError, profiles
from training.architectures import architecture
from training.hardware import build_profile
from training.models import end_completions_at, load_model
from training.run import ADAPTER
from training.rundir import CONFIG, RunDirectory
from training.tasks import Problem, Task, task_of

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Trained:
    """Adapters, and the run that made them.

    Attributes:
        run: whose settings say which model, task and profile they belong to.
        folder: of the adapters.
        step: of training that they come from.
    """

    run: RunDirectory
    folder: Path
    step: int

    @classmethod
    def find(cls, path: Path) -> Trained:
        """The adapters of a finished run, given its directory, or of a checkpoint, given its folder in a run.

        Raises:
            ConfigError: there are no adapters.
            RunDirectoryError: not a run directory, or a damaged one.
        """
        path = path.resolve()
        checkpoint = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if checkpoint and (path.parent / CONFIG).exists():
            run, folder, step = RunDirectory.open(path.parent), path, int(checkpoint[1])
        else:
            run = RunDirectory.open(path)
            folder, step = path / ADAPTER, run.experiment.total_steps
        if not (folder / WEIGHTS).exists():
            raise ConfigError(
                f"{folder} has no {WEIGHTS}: expected the directory of a finished run, or a checkpoint-<step> in one"
            )
        return cls(run, folder, step)

    @property
    def name(self) -> str:
        """What is evaluated, in words."""
        return self.run.path.name if self.folder.name == ADAPTER else f"{self.run.path.name}, {self.folder.name}"

    @cached_property
    def digest(self) -> str:
        """The first 12 hex digits of the SHA-256 of the adapters' file."""
        with (self.folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]

    @cached_property
    def task(self) -> Task:
        """The task that the adapters were trained on."""
        return task_of(self.run.experiment.task)

    @property
    def problems(self) -> list[Problem]:
        """The held-out problems that the run itself was evaluated on."""
        return self.task.problems("eval", self.run.experiment.task.eval_problems, 0)

    @property
    def profile(self) -> profiles.Profile:
        """The profile that the adapters were trained under.

        Raises:
            ConfigError: the profile of that name is another one by now.
        """
        experiment = self.run.experiment
        profile = build_profile(experiment, layers=architecture(experiment.model.name).num_hidden_layers)
        if profile.fingerprint != self.run.run.fingerprint:
            raise ConfigError(
                f"{self.name} was trained under profile {profile.name!r} with fingerprint {self.run.run.fingerprint}, "
                f"which is {profile.fingerprint} now: check out the run's revision, or name a profile's file"
            )
        return profile

    def load(self, *, merged: bool) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """The model on the CPU or the GPU there is, not emulated yet, and its tokenizer.

        Args:
            merged: add the adapters' update to the frozen weights, in the weights' dtype, before anything is cast: a
                profile then casts W + BA. Otherwise it casts W, and BA is computed beside, in the adapters' dtype.
        """
        experiment = self.run.experiment
        disable_progress_bar()  # of loading weights
        base, tokenizer = load_model(experiment.model.name, dtype=experiment.model.dtype)
        end_completions_at(base, tokenizer, self.task.end)
        model = PeftModel.from_pretrained(base, str(self.folder), autocast_adapter_dtype=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = model.merge_and_unload(safe_merge=True) if merged else model
        return loaded.to(device).eval(), tokenizer
