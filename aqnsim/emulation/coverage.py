"""Which ops a forward runs, and which of them a profile emulates.

Two sources that must agree: the candidates, which rules are asked about, and an audit of a real forward, which sees
every op that torch dispatches. Under emulation a product appears as an op of aqnsim, so a product that the audit of the
emulated model sees torch run is, by that, not emulated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aqnsim._errors import ConfigError, RealisationError
from aqnsim.emulation import sites as st
from aqnsim.emulation.audit import Audit, Key, Work
from aqnsim.emulation.discovery import Candidate, Structure, example_of, recording, refuse_emulated, run_example
from aqnsim.emulation.sites import Site
from aqnsim.profiles import Profile
from aqnsim.receipts import PHASES, STATS

if TYPE_CHECKING:
    from aqnsim.emulation.core import Emulation

STATUSES = ("emulated", "excluded", "kept", "constant", "uncovered")
"""What becomes of an op: a rule emulates it; the profile excludes it; no rule asks anything of it, or it is an adapter;
no activation enters it; no rule can reach it."""


@dataclass(frozen=True)
class Op:
    """One op of a forward.

    Attributes:
        name, kind, role: of the site; of an op that cannot be one, the module's name and what torch ran.
        shape: of the weight of a linear layer, else of the first operand.
        status: one of :data:`STATUSES`.
        rule: index of the profile's rule that emulates it, or None.
        calls: in one forward.
        flops: of its products of matrices, in one forward.
        elements: of its results, in one forward.
    """

    name: str
    kind: str
    role: str
    shape: tuple[int, ...]
    status: str
    rule: int | None
    calls: int
    flops: int
    elements: int


@dataclass(frozen=True)
class Coverage:
    """The ops of one forward of a model under a profile.

    Attributes:
        model: its class.
        profile: its name, or None for no profile.
        ops: all that an activation enters, and the constants.
        other: calls of arithmetic for which there is no kind of op, by torch's name, such as the sum that normalises
            the weights of chosen experts.
    """

    model: str
    profile: str | None
    ops: tuple[Op, ...]
    other: Mapping[str, int]

    @property
    def flops(self) -> int:
        """Of all products of matrices that an activation enters."""
        return sum(op.flops for op in self.ops if op.status != "constant")

    @property
    def uncovered(self) -> tuple[Op, ...]:
        """The ops that no rule can reach."""
        return self.of_status("uncovered")

    def of_status(self, status: str) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.status == status)

    def share(self, *ops: Op) -> float:
        """The part of all FLOPs that some ops have."""
        return sum(op.flops for op in ops) / self.flops if self.flops else 0.0

    @property
    def emulated_share(self) -> float:
        """The part of all FLOPs that is emulated."""
        return self.share(*self.of_status("emulated"))

    def table(self, grouped: bool = True) -> list[tuple[str, ...]]:
        """A header and a row for each op.

        Args:
            grouped: one row for the ops of repeated layers, with a star for the layer's number.
        """
        groups: dict[tuple[Any, ...], list[Op]] = {}
        for op in self.ops:
            name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", op.name) if grouped else op.name
            groups.setdefault((name, op.kind, op.role, op.shape, op.status, op.rule), []).append(op)
        rows: list[tuple[str, ...]] = [("op", "ops", "kind", "role", "shape", "status", "FLOPs")]
        for (name, kind, role, shape, status, rule), ops in groups.items():
            text = status if rule is None else f"{status} (rule {rule + 1})"
            share = f"{self.share(*ops):.2%}" if ops[0].flops and status != "constant" else "-"
            rows.append((name, str(len(ops)), kind, role, "x".join(map(str, shape)) or "-", text, share))
        return rows

    def summary(self) -> str:
        """How many ops, and which part of the FLOPs, have each status."""
        parts = []
        for status in STATUSES:
            ops = self.of_status(status)
            if ops:
                share = "" if status == "constant" else f", {self.share(*ops):.2%} of the FLOPs"
                parts.append(f"{status}: {len(ops)} ops{share}")
        if self.other:
            calls = ", ".join(f"{name} ({n})" for name, n in sorted(self.other.items()))
            parts.append(f"arithmetic of no kind: {calls}")
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        ops = [{**asdict(op), "shape": list(op.shape), "share": self.share(op)} for op in self.ops]
        own = {"model": self.model, "profile": self.profile, "flops": self.flops}
        return {**own, "emulated_share": self.emulated_share, "ops": ops, "other": dict(self.other)}

    def check(self) -> None:
        """Refuse ops that no rule can reach.

        Raises:
            ConfigError: there are such; the message names them with their part of the FLOPs.
        """
        if not self.uncovered:
            return
        named = [f"{op.name} ({op.kind}, {self.share(op):.2%} of the FLOPs)" for op in self.uncovered]
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        raise ConfigError(
            f"{self.model}: {len(named)} ops cannot be emulated, {self.share(*self.uncovered):.2%} of the FLOPs: "
            f"{', '.join(named[:8])}{more}; `aqnsim sites` lists all; emulate with strict=False to accept that"
        )


def survey(
    model: nn.Module,
    profile: str | Path | Profile | None = None,
    example: Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    length: int = 16,
) -> Coverage:
    """Which ops a forward of a model runs, and which of them a profile emulates; the model is left as it is.

    Args:
        profile: a name, a path to a TOML file, or a Profile; None to see the ops alone.
        example: keyword arguments of the forward; by default ``length`` tokens in each of ``batch`` rows.

    Raises:
        ConfigError: as :func:`aqnsim.emulate` does.
        RealisationError: an op that a rule matches runs as torch makes it.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh())
    >>> coverage = survey(model, "mxfp4-w4a4", {"input": torch.ones(2, 64)})
    >>> [(op.name, op.kind, op.status, op.flops) for op in coverage.ops]
    [('0', 'linear', 'emulated', 8192), ('1', 'activation', 'kept', 0)]
    """
    from aqnsim.emulation.attach import emulate  # which checks coverage itself, where it is strict

    kwargs = example_of(model, example, batch, length)
    refuse_emulated(model)
    if profile is None:
        return _coverage(model, None, *_clean(model, kwargs))
    emulation = emulate(model, profile, example=kwargs)
    try:
        return emulation.coverage
    finally:
        emulation.restore()


def coverage_of(emulation: Emulation) -> Coverage:
    """The coverage of a model that is emulated.

    Raises:
        ConfigError: it was restored before.
        RealisationError: an op that a rule matches runs as torch makes it.
    """
    if emulation.is_restored:
        raise ConfigError("coverage: the emulation was restored; ask for it before, or survey the model")
    kwargs = example_of(emulation.model, emulation.example)
    with emulation.detached() as model:
        found, audit = _clean(model, kwargs)
    _compare(emulation, found, audit, *_emulated(emulation, kwargs))
    return _coverage(emulation.model, emulation.profile, found, audit)


# ---- the two forwards ------------------------------------------------------------------------------------------------


def _clean(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[list[Candidate], Audit]:
    """The candidates of a model, and the audit of a forward of it as it is."""
    structure = Structure.of(model)
    audit = Audit(kwargs, {c.module: _scope_kind(c.kind, c.module) for c in structure.ops})
    with recording(structure.containers, audit) as recorders:
        with audit.listening(model, lambda recorder, *call: recorder.kind_of(*call)):
            run_example(model, kwargs)
        return [*structure.ops, *structure.of_recorders(recorders)], audit


def _scope_kind(kind: str, module: nn.Module) -> str:
    return "experts" if st.holds_experts(module) else kind


def _emulated(emulation: Emulation, kwargs: Mapping[str, Any]) -> tuple[Audit, torch.Tensor]:
    """The audit of a forward of the emulated model, and how often each site acted; it leaves no receipts."""
    acting = [s for s in emulation.sites if not s.specs[emulation.current_phase].is_empty]
    audit = Audit(kwargs, {s.module: _scope_kind(s.kind, s.module) for s in acting if s.ordinal is None})
    state, moment = emulation.state_dict(), emulation.moment
    quiet = nullcontext() if emulation.noise is None else emulation.noise.paused()
    with emulation.at(moment), quiet, audit.listening(emulation.model, lambda f, i, *_: f.acting_kind(i)):
        run_example(emulation.model, kwargs)
    counted = emulation.totals - state["totals"]
    emulation.load_state_dict(state)
    return audit, counted[..., STATS.index("calls")].sum((1, 2))


def _key(c: Candidate | Site) -> Key:
    if c.attends:
        return Key(c.module, c.ordinal, c.kind)
    return Key(c.module, c.ordinal, c.weight or "" if c.ordinal is None and st.holds_experts(c.module) else "")


def _compare(emulation: Emulation, found: list[Candidate], clean: Audit, emulated: Audit, calls: torch.Tensor) -> None:
    """Whether the two forwards agree: what is emulated ran as an op of aqnsim, with as many FLOPs, and nothing else
    changed."""
    acting = {s.name: s for s in emulation.sites if not s.specs[emulation.current_phase].is_empty}
    for site in acting.values():
        key = _key(site)
        if key not in clean.work:
            continue  # not called in this forward
        flops, ran = clean.work[key].flops, emulated.emulated.get(key, Work()).flops
        if site.specs[emulation.current_phase].only_weight:
            ran += emulated.work.get(key, Work()).flops  # torch multiplies by the weight, which holds its cast
        if ran != flops or not calls[site.index]:
            raise RealisationError(
                f"site {site.name!r} ({site.kind}) is to be emulated, but of its {flops} FLOPs {ran} were, and it "
                f"acted {int(calls[site.index])} times: please report this"
            )
    kept = [c for c in found if c.name not in acting]
    own = {m for c in kept for m in (c.module.modules() if c.ordinal is None else [c.module])}
    for module, kind in emulated.loose:
        if module not in own and (module, kind) not in clean.loose:
            raise RealisationError(
                f"{type(module).__name__} ran {kind} outside of its emulated ops "
                f"({', '.join(sorted(emulated.loose[module, kind].names))}): please report this"
            )


# ---- rows ------------------------------------------------------------------------------------------------------------


def _coverage(model: nn.Module, profile: Profile | None, found: list[Candidate], audit: Audit) -> Coverage:
    names = {m: st.canonical(n) for n, m in model.named_modules()}
    hosts = {m for _, m in st.host_modules(model)}
    ops = [_op_of(c, profile, audit.work.get(_key(c), Work())) for c in found]
    for status, loose in (("uncovered", audit.loose), ("constant", audit.constant)):
        for (module, kind), w in loose.items():
            role = ", ".join(sorted(w.names))
            is_adapter = status == "uncovered" and module not in hosts
            own = "kept" if is_adapter else status
            ops.append(
                Op(names[module], kind, "adapter" if is_adapter else role, (), own, None, w.calls, w.flops, w.elements)
            )
    name = None if profile is None else profile.name
    order = {m: i for i, m in enumerate(names.values())}
    ops.sort(key=lambda op: order.get(op.name, order.get(op.name.rpartition(".")[0], len(order))))
    return Coverage(type(model).__name__, name, tuple(ops), audit.other)


def _op_of(c: Candidate, profile: Profile | None, work: Work) -> Op:
    rule = None
    status = "kept"
    if profile is not None:
        rules = [profile.rule_for(c.kind, c.name, c.role, phase) for phase in PHASES[1:]]
        rule = next((r for r in rules if r is not None and not profile.rules[r].spec.is_empty), None)
        status = "emulated" if rule is not None else "excluded" if profile.excludes(c.name, c.role) else "kept"
    weight = None if c.weight is None or c.kind != "linear" else c.module._parameters[c.weight]
    shape = work.shape if weight is None else tuple(weight.shape)
    return Op(c.name, c.kind, c.role, shape, status, rule, work.calls, work.flops, work.elements)
