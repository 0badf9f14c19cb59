"""Find the ops of a model before any rule is asked: modules that are one, and those that forwards run themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim._errors import ConfigError
from aqnsim.emulation import modules as em
from aqnsim.emulation import sites as st
from aqnsim.emulation.attention import PARTS
from aqnsim.emulation.audit import Activations
from aqnsim.emulation.functional import Recorder
from aqnsim.emulation.rewriting import FUNCTIONS, rewritten


@dataclass(frozen=True)
class Candidate:
    """An op of the model, before any rule is asked.

    Attributes:
        name, kind, role, module, weight, weight_axis, ordinal, attends: as in :class:`Site`.
    """

    name: str
    kind: str
    role: str
    module: nn.Module
    weight: str | None = None
    weight_axis: int = -1
    ordinal: int | None = None
    attends: bool = False


@dataclass(frozen=True)
class Structure:
    """A model's modules by what they are.

    Attributes:
        ops: of modules that are an op as a whole.
        containers: the other modules, whose own forwards may run ops, with their names.
        routers: names of what chooses experts.
    """

    ops: list[Candidate]
    containers: dict[nn.Module, str]
    routers: set[str]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        found = cls([], {}, st.routers_of(model))
        inside: set[nn.Module] = set()  # of modules that are an op as a whole
        for name, module in st.host_modules(model):
            if module in inside:
                continue
            kind = st.module_kind(module)
            if kind is None:
                found.containers[module] = name
                continue
            experts = st.experts_of(module)
            if experts is None or not experts.plain:  # the activation of a plain gate is an op of its own
                inside.update(module.modules())
            found.ops.extend(_of_module(name, kind, module, found.routers))
        return found

    def of_recorders(self, recorders: Mapping[nn.Module, Recorder]) -> list[Candidate]:
        """The ops that containers' own forwards ran."""
        return [
            c for m, recorder in recorders.items() for c in _of_recorder(self.containers[m], m, recorder, self.routers)
        ]


def candidates(
    model: nn.Module, kinds: Set[str], inner: Set[str], example: Mapping[str, Any] | None = None
) -> list[Candidate]:
    """The ops of a model: modules that are an op of one of ``kinds``, and ops of kinds ``inner`` in forwards."""
    structure = Structure.of(model)
    found = [c for c in structure.ops if c.kind in kinds]
    if not _may_compute(structure.containers, inner):
        return found
    for module, name in structure.containers.items():
        refuse_patched(name, module)
    kwargs = example_of(model, example)
    activations = Activations(kwargs)
    with recording(structure.containers, activations) as recorders, activations:
        run_example(model, kwargs)
    return [*found, *(c for c in structure.of_recorders(recorders) if c.kind in inner)]


