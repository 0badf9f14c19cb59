"""The false findings of earlier work, each re-created in miniature, and what is said here to the same mistake.

A scene plays a mistake twice: as a naive program makes it, which reports a result, and against this package, which
refuses. `python -m training traps` plays them all; docs/traps.md is written from what they say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
from torch import Tensor, nn

import aqnsim
from aqnsim import AQN, RelativeGaussian
from aqnsim._errors import AqnsimError
from aqnsim.aqn import EpochAware, KStage
from aqnsim.profiles import Profile, Rule
from aqnsim.profiles.spec import Forward, OpSpec
from training.batch import Completion
from training.config import load
from training.preflight import examine, refuse

STEPS = 58


@dataclass(frozen=True)
class Scene:
    """A trap.

    Attributes:
        title: what was found, falsely.
        happened: the mistake.
        play: gives what a naive program reports; then makes the same mistake here, which raises.
    """

    title: str
    happened: str
    play: Callable[[], tuple[str, Callable[[], object]]]

    def played(self) -> tuple[str, str]:
        """What the naive program reported, and what this package said.

        Raises:
            AssertionError: the mistake went through here, too.
        """
        reported, mistake = self.play()
        try:
            mistake()
        except AqnsimError as error:
            return reported, f"{type(error).__name__}: {error}"
        raise AssertionError(f"{self.title}: the mistake went through")


SCENES: dict[str, Scene] = {}
"""Every scene by its name."""


def scene(name: str, title: str, happened: str) -> Callable[..., Callable[[], tuple[str, Callable[[], object]]]]:
    """Register a scene."""

    def add(play: Callable[[], tuple[str, Callable[[], object]]]) -> Callable[[], tuple[str, Callable[[], object]]]:
        SCENES[name] = Scene(title, happened, play)
        return play

    return add


def model() -> nn.Sequential:
    """Two layers with a norm between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64))


def naive_noise(weight: Tensor, step: int, total: int, trend: list[float]) -> Tensor:
    """Noise of a schedule whose first of `len(trend) + 1` intervals is a warm-up without any."""
    interval = min(step, total) * (len(trend) + 1) // total
    return weight if interval == 0 else weight + trend[min(interval, len(trend)) - 1] * torch.randn(weight.shape)


@scene(
    "epoch-aware",
    "High-sigma noise adds 2.4 points",
    "An epoch-aware schedule worked out sigma, logged it, and gave it to a function that works out sigma again: as "
    "step 0 of 1, which is its warm-up. No noise was added in any step of any run.",
)
def _epoch_aware() -> tuple[str, Callable[[], object]]:
    schedule, weight = EpochAware(0.05, 0.0005, stages_per_epoch=5, epochs=2), torch.ones(64)
    logged = [schedule.sigma(step, STEPS) for step in range(STEPS)]
    changed = sum(not torch.equal(naive_noise(weight, 0, 1, [sigma]), weight) for sigma in logged)
    least = min(s for s in logged if s)
    reported = f"log: sigma = {max(logged):g} to {least:g}; steps in which a norm changed: {changed} of {STEPS}"

    def mistake() -> None:
        m = model()
        with aqnsim.emulate(m, "ideal", aqn=AQN(schedule)) as emulation:
            for _ in range(STEPS):
                emulation.begin_step(0, STEPS)
                with emulation.phase("rollout"):
                    m(torch.ones(2, 64))

    return reported, mistake


@scene(
    "never-advanced",
    "Noise gives LoRA 2.3 points on 4-bit weights",
    "A second training loop never told the schedule of its steps: sigma stayed at the 0 it began with. Two runs of "
    "one configuration were compared, and their difference was called the effect of noise.",
)
def _never_advanced() -> tuple[str, Callable[[], object]]:
    rng = torch.Generator().manual_seed(3)
    a, b = (int(torch.bernoulli(torch.full((1319,), 0.66), generator=rng).sum()) for _ in range(2))
    scores = f"with noise {100 * a / 1319:.2f} %, without {100 * b / 1319:.2f} %"
    reported = f"{scores}: {100 * (a - b) / 1319:+.2f} points (sigma was 0 in both)"

    def mistake() -> None:
        m = model()
        emulation = aqnsim.emulate(m, "ideal", aqn=AQN(KStage(0.05, 0.0005, 10)))
        with emulation.phase("rollout"):
            m(torch.ones(2, 64))

    return reported, mistake


@scene(
    "multipliers",
    "Noise in four chosen layers does better than in all",
    "The factors of the layers stood in a table that nothing read: the key was copied to no worker, and the reader had "
    "a default. Seven experiments on where noise goes ran with the same noise in every layer.",
)
def _multipliers() -> tuple[str, Callable[[], object]]:
    asked = {"layer_sigma_config": {"14": 1.0, "15": 1.0, "default": 0.0}}
    read = {layer: asked.get("noise_injection_layer_sigma_config", {}).get(str(layer), 1.0) for layer in range(28)}
    reported = f"asked for noise in 2 of 28 layers; layers with noise: {sum(f > 0 for f in read.values())}"
    return reported, lambda: load("e12", "smoke", ["aqn.layer_multipliers={14=1.0, 15=1.0}"])


