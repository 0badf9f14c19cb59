"""Requested equals realised: what a site was asked for, and the checks that it happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from aqnsim._errors import RealisationError
from aqnsim.emulation.sites import Site
from aqnsim.receipts import STATS, STREAMS

if TYPE_CHECKING:
    from aqnsim.emulation.core import Emulation

_CALLS = STATS.index("calls")
_CHANGED = STATS.index("changed")

_DIRECTIONS = (  # a direction of the OpSpec, the prefix of its streams, and for each stream the field it is asked by
    ("forward", "", {"weight": "weight", "input": "input", "output": "error", "output-cast": "output"}),
    ("grad_input", "grad-input", {".weight": "weight", ".grad": "grad", "": "error", "-cast": "output"}),
    ("grad_weight", "grad-weight", {".input": "input", ".grad": "grad", "": "error", "-cast": "output"}),
)
_FIELDS = {prefix + s: (part, name) for part, prefix, streams in _DIRECTIONS for s, name in streams.items()}


def check(emulation: Emulation, backward: bool, false_alarm: float) -> None:
    """Fail where something was requested and did not happen; see :meth:`Emulation.check`."""
    calls = emulation.totals[..., _CALLS]
    for site in emulation.sites:
        _check_site(emulation, site, calls)
    if backward:
        _check_backward(emulation, calls)
    if emulation.noise is not None:
        emulation.noise.check(calls[:, :, STREAMS.index("aqn")].sum(1))
    if violations := emulation.receipt_report().violations(false_alarm):
        raise RealisationError("; ".join(violations))


def _check_site(emulation: Emulation, site: Site, calls: Tensor) -> None:
    if site.rule is not None and not calls[site.index, 1:].any():
        rule = f"rule {site.rule + 1} of {emulation.profile.name!r}"
        raise RealisationError(f"site {site.name!r} is emulated ({rule}) but was never called")
    for s, stream in enumerate(STREAMS):
        stats = emulation.totals[site.index, 1:, s]
        if _is_error(site, stream) and stats[:, _CALLS].any() and not stats[:, _CHANGED].any():
            asked = requested(emulation, site, stream, "train")
            raise RealisationError(
                f"site {site.name!r}: {asked} on its {stream} changed no value; sigma is too small for the dtype"
            )


def _check_backward(emulation: Emulation, calls: Tensor) -> None:
    for i, rule in enumerate(emulation.profile.rules):
        sites = [s for s in emulation.sites if s.rule == i]
        rows = [s.index for s in sites]
        for stream, part in (("grad-input", rule.spec.grad_input), ("grad-weight", rule.spec.grad_weight)):
            asked = [s for s in sites if s.trains] if stream == "grad-weight" else sites
            trained = any(s.trains or s.kind != "embedding" for s in asked)  # only a table has what rows are given
            if part.error and trained and not calls[rows][:, :, STREAMS.index(stream)].any():
                raise RealisationError(
                    f"rule {i + 1} of profile {emulation.profile.name!r} asks for {part.error} on {stream}, "
                    "but no backward pass reached any of its sites"
                )


def _is_error(site: Site, stream: str) -> bool:
    if stream == "aqn":
        return True
    part, name = _FIELDS[stream]
    specs = (s for phase, s in site.specs.items() if part != "forward" or phase not in site.native)
    return name == "error" and any(getattr(spec, part).error for spec in specs)


def requested(emulation: Emulation, site: Site, stream: str, phase: str) -> str:
    """What a stream of a site was asked for in a phase, as text."""
    if stream == "aqn":
        relative = emulation.aqn is not None and emulation.aqn.relative_to == "rms"
        return "absolute-gaussian(schedule * rms)" if relative else "absolute-gaussian(schedule)"
    part, name = _FIELDS[stream]
    asked = getattr(site.specs["train" if phase == "attach" else phase], part)
    if stream == "output" and phase in site.native:
        left_out = ", ".join(text for text in (asked.accumulator, asked.error, asked.output) if text)
        return f"native {asked.input or '-'} x {asked.weight}" + (f", without {left_out}" if left_out else "")
    names = ("accumulator", "approximation", "error") if name == "error" else (name,)
    return ", ".join(text for text in (getattr(asked, n, None) for n in names) if text) or "-"
