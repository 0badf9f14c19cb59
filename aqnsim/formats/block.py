"""Formats of blocks: elements that share a scale, and the rules by which a block gets it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from aqnsim._errors import ConfigError, unknown
from aqnsim.formats.element import Format

BlockSpecial = Literal["block", "element"]
ZeroScale = Literal["min", "one"]
Block = int | tuple[int, int] | Literal["axis", "tensor"]

MAX_BLOCK = 1 << 16
"""The most elements that may share a scale, other than a whole axis or tensor."""

SCALE_RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "e8m0": ("floor", "ceil", "rceil", "even", "amct", "mse"),
        "fp8_e4m3": (
            "te",
            "modelopt",
            "compressed_tensors",
            "torchao",
            "qutlass",
            "4over6-mae",
            "4over6-mse",
        ),
        "fp32": ("amax", "te", "te-pow2"),
        "hif4": ("hif4",),
    }
)
"""The rules by which a block gets its scale, for each format that the scale can have; see docs/semantics.md."""

_RULE_ALIASES = {"truncation-free": "rceil"}

_BLOCK_CHOICES: dict[str, tuple[str, ...]] = {
    "special": get_args(BlockSpecial),
    "zero_scale": get_args(ZeroScale),
}


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """Elements in blocks that share a scale.

    Attributes:
        name: lower-case, as vendors spell it.
        element: the element format.
        block: which elements share one scale: so many along the cast's axis, the last block may be shorter; a tile of
            ``(r, c)``, ``c`` along the axis and ``r`` along the other of the last two; all of the ``"axis"``; or the
            whole ``"tensor"``.
        scale_format: what a block's scale is stored as: ``e8m0``, ``fp8_e4m3`` (and an fp32 scale a tensor), ``fp32``,
            or ``hif4`` (three levels in 32 bits).
        scale: the rule that gives a block its scale; one of ``SCALE_RULES[scale_format]``.
        amax_to: for fp32 scales, the element value that a block's largest magnitude is mapped to; None for the
            element's ``max``.
        scale_max: for E4M3 scales by 4over6, the largest block scale in use: 256, which leaves room for the larger
            scale of map-to-4, or 448.
        special: for E8M0 scales, what a NaN or an Inf does: ``block`` makes the whole block NaN; ``element`` keeps it
            out of the scale, and the element alone is NaN, or beyond the element format's range.
        zero_scale: for E8M0 scales, the scale of a block of zeros: ``min`` (2^-127) or ``one``.
        source: where the definition stands.
        unverified: why the definition is not certain; empty where it is.
    """

    name: str
    element: Format
    block: Block
    scale_format: str
    scale: str
    amax_to: float | None = None
    scale_max: float = 448.0
    special: BlockSpecial = "block"
    zero_scale: ZeroScale = "min"
    source: str = ""
    unverified: str = ""

    def __post_init__(self) -> None:
        where = f"format {self.name!r}"
        if self.scale_format not in SCALE_RULES:
            raise unknown(f"scale format of {where}", self.scale_format, SCALE_RULES)
        if isinstance(self.block, tuple) and self.block[:-1] == (1,):
            object.__setattr__(self, "block", self.block[1])
        aliases = _RULE_ALIASES if self.scale_format == "e8m0" else {}
        object.__setattr__(self, "scale", aliases.get(self.scale, self.scale))
        if self.scale not in SCALE_RULES[self.scale_format]:
            raise unknown(f"scale rule of {where}", self.scale, [*SCALE_RULES[self.scale_format], *aliases])
        self._check_block(where)
        for field, allowed in _BLOCK_CHOICES.items():
            if getattr(self, field) not in allowed:
                raise unknown(f"{field} of {where}", getattr(self, field), allowed)
        if not self.element.signed or not self.element.has_zero:
            raise ConfigError(f"{where}: elements need a sign and a zero, {self.element.name} has not both")
        if self.scale_format == "fp8_e4m3" and self.element.max != 6.0:
            raise ConfigError(
                f"{where}: scale rule {self.scale!r} is defined for elements up to 6 (FP4 E2M1), "
                f"got {self.element.name}"
            )
        if self.scale_format == "hif4" and (self.block != 64 or self.element.name != "fp4_e1m2"):
            raise ConfigError(f"{where}: HiFloat4 is defined for blocks of 64 of fp4_e1m2")
        if self.scale_max not in (256.0, 448.0) or (self.scale_max == 256.0 and not self.scale.startswith("4over6")):
            raise ConfigError(f"{where}: scale_max must be 448, or 256 with a 4over6 rule, got {self.scale_max:g}")
        if self.amax_to is not None and not (self.scale_format == "fp32" and 2.0**-126 <= self.amax_to < 2.0**127):
            raise ConfigError(f"{where}: amax_to must be positive and needs fp32 scales, got {self.amax_to:g}")
        if self.scale_format != "e8m0" and (self.special, self.zero_scale) != ("block", "min"):
            raise ConfigError(f"{where}: special and zero_scale are choices of E8M0 scales only")

    def _check_block(self, where: str) -> None:
        if isinstance(self.block, str):
            if self.block not in ("axis", "tensor"):
                raise unknown(f"block of {where}", self.block, ("axis", "tensor"))
            if self.scale_format != "fp32":
                raise ConfigError(f"{where}: block = {self.block} needs fp32 scales, got {self.scale_format}")
            return
        sides = self.block if isinstance(self.block, tuple) else (1, self.block)
        if not all(isinstance(n, int) and n >= 1 for n in sides) or len(sides) != 2 or math.prod(sides) > MAX_BLOCK:
            raise ConfigError(
                f"{where}: block must be 1..{MAX_BLOCK} elements, a tile such as 16x16, axis or tensor, "
                f"got {self.block!r}"
            )

    @property
    def tile(self) -> tuple[int, int] | None:
        """The block as ``(rows, columns)``, columns along the cast's axis; None for a whole axis or tensor."""
        if isinstance(self.block, str):
            return None
        return self.block if isinstance(self.block, tuple) else (1, self.block)

    @property
    def bits(self) -> float:
        """Storage a value, the block's scale included, the tensor's (or the whole axis's) not."""
        if self.tile is None:
            return self.element.bits
        width = 32 if self.scale_format in ("fp32", "hif4") else 8
        return self.element.bits + width / math.prod(self.tile)

    def __str__(self) -> str:
        from aqnsim.formats.texts import text_of

        return text_of(self)


