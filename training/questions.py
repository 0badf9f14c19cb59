"""The questions of the validation plan as data: contrasts of arms, and what their outcomes together mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aqnsim._errors import unknown

Outcome = Literal["better", "worse", "equal", "undecided", "not attributable"]


@dataclass(frozen=True)
class Contrast:
    """One arm against another; the primary ones share the level of the test (Holm)."""

    treatment: str
    control: str
    asks: str
    primary: bool = False


@dataclass(frozen=True)
class Question:
    """A question and the contrasts that answer it; the first is the primary one."""

    name: str
    asks: str
    contrasts: tuple[Contrast, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """Every experiment that is needed, once."""
        return tuple(dict.fromkeys(arm for c in self.contrasts for arm in (c.treatment, c.control)))


QUESTIONS = {
    q.name: q
    for q in (
        Question(
            "e12",
            "Does the benefit of noise to LoRA carry over to MXFP4, the format of the device?",
            (
                Contrast("e12", "e6a-lora-mxfp4", "noise against none on MXFP4 weights", primary=True),
                Contrast("e12", "e7a-lora-bf16", "MXFP4 with noise against no emulated error"),
            ),
        ),
        Question(
            "targeting",
            "Does it matter where the noise goes, at equal sigma?",
            (
                Contrast("e9a-high-sigma", "e5b-noise5-epoch", "four chosen layers against all", primary=True),
                Contrast("e9a-high-sigma", "e9r-random-layers", "four chosen layers against four random ones"),
            ),
        ),
    )
}
"""Every question by its name."""

MATRIX: dict[tuple[Outcome, Outcome], str] = {
    ("better", "equal"): "Recommendations hold: high sigma, all layers.",
    ("better", "better"): "Targeting and high sigma together do best: update the recommendation.",
    ("better", "worse"): "Noise in all layers is preferred: confirmed.",
}
"""The plan's decisions by the outcomes of `e12` and `targeting`."""

NO_BENEFIT = "Revise the recommendation for LoRA on MXFP4: no benefit of noise was found."


def decision(e12: Outcome, targeting: Outcome) -> str:
    """What the plan's decision matrix says of two outcomes; nothing is decided where either is not.

    >>> decision("better", "undecided")
    'Not decided: targeting is undecided.'
    """
    if e12 in ("equal", "worse"):
        return NO_BENEFIT
    for name, outcome in (("e12", e12), ("targeting", targeting)):
        if outcome in ("undecided", "not attributable"):
            return f"Not decided: {name} is {outcome}."
    return MATRIX[e12, targeting]


def question(name: str) -> Question:
    """The question of a name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in QUESTIONS:
        raise unknown("question", name, QUESTIONS)
    return QUESTIONS[name]
