"""Whether an engine holds what it was sent: sums over bits that survive stacking and sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aqnsim._errors import RealisationError

BITS = {2: torch.int16, 4: torch.int32}


class Reading(NamedTuple):
    """Of a tensor, or of several that are stacked: the numbers add up.

    Attributes:
        elements: how many.
        bits: the sum of their bit patterns, as integers.
        weighted: the sum of bit patterns, each times one plus its column: it tells an order from another.
    """

    elements: int
    bits: int
    weighted: int

    def __add__(self, other: tuple[int, ...]) -> Reading:  # type: ignore[override]
        return Reading(*(a + b for a, b in zip(self, other, strict=True)))


def read(weight: Tensor) -> Reading:
    """A tensor's reading; int64, exact: a column of 2^20 patterns of 31 bits fits.

    >>> w = torch.arange(6.0).reshape(2, 3)
    >>> read(w) == read(w[:1]) + read(w[1:])
    True
    >>> read(w) == read(w.flip(1))
    False
    """
    data = weight.detach()
    bits = data.contiguous().view(BITS[data.element_size()]).to(torch.int64)
    by_column = bits.reshape(-1, bits.shape[-1]).sum(0)
    columns = torch.arange(1, len(by_column) + 1, device=bits.device)
    return Reading(data.numel(), int(by_column.sum()), int((by_column * columns).sum()))


def compare(pushed: Mapping[str, Reading], held: Sequence[Mapping[str, Reading]], packed: Mapping[str, str]) -> None:
    """Check that an engine holds the weights that it was sent.

    Args:
        pushed: by transformers' names.
        held: by the engine's names, on each of its ranks; empty where another process compares.
        packed: modules of transformers that the engine stacks, with the name of the stack.

    Raises:
        RealisationError: naming a weight.
    """
    if not held:
        return
    expected: dict[str, Reading] = {}
    for name, reading in pushed.items():
        module, _, leaf = name.rpartition(".")
        parent, _, child = module.rpartition(".")
        stack = ".".join(part for part in (parent, packed.get(child, child), leaf) if part)
        engine_name = name if name in held[0] else stack
        expected[engine_name] = expected.get(engine_name, Reading(0, 0, 0)) + reading
    for name, wanted in expected.items():
        if name not in held[0]:
            raise RealisationError(
                f"the engine has no weight {name!r}, which was pushed: what it computes with there is unknown"
            )
        found = [rank[name] for rank in held]
        if all(reading == wanted for reading in found):  # replicated, or one rank
            continue
        total = Reading(0, 0, 0)
        for reading in found:
            total += reading
        # Shards of columns start counting anew, and a vocabulary is padded with zeros: their bits still add up.
        if len(found) > 1 and total.bits == wanted.bits:
            continue
        raise RealisationError(
            f"the engine does not hold what was pushed at {name!r}: {found[0]} instead of {wanted}. It would roll out "
            "with other weights than the step asks for"
        )
    unknown = held[0].keys() - expected.keys()
    if unknown:
        raise RealisationError(f"the engine holds a weight that was never pushed: {sorted(unknown)[0]!r}")
