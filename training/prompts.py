"""Which problems a step asks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from aqnsim._errors import ConfigError

EPOCH, REFILL = 1, 2
"""The random streams of `PromptSchedule`; sampling has another."""


@dataclass(frozen=True)
class PromptSchedule:
    """Which problems a step asks: a pure function of the seed, the step and the generation batch.

    Batch 0 of the steps of an epoch goes through all problems once, in an order of that epoch's own; an incomplete
    last batch is dropped. Refills draw other problems than batch 0, in an order of that step's own, and leave the
    epochs alone.

    Attributes:
        problems: how many there are.
        prompts_per_step: problems in a generation batch.
        seed: of the orders.
    """

    problems: int
    prompts_per_step: int
    seed: int

    def __post_init__(self) -> None:
        if self.problems < self.prompts_per_step:
            raise ConfigError(
                f"algorithm.prompts_per_step = {self.prompts_per_step} exceeds the {self.problems} problems to train "
                "on: lower it, or raise task.prompts"
            )

    def indices(self, step: int, batch: int) -> list[int]:
        """The problems of one generation batch of a step (from 0), for all ranks together."""
        epoch, position = divmod(step, self.problems // self.prompts_per_step)
        start = position * self.prompts_per_step
        first = self._order(EPOCH, epoch)[start : start + self.prompts_per_step]
        if batch == 0:
            return first
        others = [i for i in self._order(REFILL, step) if i not in set(first)] or first
        start = (batch - 1) * self.prompts_per_step
        return list(itertools.islice(itertools.cycle(others), start, start + self.prompts_per_step))

    def _order(self, stream: int, number: int) -> list[int]:
        generator = np.random.default_rng([self.seed, stream, number])
        return [int(i) for i in generator.permutation(self.problems)]
