"""What one emulated op holds: its site, and how a tensor enters and leaves the op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.emulation.sites import Site
from aqnsim.profiles import Forward, OpSpec
from aqnsim.receipts import PHASES, STATS, STREAMS
from aqnsim.rng import key_of

if TYPE_CHECKING:
    from aqnsim.emulation.core import Emulation

_CALLS = STATS.index("calls")
_NOTHING = ["", "", ""]
_FORWARD = slice(1, 4)  # the streams input, output and output-cast
_BACKWARD = slice(5, 8)  # grad-input.grad, grad-input, grad-input-cast
_WEIGHT = slice(9, 12)  # grad-weight.grad, grad-weight, grad-weight-cast


class Binding:
    """A site and the emulation that it belongs to; what emulated modules and operations are given."""

    def __init__(self, emulation: Emulation, site: Site) -> None:
        self.emulation, self.site = emulation, site
        self.materialised = False
        self.keys = [key_of(emulation.seed, site.name, s) for s in STREAMS]
        self.texts = {phase: spec.text for phase, spec in site.specs.items()}
        self._operand_keys: list[list[int]] = [
            [key_of(emulation.seed, site.name, f"{s}.{i}" if i else s) for s in STREAMS] for i in range(3)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self  # a copied model keeps reporting to the emulation that it was copied from

    @property
    def spec(self) -> OpSpec:
        """What the op does in this phase."""
        return self.site.specs[self.emulation.current_phase]

    @property
    def text(self) -> str:
        """The spec as ops take it."""
        return self.texts[self.emulation.current_phase]

    @property
    def acts(self) -> bool:
        """Whether the op is emulated now."""
        return not self.emulation.is_off and not self.spec.is_empty

    def receipt(self) -> Tensor:
        """The totals of this site in this phase: ``[streams, stats]``."""
        e = self.emulation
        return e.totals[self.site.index, PHASES.index(e.current_phase)]

    def count_call(self, stream: str) -> None:
        self.receipt()[STREAMS.index(stream), _CALLS] += 1

    def rows(self, x: Tensor, heads: str = "") -> Tensor | None:
        """The logical rows of a tensor, where this op draws; see :meth:`Emulation.rows_of`."""
        return self.emulation.rows_of(x, heads) if self.spec.draws else None

    def enter(self, x: Tensor, operand: int = 0, rows: Tensor | None = None) -> Tensor:
        """An operand in fp32 as the op takes it; its gradient leaves as the spec says.

        Args:
            operand: its number, which tells the noise on the gradients of several operands apart.
        """
        spec = self.spec
        forward = [spec.forward.input or "", "", ""]
        backward = ["", spec.grad_input.error or "", spec.grad_input.output or ""]
        keys = self._operand_keys[operand]
        return self._stage(x, forward, backward, torch.float32, [*keys[_FORWARD], *keys[_BACKWARD]], rows, _BACKWARD)

    def enter_weight(self, weight: Tensor) -> Tensor:
        """A weight in fp32; its gradient leaves as ``grad_weight`` says."""
        part = self.spec.grad_weight
        backward = ["", part.error or "", part.output or ""]
        keys = [*self.keys[_FORWARD], *self.keys[_WEIGHT]]
        return self._stage(weight, _NOTHING, backward, torch.float32, keys, None, _WEIGHT)

    def leave(self, y: Tensor, dtype: torch.dtype, operand: int = 0, rows: Tensor | None = None) -> Tensor:
        """A result: the error, in fp32, then its cast, then ``dtype``; the gradient is cast as it comes in."""
        spec = self.spec
        forward = ["", spec.forward.error or "", spec.forward.output or ""]
        backward = [spec.grad_input.grad or "", "", ""]
        keys = self._operand_keys[operand]
        return self._stage(y, forward, backward, dtype, [*keys[_FORWARD], *keys[_BACKWARD]], rows, _BACKWARD)

    def _stage(
        self,
        x: Tensor,
        forward: list[str],
        backward: list[str],
        dtype: torch.dtype,
        keys: list[int],
        rows: Tensor | None,
        streams: slice,
    ) -> Tensor:
        if not any(forward) and not any(backward):
            return x.to(dtype)
        receipt = self.receipt()
        result: tuple[Tensor, Tensor] = torch.ops.aqnsim.stage(
            x, forward, backward, dtype, keys, self.emulation.clock, rows, receipt[streams] if any(backward) else None
        )
        if any(forward):
            torch.ops.aqnsim.record(receipt[_FORWARD], result[1])
        return result[0]

    def casts_weight(self, weight: Tensor) -> bool:
        """Whether the forward casts the weight: yes while it trains, no once cast(W) is written."""
        if self.spec.forward.weight is None:
            return False
        if self.materialised and weight.requires_grad:
            raise ConfigError(
                f"site {self.site.name!r}: the weight was frozen when the profile was attached and trains now; "
                "restore() the emulation and attach again after unfreezing"
            )
        return not self.materialised

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, stream: int = 0) -> Tensor:
        """``x W^T + b`` as the spec says, forward and backward.

        Args:
            stream: tells the noise of several weights of one site apart, such as those of experts.
        """
        spec, receipt = self.spec, self.receipt()
        cast_weight = self.casts_weight(weight)
        keys = self.keys
        if stream:
            keys = [key_of(self.emulation.seed, f"{self.site.name}.{stream}", s) for s in STREAMS]
        only_weight = spec == OpSpec(forward=Forward(weight=spec.forward.weight))
        if only_weight and not cast_weight:
            self.count_call("weight")
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            out = torch.nn.functional.linear(flat, weight, bias)
            return out.reshape(*x.shape[:-1], out.shape[-1])
        result: tuple[Tensor, Tensor] = torch.ops.aqnsim.linear(
            x, weight, bias, self.text, cast_weight, keys, self.emulation.clock, self.rows(x), receipt
        )
        torch.ops.aqnsim.record(receipt[:4], result[1])
        if not cast_weight and spec.forward.weight is not None:
            self.count_call("weight")
        elif not spec.forward.asked:  # only gradients miss: no stream has counted this call
            self.count_call("output")
        return result[0]

    def matmul(
        self,
        a: Tensor,
        b: Tensor,
        transposed: bool,
        dtype: torch.dtype,
        rows: Tensor | None = None,
        other_rows: Tensor | None = None,
        first_rows: Tensor | None = None,
    ) -> Tensor:
        """``a b``, or ``a b^T`` of a transposed ``b``, as the spec says, forward and backward.

        Args:
            rows, first_rows, other_rows: logical rows of the result, of ``a`` and of ``b``.
        """
        receipt = self.receipt()
        result: tuple[Tensor, Tensor] = torch.ops.aqnsim.matmul(
            a, b, transposed, self.text, dtype, self.keys, self.emulation.clock, rows, first_rows, other_rows, receipt
        )
        torch.ops.aqnsim.record(receipt[:4], result[1])
        if not self.spec.forward.asked:
            self.count_call("output")
        return result[0]

    def aqn_sigma(self) -> float:
        """AQN's sigma at this site, now; 0 outside the noise's phases."""
        e = self.emulation
        if e.is_off or e.aqn is None or e.current_phase not in e.aqn.phases:
            return 0.0
        return e.sigma * e.aqn.multiplier(self.site.name)
