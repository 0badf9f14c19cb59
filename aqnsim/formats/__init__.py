"""Number formats as data: which values exist, and how a value becomes one of them. The standard library only.

A :class:`Format` says which numbers an element can hold; a :class:`BlockFormat` adds the scale that a block of
elements shares. Every named format is one value in :data:`ALL`; kernels, tests, tables and the command line read it
there. What a specification leaves open is a field, and a format with other choices is spelt ``name(field=value)``:

>>> get("fp4_e2m1").values()
(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
>>> get("mxfp4").block
32
>>> get("mxfp4(scale=rceil, rounding=nearest-away)").element.rounding
'nearest-away'
>>> str(get("mxfp4( rounding = nearest-even , scale=rceil)"))
'mxfp4(scale=rceil)'
"""

from aqnsim.formats.block import (
    MAX_BLOCK,
    SCALE_RULES,
    AnyFormat,
    Block,
    BlockFormat,
    BlockSpecial,
    ZeroScale,
    element_of,
    scale_shape,
)
from aqnsim.formats.element import (
    ROUNDINGS,
    Format,
    NanInput,
    Overflow,
    Specials,
    Subnormals,
    all_values,
    check_rounding,
    float32,
)
from aqnsim.formats.names import ALL, ieee_like
from aqnsim.formats.texts import get, random_bits, with_rounding

__all__ = [
    "ALL",
    "MAX_BLOCK",
    "ROUNDINGS",
    "SCALE_RULES",
    "AnyFormat",
    "Block",
    "BlockFormat",
    "BlockSpecial",
    "Format",
    "NanInput",
    "Overflow",
    "Specials",
    "Subnormals",
    "ZeroScale",
    "all_values",
    "check_rounding",
    "element_of",
    "float32",
    "get",
    "ieee_like",
    "random_bits",
    "scale_shape",
    "with_rounding",
]
