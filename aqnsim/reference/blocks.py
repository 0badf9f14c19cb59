"""The way from a tensor to its blocks and back, and a cast in its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim import formats
from aqnsim.formats import BlockFormat
from aqnsim.reference.rounding import F32, U32
from aqnsim.reference.scales import RULES


@dataclass(frozen=True)
class Blocks:
    """A cast in its parts.

    Attributes:
        scaled: what was rounded to the element format: the input brought there by its block's scale.
        elements: what it was rounded to.
        values: what that stands for.
        scales: one a block, as fp32 values; for HiF4 the 32 bits of the block's three levels, as int32.
        tensor_scale: the scale of the whole tensor, 1 where there is none.

    The first three have the input's shape; in that of ``scales``, an axis with blocks along it counts blocks.
    """

    scaled: F32
    elements: F32
    values: F32
    scales: npt.NDArray[Any]
    tensor_scale: np.float32


def blocks_of(x: F32, fmt: BlockFormat, axis: int = -1, words: U32 | None = None) -> Blocks:
    """Quantise ``x``, blocks along ``axis``.

    Raises:
        ConfigError: tiles along an axis that is not one of the last two.
    """
    x = np.asarray(x, np.float32)
    tiles = _Tiles(x.shape, fmt, axis)
    blocks = tiles.split(x)
    noise = None if words is None else tiles.split(np.asarray(words, np.uint32))
    with np.errstate(all="ignore"):
        s = RULES[fmt.scale_format](blocks, fmt, noise)
    parts = [tiles.join(part) for part in (s.scaled, s.elements, s.values)]
    return Blocks(parts[0], parts[1], parts[2], tiles.join_scales(s.scales), s.tensor_scale)


class _Tiles:
    """The way from a tensor to its blocks ``[batch, blocks down, blocks across, rows, columns]`` and back.

    The last blocks of an axis may be shorter; they are filled with zeros.
    """

    def __init__(self, shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> None:
        self.shape, self.inner = shape, shape or (1,)
        self.view: tuple[int, int, int]
        self.axis = axis % len(self.inner)
        self.scale_shape = formats.scale_shape(fmt, shape, axis)
        self.rows, self.columns = fmt.tile or (1, max(self.inner[self.axis], 1))
        self.one_row = self.swap = False
        self.whole = fmt.block == "tensor"  # one block, even of an empty tensor
        if self.whole:
            self.columns = max(math.prod(self.inner), 1)
            self.view = (1, 1, math.prod(self.inner))
        elif self.rows == 1:
            self.one_row = True
            others = self.inner[: self.axis] + self.inner[self.axis + 1 :]
            self.view = (1, math.prod(others), self.inner[self.axis])
        else:
            high, wide = (1, *self.inner)[-2:]
            self.swap = len(self.inner) > 1 and self.axis == len(self.inner) - 2
            self.view = (math.prod(self.inner[:-2]), *((wide, high) if self.swap else (high, wide)))

    def split(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        x = x.reshape(self.inner)
        if self.one_row:
            x = np.moveaxis(x, self.axis, -1)
        elif self.swap:
            x = np.swapaxes(x, -1, -2)
        batch, high, wide = self.view
        down, across = -(-high // self.rows), -(-max(wide, self.whole) // self.columns)
        padded = np.zeros((batch, down * self.rows, across * self.columns), x.dtype)
        padded[:, :high, :wide] = x.reshape(self.view)
        return padded.reshape(batch, down, self.rows, across, self.columns).swapaxes(2, 3)

    def join(self, blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
        batch, high, wide = self.view
        flat = blocks.swapaxes(2, 3).reshape(batch, blocks.shape[1] * self.rows, blocks.shape[2] * self.columns)
        flat = flat[:, :high, :wide]
        if self.one_row:
            moved = (*self.inner[: self.axis], *self.inner[self.axis + 1 :], self.inner[self.axis])
            return np.moveaxis(flat.reshape(moved), -1, self.axis).reshape(self.shape)
        if self.swap:
            flat = flat.swapaxes(-1, -2)
        return flat.reshape(self.shape)

    def join_scales(self, scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Scales ``[batch, blocks down, blocks across]`` in the order of the tensor's axes."""
        if self.one_row:
            moved = (*self.scale_shape[: self.axis], *self.scale_shape[self.axis + 1 :], self.scale_shape[self.axis])
            return np.moveaxis(scales.reshape(moved), -1, self.axis)
        return (scales.swapaxes(-1, -2) if self.swap else scales).reshape(self.scale_shape)
