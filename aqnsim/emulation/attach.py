"""Find the sites that a profile reaches and give their modules the emulated classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqnsim import backends, ops  # noqa: F401  (ops defines torch.ops.aqnsim)
from aqnsim._errors import ConfigError
from aqnsim.aqn import AQN, KINDS
from aqnsim.emulation import approximate
from aqnsim.emulation import modules as em
from aqnsim.emulation import sites as st
from aqnsim.emulation.binding import Binding
from aqnsim.emulation.core import Emulation
from aqnsim.emulation.discovery import (
    Candidate,
    candidates,
    refuse_emulated,
    refuse_patched,
    router_feeders,
    token_embedding,
)
from aqnsim.emulation.functional import Functions, emulated
from aqnsim.emulation.rewriting import FUNCTIONS, rewritten
from aqnsim.emulation.sites import Site
from aqnsim.profiles import OpSpec, Profile, load
from aqnsim.profiles.spec import operand
from aqnsim.receipts import PHASES, STATS, STREAMS

_TRAINER_PHASES = PHASES[1:]


def emulate(
    model: nn.Module,
    profile: str | Path | Profile,
    *,
    seed: int = 0,
    aqn: AQN | None = None,
    run: int = 0,
    example: Mapping[str, Any] | None = None,
    strict: bool = False,
    native: bool = True,
) -> Emulation:
    """Run a model on emulated hardware from here on, until ``restore()`` or the end of a ``with`` block.

    Every op that a rule of the profile matches is emulated: modules that are an op as a whole (linear layers, norms,
    activations, embeddings, experts) and the ops that a module's own forward runs (attention, rotary embeddings,
    products, residual adds, losses). A weight that trains is cast in each forward and keeps its master
    (straight-through gradient); a frozen one holds cast(W) from now on, so that it costs nothing and merging an adapter
    gives cast(W) + BA. Adapters are never touched.

    Args:
        model: fp32, bf16 or fp16, with or without PEFT, DDP, FSDP2 and torch.compile.
        profile: a name, a path to a TOML file, or a Profile.
        seed: of all noise.
        aqn: noise on the weights of norms or linear layers, in rollouts unless it says otherwise; needs ``begin_step``
            at each step.
        run: tells repetitions of one seed apart where the hardware is not deterministic.
        example: keyword arguments for a forward, from which the ops of modules' own forwards are learnt where the
            profile asks for such, and what feeds a router where AQN protects it; by default a few tokens, for a model
            with token embeddings.
        strict: refuse a model that runs ops which no rule could reach; see :attr:`Emulation.coverage`.
        native: let a device multiply the formats that its backend declares as native; such a layer emulates no error,
            and its receipt says so. False emulates them like all others.

    Raises:
        ConfigError: a rule that matches no op, a module that is emulated already, a class of linear layer that cannot
            be emulated, a frozen weight that is sharded already, AQN of which a part reaches nothing; with ``strict``,
            an op that cannot be emulated.
        UnknownNameError: no such profile.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> with emulate(model, "mxfp4-w4a4") as emu:
    ...     _ = model(torch.ones(1, 64))
    >>> [(r.stream, r.requested) for r in emu.receipts()]
    [('weight', 'mxfp4'), ('input', 'mxfp4')]
    """
    profile, model = load(profile), st.unwrapped(model)
    emulation = Emulation(model, profile, seed, aqn, run)
    emulation.example = example
    with st.unsharded(model):
        planned = _plan(model, profile, aqn, example, native)
    device = next((p.device for s in planned for p in s.module.parameters()), torch.device("cpu"))
    emulation.totals = torch.zeros(
        len(planned), len(PHASES), len(STREAMS), len(STATS), dtype=torch.float64, device=device
    )
    try:
        with st.unsharded(model):  # again: the example's forward has sharded its layers
            bindings = _attach(emulation, planned)
        _materialise(emulation, bindings)
        if emulation.draws:
            _track_rows(emulation, model)
        if strict:
            emulation.coverage.check()
    except BaseException:
        emulation.restore()
        raise
    return emulation


# ---- plan ------------------------------------------------------------------------------------------------------------


def _plan(
    model: nn.Module, profile: Profile, aqn: AQN | None, example: Mapping[str, Any] | None, native: bool
) -> list[Site]:
    """Every site, checked; nothing is changed yet."""
    refuse_emulated(model)
    wanted = profile.kinds | (set(KINDS.values()) if aqn is not None else set())
    found: list[Site] = []
    known = candidates(model, wanted, profile.kinds, example)
    noisy = _noisy(model, known, aqn, example) if aqn is not None else set()
    for c in known:
        rules = {phase: profile.rule_for(c.kind, c.name, c.role, phase) for phase in _TRAINER_PHASES}
        specs = {p: OpSpec() if r is None else profile.rules[r].spec for p, r in rules.items()}
        asked = any(not spec.is_empty for spec in specs.values())
        if asked or c in noisy:
            _check_candidate(c)
            args = (c.module, len(found), c.weight, c.weight_axis, c.ordinal, c.attends, c in noisy)
            found.append(
                Site(c.name, c.kind, c.role, rules, specs, *args, native=_native(c, specs) if native else frozenset())
            )
    _check_rules(model, profile, found)
    return found


def _native(candidate: Candidate, specs: Mapping[str, OpSpec]) -> frozenset[str]:
    """The phases in which the backend lets the device itself multiply what the specs ask for."""
    weight = candidate.module._parameters.get("weight")
    if candidate.kind != "linear" or not isinstance(candidate.module, nn.Linear) or weight is None:
        return frozenset()
    device = weight.device.type
    return frozenset(
        phase
        for phase, spec in specs.items()
        if backends.multiplies_natively(device, spec.forward.input, spec.forward.weight)
    )


def _noisy(model: nn.Module, known: list[Candidate], aqn: AQN, example: Mapping[str, Any] | None) -> set[Candidate]:
    """The ops on whose weight AQN acts."""
    feeders = router_feeders(model, example) if aqn.moe == "protect_router" else set()
    reached = [
        c
        for c in known
        if _may_take_noise(c) and aqn.reaches(c.name, c.kind, c.role, c.role == "router" or c.module in feeders)
    ]
    for name, shape in _other_experts(model):
        if aqn.reaches(name, "linear", name.rpartition(".")[2], feeds_router=False):
            raise ConfigError(
                f"AQN would reach {name!r}, whose shape is {shape}: weights of experts that another forward than the "
                "known one multiplies by cannot get noise; exclude them"
            )
    aqn.check_sites(reached)
    return {c for c in reached if aqn.multiplier(c.name)}


def _may_take_noise(c: Candidate) -> bool:
    """Whether an op is an RMSNorm or a linear layer, a module of its own with a weight, or a mixture's experts."""
    if c.kind not in KINDS.values() or c.ordinal is not None or c.module._parameters.get(c.weight or "") is None:
        return False
    norm = st.norm_of(c.module) if c.kind == "norm" else None
    return c.kind == "linear" or (norm is not None and not norm.centred)


