"""Finished adapters on other hardware and under noise: how accuracy falls, point by point, each with its receipts.

Adapters that a run made are evaluated under profiles, with relative Gaussian noise on the results of linear layers on
top. Every record says under which profile the adapters were trained and under which they were evaluated.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

import aqnsim
from aqnsim import ConfigError, Emulation, RealisationError, RelativeGaussian, errors
from aqnsim._errors import unknown
from aqnsim.profiles import Forward, OpSpec, Profile, Rule, load
from aqnsim.receipts import merge
from training import curves, rundir
from training.evaluate import attest_clean, attest_emulated, evaluate
from training.generation import pad_left
from training.records import PROBLEMS, ROBUSTNESS, ProblemRecord, RobustnessPoint, Score
from training.run import EVAL_BATCH
from training.trained import Trained

CLEAN, TRAINED = "clean", "trained"
"""Names that stand for no emulated hardware, and for the profile that the adapters were trained under."""

NEVER_NOISY = ("lm_head", "embedding", "router")
"""What gets no noise on clean hardware: what the profiles of the package leave exact, too."""

PROBED = 8
"""Prompts whose logits are compared by their bits."""


def with_noise(profile: Profile, sigma: float) -> Profile:
    """The profile with a relative Gaussian error on the forward of every linear layer that it does not keep exact.

    ``y' = y + sigma z |y|`` acts in fp32, where the profile's own error would. A relative Gaussian error that is there
    already gets the root of the sum of squares. Sites that the profile excludes, or keeps by a rule that asks for
    nothing, stay as they are; of clean hardware, `NEVER_NOISY`. With sigma 0 the profile itself.

    Raises:
        ConfigError: the profile has an error on linear layers from which receipts could not tell the noise.

    >>> noisy = with_noise(load("mxfp4-w4a16"), 0.02)
    >>> noisy.name, noisy.rules[0].spec.forward.weight, noisy.rules[0].spec.forward.error
    ('mxfp4-w4a16 + 2% noise', 'mxfp4', 'relative-gaussian(sigma=0.02)')
    """
    if sigma == 0:
        return profile
    rules: list[Rule] = []
    for rule in profile.rules:
        if "linear" not in rule.kinds or rule.spec.is_empty:
            rules.append(rule)
            continue
        if others := tuple(kind for kind in rule.kinds if kind != "linear"):
            rules.append(replace(rule, kind=others))
        forward = replace(rule.spec.forward, error=_added(profile, rule.spec.forward.error, sigma))
        rules.append(replace(rule, kind="linear", spec=replace(rule.spec, forward=forward)))
    if not any("linear" in r.kinds and "*" in r.sites and "eval" in r.phases for r in rules):
        rules.append(Rule(kind="linear", spec=OpSpec(forward=Forward(error=str(RelativeGaussian(sigma))))))
    return replace(
        profile,
        name=f"{profile.name} + {100 * sigma:g}% noise",
        source={**profile.source, "noise": f"relative Gaussian, sigma {sigma:g}, on linear layers; not a device's"},
        exclude=profile.exclude if profile.rules else NEVER_NOISY,
        rules=tuple(rules),
    )


def _added(profile: Profile, text: str | None, sigma: float) -> str:
    """The error's text with the noise in it."""
    if text is None:
        return str(RelativeGaussian(sigma))
    match errors.chain(text):
        case (RelativeGaussian(reference="output") as own,):
            return str(replace(own, sigma=math.hypot(own.sigma, sigma)))
    raise ConfigError(
        f"profile {profile.name!r} has {text} on linear layers: receipts could not tell noise on top of it from it; "
        "take a profile without, or whose error is one relative-gaussian"
    )


@dataclass(frozen=True)
class Point:
    """An evaluation that is to be made: of which hardware, with how much noise, from which seed of the noise."""

    base: Profile
    noise: float
    seed: int

    @property
    def profile(self) -> Profile:
        """What is evaluated under."""
        return with_noise(self.base, self.noise)


def plan(trained: Trained, profiles: Sequence[str], noise: Sequence[float], draws: int) -> list[Point]:
    """The points of one adapter: where nothing is drawn, one seed; the first seed is that of the run.

    Raises:
        ConfigError: no profile, noise or draws; a negative noise.
        UnknownNameError: no such profile.
    """
    if not profiles or not noise or draws < 1 or min(noise) < 0:
        raise ConfigError(
            f"profiles {list(profiles)}, noise {list(noise)}, draws {draws}: expected at least one of each, and no "
            "noise below 0"
        )
    seed = trained.run.run.seed
    points = []
    for name, sigma in itertools.product(profiles, noise):
        point = Point(_profile(trained, name), sigma, seed)
        drawn = any(rule.spec.draws for rule in point.profile.rules)
        points += [replace(point, seed=seed + draw) for draw in range(draws if drawn else 1)]
    return list({(point.profile.fingerprint, point.seed): point for point in points}.values())


