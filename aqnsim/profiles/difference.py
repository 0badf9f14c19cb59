"""What two profiles do differently, for each kind of op. The standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from aqnsim.profiles import KINDS, Profile, Rule
from aqnsim.profiles.texts import flat

RULE = "rule"
"""The field of a difference where one profile has no rule."""

_SILENT = {"forward.bias": "exact"}  # what a field says where it is left out


@dataclass(frozen=True)
class Difference:
    """One field that two rules give otherwise, for the kinds of op that share it.

    Attributes:
        kinds: of op.
        rules: number of the rule in each profile, from 1; None where a profile has no such rule.
        field: of the rule, such as ``forward.weight``; ``rule`` where one profile has none there.
        values: what each profile says; None where it asks nothing.
    """

    kinds: tuple[str, ...]
    rules: tuple[int | None, int | None]
    field: str
    values: tuple[Any, Any]


def differences(a: Profile, b: Profile) -> list[Difference]:
    """Where the rules of two profiles differ, kind by kind: the n-th rule for a kind beside the other's n-th.

    >>> from aqnsim.profiles import load
    >>> differences(load("mxfp4-w4a16"), load("nvfp4-w4a16"))
    [Difference(kinds=('linear',), rules=(1, 1), field='forward.weight', values=('mxfp4', 'nvfp4'))]
    """
    kinds_of: dict[tuple[Any, ...], list[str]] = {}
    for kind in KINDS:
        for rules, field, values in _of_kind(kind, a, b):
            kinds_of.setdefault((rules, field, values), []).append(kind)
    return [Difference(tuple(kinds), *key) for key, kinds in kinds_of.items()]


def _of_kind(kind: str, a: Profile, b: Profile) -> Iterator[tuple[Any, ...]]:
    for first, second in zip_longest(_rules_for(kind, a), _rules_for(kind, b)):
        if first is None or second is None:
            numbers, rules = zip(*((None, None) if n is None else n for n in (first, second)), strict=True)
            yield numbers, RULE, tuple(None if rule is None else _summary(rule) for rule in rules)
            continue
        (i, rule), (j, other) = first, second
        said, others = _said(rule), _said(other)
        for field in dict.fromkeys([*said, *others]):
            values = said.get(field, _SILENT.get(field)), others.get(field, _SILENT.get(field))
            if values[0] != values[1]:
                yield (i, j), field, values


def _rules_for(kind: str, profile: Profile) -> list[tuple[int, Rule]]:
    return [(i, rule) for i, rule in enumerate(profile.rules, 1) if kind in rule.kinds]


def _said(rule: Rule) -> dict[str, Any]:
    return {"sites": rule.sites, "phases": rule.phases, **flat(rule.spec)}


def _summary(rule: Rule) -> tuple[str, ...]:
    return tuple(f"{field} = {_word(value)}" for field, value in _said(rule).items())


def exclusions(a: Profile, b: Profile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The exclusions that only the first has, and that only the second has."""
    return (
        tuple(glob for glob in a.exclude if glob not in b.exclude),
        tuple(glob for glob in b.exclude if glob not in a.exclude),
    )


def in_words(difference: Difference, a: str, b: str) -> str:
    """A difference as a sentence, for the profiles' names.

    >>> in_words(Difference(("linear",), (1, 1), "forward.weight", ("mxfp4", None)), "mine", "yours")
    'forward.weight is mxfp4 in mine, not asked for in yours'
    """
    (first, second), field = difference.values, difference.field
    if field == RULE:
        return f"only in {a if second is None else b}: {_word(first or second)}"
    return f"{field} is {_word(first)} in {a}, {_word(second)} in {b}"


def _word(value: Any) -> str:
    if value is None:
        return "not asked for"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