@scene(
    "bf16-evaluation",
    "Training in 4 bits reaches 73 %",
    "Models that were trained with 4-bit weights and activations were scored by a program that did not load the "
    "emulation, so in 16 bits, and nothing in the result said so.",
)
def _bf16_evaluation() -> tuple[str, Callable[[], object]]:
    m, x = model(), torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    clean = m(x)
    with tempfile.TemporaryDirectory() as folder:
        with aqnsim.emulate(m, "mxfp4-w4a4") as emulation:
            far = float(((m(x) - clean).norm() / clean.norm()).detach())
            m.save_pretrained = lambda path, **_: Path(path).mkdir(exist_ok=True)  # type: ignore[assignment]
            emulation.save_pretrained(folder, frozen="master")
        reported = f"scored as trained: outputs are {far:.0%} away from the ones that were scored"
        record = Path(folder, "aqnsim.json").read_text()

    def mistake() -> None:
        with tempfile.TemporaryDirectory() as again:
            Path(again, "aqnsim.json").write_text(record)
            try:
                aqnsim.emulate(model(), "bf16").check_checkpoint(again)
            except AqnsimError as error:
                raise type(error)(str(error).replace(again, "CHECKPOINT")) from None

    return reported, mistake


@scene(
    "below-half-an-ulp",
    "Models are robust to errors of 1e-4",
    "Errors of 1e-4 were added to results that had been rounded to bfloat16, whose neighbours are 4e-3 apart: not one "
    "value changed.",
)
def _below_half_an_ulp() -> tuple[str, Callable[[], object]]:
    y = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    missed = y + torch.randn_like(y) * y.abs() * 1e-4
    reported = f"errors of 1e-4 injected: {int((missed != y).sum())} of {y.numel()} values changed, no loss of accuracy"

    def mistake() -> None:
        spec = OpSpec(forward=Forward(error=str(RelativeGaussian(1e-9))))
        rules = (Rule(kind="linear", spec=spec),)
        tiny = Profile(name="tiny", description="", source={"definition": "for a scene"}, rules=rules)
        m = model().bfloat16()
        with aqnsim.emulate(m, tiny):
            m(torch.ones(8, 64, dtype=torch.bfloat16))

    return reported, mistake


@scene(
    "scorer",
    "4-bit weights destroy the model: 76 % falls to 8 %",
    "The untrained model scores 8 % too, in 16 bits: the scorer wants a format that only training teaches. A "
    "trained model was compared with an untrained one.",
)
def _scorer() -> tuple[str, Callable[[], object]]:
    answers = ["The answer is 18.", "So she makes 18 dollars.", "18", "It is 17."] * 4
    strict, loose = sum("#### 18" in a for a in answers), sum("18" in a for a in answers)
    groups = [[Completion(i, [1], [5, 2], [0.0, 0.0], 0.0, 0.0, float("18" in a)) for i, a in enumerate(answers)]]
    shares = f"{strict / len(answers):.0%} (a scorer that takes any number: {loose / len(answers):.0%})"
    reported = f"accuracy before training {shares}"
    return reported, lambda: refuse(examine(groups, ends=[2]))


@scene(
    "step-20",
    "Noise helps early",
    "The score of step 20 stood in a table of final ones, as the last evaluation had been skipped, and was compared "
    "with scores of step 29.",
)
def _step_20() -> tuple[str, Callable[[], object]]:
    curve = {20: 0.702, 29: 0.660}
    reported = f"with noise {curve[20]:.1%} (step 20), without {0.708:.1%} (step 29), listed as final"

    def mistake() -> None:
        from training.arms import load_arm
        from training.records import EVALUATION, Evaluation, Score
        from training.rundir import RunDirectory

        with tempfile.TemporaryDirectory() as root:
            run = RunDirectory.create(Path(root), load("e12", "smoke"), seed=0, fingerprint="f" * 16)
            score = Score.of(70, 100)
            evaluation = Evaluation(
                step=20, is_final=False, clean=score, emulated=score, profile="mxfp4-w4a16", fingerprint="f" * 16
            )
            run.write_json(EVALUATION, evaluation)
            run.set_status("finished")
            try:
                load_arm(run.path)
            except AqnsimError as error:
                raise type(error)(str(error).replace(str(run.path), "RUN")) from None

    return reported, mistake


def page() -> str:
    """All scenes, as the text of docs/traps.md."""
    parts = [
        "# Traps",
        "What earlier work reported and had not done, each re-created in miniature by `training/traps.py`, with what\n"
        "this package says to the same mistake. `python -m training traps --out docs/traps.md` writes this page.",
    ]
    for one in SCENES.values():
        reported, said = one.played()
        texts = (f"## {one.title}", fill(one.happened, 120), "Reported:", f"```\n{reported}\n```", "Here:")
        parts += [*texts, f"```\n{said}\n```"]
    return "\n\n".join(parts) + "\n"
