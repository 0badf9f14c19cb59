"""Per-site sensitivity of a model to a profile, by several measures that need not agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import aqnsim
from aqnsim._errors import unknown
from aqnsim.aqn import layer_of
from aqnsim.diagnose.text import Effect, Text, logits_of
from aqnsim.emulation.sites import Site
from aqnsim.profiles import Profile, load
from aqnsim.receipts import Receipt

METRICS: dict[str, tuple[int, str]] = {
    "weight_sqnr_db": (-1, "signal to noise of the weight's cast, dB"),
    "input_sqnr_db": (-1, "signal to noise of the input's cast, dB"),
    "weight_nmse": (1, "squared error of the weight over its square"),
    "input_nmse": (1, "squared error of the input over its square"),
    "weight_zeros": (1, "share of the weight's numbers that became 0"),
    "input_zeros": (1, "share of the input's numbers that became 0"),
    "weight_saturated": (1, "share of the weight beyond its format's range"),
    "input_saturated": (1, "share of the input beyond its format's range"),
    "gradient_snr_db": (-1, "signal to noise of the weight's gradient with all sites emulated, dB"),
    "kl_only": (1, "KL of the logits, this site alone emulated, nats a token"),
    "loss_only": (1, "change of the loss, this site alone emulated, nats a token"),
    "kl_without": (-1, "KL of the logits, all sites but this one emulated, nats a token"),
    "loss_without": (-1, "change of the loss, all sites but this one emulated, nats a token"),
}
"""Measures of a site: 1 where more is worse, -1 where less is, and what it is."""


@dataclass(frozen=True)
class SiteScan:
    """What was measured of one site; None where it has none of it.

    Attributes:
        name, kind, role: of the site.
        layer: its number; None outside of layers.
        parameters: of its weight.
        values: by name of :data:`METRICS`.
    """

    name: str
    kind: str
    role: str
    layer: int | None
    parameters: int
    values: dict[str, float | None]


@dataclass(frozen=True)
class Scan:
    """A scan of a model.

    Attributes:
        profile: whose sites they are.
        sites: one a site.
        whole: all sites emulated.
        loss: of the model as it is.
        tokens: of the text.
    """

    profile: Profile
    sites: tuple[SiteScan, ...]
    whole: Effect
    loss: float
    tokens: int

    def ranking(self, metric: str) -> list[SiteScan]:
        """Sites that have the measure, worst first.

        Raises:
            UnknownNameError: no such measure.
        """
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        sign = METRICS[metric][0]
        known = [(s.values[metric], s) for s in self.sites]
        return [s for v, s in sorted(((v, s) for v, s in known if v is not None), key=lambda pair: -sign * pair[0])]

    def agreement(self, metrics: Sequence[str] | None = None) -> dict[tuple[str, str], float]:
        """Spearman's rank correlation of each two measures, over the sites that have both: 1 where they rank alike.

        Measures that are the same at all sites rank nothing and are left out.
        """
        found = {}
        chosen = [m for m in metrics or METRICS if len({s.values[m] for s in self.sites}) > 2]
        for i, a in enumerate(chosen):
            for b in chosen[i + 1 :]:
                pairs = [(s.values[a], s.values[b]) for s in self.sites]
                both = [(x * METRICS[a][0], y * METRICS[b][0]) for x, y in pairs if x is not None and y is not None]
                if len(both) > 2:
                    found[a, b] = _spearman(*zip(*both, strict=True))
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "profile": self.profile.name,
            "fingerprint": self.profile.fingerprint,
            "tokens": self.tokens,
            "loss": self.loss,
            "whole": vars(self.whole),
            "metrics": {name: text for name, (_, text) in METRICS.items()},
            "sites": [vars(s) for s in self.sites],
            "agreement": [{"a": a, "b": b, "spearman": r} for (a, b), r in self.agreement().items()],
        }


Progress = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]


@contextmanager
def _silent(label: str, total: int) -> Iterator[Callable[[str], None]]:
    yield lambda _: None


def scan(
    model: nn.Module,
    profile: str | Profile,
    text: Text,
    *,
    seed: int = 0,
    gradients: bool = True,
    without: bool = True,
    progress: Progress = _silent,
) -> Scan:
    """Measure every site that a profile emulates in a model.

    Args:
        model: a causal language model; it is as it was afterwards.
        profile: a name or a profile.
        text: what the model is asked.
        seed: of the profile's noise.
        gradients: measure gradients, which needs a backward pass and the memory of all gradients twice.
        without: also emulate all sites but one, which doubles the time.
        progress: a context of a label and a number of steps.

    Raises:
        ConfigError, UnknownNameError: see :func:`aqnsim.emulate`.

    >>> import torch, aqnsim
    >>> torch.manual_seed(0) and None
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 50))
    >>> found = scan(model, "mxfp4-w4a4", Text(torch.randint(50, (4, 16))))
    >>> [s.name for s in found.sites], found.whole.kl > 0
    (['1', '2'], True)
    """
    asked = load(profile) if isinstance(profile, str) else profile
    text.record(model)
    zeros = _zeros(model, asked, text, seed)
    with aqnsim.emulate(model, asked, seed=seed) as emulation:
        whole = text.effect(model)
        receipts = emulation.receipts()
        sites = list(emulation.sites)
    snr = _gradient_snr(model, asked, text, seed) if gradients else {}
    scans = []
    with progress("scanning", len(sites)) as step:
        for site in sites:
            step(site.name)
            values = {**_of_receipts(site, receipts), **zeros.get(site.name, {})}
            values["gradient_snr_db"] = snr.get(site.name)
            values |= _effects(model, asked, site, text, seed, without)
            ordered = {m: values.get(m) for m in METRICS}
            size = 0 if site.parameter is None else site.parameter.numel()
            scans.append(SiteScan(site.name, site.kind, site.role, layer_of(site.name), size, ordered))
    return Scan(asked, tuple(scans), whole, text.clean_loss, text.tokens.numel())


def only(profile: Profile, site: Site) -> Profile:
    """The profile with the rules of one site alone."""
    rules = {r for r in site.rules.values() if r is not None}
    kept = tuple(
        replace(profile.rules[r], kind=site.kind, sites=(site.name,), phases=_phases(profile, site, r))
        for r in sorted(rules)
    )
    return replace(profile, name=f"{profile.name}, {site.name} alone", rules=kept)


def but(profile: Profile, *names: str) -> Profile:
    """The profile without some sites; rules that would then reach nothing are the caller's to avoid."""
    return replace(profile, name=f"{profile.name}, but {len(names)}", exclude=(*profile.exclude, *names))


