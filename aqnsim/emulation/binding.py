"""What one emulated op holds: its site, and how a tensor enters and leaves the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.emulation.sites import Site
from aqnsim.profiles import OpSpec
from aqnsim.receipts import PHASES, STATS, STREAMS
from aqnsim.rng import key_of

if TYPE_CHECKING:
    from aqnsim.emulation.core import Emulation

_CALLS = STATS.index("calls")
_WEIGHT_CAST, _AQN = STREAMS.index("weight"), STREAMS.index("aqn")
_NOTHING = ["", "", ""]
_FORWARD = slice(1, 4)  # the streams input, output and output-cast
_BACKWARD = slice(5, 8)  # grad-input.grad, grad-input, grad-input-cast
_WEIGHT = slice(9, 12)  # grad-weight.grad, grad-weight, grad-weight-cast


@dataclass(frozen=True)
class _Plan:
    """What a spec asks for, in the plain values that ops and compiled graphs take."""

    text: str
    is_empty: bool
    native: bool
    draws: bool
    weight: str
    only_weight: bool
    counts_output: bool
    approximation: str
    entering: tuple[list[str], list[str]]
    weight_entering: tuple[list[str], list[str]]
    leaving: tuple[list[str], list[str]]

    @classmethod
    def of(cls, spec: OpSpec, native: bool) -> _Plan:
        def steps(fmt: str | None, error: str | None, output: str | None) -> list[str]:
            return [fmt or "", error or "", output or ""]

        forward, grad_input, grad_weight = spec.forward, spec.grad_input, spec.grad_weight
        return cls(
            text=spec.text,
            is_empty=spec.is_empty,
            native=native,
            draws=spec.draws,
            weight=forward.weight or "",
            only_weight=spec.only_weight and not native,
            counts_output=not native
            and not forward.error
            and (forward.approximation is not None or not (forward.asked.keys() - {"bias"})),
            approximation=forward.approximation or "",
            entering=(steps(forward.input, None, None), steps(None, grad_input.error, grad_input.output)),
            weight_entering=(steps(forward.weight, None, None), steps(None, grad_weight.error, grad_weight.output)),
            leaving=(steps(None, forward.error, forward.output), steps(grad_input.grad, None, None)),
        )


def autocasted(*operands: Tensor) -> list[Tensor]:
    """Operands of a product in autocast's dtype, where it is on: torch does that for its own ops and not for ours."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(operands)
    return [x.to(torch.get_autocast_dtype(device)) for x in operands]


