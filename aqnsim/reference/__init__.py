"""The meaning of every word, in numpy: bit-exact, slow, readable.

Every backend is compared with this file. It follows the specifications in the order in which they state things, in
fp32, and uses only operations that IEEE 754 fixes to the last bit. bfloat16 enters and leaves as fp32 values.
"""

from __future__ import annotations

from aqnsim.formats import AnyFormat, Format
from aqnsim.reference.accumulate import gemm
from aqnsim.reference.blocks import Blocks, blocks_of
from aqnsim.reference.codes import decode, encode
from aqnsim.reference.noise import box_muller, normal, perturb, philox, random_words
from aqnsim.reference.rounding import F32, U32, round_to, to_bf16

__all__ = [
    "F32",
    "U32",
    "Blocks",
    "blocks_of",
    "box_muller",
    "cast",
    "decode",
    "encode",
    "gemm",
    "normal",
    "perturb",
    "philox",
    "random_words",
    "round_to",
    "to_bf16",
]


def cast(x: F32, fmt: AnyFormat, axis: int = -1, words: U32 | None = None) -> F32:
    """``x`` in the format and back, fp32; blocks run along ``axis``.

    >>> import numpy as np
    >>> from aqnsim import formats
    >>> cast(np.float32([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, 6]), formats.get("mxfp4")).tolist()
    [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    """
    if isinstance(fmt, Format):
        return round_to(x, fmt, words)
    return blocks_of(x, fmt, axis, words).values
