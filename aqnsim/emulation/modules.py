"""The classes that emulated modules take on: subclasses of what they were, with nothing stored in them but a binding.

Attaching swaps ``module.__class__``: parameters, state-dict keys, hooks and PEFT's view of the module stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim._errors import ConfigError
from aqnsim.emulation import approximate
from aqnsim.emulation.binding import Binding
from aqnsim.emulation.core import Emulation, Moment
from aqnsim.emulation.rewriting import FUNCTIONS, Rewritten
from aqnsim.emulation.sites import Experts, Norm


class _Class:
    """Makes an object of a class for a copy; refuses to be part of a pickle."""

    def __init__(self, cls: type[Any]) -> None:
        self.cls = cls

    def __call__(self) -> Any:
        return object.__new__(self.cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Class:
        return self

    def __reduce__(self) -> Any:
        raise ConfigError(
            f"an emulated {self.cls.__name__} cannot be pickled: save its state_dict(), or the model with "
            "emulation.save_pretrained(), or restore() the emulation first"
        )


class Emulated:
    """Mixed into every class that a module takes on: a copy stays emulated, a pickle is refused."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Class(type(self)), (), self.__getstate__()  # type: ignore[attr-defined]


class EmulatedLinear(Emulated, nn.Linear):
    """A linear layer whose products run as its site says, forward and backward; with AQN, of ``w + sigma z``."""

    aqnsim_binding: Binding

    def forward(self, input: Tensor) -> Tensor:
        site = self.aqnsim_binding
        if not site.changes:
            return super().forward(input)
        return site.linear(input, self.weight, self.bias)


class EmulatedTransposedLinear(Emulated):
    """Mixed into a layer that computes ``x W + b`` with a weight ``[inputs, outputs]``."""

    aqnsim_binding: Binding
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Any:
        site = self.aqnsim_binding
        if not site.changes:
            return super().forward(x)  # type: ignore[misc]
        return site.linear(x, self.weight.t(), self.bias)


class EmulatedNorm(Emulated):
    """Mixed into a norm's own class: the norm in fp32, as its site says; with AQN, of ``w + sigma z``."""

    aqnsim_binding: Binding
    aqnsim_norm: Norm
    weight: nn.Parameter | None

    def forward(self, hidden_states: Tensor) -> Any:
        site = self.aqnsim_binding
        noise = site.noise
        if not noise and not site.acts:
            return super().forward(hidden_states)  # type: ignore[misc]
        weight, bias = self.weight, getattr(self, "bias", None)
        rows = site.rows(hidden_states, "bshd") if site.acts else None
        x = hidden_states
        if site.acts:
            x = site.enter(x, 0, rows)
            weight = None if weight is None else site.enter_weight(weight)  # type: ignore[assignment]
        if noise:
            weight = site.noisy(weight.float())  # type: ignore[union-attr, assignment]
        tables = site.plan.approximation if site.acts else ""
        y = approximate.norm(self.aqnsim_norm, x, weight, bias, tables) if tables else self.aqnsim_norm(x, weight, bias)
        return site.leave(y, hidden_states.dtype, 0, rows) if site.acts else y.to(hidden_states.dtype)


class EmulatedElementwise(Emulated):
    """Mixed into an activation: what it computes, in fp32, leaves as its site says.

    Where it is computed from tables, ``aqnsim_tables`` has its function by the tables' text.
    """

    aqnsim_binding: Binding
    aqnsim_tables: dict[str, Callable[[Tensor], Tensor]]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        site = self.aqnsim_binding
        if not site.acts:
            return super().forward(input, *args, **kwargs)  # type: ignore[misc]
        rows = site.rows(input)
        function = self.aqnsim_tables.get(site.plan.approximation)
        entered = site.enter(input, 0, rows)
        y = function(entered) if function else super().forward(entered, *args, **kwargs)  # type: ignore[misc]
        return site.leave(y, input.dtype, 0, rows)


class EmulatedEmbedding(Emulated):
    """Mixed into an embedding: the rows that it looks up leave as its site says; so does the table's gradient."""

    aqnsim_binding: Binding
    weight: nn.Parameter

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        site = self.aqnsim_binding
        y = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        return site.leave(y, y.dtype, 0, site.rows(y)) if site.acts else y


