"""AQN on the weights of a model: sigma by site at a step, and whether a run got what it asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from aqnsim._errors import RealisationError
from aqnsim.aqn import AQN, Survival, survives
from aqnsim.emulation.sites import Site
from aqnsim.errors import AbsoluteGaussian

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SAMPLE = 1 << 14  # weights from which survival is estimated


class WeightNoise:
    """The noise at its sites.

    Attributes:
        aqn: what noise.
        sites: those that it reaches.
        sigmas: by the site's name, at this step, in units of the weight; None before the first step.
        errors: the same as texts of error models, on which a compiled forward can be specialised; empty for no noise.
        peaks: the largest sigma of any step, by the site's name.
    """

    def __init__(self, aqn: AQN) -> None:
        self.aqn = aqn
        self.sites: list[Site] = []
        self.sigmas: dict[str, float] | None = None
        self.peaks: dict[str, float] = {}
        self.errors: Mapping[str, str] = {}

    def add(self, site: Site) -> None:
        self.sites.append(site)
        self.peaks[site.name] = 0.0

    def begin_step(self, step: int, total_steps: int) -> None:
        """Set every sigma; the root mean squares of weights are taken now, so that no forward waits for a device."""
        relative = self.aqn.relative_to == "rms"
        self.sigmas = {}
        for site in self.sites:
            sigma = self.aqn.sigma(site.name, step, total_steps)
            self.sigmas[site.name] = sigma * rms(site) if sigma and relative else sigma
        self.errors = {name: str(AbsoluteGaussian(sigma)) if sigma else "" for name, sigma in self.sigmas.items()}
        self.peaks = {name: max(peak, self.sigmas[name]) for name, peak in self.peaks.items()}

    def at(self, site: Site, phase: str) -> str:
        """The error model of the noise on a site's weight, now; empty for none.

        Raises:
            RealisationError: no step has begun.
        """
        if phase not in self.aqn.phases:
            return ""
        if self.sigmas is None:
            raise RealisationError(
                "AQN was asked for but its schedule never advanced: call begin_step(step, total_steps) at each step"
            )
        return self.errors[site.name]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block without noise."""
        before = self.sigmas, self.errors
        self.sigmas = {site.name: 0.0 for site in self.sites}
        self.errors = {site.name: "" for site in self.sites}
        try:
            yield
        finally:
            self.sigmas, self.errors = before

    def check(self, calls: Tensor) -> None:
        """Fail where noise was asked for and none acted.

        Args:
            calls: how often each site got noise, ``[sites]``.

        Raises:
            RealisationError: no step has begun, a schedule stayed at 0, a site was never called.
        """
        if self.sigmas is None:
            raise RealisationError(f"{self.aqn.schedule} never advanced: begin_step was not called")
        for site in self.sites:
            schedule, peak = self.aqn.schedule_of(site.name), self.peaks[site.name]
            if not peak:
                zone = self.aqn.zone_of(site.name)
                own = zone is not None and zone.schedule is not None
                where = f" in the zone of layers {zone.first} to {zone.last}" if own else ""  # type: ignore[union-attr]
                raise RealisationError(f"{schedule}{where} stayed at sigma 0 in every step of this run")
            if not calls[site.index]:
                raise RealisationError(
                    f"AQN reached no forward of {site.name!r}: sigma was up to {peak}, but the {site.kind} was never "
                    f"called in phase {' or '.join(self.aqn.phases)}"
                )

    def survival(self, total_steps: int) -> list[Survival]:
        """See :meth:`Emulation.survival`."""
        schedules = dict.fromkeys(self.aqn.schedule_of(site.name) for site in self.sites)
        stored = {site: _sample(site, 1 + _SAMPLE // len(self.sites)) for site in self.sites}
        scales = {s: rms(s) if self.aqn.relative_to == "rms" else 1.0 for s in self.sites}
        sizes = {s: _weight(s).numel() for s in self.sites}
        found = []
        for _, steps in itertools.groupby(
            range(total_steps), lambda t: [schedule.sigma(t, total_steps) for schedule in schedules]
        ):
            first, *rest = steps
            sigmas = {s: self.aqn.sigma(s.name, first, total_steps) * scales[s] for s in self.sites}
            changed = math.fsum(sizes[s] * survives(sigmas[s], *stored[s]) for s in self.sites)
            found.append(Survival(first, (rest or [first])[-1], max(sigmas.values()), changed / sum(sizes.values())))
        return found


def rms(site: Site) -> float:
    """The root mean square of the weight that acts: ``offset + w`` of a norm. Of a sharded weight, of the whole one.

    The sum is taken in fp64 and the result rounded to fp32, so that the order of adding matters to none but a few.
    """
    weight = _weight(site).float()
    if site.kind == "norm":
        weight = weight + site.module.__dict__["aqnsim_norm"].offset
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
    return float((norm / math.sqrt(weight.numel())).float())


def _weight(site: Site) -> Tensor:
    assert site.parameter is not None
    weight = site.parameter.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _sample(site: Site, count: int) -> tuple[list[float], str]:
    """Evenly spaced values of a weight, about ``count``, and the name of its dtype."""
    weight = _weight(site)
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // count)].float().tolist(), _DTYPES[weight.dtype]
