"""Profiles: which op of a model runs in which formats and with which errors. The standard library only.

A profile is TOML with a source. Its rules are ordered; the first that matches a site in a phase gives the site its
:class:`OpSpec`. The fingerprint is a hash of everything that changes a number, and travels with results.

>>> load("mxfp4-w4a16").rules[0].spec.forward.weight
'mxfp4'
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from aqnsim import formats
from aqnsim._errors import ConfigError, unknown
from aqnsim.profiles.spec import (
    ELEMENTWISE,
    GEMMS,
    KINDS,
    PARTS,
    Forward,
    GradInput,
    GradWeight,
    OpSpec,
    build,
    check_keys,
    plain,
)
from aqnsim.rng import PHASES

__all__ = [
    "ELEMENTWISE",
    "GEMMS",
    "KINDS",
    "SEMANTICS",
    "Forward",
    "GradInput",
    "GradWeight",
    "OpSpec",
    "Profile",
    "Rule",
    "from_toml",
    "load",
    "names",
]

SEMANTICS = 3
"""Version of what formats, errors and specs mean; part of every fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Sites of some kinds whose name or role matches one of the globs, in some phases, and what they do.

    Attributes:
        kind: one of :data:`KINDS`, or several.
        sites: globs of names, or of their last parts, or of roles.
        phases: where the rule holds; all by default.
        spec: what the ops do. An empty one keeps them as torch makes them.

    Raises:
        UnknownNameError: a kind or phase that does not exist.
        ConfigError: the spec asks for what an op of that kind has not got; no kind, site or phase.
    """

    kind: str | tuple[str, ...]
    sites: tuple[str, ...] = ("*",)
    phases: tuple[str, ...] = PHASES
    spec: OpSpec = field(default_factory=OpSpec)

    def __post_init__(self) -> None:
        for what, names in (("kind", self.kinds), ("sites", self.sites), ("phases", self.phases)):
            if not names:
                raise ConfigError(f"a rule with no {what} matches nothing")
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of site", kind, KINDS)
            self.spec.check(kind, "rule")
        for phase in self.phases:
            if phase not in PHASES:
                raise unknown("phase", phase, PHASES)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    def matches(self, kind: str, site: str, role: str = "") -> bool:
        return kind in self.kinds and _matches(site, role, self.sites)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Ordered rules with a source.

    Attributes:
        name: what reports print.
        description: one line.
        source: where the choices come from, as a table of strings.
        exclude: globs of site names or roles that no rule reaches; they need not match anything.
        rules: the first that matches wins; each must match some site.

    Raises:
        ConfigError: a name, description or source that is no text, or no source.
    """

    name: str
    description: str
    source: Mapping[str, str]
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(f"profile {self.name!r}: a [source] table must say where the choices come from")
        texts = {"name": self.name, "description": self.description}
        for what, text in (texts | {f"source.{key}": value for key, value in self.source.items()}).items():
            if not isinstance(text, str):
                raise ConfigError(f"profile {self.name!r}: {what} must be a text, got {text!r}")

    def rule_for(self, kind: str, site: str, role: str = "", phase: str = "train") -> int | None:
        """Index of the rule that applies to a site in a phase, or None."""
        if self.excludes(site, role):
            return None
        found = (i for i, r in enumerate(self.rules) if phase in r.phases and r.matches(kind, site, role))
        return next(found, None)

    def excludes(self, site: str, role: str = "") -> bool:
        """Whether no rule reaches a site."""
        return _matches(site, role, self.exclude)

    @property
    def kinds(self) -> set[str]:
        """The kinds of op that some rule asks something of."""
        return {kind for r in self.rules if not r.spec.is_empty for kind in r.kinds}

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that changes a number: rules, exclusions and what their formats mean."""
        used = sorted({f for r in self.rules for f in r.spec.formats})
        content = {
            "semantics": SEMANTICS,
            "exclude": self.exclude,
            "rules": [{**plain(r), "kind": list(r.kinds)} for r in self.rules],
            "formats": {f: dataclasses.asdict(formats.get(f)) for f in used},
        }
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _matches(site: str, role: str, globs: tuple[str, ...]) -> bool:
    """A glob matches the role, the whole name or its last parts: ``lm_head`` matches ``model.lm_head``."""
    match = fnmatch.fnmatchcase
    return any(match(site, g) or match(site, f"*.{g}") or (role and match(role, g)) for g in globs)


def _texts(value: Any, what: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{where}: expected a list of {what}, got {value!r}")
    return tuple(value)


def _rule(table: dict[str, Any], where: str) -> Rule:
    """A rule from its table, in which the parts of the OpSpec stand beside ``kind``, ``sites`` and ``phases``."""
    check_keys(table, ["kind", "sites", "phases", *PARTS], where)
    spec = build(OpSpec, {k: v for k, v in table.items() if k in PARTS}, where)
    own = {k: v for k, v in table.items() if k not in PARTS}
    for key, what in (("sites", "globs"), ("phases", "phases")):
        if key in own:
            own[key] = _texts(own[key], what, f"{where}: {key}")
    if isinstance(own.get("kind"), list):
        own["kind"] = _texts(own["kind"], "kinds", f"{where}: kind")
    rule: Rule = build(Rule, {**own, "spec": spec}, where)
    return rule


def from_toml(text: str, where: str = "profile") -> Profile:
    """A profile from TOML text.

    Raises:
        ConfigError: not TOML, a key missing or unknown, no ``[source]``.
        UnknownNameError: a format, error model or kind that does not exist.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from error
    tables = table.pop("rule", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{where}: expected [[rule]] tables, got rule = {tables!r}")
    rules = [_rule(t, f"{where}: rule {i + 1}") for i, t in enumerate(tables)]
    if not isinstance(table.get("source"), dict) or not table["source"]:
        raise ConfigError(f"{where}: a [source] table must say where the choices come from")
    if "rules" in table:
        raise ConfigError(f"{where}: unknown key 'rules' (did you mean '[[rule]]'?)")
    exclude = _texts(table.get("exclude", []), "globs", f"{where}: exclude")
    profile: Profile = build(Profile, {**table, "exclude": exclude, "rules": tuple(rules)}, where)
    return profile


def names() -> list[str]:
    """The profiles that come with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def load(profile: str | Path | Profile) -> Profile:
    """A profile by name, by path to a TOML file, or as it is.

    Raises:
        UnknownNameError: no such profile; the message names the closest.
        ConfigError: the file is missing or not a valid profile.
    """
    if isinstance(profile, Profile):
        return profile
    path = Path(profile)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"profile {str(path)!r}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"profile {str(path)!r}: not UTF-8 text: {error}") from error
        return from_toml(text, str(path))
    if str(profile) not in names():
        raise unknown("profile", str(profile), names())
    text = (resources.files(__name__) / f"{profile}.toml").read_text()
    return from_toml(text, f"profile {profile}")