class EmulatedExperts(Emulated):
    """Mixed into a mixture's experts: each token's products run as the sites of their parameters say.

    The other sites: ``multiply`` of a plain gate, or else the ``gate`` as one function; ``weigh`` by the router's
    weights; ``combine``, the sum over a token's experts.
    """

    aqnsim_bindings: dict[str, Binding]
    aqnsim_experts: Experts
    gate_up_proj: nn.Parameter

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        sites = self.aqnsim_bindings
        if not any(site.changes for site in sites.values()):
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
        emulation = next(iter(sites.values())).emulation
        tokens = emulation.rows_of(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        results = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=dtype)
        for expert in top_k_index.unique().tolist():
            if expert >= self.gate_up_proj.shape[0]:
                continue  # a token that another rank's expert serves
            token, choice = torch.where(top_k_index == expert)
            with emulation.at_rows(None if tokens is None else tokens[token]):
                y = self._expert(expert, hidden_states[token])
                results[token, choice] = self._multiply("weigh", expert, y, top_k_weights[token, choice, None])
        return self._combine(results).to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        return self._product("down_proj", expert, self._gate(expert, self._product("gate_up_proj", expert, x)))

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        experts, site = self.aqnsim_experts, self.aqnsim_bindings.get(name)
        weight, bias = experts.weight(self, name, expert), experts.bias(self, name, expert)  # type: ignore[arg-type]
        if site is None or not site.changes:
            return nn.functional.linear(x, weight, bias)
        return site.linear(x, weight, bias, part=expert + 1)

    def _gate(self, expert: int, x: Tensor) -> Tensor:
        experts = self.aqnsim_experts
        if experts.plain:
            gate, up = x.chunk(2, -1)
            return self._multiply("multiply", expert, self.act_fn(gate), up)  # type: ignore[attr-defined]
        site = self.aqnsim_bindings.get("gate")
        if site is None or not site.acts:
            return experts.gate(self, x)  # type: ignore[arg-type]
        rows, part = site.rows(x), expert + 1
        y = experts.gate(self, site.enter(x, 0, rows, part))  # type: ignore[arg-type]
        return site.leave(y, x.dtype, 0, rows, part)

    def _multiply(self, name: str, expert: int, a: Tensor, b: Tensor) -> Tensor:
        site = self.aqnsim_bindings.get(name)
        if site is None or not site.acts:
            return a * b
        rows, part = site.rows(a), expert + 1
        y = site.enter(a, 0, rows, part) * site.enter(b, 1, rows, part)
        return site.leave(y, torch.promote_types(a.dtype, b.dtype), 0, rows, part)

    def _combine(self, results: Tensor) -> Tensor:
        """The sum of ``[tokens, choices, width]`` over a token's choices."""
        site = self.aqnsim_bindings.get("combine")
        if site is None or not site.acts:
            return results.sum(1)
        rows = site.rows(results[:, 0])
        entered = [site.enter(y, i, rows) for i, y in enumerate(results.unbind(1))]
        return site.leave(torch.stack(entered).sum(0), results.dtype, 0, rows)


class Recomputed(Emulated):
    """Mixed into a layer that gradient checkpointing may run again in the backward: it carries its moment along.

    transformers wraps ``__call__`` of such layers and keeps their keyword arguments for the second run, so the moment
    is one of them. torch.compile puts both runs into one graph, where nothing can come between them.
    """

    aqnsim_emulation: Emulation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recomputes = self.gradient_checkpointing and self.training  # type: ignore[attr-defined]
        if recomputes and not torch.compiler.is_compiling():
            kwargs["aqnsim_moment"] = self.aqnsim_emulation.moment
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, aqnsim_moment: Moment | None = None, **kwargs: Any) -> Any:
        if aqnsim_moment is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with self.aqnsim_emulation.at(aqnsim_moment):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def emulated_class(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    """A module's class with a mixin before it; its name keeps the original's, so that matches by name still hold."""
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})


def rewritten_class(cls: type[nn.Module], copy: Rewritten) -> type[nn.Module]:
    """A module's class whose forward's operations go through :data:`FUNCTIONS`; its own forward runs when off."""

    @functools.wraps(copy.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = cls.forward if self.aqnsim_functions.is_off else copy.forward
        return run(self, *args, **kwargs)

    return _container(cls, (Emulated, cls), {"forward": forward, FUNCTIONS: None})


def recomputed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A layer's class that carries its moment through gradient checkpointing."""
    return _container(cls, (Recomputed, cls), {})


def _container(cls: type[nn.Module], bases: tuple[type, ...], members: dict[str, Any]) -> type[nn.Module]:
    # Containers keep their very names: checkpoints record them, and wrapping and placing go by them.
    return type(cls.__name__, bases, {**members, "__qualname__": cls.__qualname__})
