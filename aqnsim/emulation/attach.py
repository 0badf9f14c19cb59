"""Find the sites that a profile reaches and give their modules the emulated classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim import ops  # noqa: F401  (defines torch.ops.aqnsim)
from aqnsim._errors import ConfigError
from aqnsim.aqn import AQN, layer_of
from aqnsim.emulation import sites as st
from aqnsim.emulation.core import Binding, Emulation
from aqnsim.emulation.modules import EmulatedLinear, NoisyNorm, noisy_class
from aqnsim.emulation.sites import Site
from aqnsim.profiles import OpSpec, Profile, load
from aqnsim.receipts import PHASES, STATS, STREAMS
from aqnsim.rng import POSITION_BITS


def emulate(
    model: nn.Module,
    profile: str | Path | Profile,
    *,
    seed: int = 0,
    aqn: AQN | None = None,
) -> Emulation:
    """Run a model on emulated hardware from here on, until ``restore()`` or the end of a ``with`` block.

    Linear layers that the profile's rules match take on an emulated class. A weight that trains is cast in each
    forward and keeps its master (straight-through gradient); a frozen one holds cast(W) from now on, so that it costs
    nothing and merging an adapter gives cast(W) + BA. Adapters are never touched.

    Args:
        model: fp32 or bf16, with or without PEFT.
        profile: a name, a path to a TOML file, or a Profile.
        seed: of all noise.
        aqn: noise on norm weights, in rollouts; needs ``begin_step`` at each step.

    Raises:
        ConfigError: a rule that matches no module, a module that is emulated already, a weight that another module
            shares (such as a tied lm_head), a class of linear layer that cannot be emulated, AQN without a norm.
        UnknownNameError: no such profile.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> with emulate(model, "mxfp4-w4a4") as emu:
    ...     _ = model(torch.ones(1, 64))
    >>> [(r.stream, r.requested) for r in emu.receipts()]
    [('weight', 'mxfp4'), ('input', 'mxfp4')]
    """
    profile = load(profile)
    emulation = Emulation(model, profile, seed, aqn)
    planned = _plan(model, profile, aqn)
    device = next((p.device for s in planned for p in s.module.parameters()), torch.device("cpu"))
    emulation.totals = torch.zeros(
        len(planned), len(PHASES), len(STREAMS), len(STATS), dtype=torch.float64, device=device
    )
    try:
        for site in planned:
            (_attach_linear if site.kind == "linear" else _attach_norm)(emulation, site)
        if any(s.spec.has_error for s in planned):
            _track_rows(emulation, model)
    except BaseException:
        emulation.restore()
        raise
    return emulation


def _plan(model: nn.Module, profile: Profile, aqn: AQN | None) -> list[Site]:
    """Every site, checked; nothing is changed yet."""
    found: list[Site] = []
    shared = st.owners(model)
    matched = set()
    for name, module in st.host_modules(model):
        if not isinstance(module, nn.Linear):
            continue
        rule = profile.rule_for("linear", name)
        if rule is None:
            continue
        _check_linear(module, name, shared)
        matched.add(rule)
        role = name.rpartition(".")[2]
        found.append(Site(name, "linear", role, rule, profile.rules[rule].spec, module, len(found)))
    for i, r in enumerate(profile.rules):
        if i not in matched:
            raise ConfigError(
                f"rule {i + 1} of profile {profile.name!r} ({r.kind}, sites {', '.join(r.sites)}) matches no module "
                f"of {type(model).__name__}: nothing would be emulated; see the names with model.named_modules()"
            )
    if aqn is not None:
        found += _norms(model, aqn, len(found))
    return found


def _check_linear(module: nn.Linear, name: str, shared: dict[int, list[str]]) -> None:
    if isinstance(module, EmulatedLinear):
        raise ConfigError(f"{name!r} is already emulated: restore() the first emulation before attaching another")
    if type(module) is not nn.Linear:
        raise ConfigError(
            f"{name!r} is a {type(module).__qualname__}, whose forward may differ from nn.Linear's: "
            "exclude it in the profile"
        )
    others = [n for n in shared[id(module.weight)] if n != name]
    if others:
        raise ConfigError(
            f"the weight of {name!r} is tied to {', '.join(map(repr, others))}: emulating one would change the other; "
            "exclude it in the profile or untie the weights"
        )
    if module.weight.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"{name!r} has {module.weight.dtype} weights; expected float32 or bfloat16")


def _norms(model: nn.Module, aqn: AQN, first: int) -> list[Site]:
    found: list[Site] = []
    layers: set[int | None] = set()
    for name, module in st.host_modules(model):
        if isinstance(module, NoisyNorm):
            raise ConfigError(f"{name!r} already has AQN: restore() the first emulation before attaching another")
        if st.norm_offset(module) is None:
            continue
        layers.add(layer_of(name))
        if aqn.multiplier(name) > 0:
            role = name.rpartition(".")[2]
            found.append(Site(name, "norm", role, None, OpSpec(), module, first + len(found)))
    if missing := sorted(set(aqn.multipliers) - layers):
        raise ConfigError(
            f"AQN: multipliers name layers {missing} that have no norm in {type(model).__name__}: "
            "they would have no effect"
        )
    if not found:
        raise ConfigError(
            f"AQN targets {aqn.targets} but {type(model).__name__} has none with a multiplier above 0 "
            f"(multipliers {dict(aqn.multipliers)}, default {aqn.default_multiplier}): no noise would be injected"
        )
    return found


def _swap(emulation: Emulation, site: Site, cls: type[nn.Module]) -> Binding:
    module, original = site.module, type(site.module)
    binding = emulation.add_site(site)
    module.__dict__["aqnsim_binding"] = binding
    module.__class__ = cls

    def undo() -> None:
        module.__class__ = original
        del module.__dict__["aqnsim_binding"]

    emulation.on_restore(undo)
    return binding


def _attach_linear(emulation: Emulation, site: Site) -> None:
    weight: nn.Parameter = site.module.weight  # type: ignore[assignment]
    binding = _swap(emulation, site, EmulatedLinear)
    if site.spec.forward.weight is not None and not weight.requires_grad:
        emulation.materialise(site, weight)
        binding.materialised = True


def _attach_norm(emulation: Emulation, site: Site) -> None:
    offset, eps = st.norm_offset(site.module), st.norm_eps(site.module)
    assert offset is not None
    assert eps is not None
    binding = _swap(emulation, site, noisy_class(type(site.module)))
    binding.norm_offset, binding.norm_eps = offset, eps


def _track_rows(emulation: Emulation, model: nn.Module) -> None:
    """Key noise by (sequence, position) in a language model: its decoder says which tokens a forward gets.

    A model without token embeddings keeps plain rows 0, 1, 2, ... of each input.
    """
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if get is not None else None
    if embedding is None:
        return
    decoder = next(m for m in model.modules() if any(c is embedding for c in m.children()))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        emulation.set_rows(batch, _positions(kwargs, batch, length, tokens.device))

    handle = decoder.register_forward_pre_hook(before, with_kwargs=True)
    emulation.tracks_rows = True
    emulation.on_restore(handle.remove)


def _positions(kwargs: dict[str, Any], batch: int, length: int, device: torch.device) -> Tensor:
    """Logical positions ``[batch, length]``: padding does not count, cached tokens do.

    Raises:
        ConfigError: more tokens than a logical row has positions.
    """
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        positions = mask.long().cumsum(-1) - 1
    else:
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past + length, device=device).expand(batch, -1)
    if positions.shape[1] > 1 << POSITION_BITS:
        raise ConfigError(
            f"noise is keyed by positions below 2^{POSITION_BITS}, but a sequence has {positions.shape[1]} tokens"
        )
    return positions[:, -length:]
