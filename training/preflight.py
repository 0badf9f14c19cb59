"""Whether a run can learn, told from its first rollout, before anything is trained."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from statistics import fmean, pstdev

from aqnsim._errors import ConfigError
from training.batch import Group, is_informative
from training.records import Preflight


def examine(groups: Sequence[Group], ends: Collection[int]) -> Preflight:
    """Rewards, formats and ends of a rollout.

    Args:
        groups: all that were sampled in the first step.
        ends: token ids that end a completion.
    """
    completions = list(itertools.chain.from_iterable(groups))
    return Preflight(
        completions=len(completions),
        groups=len(groups),
        accuracy=fmean(c.correct for c in completions),
        flexible=fmean(c.flexible for c in completions),
        informative=fmean(map(is_informative, groups)),
        reward_sd=fmean(pstdev([c.correct for c in group]) for group in groups),
        truncated=fmean(not c.tokens or c.tokens[-1] not in ends for c in completions),
    )


def refuse(found: Preflight) -> None:
    """Refuse a run that cannot learn.

    Raises:
        ConfigError: every completion was cut off, or no group's answers differ.
    """
    sampled = f"of {found.completions} completions in {found.groups} groups, sampled before training"
    if found.truncated == 1:
        raise ConfigError(f"{sampled}, none ended: raise algorithm.max_new_tokens, or take a task with shorter answers")
    if found.informative == 0:
        artefact = found.flexible - found.accuracy > 0.1
        raise ConfigError(
            f"{sampled}, {found.accuracy:.0%} are right by the strict scorer and {found.flexible:.0%} by the flexible "
            "one, and no group's answers differ: there is nothing to learn from. "
            + (
                "The strict scorer asks for a format that the model does not know: show it in the prompt"
                if artefact
                else "Choose an easier or a harder task, or raise algorithm.group_size"
            )
        )
