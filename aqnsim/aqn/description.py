"""AQN as a value: what noise, on which weights, when; and the settings of others under their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from aqnsim._errors import ConfigError, UnknownNameError, unknown
from aqnsim.aqn.layers import Zone, check_factors, check_zones, layer_of
from aqnsim.aqn.schedules import KStage, Schedule

PHASES = ("rollout", "train", "eval", "reference")

KINDS = {"rmsnorm": "norm", "linear": "linear"}
"""Kind of site by the word for it among targets."""

Moe = Literal["all", "post_attention_only", "protect_router"]
RelativeTo = Literal["absolute", "rms"]


class SiteLike(Protocol):
    """What is asked of a site: its path, its kind (``norm`` or ``linear``) and its role, such as ``q_proj``."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def role(self) -> str: ...


def moe_admits(rule: Moe, site: str, feeds_router: bool) -> bool:
    """Whether a rule for mixtures of experts lets noise reach a site.

    ``all``: every site. ``protect_router``: all but those that feed a router, whose choice of experts the noise would
    change. ``post_attention_only``: sites named ``post_attention_layernorm`` alone, as zhshgmail/verl does on MoE
    models to protect the router; in Qwen's and Mixtral's layers that norm is the one that feeds it.

    Args:
        rule: the rule.
        site: the module's path.
        feeds_router: a fact of the model: a router reads this site's output, or the site is the router.

    >>> norm = "model.layers.0.post_attention_layernorm"
    >>> [moe_admits(rule, norm, feeds_router=True) for rule in ("all", "post_attention_only", "protect_router")]
    [True, True, False]
    """
    if rule == "protect_router":
        return not feeds_router
    return rule == "all" or site.rpartition(".")[2] == "post_attention_layernorm"