def _phases(profile: Profile, site: Site, rule: int) -> tuple[str, ...]:
    return tuple(p for p in profile.rules[rule].phases if site.rules.get(p) == rule)


def _effects(
    model: nn.Module, profile: Profile, site: Site, text: Text, seed: int, without: bool
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    alone = _effect(model, only(profile, site), text, seed)
    found["kl_only"], found["loss_only"] = alone.kl, alone.loss_change
    if without:
        rest = effect_without(model, profile, [site.name], text, seed)
        found["kl_without"], found["loss_without"] = rest.kl, rest.loss_change
    return found


def _effect(model: nn.Module, profile: Profile, text: Text, seed: int) -> Effect:
    with aqnsim.emulate(model, profile, seed=seed):
        return text.effect(model)


def effect_without(model: nn.Module, profile: Profile, names: Sequence[str], text: Text, seed: int) -> Effect:
    """What emulating all sites but some does; nothing is emulated where no site is left."""
    kept = reduced(model, but(profile, *names))
    return _effect(model, kept, text, seed) if kept.rules else Effect(0.0, text.clean_loss, 0.0)


def reduced(model: nn.Module, profile: Profile) -> Profile:
    """The profile without the rules that reach nothing in a model, which it would be refused for."""
    rules = list(profile.rules)
    while rules:
        candidate = replace(profile, rules=tuple(rules))
        idle = _idle(model, candidate)
        if not idle:
            return candidate
        rules = [r for i, r in enumerate(rules) if i not in idle]
    return replace(profile, rules=())


def _idle(model: nn.Module, profile: Profile) -> set[int]:
    from aqnsim.emulation.discovery import candidates

    found = candidates(model, profile.kinds, profile.kinds, None)
    phases = {p for r in profile.rules for p in r.phases}
    used = {profile.rule_for(c.kind, c.name, c.role, phase) for c in found for phase in phases}
    return set(range(len(profile.rules))) - {r for r in used if r is not None}


def _of_receipts(site: Site, receipts: Sequence[Receipt]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for stream in ("weight", "input"):
        own = [r for r in receipts if r.site == site.name and r.stream == stream and r.elements]
        if own:
            worst = min(own, key=lambda r: math.inf if r.sqnr_db is None else r.sqnr_db)
            found[f"{stream}_sqnr_db"] = worst.sqnr_db
            found[f"{stream}_nmse"] = None if worst.sqnr_db is None else 10 ** (-worst.sqnr_db / 10)
            found[f"{stream}_saturated"] = worst.saturated
    return found


# ---- what receipts do not have --------------------------------------------------------------------------------------


def _zeros(model: nn.Module, profile: Profile, text: Text, seed: int) -> dict[str, dict[str, float | None]]:
    """By site of a linear layer: the shares of weight and input that are not 0 and become 0 by their casts."""
    with aqnsim.emulate(model, profile, seed=seed) as emulation:
        sites = [s for s in emulation.sites if s.kind == "linear" and isinstance(s.module, nn.Linear)]
        text.effect(model)
    found: dict[str, dict[str, float | None]] = {s.name: {} for s in sites}
    counts = {s.name: [0, 0] for s in sites}
    handles = []
    for s in sites:
        forward = s.spec.forward
        if forward.weight is not None and s.parameter is not None:
            lost, of = _became_zero(s.parameter.detach(), forward.weight)
            found[s.name]["weight_zeros"] = lost / max(of, 1)
        if forward.input is not None:
            handles.append(s.module.register_forward_pre_hook(_counter(forward.input, counts[s.name])))
    try:
        with torch.no_grad():
            for tokens in text.batches():
                logits_of(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    for name, (lost, of) in counts.items():
        if of:
            found[name]["input_zeros"] = lost / of
    return found


def _counter(fmt: str, count: list[int]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        lost, of = _became_zero(args[0].detach(), fmt)
        count[0] += lost
        count[1] += of

    return hook


def _became_zero(x: Tensor, text: str) -> tuple[int, int]:
    """How many numbers that are not 0 become 0 by a cast, and how many are not 0."""
    from aqnsim.profiles.spec import operand

    y = aqnsim.cast(x, operand(text)[0], rounding="nearest-even")
    return int(((x != 0) & (y == 0)).sum()), int((x != 0).sum())


def _gradient_snr(model: nn.Module, profile: Profile, text: Text, seed: int) -> dict[str, float | None]:
    """By site with a weight: signal to noise of its gradient, all sites emulated beside none."""
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in trained:
            p.requires_grad_(p.is_floating_point())
        with aqnsim.emulate(model, profile, seed=seed) as emulation:
            weights = {s.name: s.parameter for s in emulation.sites if s.parameter is not None}
            noisy = _gradients(model, weights, text)
            with emulation.off():
                clean = _gradients(model, weights, text)
    finally:
        for p, requires in trained.items():
            p.requires_grad_(requires)
    return {name: _decibel(clean[name], noisy[name]) for name in weights}


def _gradients(model: nn.Module, weights: dict[str, nn.Parameter], text: Text) -> dict[str, Tensor]:
    tokens = next(text.batches())
    log_p = logits_of(model, tokens).float().log_softmax(-1)
    loss = torch.nn.functional.nll_loss(log_p[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    own = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
    return {name: torch.zeros(()) if g is None else g.float() for name, g in own.items()}


def _decibel(clean: Tensor, noisy: Tensor) -> float | None:
    signal, noise = float(clean.double().square().sum()), float((noisy - clean).double().square().sum())
    if not signal:
        return None
    return math.inf if not noise else 10 * math.log10(signal / noise)


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = [torch.tensor(_ranks(v), dtype=torch.float64) for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]
