"""The random Hadamard transform: a step before a cast, undone after it, that spreads outliers over a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.backends.checks import DTYPES
from aqnsim.rng import NoiseKey, coordinates

SIZES = (16, 32, 64, 128)

TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The fixed signs of NVIDIA TransformerEngine's transform of size 16."""


def hadamard(
    x: Tensor, size: int = 16, axis: int = -1, signs: Tensor | NoiseKey | None = None, inverse: bool = False
) -> Tensor:
    """``x diag(signs) H / sqrt(size)`` on blocks of ``size`` along an axis; H is Sylvester's, of entries +1 and -1.

    The transform is orthogonal: applied to both operands of a product along its contraction it leaves the product, and
    ``inverse=True`` undoes it. It computes in fp32 by ``log2(size)`` passes of sums and differences in a fixed order,
    then multiplies with ``1 / sqrt(size)``, and rounds to the dtype of ``x``. Differentiable.

    Args:
        x: float32, bfloat16 or float16; the axis must be a multiple of ``size``.
        size: one of :data:`SIZES`.
        axis: the axis along which the blocks lie.
        signs: +1 and -1, ``[size]``, the same for all blocks: a tensor such as ``torch.tensor(TE_SIGNS)``; or a key,
            of which they are a pure function; or None for no sign changes.
        inverse: give ``x H / sqrt(size) diag(signs)``, which brings back what was transformed.

    Raises:
        ConfigError: a size, axis, length or signs that do not fit.

    Source: TransformerEngine, NVFP4 recipe; QuaRot (arXiv 2404.00456).

    >>> x = torch.zeros(16); x[3] = 8.0
    >>> hadamard(x).abs().unique().tolist(), torch.equal(hadamard(hadamard(x), inverse=True), x)
    ([2.0], True)
    """
    if size not in SIZES:
        raise ConfigError(f"hadamard: size must be one of {', '.join(map(str, SIZES))}, got {size}")
    if x.dim() == 0 or not -x.dim() <= axis < x.dim():
        raise ConfigError(f"hadamard: axis {axis} is out of range for a tensor of {x.dim()} dimensions")
    if x.shape[axis] % size:
        raise ConfigError(f"hadamard: axis {axis} has {x.shape[axis]} elements, expected a multiple of {size}")
    if x.dtype not in DTYPES:
        raise ConfigError(f"hadamard: expected a float32, bfloat16 or float16 tensor, got {x.dtype}: convert it first")
    flips = _signs(signs, size, x)
    blocks = x.float().movedim(axis, -1).unflatten(-1, (-1, size))
    if not inverse:
        blocks = blocks * flips
    blocks = _walsh_hadamard(blocks) * (1 / math.sqrt(size))
    if inverse:
        blocks = blocks * flips
    return blocks.flatten(-2).movedim(-1, axis).to(x.dtype)


def _walsh_hadamard(x: Tensor) -> Tensor:
    """``x H`` along the last axis: neighbours at a distance of 1, 2, 4, ... become their sum and difference."""
    size, stride = x.shape[-1], 1
    while stride < size:
        pairs = x.unflatten(-1, (size // (2 * stride), 2, stride))
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    return x


def _signs(signs: Tensor | NoiseKey | None, size: int, x: Tensor) -> Tensor:
    if signs is None:
        return torch.ones(size, device=x.device)
    if isinstance(signs, NoiseKey):
        import numpy as np

        from aqnsim.reference import random_words

        words = random_words(np.zeros(1, np.int64), size, *coordinates(signs.value, signs.clock))[0]
        return torch.from_numpy(1.0 - 2.0 * (words >> 31)).float().to(x.device)
    flat = torch.as_tensor(signs)
    if flat.shape != (size,) or not bool((flat.abs() == 1).all()):
        raise ConfigError(f"hadamard: signs must be {size} values of +1 or -1, got {flat.tolist()}")
    return flat.float().to(x.device)