def router_feeders(model: nn.Module, example: Mapping[str, Any] | None = None) -> set[nn.Module]:
    """The norms and linear layers whose output a router reads, as a forward shows: it is the tensor that the router, or
    the block that has it beside its experts, is given.

    Raises:
        ConfigError: a router that reads no such output in that forward, so that it cannot be protected.
    """
    structure = Structure.of(model)
    makers: dict[int, nn.Module] = {}  # of the tensors at each address
    outputs: list[Any] = []  # kept, or their addresses would be used again
    found: dict[str, set[nn.Module]] = {router: set() for router in structure.routers}

    def made(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)
            makers[output.untyped_storage().data_ptr()] = module

    def given(router: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        addresses = {t.untyped_storage().data_ptr() for t in tensors}
        found[router].update(makers[a] for a in addresses & makers.keys())

    with ExitStack() as stack:
        for c in structure.ops:
            if c.kind in ("norm", "linear") and not st.holds_experts(c.module):
                stack.callback(c.module.register_forward_hook(made).remove)
        for name, module in st.host_modules(model) if found else ():
            for router in found:
                if name in (router, router.rpartition(".")[0]):
                    hook = partial(lambda router, _, args, kwargs: given(router, args, kwargs), router)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if found:
            run_example(model, example_of(model, example))
    if lost := sorted(router for router, feeders in found.items() if not feeders):
        raise ConfigError(
            f"moe = 'protect_router': the router {lost[0]!r} reads no output of a norm or a linear layer in the "
            "example's forward, so what to protect is unknown: use moe = 'all', and exclude what feeds it by name"
        )
    return set().union(*found.values())


def _of_module(name: str, kind: str, module: nn.Module, routers: set[str]) -> list[Candidate]:
    """The ops of a module that is an op as a whole, or a mixture's experts."""
    if kind == "experts":
        experts = st.experts_of(module)
        assert experts is not None
        axis = -2 if experts.transposed else -1
        parts = [Candidate(f"{name}.{w}", "linear", w, module, w, axis) for w in st.EXPERTS]
        gate = ("multiply", "multiply") if experts.plain else ("gate", "activation")
        between = (gate, ("weigh", "multiply"), ("combine", "add"))
        return [*parts, *(Candidate(f"{name}.{op}", kind, op, module) for op, kind in between)]
    axis = -2 if kind == "linear" and not isinstance(module, nn.Linear) else -1
    weight = "weight" if isinstance(module._parameters.get("weight"), nn.Parameter) else None
    return [Candidate(name, kind, st.role_of(name, kind, routers), module, weight, axis)]


def _may_compute(containers: Mapping[nn.Module, str], kinds: Set[str]) -> bool:
    """Whether the source of some container has an operation of one of the kinds, as far as it can be read there."""
    unknown = kinds & {*PARTS, "activation", "loss"}
    for cls in {type(m) for m in containers}:
        copy = rewritten(cls)
        for operation in copy.operations if copy is not None else ():
            if operation.kind in kinds or (unknown and operation.kind in (None, "attention")):
                return True
    return False


def _of_recorder(name: str, module: nn.Module, recorder: Recorder, routers: set[str]) -> list[Candidate]:
    found: list[Candidate] = []
    ran = [recorder.found[i] for i in sorted(recorder.found)]
    for f in ran:
        kinds = PARTS if f.kind == "attention" else (f.kind,)
        same = [g.operation.ordinal for g in ran if g.kind == f.kind]
        suffix = f"_{same.index(f.operation.ordinal)}" if len(same) > 1 else ""
        for kind in kinds:
            own, weight = f"{name}.{kind}{suffix}".removeprefix("."), None
            axis = -1
            if kind == "linear":
                weight = f.operation.target or None
                axis = -1 if f.operation.kind == "linear" else -2  # F.linear(x, W), or x @ W
                own = name if weight == "weight" else f"{name}.{weight or kind}{'' if weight else suffix}"
            role, ordinal = st.role_of(own, kind, routers), f.operation.ordinal
            found.append(Candidate(own, kind, role, module, weight, axis, ordinal, attends=f.kind == "attention"))
    return found


@contextmanager
def recording(containers: Mapping[nn.Module, str], activations: Activations) -> Iterator[dict[nn.Module, Recorder]]:
    """Give every container whose source can be read a forward that records; take it away after."""
    recorders: dict[nn.Module, Recorder] = {}
    classes = {m: type(m) for m in containers}
    try:
        for module, cls in classes.items():
            copy = rewritten(cls)
            if copy is not None:
                recorders[module] = Recorder(module, copy.operations, activations)
                module.__dict__[FUNCTIONS] = recorders[module]
                module.__class__ = em.rewritten_class(cls, copy)
        yield recorders
    finally:
        for module in recorders:
            module.__class__ = classes[module]
            del module.__dict__[FUNCTIONS]


def example_of(model: nn.Module, example: Mapping[str, Any] | None, batch: int = 1, length: int = 4) -> dict[str, Any]:
    """The keyword arguments of a forward: those given, or a few tokens with their loss.

    Raises:
        ConfigError: the model has no token embeddings, and no example is given; no tokens are asked for.
    """
    if example is not None:
        return dict(example)
    if batch < 1 or length < 1:
        raise ConfigError(f"expected at least one row of one token, got batch {batch}, length {length}")
    embedding = token_embedding(model)
    if embedding is None:
        raise ConfigError(
            f"{type(model).__name__} has no token embeddings: pass example=, the keyword arguments of a forward, from "
            "which the ops are learnt that modules' own forwards run"
        )
    table = next(embedding.parameters())
    tokens = torch.arange(1, batch * length + 1, device=table.device).reshape(batch, length) % table.shape[0]
    return {"input_ids": tokens, "labels": tokens}


def run_example(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Run a forward without gradients, in evaluation, that leaves no trace in the model or in torch's generator.

    Raises:
        ConfigError: the model takes other arguments.
    """
    training = {m: m.training for m in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            model(**kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{type(model).__name__} takes other arguments than {', '.join(kwargs)} ({error}): "
            "pass example=, the keyword arguments of a forward"
        ) from error
    finally:
        for module, was in training.items():
            module.training = was


def refuse_patched(name: str, module: nn.Module) -> None:
    """Refuse a module whose class's forward is not what runs: another class would have no effect."""
    if "forward" in module.__dict__:
        raise ConfigError(
            f"{name!r} has a forward of its own, set on the module (by accelerate, a kernel library?), which runs in "
            "place of its class's: emulate the model before, or exclude it in the profile"
        )


def refuse_emulated(model: nn.Module) -> None:
    """Refuse a model that an emulation is at work on.

    Raises:
        ConfigError: there is one.
    """
    for name, module in st.host_modules(model):
        if any(k.startswith("aqnsim_") for k in module.__dict__):
            raise ConfigError(f"{name!r} is already emulated: restore() the first emulation before attaching another")


def token_embedding(model: nn.Module) -> nn.Module | None:
    """What looks tokens up, in a language model."""
    get: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    return get() if get is not None else None
