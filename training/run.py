"""One run of an experiment, from the resolved config to the final evaluation."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

import aqnsim
from aqnsim import ConfigError, Emulation, RealisationError, Receipt, ReceiptTotals
from aqnsim.receipts import by_request, merge, table
from training import checkpoints
from training.adapters import attach_lora
from training.alarms import AlarmError, Watch
from training.arguments import grpo_config
from training.batch import Group
from training.config import Experiment, Lora, load
from training.dapo import DapoTrainer
from training.dryrun import outline, shrunk
from training.evaluate import ProblemResult, evaluate_modes
from training.generation import end_of_sequence_ids
from training.hardware import build_aqn, build_profile, build_schedule
from training.launch.world import asks_for_fsdp, join
from training.memory import keep_freed_memory
from training.models import end_completions_at, load_model
from training.plot import plot_run
from training.preflight import examine, refuse
from training.records import (
    ALARMS,
    EVALUATION,
    FINAL_RECEIPTS,
    METRICS,
    MODES,
    PREFLIGHT,
    PROBLEMS,
    RECEIPTS,
    Evaluation,
    ProblemRecord,
    Score,
    StepMetrics,
)
from training.rundir import RunDirectory
from training.sharding import trained_state
from training.tasks import Task, task_of

ADAPTER = "adapter"
"""In the run directory: the final adapters, as safetensors."""

MODEL = "model"
"""In the run directory: all weights, where all were trained."""

EVAL_BATCH = 100
"""Problems decoded at once; part of what an evaluation's last bits depend on, hence not a setting."""


def run(
    experiment: str,
    *,
    preset: str | None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    runs: Path = Path("runs"),
    resume: Path | None = None,
    processes: int | None = None,
    fsdp: bool = False,
    dry_run: bool = False,
) -> Path:
    """Train and evaluate one arm; every rank of torchrun calls it.

    Args:
        experiment: name of an experiment, or path to a TOML.
        preset: model, task and scale.
        overrides: ``table.key=value`` each.
        seed: of everything that is drawn.
        runs: where run directories are made.
        resume: continue this run instead; its own config and seed are used.
        processes: how many processes there have to be; None takes those of torchrun.
        fsdp: keep weights in shards over the processes, by FSDP2; a launcher can ask for it as well.
        dry_run: a few steps at the scale of a test, with a tiny model of the same architecture: see `dryrun.shrunk`.

    Returns:
        The run's directory.

    Raises:
        ConfigError: the config is not valid, or `resume` is a run of another experiment.
        RealisationError: something that was asked for did not happen.
        WorldError: there are not as many processes as were asked for.
        KeyboardInterrupt: the run was interrupted, and can be resumed.
    """
    keep_freed_memory()
    disable_progress_bar()  # of loading weights: a line of progress per step is printed instead
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # TRL's, about itself
    state = join(processes)
    console = Console(quiet=not state.is_main_process, highlight=False, soft_wrap=True)
    if resume is None:
        resolved = load(experiment, preset, overrides)
        if dry_run:
            console.print(outline(resolved, state.num_processes))
            resolved = shrunk(resolved, state.num_processes)
    else:
        if dry_run:
            raise ConfigError("--resume continues a run as it was started: leave out --dry-run")
        if overrides:
            raise ConfigError("--resume continues a run with its own settings: leave out --set")
        stored = RunDirectory.open(resume)
        resolved, seed = stored.experiment, stored.run.seed
        if resolved.id != Path(experiment).stem:
            raise ConfigError(f"{resume} is a run of {resolved.id!r}, not of {experiment!r}")
    arm = Arm(resolved, seed, fsdp=fsdp or asks_for_fsdp(), rehearsal=dry_run)
    directory = _directory(arm, runs, resume, state)
    console.print(f"[bold]{resolved.id}[/bold] ({resolved.preset}), seed {seed}: {directory.path}")
    with _records(directory), directory.recording():
        arm.run(directory, console, resuming=resume is not None)
    return directory.path