def _profile(trained: Trained, name: str) -> Profile:
    if name == TRAINED:
        return trained.profile
    return load("ideal" if name == CLEAN else name)


def robustness(
    paths: Sequence[Path],
    *,
    profiles: Sequence[str] = (CLEAN, TRAINED),
    noise: Sequence[float] = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1),
    draws: int = 5,
    forms: Sequence[bool] = (False, True),
    console: Console | None = None,
) -> list[RobustnessPoint]:
    """Evaluate adapters at every point that their run's `robustness.jsonl` does not have yet.

    Args:
        paths: of finished runs, or of checkpoints in runs.
        profiles: names or files; `CLEAN` and `TRAINED` stand for themselves.
        noise: sigmas that are added to linear layers, as shares of their results.
        draws: of the noise, each with a seed of its own.
        forms: whether the adapters are merged into the weights before these are cast.
        console: where progress is printed; None prints nothing.

    Returns:
        The points that were asked for, old and new.

    Raises:
        ConfigError, UnknownNameError: see `plan`, `with_noise` and `Trained.find`.
        RealisationError: noise that was asked for did not happen, or without any the result is not the clean one.
    """
    console = console or Console(quiet=True)
    points: list[RobustnessPoint] = []
    for trained, merged in itertools.product(map(Trained.find, paths), forms):
        wanted = plan(trained, profiles, noise, draws)
        done = {point.key: point for point in trained.run.read_jsonl(ROBUSTNESS, RobustnessPoint)}
        keys = [_key(trained, merged, point) for point in wanted]
        missing = [point for key, point in zip(keys, wanted, strict=True) if key not in done]
        console.print(f"{trained.name}, {_form(merged)}: {len(wanted) - len(missing)} of {len(wanted)} points are done")
        for made in Bench(trained, merged).points(missing) if missing else ():
            trained.run.append_jsonl(ROBUSTNESS, made)
            done[made.key] = made
            realised = "" if made.realised is None else f", realised {made.realised:.5f}"
            console.print(
                f"  {made.profile} + {made.noise:.1%}, seed {made.seed}: {made.score.accuracy:6.1%}"
                f" ({made.noisy_sites} noisy sites{realised})"
                + ("" if made.as_recorded is None else f", as the run recorded: {made.as_recorded}")
            )
        points += [done[key] for key in keys]
    return points


def command(
    paths: Sequence[Path], profiles: Sequence[str], noise: Sequence[str], draws: int, form: str, out: Path | None
) -> None:
    """What `python -m training robustness` does: evaluate, print the table, write JSON and picture.

    Raises:
        ConfigError: a noise that is no number, an unknown form, or see `robustness`.
        RealisationError: see `robustness`.
    """
    forms = {"unmerged": (False,), "merged": (True,), "both": (False, True)}
    if form not in forms:
        raise unknown("form of adapters", form, forms)
    try:
        sigmas = [float(text) for text in noise]
    except ValueError as error:
        raise ConfigError(f"--noise {','.join(noise)}: expected numbers separated by commas, such as 0,0.05") from error
    console = Console(highlight=False, soft_wrap=True)
    points: dict[str, list[RobustnessPoint]] = {}
    for path in paths:
        found = robustness([path], profiles=profiles, noise=sigmas, draws=draws, forms=forms[form], console=console)
        run = Trained.find(path).run
        points.setdefault(f"{run.experiment.id}, seed {run.run.seed}", []).extend(found)
    for table in curves.tables(points):
        console.print(table)
    for written in curves.write(points, out or Trained.find(paths[0]).run.path):
        console.print(str(written))


def _key(trained: Trained, merged: bool, point: Point) -> tuple[object, ...]:
    n = trained.run.experiment.task.eval_problems
    return (trained.digest, merged, point.profile.fingerprint, point.seed, n)


def _form(merged: bool) -> str:
    return "merged" if merged else "unmerged"


