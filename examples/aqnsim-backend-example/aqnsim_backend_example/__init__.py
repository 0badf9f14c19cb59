"""A backend in a package of its own: INT8 products by "the chip", everything else by aqnsim's cpu backend.

The chip here is a CPU that adds int8 products in int32, so that the example runs anywhere. A real one calls its own
library in :func:`native_linear`, and lists its device type in ``BACKEND``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aqnsim.backends import Backend, get


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a row, and its scale: the largest magnitude becomes 127."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, x / scale, 0.0).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, input: str | None, weight_format: str) -> Tensor:
    """``x W^T + b`` of two dimensions, in the dtype of ``x``: what the chip makes of a pair of ``BACKEND.native``."""
    codes, of_token = quantized(x)
    weights, of_channel = quantized(weight)
    sums = codes.int() @ weights.int().t()
    y = sums.float() * of_token * of_channel.t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


BACKEND = Backend(
    name="example",
    devices=("cpu",),
    # Start from ops that work, and replace one after the other; `aqnsim conformance --backend example` says which hold.
    ops={**get("cpu").ops, "native_linear": native_linear},
    native=(("int8_token", "int8_channel"),),
)
