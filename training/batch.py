"""The completions of a step, and how they are divided among its updates and the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.generation import TokenIds, pad_left


@dataclass(frozen=True)
class Completion:
    """One sampled completion. Its id is its position among all completions of the step, over all ranks.

    `log_probs` are those of its tokens in the rollout; `correct` and `flexible` say whether it is right, by the two
    scorers.
    """

    sequence_id: int
    prompt: TokenIds
    tokens: TokenIds
    log_probs: list[float]
    advantage: float
    correct: float
    flexible: float


Group = Sequence[Completion]
"""The completions of one prompt."""


def is_informative(group: Group) -> bool:
    """Whether the completions differ in accuracy: 0 < correct < G (the constraint of DAPO's eq. 8)."""
    return len({completion.correct for completion in group}) > 1


def deal(groups: Sequence[Group], updates: int) -> list[Sequence[Group]]:
    """The groups of each update, dealt out one by one: where informative ones come first, each update has its share.

    >>> deal(["a", "b", "c", "d"], 2)
    [['a', 'c'], ['b', 'd']]
    """
    return [groups[update::updates] for update in range(updates)]


def share(groups: Sequence[Group], ranks: int, rank: int) -> Sequence[Group]:
    """A rank's share of the groups of one update; a group stays whole."""
    size = len(groups) // ranks
    return groups[size * rank : size * (rank + 1)]


def collate(groups: Sequence[Group], *, weighs: Sequence[bool], padding: int) -> dict[str, torch.Tensor]:
    """Groups as TRL's generation batch, with a column of sequence ids.

    Args:
        groups: their completions are the rows, in this order.
        weighs: whether a group counts in the loss; where not, the mask of its completions is 0.
        padding: token id; prompts are padded on the left, completions on the right.
    """
    completions = list(itertools.chain.from_iterable(groups))
    weight = torch.tensor([has for has, group in zip(weighs, groups, strict=True) for _ in group])
    prompt_ids, prompt_mask = pad_left([c.prompt for c in completions], padding)
    # Right padding is left padding in the mirror.
    ids, mask = pad_left([c.tokens[::-1] for c in completions], padding)
    sampled = torch.zeros(ids.shape)
    for row, completion in zip(sampled, completions, strict=True):
        row[: len(completion.tokens)] = torch.tensor(completion.log_probs)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids.flip(1),
        "completion_mask": mask.flip(1) * weight[:, None],
        "whole_mask": mask.flip(1),
        "advantages": torch.tensor([c.advantage for c in completions]),
        "sampling_per_token_logps": sampled,
        "sequence_ids": torch.tensor([c.sequence_id for c in completions]),
    }