class Bench:
    """Adapters in one form, loaded, with the problems that they are evaluated on."""

    def __init__(self, trained: Trained, merged: bool) -> None:
        self.trained, self.merged = trained, merged
        self.model, self.tokenizer = trained.load(merged=merged)
        self.problems = trained.problems

    def points(self, wanted: Sequence[Point]) -> Iterator[RobustnessPoint]:
        """Evaluate points one by one.

        Raises:
            RealisationError: see `robustness`.
        """
        clean: tuple[str, str] | None = None
        for point in wanted:
            made = self._point(point)
            if not point.profile.rules:
                clean = clean or self._clean()
                if (made.answers, made.logits) != clean:
                    raise RealisationError(
                        f"{self.trained.name}, {_form(self.merged)}: without noise, clean hardware gives other results "
                        f"than the model with its emulation off: {made.answers}, {made.logits} instead of {clean}"
                    )
            yield made

    def _point(self, point: Point) -> RobustnessPoint:
        profile, experiment = point.profile, self.trained.run.experiment
        with aqnsim.emulate(self.model, profile, seed=point.seed, strict=True) as emulation:
            emulation.begin_step(self.trained.step, max(self.trained.step, experiment.total_steps))
            since = emulation.snapshot()
            score, answers, logits = self._answers(emulation)
            attest_emulated(emulation, since)
            requested, realised, noisy = attest_noise(emulation)
        own = self.trained.run.run
        return RobustnessPoint(
            adapters=self.trained.digest,
            step=self.trained.step,
            merged=self.merged,
            trained_under=own.profile,
            trained_fingerprint=own.fingerprint,
            profile=point.base.name,
            fingerprint=point.base.fingerprint,
            evaluated_under=profile.fingerprint,
            noise=point.noise,
            seed=point.seed,
            draws_anything=emulation.draws,
            score=score,
            sites=len(emulation.sites),
            noisy_sites=noisy,
            requested=requested,
            realised=realised,
            answers=answers,
            logits=logits,
            as_recorded=self._as_recorded(point, answers),
            revision=rundir.environment()["git"]["revision"],
        )

    def _as_recorded(self, point: Point, answers: str) -> bool | None:
        """Whether answers are those of the run's own evaluation, where the point repeats it."""
        own = self.trained.run
        rows = [r for r in own.read_jsonl(PROBLEMS, ProblemRecord) if r.split_is_final and r.mode == "emulated"]
        repeats = point.profile.fingerprint == own.run.fingerprint and point.seed == own.run.seed and not self.merged
        if not (repeats and rows and rows[0].step == self.trained.step):
            return None
        return answers == _digest_of(row.completion for row in rows)

    def _clean(self) -> tuple[str, str]:
        """Answers and logits of the model whose emulation is off."""
        profile = self.trained.profile
        with aqnsim.emulate(self.model, profile if profile.rules else with_noise(profile, 0.05)) as emulation:
            since = emulation.snapshot()
            with emulation.off():
                _, answers, logits = self._answers(emulation)
            attest_clean(emulation, since)
            self._answers(emulation, count=PROBED)  # so that the emulation that was off is one that acts
        return answers, logits

    def _answers(self, emulation: Emulation, count: int | None = None) -> tuple[Score, str, str]:
        problems = self.problems[:count]
        results = evaluate(
            self.model,
            self.tokenizer,
            problems,
            self.trained.task.score,
            emulation=emulation,
            batch_size=EVAL_BATCH,
            max_new_tokens=self.trained.run.experiment.algorithm.max_new_tokens,
        )
        prompts = self.tokenizer([problem.prompt for problem in self.problems[:PROBED]])["input_ids"]
        ids, mask = pad_left(prompts, self.tokenizer.pad_token_id or 0)
        device = next(self.model.parameters()).device
        with torch.no_grad(), emulation.phase("eval"), emulation.sequences(torch.arange(len(ids))):
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        score = Score.of(sum(result.correct for result in results), len(results))
        answers = _digest_of(result.completion for result in results)
        return score, answers, _digest(logits.float().cpu().numpy().tobytes())


def attest_noise(emulation: Emulation) -> tuple[float | None, float | None, int]:
    """Check that every linear layer that the profile gives an error injected it, as asked.

    Returns:
        Sigma requested and realised over all of these layers, as root mean squares, and their number.

    Raises:
        RealisationError: a layer did not, or not with the sigma that was asked for.
    """
    asked = {s.name for s in emulation.sites if s.kind == "linear" and s.specs["eval"].forward.error is not None}
    if not asked:
        return None, None, 0
    emulation.check()
    found = [r for r in emulation.receipts() if (r.phase, r.stream) == ("eval", "output") and r.site in asked]
    silent = asked - {r.site for r in found if r.changed > 0}
    if silent:
        raise RealisationError(
            f"profile {emulation.profile.name!r} asks for noise on {len(asked)} linear layers, and it changed nothing "
            f"at {len(silent)} of them, such as {min(silent)!r}"
        )
    total = merge([replace(r, requested="") for r in found])
    return total.requested_sigma, total.realised_sigma, len(asked)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _digest_of(completions: Iterable[str]) -> str:
    return _digest("\0".join(completions).encode())