class Arm:
    """An experiment with a seed: its model, emulation and task, ready to train."""

    def __init__(self, experiment: Experiment, seed: int, *, fsdp: bool = False, rehearsal: bool = False) -> None:
        self.experiment, self.seed, self.fsdp, self.rehearsal = experiment, seed, fsdp, rehearsal
        if (schedule := build_schedule(experiment)) is not None:
            schedule.check(experiment.total_steps)  # before anything is loaded
        set_seed(seed)
        task = experiment.task
        self.task: Task = task_of(task)
        self.train_problems = self.task.problems("train", task.prompts, seed)
        # The held-out problems are the same for every seed: runs are compared on them problem by problem.
        self.eval_problems = self.task.problems("eval", task.eval_problems, 0)
        with PartialState().local_main_process_first():  # transformers saves from the first process alone
            model, self.tokenizer = load_model(experiment.model.name, dtype=experiment.model.dtype)
        end_completions_at(model, self.tokenizer, self.task.end)
        model.to(PartialState().device)  # before anything is emulated: counters stay where the weights are
        lora = experiment.lora
        self.model: PreTrainedModel | PeftModel = (
            attach_lora(model, lora, seed=seed) if isinstance(lora, Lora) else model.requires_grad_(True)
        )
        layers = model.config.get_text_config().num_hidden_layers
        profile = build_profile(experiment, layers=layers)
        aqn = build_aqn(experiment, layers=layers, seed=seed)
        self.emulation: Emulation = aqnsim.emulate(self.model, profile, seed=seed, aqn=aqn, strict=True)

    def run(self, directory: RunDirectory, console: Console, *, resuming: bool) -> None:
        """Evaluate, train, evaluate again, and hand in the records.

        Raises:
            RealisationError, KeyboardInterrupt: see `run`.
        """
        self.directory, self.console = directory, console
        trainer = self._trainer()
        checkpoint = checkpoints.latest_checkpoint(directory.path) if resuming else None
        if resuming:
            updates = self.experiment.algorithm.updates_per_step
            step = int(checkpoint.name.rpartition("-")[2]) // updates if checkpoint else None
            directory.resume(step)
            self.recorder.replay()
            console.print(f"resuming from {checkpoint.name if checkpoint else 'the start'}")
        if checkpoint is None:
            self._evaluate(step=0, is_final=False)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.interrupted:
            console.print(
                f"interrupted after step {trainer.step}; continue with:\n"
                f"  python -m training run {self.experiment.id} --resume {directory.path}"
            )
            raise KeyboardInterrupt
        self._finish(trainer)

    def _trainer(self) -> DapoTrainer:
        algorithm = self.experiment.algorithm
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.directory.path / "tensorboard")
        self.recorder = StepRecorder(
            self.emulation,
            self.directory,
            self.console,
            Watch(self.experiment.alarms, algorithm.prompts_per_step),
            algorithm.updates_per_step,
        )
        return DapoTrainer(
            self.model,
            tokenizer=self.tokenizer,
            algorithm=algorithm,
            args=grpo_config(
                algorithm,
                output_dir=self.directory.path,
                seed=self.seed,
                steps=self.experiment.total_steps,
                fsdp=self.fsdp,
                engine=self.experiment.rollout.engine,
            ),
            problems=self.train_problems,
            score=self.task.score,
            flexible=partial(self.task.score, extraction="flexible"),
            emulation=self.emulation,
            on_first_rollout=self._preflight,
            on_metrics=self.recorder.write,
            callbacks=[self.recorder],
        )

    @property
    def _base(self) -> PreTrainedModel:
        """The model below the adapters, where there are some."""
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(PreTrainedModel, model)

    def _preflight(self, groups: list[Group]) -> None:
        """Refuse a run that cannot learn; record what the first rollout says of the others."""
        found = examine(groups, end_of_sequence_ids(self._base, self.tokenizer))
        self.directory.write_json(PREFLIGHT, found)
        self.console.print(
            f"before training: {found.informative:.0%} of {found.groups} groups are informative, {found.accuracy:.0%} "
            f"of the samples right ({found.flexible:.0%} by the flexible scorer), {found.truncated:.0%} cut off"
        )
        if not self.rehearsal:
            refuse(found)

    def _evaluate(self, step: int, is_final: bool) -> Evaluation:
        """Score the held-out problems, clean and emulated, and store every answer."""
        results = evaluate_modes(
            self.emulation,
            self.model,
            self.tokenizer,
            self.eval_problems,
            self.task.score,
            batch_size=EVAL_BATCH,
            max_new_tokens=self.experiment.algorithm.max_new_tokens,
        )
        profile = self.emulation.profile
        evaluation = Evaluation(
            step=step,
            is_final=is_final,
            clean=_score(results["clean"]),
            emulated=_score(results["emulated"]),
            profile=profile.name,
            fingerprint=profile.fingerprint,
        )
        rows = [
            ProblemRecord(step=step, split_is_final=is_final, mode=mode, **vars(result))
            for mode in MODES
            for result in results[mode]
        ]
        self.directory.append_jsonl(PROBLEMS, *rows)
        for mode in MODES:
            score = evaluation.score(mode)
            low, high = score.wilson
            self.console.print(
                f"step {step}: held-out accuracy {mode:8} {score.accuracy:6.1%}  "
                f"(95 % Wilson {low:.1%} to {high:.1%}, {score.correct} of {score.n})"
            )
        return evaluation

    def _finish(self, trainer: DapoTrainer) -> None:
        evaluation = self._evaluate(step=trainer.step, is_final=True)
        specs = [rule.spec for rule in self.emulation.profile.rules]
        self.emulation.check(backward=any(s.grad_input.error or s.grad_weight.error for s in specs))
        receipts = self.emulation.receipts(until=self.emulation.snapshot(reduce=True))
        self.directory.write_json(FINAL_RECEIPTS, [receipt.to_dict() for receipt in receipts])
        self.directory.write_json(EVALUATION, evaluation)
        self.console.print(table(receipts) if receipts else "profile ideal: nothing is emulated")
        trained = trained_state(self.model)
        if trainer.is_world_process_zero():
            self._save_model(trained)
            plot_run(self.directory.path, self.directory.path / "run.png")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()

    def _save_model(self, trained: dict[str, torch.Tensor] | None) -> None:
        """The adapters, or all weights as they train, which is masters, beside what they were trained on."""
        adapted = isinstance(self.model, PeftModel)
        name = ADAPTER if adapted else MODEL
        kwargs: dict[str, Any] = {"save_embedding_layers": False} if adapted else {}
        staging = self.directory.path / f".{name}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        self.emulation.save_pretrained(staging, frozen="master", state_dict=trained, **kwargs)
        final = self.directory.path / name
        shutil.rmtree(final, ignore_errors=True)  # of an attempt to finish that was cut off
        os.replace(staging, final)