AnyFormat = Format | BlockFormat


def element_of(fmt: AnyFormat) -> Format:
    """The element format of either kind."""
    return fmt.element if isinstance(fmt, BlockFormat) else fmt


def scale_shape(fmt: AnyFormat, shape: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """The shape of the scales of a tensor: an axis with blocks along it counts blocks.

    Raises:
        ConfigError: tiles along an axis that is not one of the last two.

    >>> from aqnsim.formats import get
    >>> scale_shape(get("mxfp4"), (3, 70), -1), scale_shape(get("mxfp4(block=32x32)"), (3, 70), 0)
    ((3, 3), (1, 3))
    """
    if not isinstance(fmt, BlockFormat) or fmt.block == "tensor":
        return ()
    sizes = list(shape) or [1]
    axis %= len(sizes)
    if fmt.tile is None:
        sizes[axis] = min(sizes[axis], 1)
        return tuple(sizes)
    rows, columns = fmt.tile
    if rows > 1 and axis < len(sizes) - 2:
        raise ConfigError(f"{fmt.name}: tiles lie in the last two axes, but blocks run along axis {axis}")
    sizes[axis] = (sizes[axis] + columns - 1) // columns
    if rows > 1 and len(sizes) > 1:
        other = len(sizes) - 1 if axis == len(sizes) - 2 else len(sizes) - 2
        sizes[other] = (sizes[other] + rows - 1) // rows
    return tuple(sizes)
