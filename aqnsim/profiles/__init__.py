"""Profiles: which op of a model runs in which formats and with which errors. The standard library only.

A profile is TOML with a source. Its rules are ordered; the first that matches a site gives the site its
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
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from aqnsim import errors, formats
from aqnsim._errors import ConfigError, did_you_mean, unknown

SEMANTICS = 2
"""Version of what formats and errors mean; part of every fingerprint."""

KINDS = ("linear",)
"""Kinds of site that a rule can match."""


def _canonical_format(name: str | None, where: str) -> str | None:
    """One text for one format, so that two spellings of it have the same fingerprint."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise ConfigError(f"{where}: expected the name of a format, got {name!r}")
    fmt = formats.get(name)
    if formats.random_bits(fmt):
        raise ConfigError(f"{where}: {name!r} rounds stochastically, which an emulated op has no random bits for yet")
    return str(fmt)


def _canonical_error(text: str | None, where: str) -> str | None:
    """One text for one error model, so that ``5e-2`` and ``0.05`` have the same fingerprint."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected an error model's text, got {text!r}")
    return str(errors.parse(text))


@dataclass(frozen=True, kw_only=True)
class Forward:
    """``y = cast(x) @ cast(W)^T``, then the error in fp32, then the bias, then the output dtype.

    Blocks run along the contraction; ``None`` leaves an operand or the result as torch makes it.
    """

    input: str | None = None
    weight: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", _canonical_format(self.input, "forward.input"))
        object.__setattr__(self, "weight", _canonical_format(self.weight, "forward.weight"))
        object.__setattr__(self, "error", _canonical_error(self.error, "forward.error"))


@dataclass(frozen=True, kw_only=True)
class Backward:
    """One gradient GEMM, on the forward's cast operands (straight-through), then the error in fp32."""

    error: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "error", _canonical_error(self.error, "backward error"))


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What one op does, forward and for each gradient on its own."""

    forward: Forward = Forward()
    grad_input: Backward = Backward()
    grad_weight: Backward = Backward()

    @property
    def text(self) -> str:
        """Canonical JSON: what ops take as an argument."""
        return json.dumps(_plain(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> OpSpec:
        """The spec of a canonical text."""
        spec: OpSpec = _build(OpSpec, json.loads(text), "spec")
        return spec

    @property
    def has_error(self) -> bool:
        """Whether any of the three GEMMs misses."""
        return any(p.error for p in (self.forward, self.grad_input, self.grad_weight))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Sites of one kind whose name matches one of the globs, and what they do."""

    kind: str
    sites: tuple[str, ...] = ("*",)
    spec: OpSpec = OpSpec()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of site", self.kind, KINDS)

    def matches(self, kind: str, site: str) -> bool:
        return kind == self.kind and _matches(site, self.sites)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Ordered rules with a source.

    Attributes:
        name: what reports print.
        description: one line.
        source: where the choices come from, as a table of strings.
        exclude: globs of site names that no rule reaches; they need not match anything.
        rules: the first that matches wins; each must match some site.
    """

    name: str
    description: str
    source: Mapping[str, str]
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = field(default=())

    def rule_for(self, kind: str, site: str) -> int | None:
        """Index of the rule that applies to a site, or None."""
        if _matches(site, self.exclude):
            return None
        return next((i for i, r in enumerate(self.rules) if r.matches(kind, site)), None)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that changes a number: rules, exclusions and what their formats mean."""
        used = sorted({f for r in self.rules for f in (r.spec.forward.input, r.spec.forward.weight) if f})
        content = {
            "semantics": SEMANTICS,
            "exclude": self.exclude,
            "rules": [_plain(r) for r in self.rules],
            "formats": {f: dataclasses.asdict(formats.get(f)) for f in used},
        }
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _matches(site: str, globs: tuple[str, ...]) -> bool:
    """A glob matches the whole name or its last parts: ``lm_head`` matches ``model.lm_head``."""
    return any(fnmatch.fnmatchcase(site, g) or fnmatch.fnmatchcase(site, f"*.{g}") for g in globs)


def _plain(value: Any) -> Any:
    """Dataclasses as dicts without their empty fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, _plain(getattr(value, f.name))) for f in dataclasses.fields(value))
        return {k: v for k, v in items if v not in (None, {})}
    return list(value) if isinstance(value, tuple) else value


_NESTED = {"forward": Forward, "grad_input": Backward, "grad_weight": Backward}


def _build(cls: type[Any], table: Any, where: str) -> Any:
    """A dataclass from a table, unknown keys rejected."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, got {table!r}")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")
    nested = {k: _build(c, table[k], f"{where}.{k}") for k, c in _NESTED.items() if k in table}
    try:
        return cls(**{**table, **nested})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _globs(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{where}: expected a list of globs, got {value!r}")
    return tuple(value)


def _rule(table: dict[str, Any], where: str) -> Rule:
    """A rule from its table, in which the parts of the OpSpec stand beside ``kind`` and ``sites``."""
    known = ["kind", "sites", *_NESTED]
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")
    spec = _build(OpSpec, {k: v for k, v in table.items() if k in _NESTED}, where)
    own = {k: v for k, v in table.items() if k not in _NESTED}
    if "sites" in own:
        own["sites"] = _globs(own["sites"], f"{where}: sites")
    rule: Rule = _build(Rule, {**own, "spec": spec}, where)
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
    exclude = _globs(table.get("exclude", []), f"{where}: exclude")
    profile: Profile = _build(Profile, {**table, "exclude": exclude, "rules": tuple(rules)}, where)
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
