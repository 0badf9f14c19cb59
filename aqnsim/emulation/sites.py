"""Sites: the places in a model where an op runs, found by structure rather than by class name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aqnsim.profiles import OpSpec


@dataclass(frozen=True, eq=False)
class Site:
    """One op of the model.

    Attributes:
        name: the module's path, the same before and after PEFT wraps the model.
        kind: ``linear`` or ``norm``.
        role: last part of the name, such as ``q_proj``.
        rule: index of the profile's rule, or None for a site that only AQN uses.
        spec: what the rule asks for.
        module: the module itself.
        index: row of the emulation's totals.
    """

    name: str
    kind: str
    role: str
    rule: int | None
    spec: OpSpec
    module: nn.Module
    index: int


def canonical(name: str) -> str:
    """A module's path without what PEFT puts around it.

    >>> canonical("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    'model.layers.0.mlp.up_proj'
    """
    parts = [p for p in name.removeprefix("base_model.model.").split(".") if p != "base_layer"]
    return ".".join(parts)


def host_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model itself with their canonical names; a module reached twice comes once.

    Adapters are told by structure: whatever hangs on a module that has a ``base_layer``, other than the base layer.
    """
    adapters: set[nn.Module] = set()
    for module in model.modules():
        base = module._modules.get("base_layer")
        if base is not None:
            own = {module, *base.modules()}
            adapters.update(m for m in module.modules() if m not in own)
    for name, module in model.named_modules():
        wraps = "base_layer" in module._modules
        if module not in adapters and not wraps:
            yield canonical(name), module


def owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's id."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                found.setdefault(id(p), []).append(canonical(name))
    return found


def norm_offset(module: nn.Module) -> float | None:
    """Whether a module is an RMSNorm, by what it does: 0 for ``w x/rms(x)``, 1 for ``(1 + w) x/rms(x)``, else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or norm_eps(module) is None:
        return None
    if any(True for _ in module.children()) or getattr(module, "bias", None) is not None:
        return None
    n = weight.numel()
    x = torch.cos(torch.arange(n, device=weight.device).float()) * 3 + 0.5
    with torch.no_grad():
        y = module.forward(x.to(weight.dtype)[None])[0]  # not the module's hooks: this is no forward of the model
    unit = unit_rms(x.to(weight.dtype), module)
    for offset in (0.0, 1.0):
        if torch.allclose(y.float(), (offset + weight.detach().float()) * unit, rtol=0.02, atol=1e-3):
            return offset
    return None


def norm_eps(module: nn.Module) -> float | None:
    """The epsilon of a norm, under whichever of the usual names it has."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    if isinstance(module, nn.RMSNorm) and isinstance(module.weight, nn.Parameter):
        return torch.finfo(module.weight.dtype).eps  # its default
    return None


def unit_rms(x: Tensor, module: nn.Module) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` in fp32."""
    x = x.float()
    eps = norm_eps(module)
    assert eps is not None
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
