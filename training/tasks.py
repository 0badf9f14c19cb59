"""Verifiable tasks: problems that are pure functions of (split, count, seed), and how an answer is scored.

A task partitions the space of its problems once and for all by a hash: no problem of the split "train" is ever in
the split "eval", under any seed, any count and any mixture of families.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from aqnsim._errors import ConfigError, unknown

if TYPE_CHECKING:
    from training.config import AnyTask

Split = Literal["train", "eval"]
Extraction = Literal["strict", "flexible"]

_OPERATORS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", operator.add),
    "sub": ("-", operator.sub),
    "mul": ("*", operator.mul),
}
_EXAMPLES = ("3 + 4 = 7", "9 - 5 = 4", "6 * 7 = 42", "8 + 5 = 13")
_NUMBER = re.compile(r"[+-]?[0-9]{1,100}")  # int() refuses thousands of digits


@dataclass(frozen=True)
class Problem:
    """A problem: `prompt` is what the model completes, `problem_id` the bare expression."""

    problem_id: str
    prompt: str
    answer: str


class Task(Protocol):
    """What a run needs to know about a task."""

    @property
    def end(self) -> str:
        """The text that ends an answer, as an end-of-sequence token does."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """`count` problems of a split, a pure function of the arguments and the task's parameters."""

    def score(self, completion: str, answer: str, extraction: Extraction = "strict") -> bool:
        """Whether a completion answers the problem."""