class StepRecorder(TrainerCallback):
    """Holds each step's receipts against what the step asked for, and writes both down."""

    def __init__(
        self,
        emulation: Emulation,
        directory: RunDirectory,
        console: Console,
        watch: Watch,
        updates_per_step: int = 1,
    ) -> None:
        self.emulation, self.directory, self.console = emulation, directory, console
        self.watch, self.updates = watch, updates_per_step
        self._start: ReceiptTotals | None = None
        self._receipts: list[Receipt] = []
        self._requested: float | None = None
        self._realised: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.updates == 0:
            self._start = self.emulation.snapshot(reduce=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attest the step.

        Raises:
            RealisationError: AQN's sigma of this step did not reach the norms.
        """
        if state.global_step % self.updates:
            return  # the step has updates left
        end = self.emulation.snapshot(reduce=True)
        self._receipts = self.emulation.receipts(since=self._start, until=end)
        if self.emulation.aqn is not None:
            self._requested = self.emulation.sigma
            self._realised = realised_aqn_sigma(self.emulation, self._receipts, state.global_step // self.updates)

    def replay(self) -> None:
        """Let the alarms know the steps of a run that is resumed; theirs are on record already."""
        for row in self.directory.read_jsonl(METRICS, StepMetrics):
            list(self.watch.look(row))

    def write(self, metrics: dict[str, Any]) -> None:
        """Append the step to the run's records; called on rank 0.

        Raises:
            AlarmError: the experiment stops at an alarm, and there is one.
        """
        row = StepMetrics(sigma_requested=self._requested, sigma_realised=self._realised, **metrics)
        self.directory.append_jsonl(METRICS, row)
        receipts = [merge(group).to_dict() for group in by_request(self._receipts)]
        self.directory.append_jsonl(RECEIPTS, {"step": row.step, "receipts": receipts})
        noise = "" if self._requested is None else f"  sigma {self._requested:.5f} realised {self._realised:.5f}"
        starved = "  starved" if row.starved else ""
        self.console.print(
            f"step {row.step:3}  reward {row.reward:6.3f}  {row.kept_groups} groups kept"
            f" of {row.generation_batches} batches{noise}  {row.seconds:.1f} s{starved}"
        )
        for alarm in self.watch.look(row):
            self.directory.append_jsonl(ALARMS, alarm)
            text = f"{alarm.rule}: {alarm.value:.4g}, threshold {alarm.threshold:.4g}; {alarm.sign}"
            self.console.print(f"[bold red]alarm[/bold red] step {alarm.step}, {text}")
            if self.watch.alarms.stop:
                raise AlarmError(f"step {alarm.step}: {text} (alarms.stop is true)")


def realised_aqn_sigma(emulation: Emulation, receipts: Sequence[Receipt], step: int) -> float:
    """The schedule's sigma as injected in a step, with what scales it at each site taken out; 0 where none was.

    Raises:
        RealisationError: it is not what the step asked for, within six standard errors of the draws.
    """
    assert emulation.noise is not None
    assert emulation.noise.sigmas is not None
    requested, sigmas = emulation.sigma, emulation.noise.sigmas
    squares = draws = 0.0
    for r in receipts:
        if r.stream == "aqn" and r.realised_sigma is not None:
            own = r.elements / r.calls  # every call of a step injects the same draws
            squares += own * (r.realised_sigma / sigmas[r.site]) ** 2
            draws += own
    share = sqrt(squares / draws) if draws else 0.0
    if any(sigmas.values()) and abs(share - 1) > (6 / sqrt(2 * draws) if draws else 0.0):
        raise RealisationError(
            f"step {step}: AQN asked for sigma {requested} and {share:.6g} of it was realised on {draws:.0f} weights; "
            f"the schedule {emulation.noise.aqn.schedule} is not what the rollout saw"
        )
    return share * requested


def _score(results: Sequence[ProblemResult]) -> Score:
    return Score.of(sum(r.correct for r in results), len(results))


def _directory(arm: Arm, runs: Path, resume: Path | None, state: PartialState) -> RunDirectory:
    """The run's directory: rank 0 makes it, the others open it."""
    if resume is not None:
        return RunDirectory.open(resume, rank=state.process_index)
    path: list[Path | None] = [None]
    if state.is_main_process:
        made = RunDirectory.create(
            runs,
            arm.experiment,
            seed=arm.seed,
            fingerprint=arm.emulation.profile.fingerprint,
            command=sys.argv[1:],
            processes=state.num_processes,
        )
        path = [made.path]
    broadcast_object_list(path)
    assert path[0] is not None
    return RunDirectory.open(path[0], rank=state.process_index)


@contextmanager
def _records(directory: RunDirectory) -> Iterator[None]:
    """Keep what the libraries log beside the run, and what concerns the user on the terminal."""
    if directory.rank != 0:
        yield
        return
    handler = logging.FileHandler(directory.path / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
