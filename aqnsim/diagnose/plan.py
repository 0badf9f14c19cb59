"""What to do about a scan: sites to keep as they are within a budget, and multipliers of noise by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from aqnsim import formats
from aqnsim._errors import ConfigError
from aqnsim.diagnose.scan import Scan, SiteScan, but, effect_without, reduced
from aqnsim.diagnose.text import Effect, Text
from aqnsim.profiles import Profile
from aqnsim.profiles.spec import operand

KEPT_BITS = 16
"""Bits of a weight that is kept as it is."""


@dataclass(frozen=True)
class Plan:
    """Sites that are kept as they are, and what that is worth.

    Attributes:
        keep: names, in the order in which they were chosen.
        extra_bytes: that their weights take more.
        before, after: all sites emulated, and all but those.
        profile: the scan's, without them.
    """

    keep: tuple[str, ...]
    extra_bytes: int
    before: Effect
    after: Effect
    profile: Profile

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        effects = {"before": self.before, "after": self.after}
        measured = {name: {**vars(e), "perplexity": e.perplexity} for name, e in effects.items()}
        return {"keep": list(self.keep), "extra_bytes": self.extra_bytes, **measured}


def plan(
    found: Scan,
    model: nn.Module,
    text: Text,
    *,
    extra_bytes: int | None = None,
    kl: float | None = None,
    seed: int = 0,
) -> Plan:
    """Choose sites to keep, greedily: the most KL saved for each byte first, by ``kl_only`` of the scan.

    The greedy choice is within one site's worth of the best, were the KLs of single sites to add up (a knapsack of
    small items). That they do is not assumed: the result is measured, and a target of KL is met by measuring.

    Args:
        found: a scan of the same model and text.
        extra_bytes: memory budget for weights that stay in 16 bits.
        kl: accuracy budget: sites are kept until the whole model's KL is at most this.

    Raises:
        ConfigError: not exactly one budget, or a KL that keeping every site does not reach.
    """
    if (extra_bytes is None) == (kl is None):
        raise ConfigError("give one budget: extra_bytes for memory, or kl for accuracy")
    queue = sorted((s for s in found.sites if s.kind == "linear"), key=lambda s: -_worth(found.profile, s))
    keep: list[SiteScan] = []
    if extra_bytes is not None:
        spent = 0
        for s in queue:
            if spent + _bytes(found.profile, s) <= extra_bytes:
                keep.append(s)
                spent += _bytes(found.profile, s)
        after = effect_without(model, found.profile, [s.name for s in keep], text, seed)
    else:
        assert kl is not None
        keep, after = _until(
            lambda n: effect_without(model, found.profile, [s.name for s in queue[:n]], text, seed), queue, kl
        )
    names = tuple(s.name for s in keep)
    kept = reduced(model, but(found.profile, *names))
    source = {**found.profile.source, "kept": f"{len(names)} sites by KL saved a byte, over {found.tokens} tokens"}
    profile = replace(kept, name=f"{found.profile.name}-kept", source=source)
    spent = sum(_bytes(found.profile, s) for s in keep)
    return Plan(names, spent, found.whole, after, profile)


def _until(effect: Callable[[int], Effect], queue: Sequence[SiteScan], kl: float) -> tuple[list[SiteScan], Effect]:
    """The fewest sites from the queue's start that reach a KL, by bisection: keeping more rarely makes it worse."""
    low, high, best = 0, len(queue), effect(len(queue))
    if best.kl > kl:
        raise ConfigError(f"kl = {kl}: keeping every linear layer leaves {best.kl:.3g}; ask for more than that")
    while low < high:
        middle = (low + high) // 2
        reached = effect(middle)
        if reached.kl <= kl:
            high, best = middle, reached
        else:
            low = middle + 1
    return list(queue[:high]), best


def _bytes(profile: Profile, site: SiteScan) -> int:
    """What keeping a site's weight costs: 16 bits a number less what its format takes, scales included."""
    index = profile.rule_for(site.kind, site.name, site.role)
    weight = None if index is None else profile.rules[index].spec.forward.weight
    bits = KEPT_BITS if weight is None else _bits(operand(weight)[0])
    return round(site.parameters * max(KEPT_BITS - bits, 0) / 8)


def _bits(text: str) -> float:
    return float(formats.get(text).bits)


def _worth(profile: Profile, site: SiteScan) -> float:
    saved = site.values["kl_only"] or 0.0
    return saved / max(_bytes(profile, site), 1)


def multipliers(found: Scan, metric: str = "input_nmse") -> dict[int, float]:
    """Multipliers of AQN by layer, in proportion to the root of a squared error, with a mean of 1.

    Where a layer errs is not how much noise it tolerates: whether such multipliers help is a question for an experiment
    with a control at the same mean sigma, and that is why the mean is 1.

    Args:
        metric: a squared error, ``input_nmse`` or ``weight_nmse``.

    Raises:
        ConfigError: no layer has that measure.
    """
    by_layer: dict[int, list[float]] = {}
    for s in found.sites:
        value = s.values[metric]
        if s.layer is not None and value is not None:
            by_layer.setdefault(s.layer, []).append(value)
    if not by_layer:
        raise ConfigError(f"no site in a layer has {metric}: the profile {found.profile.name!r} does not cast that")
    roots = {layer: (sum(v) / len(v)) ** 0.5 for layer, v in sorted(by_layer.items())}
    mean = sum(roots.values()) / len(roots)
    return {layer: round(root / mean, 3) if mean else 1.0 for layer, root in roots.items()}
