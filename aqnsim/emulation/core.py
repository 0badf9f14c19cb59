"""The state of one emulation: phase, step, rows, receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from aqnsim import receipts as rc
from aqnsim._errors import ConfigError, RealisationError, unknown
from aqnsim.aqn import AQN, Survival
from aqnsim.emulation import attest, checkpoint
from aqnsim.emulation.binding import Binding
from aqnsim.emulation.changes import FrozenWeight, Swap, digest_of
from aqnsim.emulation.noise import WeightNoise
from aqnsim.emulation.rows import Rows, rows_of_forward
from aqnsim.emulation.sites import Site, reshard
from aqnsim.profiles import Profile
from aqnsim.receipts import PHASES, STATS, STREAMS, Receipt
from aqnsim.report import Report
from aqnsim.rng import MAX_SEQUENCE_BITS, check_step, clock, key_of

if TYPE_CHECKING:
    from aqnsim.emulation.coverage import Coverage

_CALLS = STATS.index("calls")


@dataclass(frozen=True)
class ReceiptTotals:
    """Counters at one moment: ``[sites, phases, streams, stats]``."""

    totals: Tensor


@dataclass(frozen=True)
class Moment:
    """Where a forward is: what its ops, and their recomputation, take their noise and receipts from."""

    phase: str
    clock: Tensor
    rows: Rows | Tensor | None
    is_off: bool
    errors: Mapping[str, str]


class Emulation:
    """A profile at work on a model. Made by :func:`aqnsim.emulate`; a context manager that restores and checks.

    Attributes:
        model, profile, seed, aqn, run: as given.
        sites: every emulated site.
        example: keyword arguments of a forward that shows which ops there are; None for a few tokens.
        step, total_steps: as :meth:`begin_step` set them; None before.
        clock: run, phase and step, as ops take them; see :func:`aqnsim.rng.clock`.
        noise: AQN at its sites; None without AQN.
    """

    def __init__(self, model: nn.Module, profile: Profile, seed: int, aqn: AQN | None, run: int) -> None:
        self.model, self.profile, self.seed, self.aqn, self.run = model, profile, seed, aqn, run
        self.sites: list[Site] = []
        self.step: int = 0
        self.total_steps: int | None = None
        self.tracks_rows = False
        self.is_off = False
        self.recomputes = False
        self.totals = torch.zeros(0, len(PHASES), len(STREAMS), len(STATS), dtype=torch.float64)
        self._phase = "train"
        self._rows: Rows | Tensor | None = None
        self._sequences: Tensor | None = None
        self.example: Mapping[str, Any] | None = None
        self.is_restored = False
        self._swaps: list[Swap] = []
        self._undo: list[Callable[[], None]] = []
        self._masters: list[FrozenWeight] = []
        self.noise = None if aqn is None else WeightNoise(aqn)
        self._set_clock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Emulation:
        return self  # a copied model keeps reporting to the emulation that it was copied from

    # ---- where the run is ------------------------------------------------------------------------------------------

    def begin_step(self, step: int, total_steps: int) -> None:
        """Set the training step: the only place where noise and the AQN schedule advance.

        Raises:
            ConfigError: a step outside 0 .. total_steps, a schedule that would be 0 at every step, or sigmas that are
                relative to weights which ``off()`` has taken away.
        """
        check_step(step)
        if not 0 <= step <= total_steps:
            raise ConfigError(f"begin_step: expected 0 <= step <= {total_steps}, got {step}")
        if self.noise is not None:
            if total_steps != self.total_steps:
                self.noise.aqn.check(total_steps)
            if self.is_off and self.noise.aqn.relative_to == "rms":
                raise ConfigError("begin_step inside of off(): the sigma of AQN is relative to the emulated weights")
            self.noise.begin_step(step, total_steps)
        self.step, self.total_steps = step, total_steps
        self._set_clock()

    def _set_clock(self) -> None:
        # a new tensor: a pending backward keeps its own, and a compiled graph takes it as an input
        with torch.inference_mode(False):  # a rollout's phase may end there, and a backward is to save the clock
            self.clock = torch.tensor(clock(self.step, self._phase, self.run), device="cpu")

    @property
    def sigma(self) -> float:
        """The sigma of AQN's schedule at this step, which sites scale; 0 without AQN."""
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
        self._set_clock()
        try:
            yield self
        finally:
            self._phase = before
            self._set_clock()

    @contextmanager
    def off(self) -> Iterator[Emulation]:
        """Run a block on the clean model: original weights, no error, no AQN; bit-identical to plain torch."""
        if self.is_off:
            yield self
            return
        self.check_frozen()
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
            ids: int64 ``[batch]``, or ``[batch, length]`` where one row holds several sequences, each 0 <= id < 2^43.

        Without it, the rows of a batch are 0, 1, 2, ...
        """
        if ids.dim() not in (1, 2) or ids.dtype != torch.int64:
            raise ConfigError(
                f"sequences: expected int64 ids of shape [batch] or [batch, length], got {ids.dtype} {tuple(ids.shape)}"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << MAX_SEQUENCE_BITS:
            raise ConfigError(
                f"sequences: expected 0 <= id < 2^{MAX_SEQUENCE_BITS}, got {int(ids.min())} .. {int(ids.max())}"
            )
        if self.draws and not self.tracks_rows:
            raise ConfigError(
                f"sequences: {type(self.model).__name__} has no token embeddings: its noise is keyed by the rows of "
                "each input, and sequence ids would have no effect"
            )
        before, self._sequences = self._sequences, ids
        try:
            yield self
        finally:
            self._sequences = before

    @property
    def draws(self) -> bool:
        """Whether anything random enters at some site."""
        return any(spec.draws for s in self.sites for spec in s.specs.values())

    def begin_forward(self, kwargs: Mapping[str, Any], tokens: Tensor) -> None:
        """Note whose tokens the forward that begins computes; see :func:`aqnsim.emulation.rows.rows_of_forward`."""
        self._rows = rows_of_forward(kwargs, tokens, self._sequences)

    def rows_of(self, x: Tensor, heads: str = "") -> Tensor | None:
        """The logical rows of a tensor; None, for 0, 1, 2, ..., on a model without token embeddings."""
        return self._rows.of(x, heads) if isinstance(self._rows, Rows) else self._rows

    def cached_rows(self, x: Tensor) -> Tensor | None:
        """The logical rows of keys or values ``[batch, heads, keys, width]``."""
        return self._rows.cached(x) if isinstance(self._rows, Rows) else None

    def score_rows(self, query: Tensor) -> Tensor | None:
        """The logical rows of the scores of queries ``[batch, heads, length, width]``."""
        return self._rows.scores(query) if isinstance(self._rows, Rows) else None

    @contextmanager
    def at_rows(self, rows: Tensor | None) -> Iterator[None]:
        """Run a block on some of the tokens, whose logical rows are given."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    @property
    def moment(self) -> Moment:
        """Where the forward is now."""
        return Moment(self._phase, self.clock, self._rows, self.is_off, {} if self.noise is None else self.noise.errors)

    @contextmanager
    def at(self, moment: Moment) -> Iterator[None]:
        """Run a block as at another moment: how a layer is recomputed in the backward.

        Raises:
            ConfigError: the emulation was on then and is off now, or the other way round: the weights are others.
        """
        if moment.is_off != self.is_off:
            raise ConfigError("a forward is recomputed after off() began or ended: do its backward before")
        before, was_recomputing = self.moment, self.recomputes
        self._go_to(moment)
        self.recomputes = True
        try:
            yield
        finally:
            self._go_to(before)
            self.recomputes = was_recomputing

    def _go_to(self, moment: Moment) -> None:
        self._phase, self.clock, self._rows = moment.phase, moment.clock, moment.rows
        if self.noise is not None:
            self.noise.errors = moment.errors

    def recompute_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`: the second run is at the first's moment.

        Only for a checkpoint that you call, such as ``checkpoint(layer, x, use_reentrant=False,
        context_fn=emu.recompute_context)``; layers under ``model.gradient_checkpointing_enable()`` know their moment.
        """
        return nullcontext(), self.at(self.moment)

    def check_moment(self) -> None:
        """Refuse a forward inside a backward that does not say whose it repeats: its noise could be another's.

        Raises:
            ConfigError: a checkpoint that the emulation does not know of.
        """
        if not self.recomputes and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise ConfigError(
                "an emulated op is recomputed in a backward and cannot know the step, phase and sequences of its "
                "forward: call checkpoint(..., use_reentrant=False, context_fn=emulation.recompute_context), or "
                "model.gradient_checkpointing_enable()"
            )

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
                                requested=attest.requested(self, site, stream, phase),
                            )
                        )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for a resumed run to end with the same receipts."""
        peaks = [] if self.noise is None else list(self.noise.peaks.values())
        return {"totals": self.totals.clone(), "sigmas": torch.tensor(peaks, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict` of an emulation of the same model and profile.

        Raises:
            ConfigError: the state has another number of sites, or of sites that AQN reaches.
        """
        if state["totals"].shape != self.totals.shape:
            raise ConfigError(
                f"the receipts of a checkpoint have shape {tuple(state['totals'].shape)}, this emulation's "
                f"{tuple(self.totals.shape)}: it is another model, profile or AQN"
            )
        peaks, names = state["sigmas"].tolist(), [] if self.noise is None else list(self.noise.peaks)
        if len(peaks) != len(names):
            raise ConfigError(f"a checkpoint has AQN at {len(peaks)} sites, this emulation at {len(names)}")
        self.totals.copy_(state["totals"])
        if self.noise is not None:
            self.noise.peaks = dict(zip(names, peaks, strict=True))

    def save_pretrained(
        self,
        path: str | Path,
        *,
        frozen: Literal["master", "cast"],
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model as transformers does, and beside it ``aqnsim.json``: under which profile it was run.

        Args:
            path: the checkpoint's folder.
            frozen: what frozen weights are saved as: ``master``, what they were before the profile was attached, or
                ``cast``, what they hold: cast(W), and cast(W) + BA after merging an adapter. A weight that trains is
                saved as its master.
            model: what to save in place of the emulated model, such as what ``merge_and_unload()`` returned.
            kwargs: for the model's own ``save_pretrained``.

        Raises:
            ConfigError: ``frozen`` is neither; masters of weights that were changed since.
        """
        checkpoint.save(self, model or self.model, Path(path), frozen, kwargs)

    def check_checkpoint(self, path: str | Path, *, other_profile: bool = False) -> None:
        """Refuse a checkpoint of another profile than this emulation's.

        Args:
            path: a folder that :meth:`save_pretrained` wrote, from which the model was loaded.
            other_profile: accept another profile: the model shall run on other hardware than it was trained on.

        Raises:
            ConfigError: no record; another profile; frozen weights saved as cast(W) that a second cast changed.
        """
        checkpoint.check(self, Path(path), other_profile)

    def report(self, since: ReceiptTotals | None = None) -> Report:
        """The receipts, requested beside realised: printed it is a table; see :class:`aqnsim.report.Report`."""
        report = self.receipt_report(since)
        if self.noise is None or self.total_steps is None:
            return report
        return replace(report, survival=tuple(self.survival()))

    def receipt_report(self, since: ReceiptTotals | None = None) -> Report:
        receipts = tuple(self.receipts(since))
        return Report(self.profile.name, self.profile.fingerprint, self.seed, len(self.sites), receipts)

    def survival(self, total_steps: int | None = None) -> list[Survival]:
        """The share of stored weights that change where AQN's noise is added in place, for each stretch of equal sigma.

        Each weight counts in its own dtype, by :func:`aqnsim.aqn.survives`; a large one by evenly spaced values.

        Args:
            total_steps: of the run; by default as :meth:`begin_step` was told.

        Raises:
            ConfigError: there is no AQN, or the run's length is not known yet.

        >>> from aqnsim import emulate
        >>> from aqnsim.aqn import Constant
        >>> model = nn.Sequential(nn.RMSNorm(8, eps=1e-6)).bfloat16()
        >>> emulate(model, "ideal", aqn=AQN(Constant(0.001))).survival(total_steps=9)
        [Survival(first=0, last=8, sigma=0.001, share=0.0254...)]
        """
        total_steps = self.total_steps if total_steps is None else total_steps
        if self.noise is None or total_steps is None:
            what = "no AQN is asked for" if self.noise is None else "give total_steps, as no step has begun"
            raise ConfigError(f"survival: {what}")
        return self.noise.survival(total_steps)

    def check(self, backward: bool = False, false_alarm: float = 1e-6) -> None:
        """Fail where something was requested and did not happen.

        Args:
            backward: also require that the gradient errors of every rule were injected somewhere.
            false_alarm: probability with which a sigma that was injected as asked may fail nonetheless.

        Raises:
            RealisationError: a site that was never called, an error that changed no value, an AQN schedule that never
                advanced, stayed at 0 or missed a site, a sigma that is not the one asked for. The message names the
                site or the schedule.
        """
        attest.check(self, backward, false_alarm)

    # ---- attach and restore ------------------------------------------------------------------------------------------

    def add_site(self, site: Site) -> Binding:
        self.sites.append(site)
        if self.noise is not None and site.takes_noise:
            self.noise.add(site)
        return Binding(self, site)

    def swap(self, module: nn.Module, cls: type[nn.Module], attributes: Mapping[str, Any]) -> None:
        """Give a module an emulated class and what it needs, until the emulation is restored."""
        self._swaps.append(Swap(module, type(module), cls, attributes))
        self._swaps[-1].do()

    @contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """Run a block on the model as it was before: its own classes and weights."""
        with self.off(), self.at(replace(self.moment, is_off=True)):
            for swap in reversed(self._swaps):
                swap.undo()
            try:
                yield self.model
            finally:
                for swap in self._swaps:
                    swap.do()

    @cached_property
    def coverage(self) -> Coverage:
        """Which ops a forward runs, and which of them are emulated: of the example, or a few tokens. Found when first
        asked for.

        Raises:
            ConfigError: the emulation was restored before.
            RealisationError: an op that a rule matches runs as torch makes it.
        """
        from aqnsim.emulation.coverage import coverage_of  # which attaches emulations itself

        return coverage_of(self)

    def on_restore(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def materialise(self, site: Site, weight: nn.Parameter) -> None:
        """Write cast(W) into a frozen weight, once, and keep the master."""
        if hasattr(weight, "placements"):  # a DTensor
            raise ConfigError(
                f"the frozen weight of {site.name!r} is sharded already, and cast(W) cannot be written into it: "
                "emulate the model first, then call fully_shard"
            )
        fmt = site.spec.forward.weight
        master = weight.data
        cast = partial(
            torch.ops.aqnsim.cast,
            master,
            fmt,
            site.weight_axis,
            key_of(self.seed, site.name, "weight"),
            self.clock,
            None,
        )
        value, stats = cast(True)
        torch.ops.aqnsim.record(self.totals[site.index, 0, 0], stats)
        weight.data = value
        self._masters.append(FrozenWeight(site, weight, master, value, digest_of(value), lambda: cast(False)[0]))

    def check_frozen(self) -> None:
        """Refuse frozen weights that were changed behind the emulation's back, such as by merging an adapter in place.

        Raises:
            ConfigError: naming the first such site.
        """
        reshard(self.model)  # what FSDP2 holds gathered is a copy
        for frozen in self._masters:
            frozen.check()

    def refresh_weights(self) -> None:
        """Write cast(W) into every frozen weight again, over whatever was written there since.

        After an adapter was unmerged: adding and taking off its product leaves rounding errors in cast(W).
        """
        for frozen in self._masters:
            frozen.refresh()
        self._hold(masters=self.is_off)

    @property
    def recast(self) -> list[str]:
        """Sites whose frozen weight was no value of its format: the cast at the attach changed it."""
        return [f.site.name for f in self._masters if f.recast]

    def _hold(self, masters: bool) -> None:
        reshard(self.model)  # else what was gathered would stay
        with torch.no_grad():
            for frozen in self._masters:
                frozen.hold(masters)

    def restore(self, keep_weights: bool = False) -> None:
        """Give the model back as it was: classes, weights, hooks. Receipts stay readable.

        Args:
            keep_weights: leave frozen weights as they are now, such as cast(W) + BA after merging an adapter.

        Raises:
            ConfigError: a frozen weight was changed since the profile was attached, and is not to be kept.
        """
        if not keep_weights:
            self.check_frozen()
            self._hold(masters=True)
        self._masters.clear()
        self.is_restored = True
        while self._swaps:
            self._swaps.pop().undo()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Emulation:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.restore()
        if kind is None:
            self.check()
