"""The state of one emulation: phase, step, rows, receipts; and what a module needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim import receipts as rc
from aqnsim._errors import ConfigError, RealisationError, unknown
from aqnsim.aqn import AQN
from aqnsim.emulation.sites import Site
from aqnsim.profiles import Profile
from aqnsim.receipts import PHASES, STATS, STREAMS, Receipt
from aqnsim.rng import MAX_SEQUENCE_BITS, POSITION_BITS, check_step, key_of

_CALLS = STATS.index("calls")
_CHANGED = STATS.index("changed")


@dataclass(frozen=True)
class ReceiptTotals:
    """Counters at one moment: ``[sites, phases, streams, stats]``."""

    totals: Tensor


@dataclass(frozen=True)
class _Frozen:
    """A frozen weight, what it was before the profile was attached, and cast(W), which it holds."""

    site: str
    weight: nn.Parameter
    master: Tensor
    value: Tensor
    digest: int

    def check(self) -> None:
        """Refuse to put the master back over something that was written since."""
        if _digest(self.weight.data) != self.digest:
            raise ConfigError(
                f"the frozen weight of {self.site!r} was changed since the profile was attached (a merged adapter, a "
                "loaded state dict?): going back to the clean weight would lose that; unmerge or reload first"
            )


def _digest(t: Tensor) -> int:
    """A sum over the bits, to notice that a tensor was written."""
    bits = t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)
    return int(bits.sum(dtype=torch.int64))


class Emulation:
    """A profile at work on a model. Made by :func:`aqnsim.emulate`; a context manager that restores and checks.

    Attributes:
        model, profile, seed, aqn: as given.
        sites: every emulated site.
        step, total_steps: as :meth:`begin_step` set them; None before.
    """

    def __init__(self, model: nn.Module, profile: Profile, seed: int, aqn: AQN | None) -> None:
        self.model, self.profile, self.seed, self.aqn = model, profile, seed, aqn
        self.sites: list[Site] = []
        self.step: int = 0
        self.total_steps: int | None = None
        self.step_tensor = torch.tensor(0)
        self.rows: Tensor | None = None
        self.tracks_rows = False
        self.is_off = False
        self.totals = torch.zeros(0, len(PHASES), len(STREAMS), len(STATS), dtype=torch.float64)
        self._phase = "train"
        self._sequences: Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        self._masters: list[_Frozen] = []
        self._sigmas: set[float] = set()  # every sigma that a step asked for

    def __deepcopy__(self, memo: dict[int, Any]) -> Emulation:
        return self  # a copied model keeps reporting to the emulation that it was copied from

    # ---- where the run is ------------------------------------------------------------------------------------------

    def begin_step(self, step: int, total_steps: int) -> None:
        """Set the training step: the only place where noise and the AQN schedule advance.

        Raises:
            ConfigError: a step outside 0 .. total_steps, or a schedule that would be 0 at every step.
        """
        check_step(step)
        if not 0 <= step <= total_steps:
            raise ConfigError(f"begin_step: expected 0 <= step <= {total_steps}, got {step}")
        if self.aqn is not None and total_steps != self.total_steps:
            self.aqn.schedule.check(total_steps)
        self.step, self.total_steps = step, total_steps
        self.step_tensor = torch.tensor(step)  # a new tensor: a pending backward keeps its own
        self._sigmas.add(self.sigma)

    @property
    def sigma(self) -> float:
        """AQN's sigma at this step, before layer multipliers; 0 without AQN."""
        if self.aqn is None:
            return 0.0
        if self.total_steps is None:
            raise RealisationError(
                "AQN was asked for but its schedule never advanced: call begin_step(step, total_steps) at each step"
            )
        return self.aqn.schedule.sigma(self.step, self.total_steps)

    @property
    def current_phase(self) -> str:
        return self._phase

    @contextmanager
    def phase(self, name: str) -> Iterator[Emulation]:
        """Run a block as ``rollout``, ``train``, ``eval`` or ``reference``; noise and receipts tell them apart."""
        if name not in PHASES[1:]:
            raise unknown("phase", name, PHASES[1:])
        before, self._phase = self._phase, name
        try:
            yield self
        finally:
            self._phase = before

    @contextmanager
    def off(self) -> Iterator[Emulation]:
        """Run a block on the clean model: original weights, no error, no AQN; bit-identical to plain torch."""
        if self.is_off:
            yield self
            return
        self.is_off = True
        self._hold(masters=True)
        try:
            yield self
        finally:
            self._hold(masters=False)
            self.is_off = False

    @contextmanager
    def sequences(self, ids: Tensor) -> Iterator[Emulation]:
        """Name the rows of the batch: noise is keyed by (sequence id, position), not by the batch's layout.

        Args:
            ids: int64 ``[batch]``, each 0 <= id < 2^43.

        Without it, the rows of a batch are 0, 1, 2, ...
        """
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ConfigError(f"sequences: expected int64 ids of shape [batch], got {ids.dtype} {tuple(ids.shape)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << MAX_SEQUENCE_BITS:
            raise ConfigError(
                f"sequences: expected 0 <= id < 2^{MAX_SEQUENCE_BITS}, got {int(ids.min())} .. {int(ids.max())}"
            )
        if any(s.spec.has_error for s in self.sites) and not self.tracks_rows:
            raise ConfigError(
                f"sequences: {type(self.model).__name__} has no token embeddings: its noise is keyed by the rows of "
                "each input, and sequence ids would have no effect"
            )
        before, self._sequences = self._sequences, ids
        try:
            yield self
        finally:
            self._sequences = before

    def set_rows(self, batch: int, positions: Tensor) -> None:
        """Logical rows of the forward that begins: ``positions`` is int64 ``[batch, tokens]``."""
        ids = self._sequences
        if ids is None:
            ids = torch.arange(batch, device=positions.device)
        elif len(ids) != batch:
            raise ConfigError(f"sequences: {len(ids)} ids are set but the batch has {batch} rows")
        self.rows = ((ids.to(positions.device)[:, None] << POSITION_BITS) | positions.clamp(min=0)).reshape(-1)

    # ---- receipts --------------------------------------------------------------------------------------------------

    def snapshot(self, reduce: bool = False) -> ReceiptTotals:
        """The counters now; ``reduce`` adds up the ranks of torch.distributed (a collective call)."""
        totals = self.totals.clone()
        if reduce and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
            totals[:, 0] = self.totals[:, 0]  # every rank casts the same frozen weights
        return ReceiptTotals(totals)

    def receipts(self, since: ReceiptTotals | None = None, until: ReceiptTotals | None = None) -> list[Receipt]:
        """What happened at each site, in each phase and stream: since attach, or between two snapshots."""
        end = (until or self.snapshot()).totals
        totals = (end - since.totals if since else end).tolist()
        found = []
        for site in self.sites:
            for p, phase in enumerate(PHASES):
                for s, stream in enumerate(STREAMS):
                    stats = totals[site.index][p][s]
                    if stats[_CALLS]:
                        found.append(
                            rc.from_stats(
                                stats,
                                site=site.name,
                                role=site.role,
                                phase=phase,
                                stream=stream,
                                requested=self._requested(site, stream),
                            )
                        )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for a resumed run to end with the same receipts."""
        return {"totals": self.totals.clone(), "sigmas": torch.tensor(sorted(self._sigmas), dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict` of an emulation of the same model and profile.

        Raises:
            ConfigError: the state has another number of sites.
        """
        if state["totals"].shape != self.totals.shape:
            raise ConfigError(
                f"the receipts of a checkpoint have shape {tuple(state['totals'].shape)}, this emulation's "
                f"{tuple(self.totals.shape)}: it is another model, profile or AQN"
            )
        self.totals.copy_(state["totals"])
        self._sigmas = set(state["sigmas"].tolist())

    def report(self) -> str:
        """The receipts as a table, requested beside realised."""
        head = f"profile {self.profile.name} ({self.profile.fingerprint}), {len(self.sites)} sites, seed {self.seed}"
        if not self.sites:
            return f"{head}: nothing is emulated"
        return f"{head}\n{rc.table(self.receipts())}"

    def check(self, backward: bool = False) -> None:
        """Fail where something was requested and did not happen.

        Args:
            backward: also require that the gradient errors of every rule were injected somewhere.

        Raises:
            RealisationError: a site that was never called, an error that changed no value, an AQN schedule that never
                advanced, stayed at 0 or reached no norm. The message names the site or the schedule.
        """
        calls = self.totals[..., _CALLS]
        changed = self.totals[..., _CHANGED]
        for site in self.sites:
            if site.kind == "linear" and not calls[site.index, 1:, :3].any():
                raise RealisationError(f"site {site.name!r} is emulated ({self._rule_text(site)}) but was never called")
            for s, stream in enumerate(STREAMS):
                if (
                    self._is_error(site, stream)
                    and calls[site.index, :, s].any()
                    and not changed[site.index, :, s].any()
                ):
                    raise RealisationError(
                        f"site {site.name!r}: {self._requested(site, stream)} on its {stream} changed no value; "
                        "sigma is too small for the dtype"
                    )
        if backward:
            self._check_backward(calls)
        if self.aqn is not None:
            self._check_aqn(calls)

    def _check_backward(self, calls: Tensor) -> None:
        for i, rule in enumerate(self.profile.rules):
            rows = [s.index for s in self.sites if s.rule == i]
            for stream, part in (
                ("grad-input", rule.spec.grad_input),
                ("grad-weight", rule.spec.grad_weight),
            ):
                trained = stream == "grad-input" or any(
                    s.module.weight.requires_grad
                    for s in self.sites
                    if s.rule == i  # type: ignore[union-attr]
                )
                if part.error and trained and not calls[rows][:, :, STREAMS.index(stream)].any():
                    raise RealisationError(
                        f"rule {i + 1} of profile {self.profile.name!r} asks for {part.error} on {stream}, "
                        "but no backward pass reached any of its sites"
                    )

    def _check_aqn(self, calls: Tensor) -> None:
        assert self.aqn is not None
        if self.total_steps is None:
            raise RealisationError(f"{self.aqn.schedule} never advanced: begin_step was not called")
        if not any(s > 0 for s in self._sigmas):
            raise RealisationError(f"{self.aqn.schedule} stayed at sigma 0 in every step of this run")
        for site in self.sites:
            noisy = site.kind == "norm" and self.aqn.multiplier(site.name) > 0
            if noisy and not calls[site.index, :, STREAMS.index("aqn")].any():
                raise RealisationError(
                    f"AQN reached no forward of {site.name!r}: sigma was up to {max(self._sigmas)}, but the norm "
                    f"was never called in phase {' or '.join(self.aqn.phases)}"
                )

    def _is_error(self, site: Site, stream: str) -> bool:
        return stream not in ("weight", "input") and self._requested(site, stream) != "-"

    def _requested(self, site: Site, stream: str) -> str:
        spec = site.spec
        if stream == "aqn":
            return "absolute-gaussian(schedule)"
        return {
            "weight": spec.forward.weight,
            "input": spec.forward.input,
            "output": spec.forward.error,
            "grad-input": spec.grad_input.error,
            "grad-weight": spec.grad_weight.error,
        }[stream] or "-"

    def _rule_text(self, site: Site) -> str:
        return f"rule {site.rule + 1} of {self.profile.name!r}" if site.rule is not None else "AQN"

    # ---- attach and restore ------------------------------------------------------------------------------------------

    def add_site(self, site: Site) -> Binding:
        self.sites.append(site)
        return Binding(self, site)

    def on_restore(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def materialise(self, site: Site, weight: nn.Parameter) -> None:
        """Write cast(W) into a frozen weight, once, and keep the master."""
        fmt = site.spec.forward.weight
        master = weight.data
        value, stats = torch.ops.aqnsim.cast(master, fmt, -1, 0, None, None, True)
        torch.ops.aqnsim.record(self.totals[site.index, 0, 0], stats)
        weight.data = value
        self._masters.append(_Frozen(site.name, weight, master, value, _digest(value)))

    def _hold(self, masters: bool) -> None:
        if masters:
            for frozen in self._masters:
                frozen.check()
        for frozen in self._masters:
            held = frozen.master if masters else frozen.value
            frozen.weight.data = held.to(frozen.weight.device)  # the model may have moved since

    def restore(self, keep_weights: bool = False) -> None:
        """Give the model back as it was: classes, weights, hooks. Receipts stay readable.

        Args:
            keep_weights: leave frozen weights as they are now, such as cast(W) + BA after merging an adapter.

        Raises:
            ConfigError: a frozen weight was changed since the profile was attached, and is not to be kept.
        """
        if not keep_weights:
            self._hold(masters=True)
        self._masters.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Emulation:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.restore()
        if kind is None:
            self.check()


class Binding:
    """What one emulated module holds: its site and the emulation."""

    def __init__(self, emulation: Emulation, site: Site) -> None:
        self.emulation, self.site = emulation, site
        self.materialised = False
        self.norm_offset = 0.0
        self.norm_eps = 0.0
        self._keys: dict[str, list[int]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self

    def key(self, stream: str) -> int:
        e = self.emulation
        return key_of(e.seed, self.site.name, e.current_phase, stream)

    def keys(self) -> list[int]:
        """Noise keys of the output, the input's gradient and the weight's gradient, in this phase."""
        phase = self.emulation.current_phase
        if phase not in self._keys:
            self._keys[phase] = [self.key(s) for s in ("output", "grad-input", "grad-weight")]
        return self._keys[phase]

    def receipt(self) -> Tensor:
        """The totals of this site in this phase: ``[streams, stats]``."""
        e = self.emulation
        return e.totals[self.site.index, PHASES.index(e.current_phase)]

    def count_call(self, stream: str) -> None:
        self.receipt()[STREAMS.index(stream), _CALLS] += 1

    def casts_weight(self, weight: Tensor) -> bool:
        """Whether the forward casts the weight: yes while it trains, no once cast(W) is written."""
        if self.site.spec.forward.weight is None:
            return False
        if self.materialised and weight.requires_grad:
            raise ConfigError(
                f"site {self.site.name!r}: the weight was frozen when the profile was attached and trains now; "
                "restore() the emulation and attach again after unfreezing"
            )
        return not self.materialised

    def aqn_sigma(self) -> float:
        e = self.emulation
        if e.is_off or e.aqn is None or e.current_phase not in e.aqn.phases:
            return 0.0
        return e.sigma * e.aqn.multiplier(self.site.name)
