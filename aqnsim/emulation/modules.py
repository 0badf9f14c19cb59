"""The classes that emulated modules take on: subclasses of what they were, with nothing stored in them but a binding.

Attaching swaps ``module.__class__``: parameters, state-dict keys, hooks and PEFT's view of the module stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aqnsim.emulation.core import Binding
from aqnsim.errors import AbsoluteGaussian
from aqnsim.profiles import Forward


class EmulatedLinear(nn.Linear):
    """A linear layer whose GEMMs run as its site's OpSpec says, forward and backward."""

    aqnsim_binding: Binding

    def forward(self, input: Tensor) -> Tensor:
        site = self.aqnsim_binding
        emulation = site.emulation
        if emulation.is_off:
            return super().forward(input)
        cast_weight = site.casts_weight(self.weight)
        spec = site.site.spec
        if spec.forward.input is None and not cast_weight and not spec.has_error:
            site.count_call("weight")
            flat = input.reshape(-1, input.shape[-1]).contiguous()
            out = nn.functional.linear(flat, self.weight, self.bias)
            return out.reshape(*input.shape[:-1], out.shape[-1])
        receipt = site.receipt()
        result: tuple[Tensor, Tensor] = torch.ops.aqnsim.linear(
            input,
            self.weight,
            self.bias,
            spec.text,
            cast_weight,
            site.keys(),
            emulation.step_tensor,
            emulation.rows if spec.has_error else None,
            receipt,
        )
        torch.ops.aqnsim.record(receipt[:3], result[1])
        if not cast_weight and spec.forward.weight is not None:
            site.count_call("weight")
        elif spec.forward == Forward():  # only gradients miss: no stream has counted this call
            site.count_call("output")
        return result[0]


class NoisyNorm:
    """Mixed into a norm's own class: with AQN on, ``y = (offset + w + sigma z) x/rms(x)`` in fp32."""

    aqnsim_binding: Binding
    weight: nn.Parameter

    def forward(self, hidden_states: Tensor) -> Any:
        site = self.aqnsim_binding
        sigma = site.aqn_sigma()
        if sigma == 0.0:
            return super().forward(hidden_states)  # type: ignore[misc]
        weight, stats = torch.ops.aqnsim.perturb(
            self.weight.float(),
            str(AbsoluteGaussian(sigma)),
            site.key("aqn"),
            site.emulation.step_tensor,
            None,
            None,
            True,
        )
        torch.ops.aqnsim.record(site.receipt()[5], stats)
        x = hidden_states.float()
        unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + site.norm_eps)
        return ((site.norm_offset + weight) * unit).to(hidden_states.dtype)


def noisy_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a norm with AQN; its name keeps the original's, so that matches by name still hold."""
    return type(f"Noisy{cls.__name__}", (NoisyNorm, cls), {})