@dataclass(frozen=True)
class AQN:
    """What noise, where and when.

    Attributes:
        schedule: sigma by step.
        targets: ``rmsnorm`` for norm weights, ``linear`` for the weights of linear layers, or a tuple of these words
            and of globs of roles or names, such as ``("q_proj", "layers.3.*")``. A glob matches the whole name or its
            last parts.
        multipliers: factor on sigma by layer index.
        default_multiplier: factor for all other sites, those without a layer (the final norm) among them; 0 leaves
            them alone.
        phases: where the noise acts: the rollout only, by default.
        zones: ranges of layers with a schedule or a factor of their own, ascending.
        moe: which sites of a mixture of experts are reached: see :func:`moe_admits`.
        relative_to: what sigma counts: ``absolute``, units of the weight; ``rms``, the root mean square of the
            weight that acts, which is ``offset + w`` for a norm.
        exclude: globs of names that are not reached; they need not match anything.

    Raises:
        ConfigError: a multiplier that is negative or not finite, no phase, no target, zones that overlap or meet a
            multiplier.
        UnknownNameError: a target, phase, rule or unit that does not exist.

    >>> aqn = AQN(KStage(0.01, 0.0001, 10), zones=(Zone(0, 5, multiplier=0.5),))
    >>> aqn.sigma("model.layers.3.input_layernorm", 10, 100), aqn.sigma("model.norm", 10, 100)
    (0.005, 0.01)
    """

    schedule: Schedule
    targets: str | tuple[str, ...] = "rmsnorm"
    multipliers: Mapping[int, float] = field(default_factory=dict)
    default_multiplier: float = 1.0
    phases: tuple[str, ...] = ("rollout",)
    zones: tuple[Zone, ...] = ()
    moe: Moe = "all"
    relative_to: RelativeTo = "absolute"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_targets(self.targets)
        if not self.phases:
            raise ConfigError("AQN: phases is empty: the noise would never act")
        for phase in self.phases:
            if phase not in PHASES:
                raise unknown("phase", phase, PHASES)
        for what, value, known in (("moe rule", self.moe, Moe), ("relative_to", self.relative_to, RelativeTo)):
            if value not in get_args(known):
                raise unknown(what, value, get_args(known))
        if isinstance(self.exclude, str):
            raise ConfigError(f"AQN: exclude is a tuple of globs, such as ({self.exclude!r},), got {self.exclude!r}")
        check_factors(self.multipliers, self.default_multiplier)
        check_zones(self.zones, self.multipliers)

    # ---- where ------------------------------------------------------------------------------------------------------

    def reaches(self, site: str, kind: str, role: str, feeds_router: bool | None = None) -> bool:
        """Whether targets, exclude and the moe rule choose a site; a factor of 0 may still leave it alone.

        Args:
            site: the module's path.
            kind: ``norm`` or ``linear``; no other kind has a weight that gets noise.
            role: what the site is in its layer, such as ``q_proj``.
            feeds_router: whether a router reads this site's output, or the site is the router.

        Raises:
            ConfigError: the rule is ``protect_router``, and ``feeds_router`` is not given.

        >>> aqn = AQN(KStage(0.01, 0.0001, 10), targets=("q_proj", "layers.3.*"))
        >>> aqn.reaches("model.layers.3.input_layernorm", "norm", "input_layernorm")
        True
        """
        if feeds_router is None:
            if self.moe == "protect_router":
                raise ConfigError(f"AQN: moe = 'protect_router' needs to know whether {site!r} feeds a router")
            feeds_router = False
        if _matches(site, role, self.exclude) or not moe_admits(self.moe, site, feeds_router):
            return False
        return any(_hits(target, site, kind, role) for target in self._targets)

    def check_sites(self, sites: Iterable[SiteLike]) -> None:
        """Refuse a model in which a part of the description would have no effect.

        Args:
            sites: those of the model that are reached.

        Raises:
            ConfigError: a target, a multiplier or a zone's layer without a site, or a factor of 0 on every site.
        """
        found = list(sites)
        if idle := [t for t in self._targets if not any(_hits(t, s.name, s.kind, s.role) for s in found)]:
            raise ConfigError(
                f"AQN targets {', '.join(idle)}, but nothing there is reached: no noise would be injected"
            )
        named = {*self.multipliers, *(layer for zone in self.zones for layer in zone.layers)}
        if missing := sorted(named - {layer_of(s.name) for s in found}):
            raise ConfigError(
                f"AQN: multipliers or zones name layers {missing}, in which nothing is reached: "
                "they would have no effect"
            )
        if not any(self.multiplier(s.name) for s in found):
            raise ConfigError("AQN: the multiplier of every site is 0: no noise would be injected")

    @property
    def _targets(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    # ---- how much ---------------------------------------------------------------------------------------------------

    def sigma(self, site: str, step: int, total_steps: int) -> float:
        """The standard deviation at a site, in the unit that ``relative_to`` names.

        Raises:
            ConfigError: a step outside of the run.
        """
        return self.schedule_of(site).sigma(step, total_steps) * self.multiplier(site)

    def schedule_of(self, site: str) -> Schedule:
        """The schedule of a site: that of its zone, if it has its own."""
        zone = self._zone(site)
        return self.schedule if zone is None or zone.schedule is None else zone.schedule

    def multiplier(self, site: str) -> float:
        """The factor on the sigma of a site's schedule; 1 in a zone with a schedule of its own."""
        layer, zone = layer_of(site), self._zone(site)
        if zone is not None:
            return 1.0 if zone.multiplier is None else zone.multiplier
        return self.default_multiplier if layer is None else self.multipliers.get(layer, self.default_multiplier)

    def check(self, total_steps: int) -> None:
        """Refuse a run in which one of the schedules would never act.

        Raises:
            ConfigError: its sigma is 0 at every step, or it has no such run.
        """
        for schedule in (self.schedule, *(zone.schedule for zone in self.zones)):
            if schedule is not None:
                schedule.check(total_steps)

    def _zone(self, site: str) -> Zone | None:
        layer = layer_of(site)
        return None if layer is None else next((zone for zone in self.zones if layer in zone), None)


def _check_targets(targets: str | tuple[str, ...]) -> None:
    if isinstance(targets, str) and targets not in KINDS:
        raise UnknownNameError(
            f"{unknown('AQN target', targets, KINDS)}; globs of names are given as a tuple: ({targets!r},)"
        )
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise ConfigError(f"AQN: expected targets as words or globs, got {targets!r}")


def _hits(target: str, site: str, kind: str, role: str) -> bool:
    if target in KINDS:
        return kind == KINDS[target]
    return kind in KINDS.values() and _matches(site, role, (target,))


def _matches(site: str, role: str, globs: tuple[str, ...]) -> bool:
    """A glob matches the role, the whole name or its last parts, as in profiles."""
    return any(fnmatch.fnmatchcase(text, form) for g in globs for text, form in ((role, g), (f".{site}", f"*.{g}")))


# ---- settings of others ---------------------------------------------------------------------------------------------

PRESETS: dict[str, AQN] = {
    "qerl_paper": AQN(KStage(sigma_start=1e-2, sigma_end=1e-4, stages=10)),
    "qerl_default": AQN(KStage(sigma_start=5e-2, sigma_end=5e-4, stages=10)),
}
"""Settings of others by name, as their code runs them."""

SOURCES: dict[str, str] = {
    "qerl_paper": "QeRL (arXiv 2510.11696): all training scripts of NVlabs/QeRL, with the schedule of its code",
    "qerl_default": "NVlabs/QeRL: the defaults of its configuration, with the schedule of its code",
}
"""Where each of :data:`PRESETS` comes from."""


def preset(name: str) -> AQN:
    """The settings of that name.

    Raises:
        UnknownNameError: no such name; the message names the closest.

    >>> preset("qerl_paper").schedule.text
    'k-stage(sigma_start=0.01, sigma_end=0.0001, stages=10)'
    """
    if name not in PRESETS:
        raise unknown("AQN preset", name, PRESETS)
    return PRESETS[name]