def _other_experts(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of stacked weights of experts that are no site."""
    for name, module in st.host_modules(model):
        if name.rpartition(".")[2] == "experts" and st.module_kind(module) is None:
            yield from (
                (f"{name}.{k}", tuple(p.shape)) for k, p in module._parameters.items() if p is not None and p.dim() == 3
            )


def _check_candidate(c: Candidate) -> None:
    refuse_patched(c.name, c.module)
    if c.kind != "linear" or c.ordinal is not None:
        return
    weight = c.module._parameters[c.weight or "weight"]
    if isinstance(c.module, nn.Linear) and type(c.module).forward is not nn.Linear.forward:
        raise ConfigError(
            f"{c.name!r} is a {type(c.module).__qualname__}, whose forward may differ from nn.Linear's: "
            "exclude it in the profile, and from AQN where that targets linear layers"
        )
    if weight is not None and weight.dtype not in st.DTYPES:
        raise ConfigError(f"{c.name!r} has {weight.dtype} weights; expected float32, bfloat16 or float16")


def _check_rules(model: nn.Module, profile: Profile, found: list[Site]) -> None:
    matched = {r for s in found for r in s.rules.values()}
    for i, r in enumerate(profile.rules):
        if i not in matched and not r.spec.is_empty:
            raise ConfigError(
                f"rule {i + 1} of profile {profile.name!r} ({', '.join(r.kinds)}, sites {', '.join(r.sites)}) matches "
                f"no op of {type(model).__name__}: nothing would be emulated; `aqnsim sites` lists the ops"
            )


# ---- attach ----------------------------------------------------------------------------------------------------------


def _attach(emulation: Emulation, planned: list[Site]) -> list[Binding]:
    """Swap the classes of all modules that run an op."""
    bindings: list[Binding] = []
    by_module: dict[nn.Module, dict[int | None, dict[str, Binding]]] = {}
    for site in planned:
        bindings.append(emulation.add_site(site))
        by_module.setdefault(site.module, {}).setdefault(site.ordinal, {})[_key_of(site)] = bindings[-1]
    for module, parts in by_module.items():
        own = parts.pop(None, None)
        if own is not None:
            _attach_module(emulation, module, own)
        if parts:
            _attach_functions(emulation, module, parts)  # type: ignore[arg-type]
    for module in _recomputed(emulation.model) if planned else ():
        emulation.swap(module, em.recomputed_class(type(module)), {"aqnsim_emulation": emulation})
    return bindings


def _key_of(site: Site) -> str:
    """Which op of its module a site is, for a mixture's experts and for the parts of an attention."""
    is_expert = site.ordinal is None and st.holds_experts(site.module)
    return site.name.rpartition(".")[2] if is_expert else site.kind


def _recomputed(model: nn.Module) -> list[nn.Module]:
    """Layers that may be recomputed in the backward: they know it themselves."""
    return [m for _, m in st.host_modules(model) if isinstance(getattr(type(m), "gradient_checkpointing", None), bool)]


def _attach_module(emulation: Emulation, module: nn.Module, bindings: dict[str, Binding]) -> None:
    """Swap the class of a module that is an op as a whole."""
    cls, kind = type(module), next(iter(bindings.values())).site.kind
    attributes: dict[str, Any] = {"aqnsim_binding": next(iter(bindings.values()))}
    if st.holds_experts(module):
        mixin: type = em.EmulatedExperts
        attributes = {"aqnsim_bindings": bindings, "aqnsim_experts": st.experts_of(module)}
    elif kind == "linear":
        mixin = em.EmulatedLinear if isinstance(module, nn.Linear) else em.EmulatedTransposedLinear
    elif kind == "norm":
        mixin, attributes["aqnsim_norm"] = em.EmulatedNorm, st.norm_of(module)
    elif kind == "embedding":
        mixin = em.EmulatedEmbedding
    else:
        mixin, site = em.EmulatedElementwise, next(iter(bindings.values())).site
        texts = {s.forward.approximation for s in site.specs.values() if s.forward.approximation}
        attributes["aqnsim_tables"] = {t: approximate.of_activation(module, site.name, t) for t in texts}
    new = em.EmulatedLinear if cls is nn.Linear else em.emulated_class(mixin, cls)
    emulation.swap(module, new, attributes)


def _attach_functions(emulation: Emulation, module: nn.Module, bindings: dict[int, dict[str, Binding]]) -> None:
    """Swap the class of a module whose own forward runs ops."""
    copy = rewritten(type(module))
    assert copy is not None
    table = {}
    for ordinal, parts in bindings.items():
        site = next(iter(parts.values())).site
        table[ordinal] = emulated("attention" if site.attends else site.kind, parts)
    functions = Functions(emulation, table)
    emulation.swap(module, em.rewritten_class(type(module), copy), {FUNCTIONS: functions})


def _materialise(emulation: Emulation, bindings: list[Binding]) -> None:
    """Write cast(W) into each frozen weight that no other module holds and that has one format in all phases."""
    shared = st.owners(emulation.model)
    for binding in bindings:
        site, weight = binding.site, binding.site.parameter
        formats = {spec.forward.weight for spec in site.specs.values()}
        if weight is None or weight.requires_grad or len(formats) > 1 or None in formats or site.kind != "linear":
            continue
        if any(text is not None and operand(text)[1] is not None for text in formats):
            continue  # a fault is drawn at each use
        if len(shared[id(weight)]) == 1:
            emulation.materialise(site, weight)
            binding.materialised = True


# ---- rows ------------------------------------------------------------------------------------------------------------


def _track_rows(emulation: Emulation, model: nn.Module) -> None:
    """Key noise by (sequence, position) in a language model: its decoder says which tokens a forward gets.

    A model without token embeddings keeps plain rows 0, 1, 2, ... of each input.
    """
    embedding = token_embedding(model)
    if embedding is None:
        return
    decoder = next(m for m in model.modules() if any(c is embedding for c in m.children()))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        emulation.begin_forward(kwargs, tokens)

    handle = decoder.register_forward_pre_hook(before, with_kwargs=True)
    emulation.tracks_rows = True
    emulation.on_restore(handle.remove)