class Binding:
    """A site and the emulation that it belongs to; what emulated modules and operations are given."""

    def __init__(self, emulation: Emulation, site: Site) -> None:
        self.emulation, self.site = emulation, site
        self.materialised = False
        self._keys: dict[tuple[int, int], list[int]] = {}
        self.keys = self.keys_of()
        for operand in (1, 2):  # now, as a compiled forward can look keys up but not hash
            self.keys_of(operand)
        self._plans = {phase: _Plan.of(spec, phase in site.native) for phase, spec in site.specs.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self  # a copied model keeps reporting to the emulation that it was copied from

    def keys_of(self, operand: int = 0, part: int = 0) -> list[int]:
        """The noise keys of the streams, for each operand and each part of the site on its own."""
        if (operand, part) not in self._keys:
            suffix = (f".{operand}" if operand else "") + (f"#{part}" if part else "")
            self._keys[operand, part] = [key_of(self.emulation.seed, self.site.name, s + suffix) for s in STREAMS]
        return self._keys[operand, part]

    @property
    def plan(self) -> _Plan:
        """What the op does in this phase."""
        return self._plans[self.emulation.current_phase]

    @property
    def acts(self) -> bool:
        """Whether the op is emulated now."""
        if self.emulation.is_off or self.plan.is_empty:
            return False
        self.emulation.check_moment()
        return True

    @property
    def noise(self) -> str:
        """The error model of AQN's noise on the weight, now; empty for none."""
        e = self.emulation
        if e.noise is None or e.is_off or not self.site.takes_noise:
            return ""
        e.check_moment()
        return e.noise.at(self.site, e.current_phase)

    @property
    def changes(self) -> bool:
        """Whether the op is emulated now, or its weight noisy."""
        return self.acts or bool(self.noise)

    @property
    def draws(self) -> bool:
        """Whether the op draws random numbers now."""
        return self.plan.draws

    def receipt(self) -> Tensor:
        """The totals of this site in this phase: ``[streams, stats]``."""
        e = self.emulation
        return e.totals[self.site.index, PHASES.index(e.current_phase)]

    def count_call(self, stream: str) -> None:
        self.receipt()[STREAMS.index(stream), _CALLS] += 1

    def rows(self, x: Tensor, heads: str = "") -> Tensor | None:
        """The logical rows of a tensor, where this op draws; see :meth:`Emulation.rows_of`."""
        return self.emulation.rows_of(x, heads) if self.draws else None

    def enter(self, x: Tensor, operand: int = 0, rows: Tensor | None = None, part: int = 0) -> Tensor:
        """An operand in fp32 as the op takes it; its gradient leaves as the spec says.

        Args:
            operand: its number, which tells the noise on the gradients of several operands apart.
            part: tells the noise of several parts of one site apart, such as those of experts.
        """
        keys = self.keys_of(operand, part)
        return self._stage(x, self.plan.entering, torch.float32, [*keys[_FORWARD], *keys[_BACKWARD]], rows, _BACKWARD)

    def enter_weight(self, weight: Tensor) -> Tensor:
        """A weight in fp32, after its cast; its gradient leaves as ``grad_weight`` says."""
        keys = [self.keys[0], *self.keys[2:4], *self.keys[_WEIGHT]]
        return self._stage(weight, self.plan.weight_entering, torch.float32, keys, None, _WEIGHT, slice(1))

    def leave(
        self, y: Tensor, dtype: torch.dtype, operand: int = 0, rows: Tensor | None = None, part: int = 0
    ) -> Tensor:
        """A result: the error, in fp32, then its cast, then ``dtype``; the gradient is cast as it comes in."""
        if self.plan.counts_output and not operand:  # no stream of the forward counts this call
            self.count_call("output")
        keys = self.keys_of(operand, part)
        return self._stage(y, self.plan.leaving, dtype, [*keys[_FORWARD], *keys[_BACKWARD]], rows, _BACKWARD)

    def _stage(
        self,
        x: Tensor,
        steps: tuple[list[str], list[str]],
        dtype: torch.dtype,
        keys: list[int],
        rows: Tensor | None,
        streams: slice,
        of_forward: slice = _FORWARD,
    ) -> Tensor:
        forward, backward = steps
        if not any(forward) and not any(backward):
            return x.to(dtype)
        receipt = self.receipt()
        result: tuple[Tensor, Tensor] = torch.ops.aqnsim.stage(
            x, forward, backward, dtype, keys, self.emulation.clock, rows, receipt[streams] if any(backward) else None
        )
        if any(forward):
            own = receipt[of_forward]
            torch.ops.aqnsim.record(own, result[1][: own.shape[0]])
        return result[0]

    def casts_weight(self, weight: Tensor) -> bool:
        """Whether the forward casts the weight: yes while it trains, no once cast(W) is written."""
        if not self.plan.weight:
            return False
        if self.materialised and weight.requires_grad:
            raise ConfigError(
                f"site {self.site.name!r}: the weight was frozen when the profile was attached and trains now; "
                "restore() the emulation and attach again after unfreezing"
            )
        return not self.materialised

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, part: int = 0) -> Tensor:
        """``x W^T + b`` as the spec says, forward and backward.

        Args:
            part: tells the noise of several weights of one site apart, such as those of experts.
        """
        plan, receipt = self.plan, self.receipt()
        cast_weight = self.casts_weight(weight)
        x, weight = autocasted(x, weight)
        bias = None if bias is None else autocasted(bias)[0]
        if plan.weight and not cast_weight:
            self.count_call("weight")
        if self.noise:
            if cast_weight:
                weight = self.cast_weight(weight, part)
            weight, cast_weight = self.noisy(weight, part), False
        if (plan.only_weight or plan.is_empty) and not cast_weight:
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            out = torch.nn.functional.linear(flat, weight, bias)
            return out.reshape(*x.shape[:-1], out.shape[-1])
        op = torch.ops.aqnsim.native_linear if plan.native else torch.ops.aqnsim.linear
        result: tuple[Tensor, Tensor] = op(
            x,
            weight,
            bias,
            plan.text,
            cast_weight,
            self.keys_of(part=part),
            self.emulation.clock,
            self.rows(x),
            receipt,
        )
        torch.ops.aqnsim.record(receipt[:4], result[1])
        if plan.counts_output:  # only gradients miss: no stream has counted this call
            self.count_call("output")
        return result[0]

    def cast_weight(self, weight: Tensor, part: int) -> Tensor:
        """``cast(W)``, straight-through: what ``linear`` does itself where no noise comes after it."""
        keys = [self.keys_of(part=part)[_WEIGHT_CAST]] * 6
        cast: tuple[Tensor, Tensor] = torch.ops.aqnsim.stage(
            weight, [self.plan.weight, "", ""], _NOTHING, weight.dtype, keys, self.emulation.clock, None, None
        )
        torch.ops.aqnsim.record(self.receipt()[_WEIGHT_CAST], cast[1][0])
        return cast[0]

    def noisy(self, weight: Tensor, part: int = 0) -> Tensor:
        """``w + sigma z`` in fp32, then the dtype of ``w``; straight-through."""
        noisy: tuple[Tensor, Tensor] = torch.ops.aqnsim.perturb(
            weight, self.noise, self.keys_of(part=part)[_AQN], self.emulation.clock, None, None, None, True
        )
        torch.ops.aqnsim.record(self.receipt()[_AQN], noisy[1])
        return noisy[0]

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
            a,
            b,
            transposed,
            self.plan.text,
            dtype,
            self.keys,
            self.emulation.clock,
            rows,
            first_rows,
            other_rows,
            receipt,
        )
        torch.ops.aqnsim.record(receipt[:4], result[1])
        if self.plan.counts_output:
            self.count_call("output")
        return result[0]