@dataclass(frozen=True)
class Family:
    """Expressions of one operation over operands of given numbers of decimal digits, such as 2x1: 47 and 6.

    No operand has a leading zero, hence none is 0. Differences below zero are left out.
    """

    operation: str
    digits: tuple[int, ...]

    @property
    def name(self) -> str:
        """The operation and the digits: "add-2x1"."""
        return f"{self.operation}-{'x'.join(map(str, self.digits))}"

    def operands(self) -> list[tuple[int, ...]]:
        """The operands of all problems of the family, in numerical order."""
        ranges = (range(10 ** (d - 1), 10**d) for d in self.digits)
        return [t for t in itertools.product(*ranges) if self.answer(t) >= 0]

    def answer(self, operands: Sequence[int]) -> int:
        """The operation applied from left to right."""
        return reduce(_OPERATORS[self.operation][1], operands)

    def text(self, operands: Sequence[int]) -> str:
        """The expression: "47 + 6"."""
        return f" {_OPERATORS[self.operation][0]} ".join(map(str, operands))

    def in_eval(self, operands: Sequence[int], held_out: float) -> bool:
        """Whether a problem belongs to the eval split, from a hash that is uniform in [0, 1).

        Commuted problems share their hash: 7 + 3 tells the answer to 3 + 7.
        """
        kept = operands if self.operation == "sub" else sorted(operands)
        digest = hashlib.sha256(f"arithmetic: {self.text(kept)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < held_out * 2**64


FAMILIES: dict[str, Family] = {
    family.name: family
    for operation in _OPERATORS
    for digits in [(1, 1), (2, 1), (1, 2), (2, 2), (1, 1, 1)]
    if (family := Family(operation, digits)).operands()
}
"""Every family by its name."""


@dataclass(frozen=True)
class Arithmetic:
    """Completing a line of worked examples: "3 + 4 = 7, 9 - 5 = 4, 12 + 9 =" -> " 21,".

    Args:
        families: name of a family -> its weight in the mixture.
        examples: worked examples in front of the problem, 0 to 4. They belong to no split.
        held_out: share of the problem space that the eval split holds.

    Raises:
        UnknownNameError: a family that does not exist.
        ConfigError: a parameter out of range.
    """

    families: Mapping[str, float]
    examples: int = len(_EXAMPLES)
    held_out: float = 0.5

    end = ","

    def __post_init__(self) -> None:
        for name, weight in self.families.items():
            if name not in FAMILIES:
                raise unknown("family of arithmetic problems", name, FAMILIES)
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"task.families.{name} = {weight}: expected a weight above 0; leave the family out instead"
                )
        if not self.families:
            raise ConfigError("task.families is empty: name at least one family and its weight")
        if not 0 <= self.examples <= len(_EXAMPLES):
            raise ConfigError(f"task.examples = {self.examples}: expected 0 to {len(_EXAMPLES)}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"task.held_out = {self.held_out}: expected a share between 0 and 1, both excluded")

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """Draw problems, each family in proportion to its weight, in random order.

        Eval problems are distinct. A family with fewer train problems than its share repeats them,
        as epochs would.

        Args:
            split: "train" or "eval".
            count: how many.
            seed: selects the problems and their order; the partition into splits does not depend on
                it.

        Raises:
            ConfigError: a family has fewer eval problems than its share, or the count is below 1.
        """
        if split not in get_args(Split):
            raise unknown("split", split, get_args(Split))
        if count < 1:
            raise ConfigError(f"task: {count} problems were asked for: expected at least 1")
        drawn = [
            problem
            for name, share in _shares(self.families, count).items()
            for problem in self._draw(FAMILIES[name], split, share, seed)
        ]
        _shuffler(seed, split, "order").shuffle(drawn)
        return drawn

    def score(self, completion: str, answer: str, extraction: Extraction = "strict") -> bool:
        """Whether the number extracted from the completion is the answer; see `extract`."""
        return extract(completion, extraction, end=self.end) == int(answer)

    def _draw(self, family: Family, split: Split, count: int, seed: int) -> list[Problem]:
        pool = [self._problem(family, operands) for operands in _pool(family, split, self.held_out)]
        if count > len(pool) and (split == "eval" or not pool):
            raise ConfigError(
                f"task: {count} {split} problems of family {family.name!r} were asked for, it has {len(pool)}: lower "
                f"task.eval_problems or the family's weight, or change task.held_out ({self.held_out})"
            )
        shuffler = _shuffler(seed, split, family.name)
        passes = range(math.ceil(count / len(pool)) if count else 0)
        return list(itertools.chain(*(shuffler.sample(pool, len(pool)) for _ in passes)))[:count]

    def _problem(self, family: Family, operands: Sequence[int]) -> Problem:
        text = family.text(operands)
        line = f"{self.end} ".join([*_EXAMPLES[: self.examples], f"{text} ="])
        return Problem(problem_id=text, prompt=line, answer=str(family.answer(operands)))


def extract(completion: str, extraction: Extraction, *, end: str) -> int | None:
    """The number that a completion gives as its answer, or None.

    Args:
        completion: decoded text, with or without the end of the answer and what follows it.
        extraction: "strict": up to the end of the answer (or of the line) there is a number and
            nothing else; "flexible": the first number anywhere.
        end: the text that ends an answer.
    """
    if extraction == "flexible":
        match = _NUMBER.search(completion)
    elif extraction == "strict":
        match = _NUMBER.fullmatch(completion.lstrip(" ").split(end)[0].split("\n")[0].rstrip(" "))
    else:
        raise unknown("extraction", extraction, get_args(Extraction))
    return None if match is None else int(match[0])


TASKS: dict[str, Callable[..., Task]] = {"arithmetic": Arithmetic}
"""Every task by its name."""


def load_task(name: str, **parameters: Any) -> Task:
    """Make a task from its name and parameters.

    Raises:
        UnknownNameError: no such task.
        ConfigError: a parameter that the task refuses.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name](**parameters)


def task_of(task: AnyTask) -> Task:
    """The task that an experiment names, with the experiment's parameters.

    Raises:
        UnknownNameError, ConfigError: see `load_task`.
    """
    return load_task(task.name, **task.parameters)


@cache
def _pool(family: Family, split: Split, held_out: float) -> tuple[tuple[int, ...], ...]:
    shown = {example.partition(" =")[0] for example in _EXAMPLES}
    return tuple(
        operands
        for operands in family.operands()
        if family.in_eval(operands, held_out) == (split == "eval")
        and family.text(operands) not in shown
        and family.text(operands[::-1]) not in shown
    )


def _shares(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """Split a count in proportion to weights, by largest remainders; ties go to the first name."""
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(weights, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def _shuffler(seed: int, split: Split, purpose: str) -> random.Random:
    return random.Random(f"arithmetic/{seed}/{split}/{purpose}")
