"""Softmax, norms and activations from tables, in the place of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqnsim import functions
from aqnsim._errors import ConfigError
from aqnsim.emulation.sites import Norm, activation_of


def of_function(function: Callable[..., Any], approximation: str) -> Callable[..., Tensor]:
    """A function of torch, computed from tables; it takes the same arguments.

    Raises:
        ConfigError: a function for which there are no tables.
    """
    if function in (F.softmax, torch.softmax):
        return lambda x, dim=-1, **_: functions.softmax(x, dim, approximation)
    if function is F.silu:
        return lambda x, **_: functions.silu(x, approximation)
    if function is F.gelu:
        return lambda x, approximate="none", **_: functions.gelu(x, _GELU[approximate], approximation)
    if function is F.rms_norm:
        return lambda x, _shape, weight=None, eps=None: functions.rms_norm(
            x, weight, torch.finfo(x.dtype).eps if eps is None else eps, 0.0, approximation
        )
    if function is F.layer_norm:
        return lambda x, _shape, weight=None, bias=None, eps=1e-5: functions.layer_norm(
            x, weight, bias, eps, approximation
        )
    name = getattr(function, "__name__", repr(function))
    raise ConfigError(f"{name} is not computed from tables: leave approximation out for its site")


_GELU = {"none": "erf", "tanh": "tanh"}


def of_activation(module: nn.Module, site: str, approximation: str) -> Callable[[Tensor], Tensor]:
    """An activation module's function, computed from tables.

    Raises:
        ConfigError: the module is neither SiLU nor GELU.
    """
    kind = activation_of(module)
    if kind is None:
        raise ConfigError(
            f"{site!r} is a {type(module).__name__}, which is neither SiLU nor GELU: it is not computed from tables; "
            "leave approximation out for its site"
        )
    if kind == "silu":
        return lambda x: functions.silu(x, approximation)
    return lambda x: functions.gelu(x, kind.removeprefix("gelu-"), approximation)


def norm(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, approximation: str) -> Tensor:
    """A norm with its reciprocal square root from tables."""
    if norm.centred:
        return functions.layer_norm(x, weight, bias, norm.eps, approximation)
    y = functions.rms_norm(x, weight, norm.eps, norm.offset, approximation)
    return y if bias is None else y + bias.float()
