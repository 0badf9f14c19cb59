"""Where the tables of an experiment come from: TOML files, what they extend, presets, overrides."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from aqnsim._errors import ConfigError, UnknownNameError, did_you_mean, unknown

EXPERIMENTS = Path(__file__).parent / "experiments"
PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "embedded"

PRESET_TABLES = ("model", "task", "algorithm")
"""What a preset may say: on which model, on which task, at which scale. Never what is asked."""

DESCRIPTIVE = ("id", "preset", "question", "published")
"""What describes an experiment without deciding anything that its run computes."""

LORA_METHOD: Literal["lora"] = "lora"
"""What a table of adapters means that names no method."""

KIND_KEYS = {"aqn": "schedule", "lora": "method", "task": "name"}
"""The tables whose keys depend on the value of one of them."""

VARIANTS = ("grpo", "full")
"""Tables of a preset that hold other values for GRPO, and for training all weights."""

Tables = dict[str, Any]


def names(folder: Path = EXPERIMENTS) -> list[str]:
    """Names of the experiments (or of the presets) of this package, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def identifier(name: str) -> str:
    """The id of an experiment or preset that is given by its name or by a path."""
    return PurePath(name).name.removesuffix(".toml")


def find(folder: Path, name: str, beside: Path | None = None) -> Path:
    """The file of a name in `folder`, or of a path that ends in .toml, relative to `beside`.

    Raises:
        UnknownNameError: there is none.
    """
    if name.endswith(".toml"):
        path = (beside or Path()) / name
        if not path.is_file():
            raise UnknownNameError(f"no such file: {name}")
        return path.resolve()
    if name not in names(folder):
        raise unknown(folder.name.removesuffix("s"), name, names(folder))
    return folder / f"{name}.toml"


def _read(path: Path) -> Tables:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}") from error


def over_preset(tables: Tables, path: Path) -> Tables:
    """The tables of an experiment under those of a preset, with the preset's variants that apply to it.

    Raises:
        ConfigError: the preset has other tables than a preset may have, or is not valid TOML.
    """
    preset = _read(path)
    variants = {name: preset.pop(name, {}) for name in VARIANTS}
    for part in (preset, *variants.values()):
        if foreign := part.keys() - set(PRESET_TABLES):
            raise ConfigError(
                f"preset {path.stem!r}: it may only have the tables {', '.join(PRESET_TABLES)} (and, within "
                f"{' and '.join(VARIANTS)}, the same), not {', '.join(sorted(foreign))}"
            )
    merged = merge(tables, preset)
    applies = {
        "grpo": merged.get("algorithm", {}).get("name") == "grpo",
        "full": merged.get("lora", {}).get("method", LORA_METHOD) == "none",
    }
    for name in VARIANTS:
        merged = merge(merged, variants[name]) if applies[name] else merged
    return merged


def inherit(path: Path, children: tuple[Path, ...] = ()) -> Tables:
    """The tables of an experiment over those of its parents; each asks a question of its own.

    Raises:
        ConfigError: the parents go round in a circle, or a file is not valid.
    """
    if path in children:
        cycle = " -> ".join(child.stem for child in (*children, path))
        raise ConfigError(f"extends goes round in a circle: {cycle}")
    tables = _read(path)
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    if not isinstance(parent, str):
        raise ConfigError(f"experiment {path.stem!r}: extends names one parent, not {parent!r}")
    inherited = inherit(find(EXPERIMENTS, parent, path.parent), (*children, path))
    kept = {name: table for name, table in inherited.items() if name not in DESCRIPTIVE}
    return merge(kept, tables)


def merge(base: Tables, over: Tables) -> Tables:
    """Deep merge; a table of another kind than before starts afresh, as its keys belong to that."""
    merged = dict(base)
    for name, table in over.items():
        old = base.get(name)
        if isinstance(old, dict) and isinstance(table, dict) and _same_kind(name, old, table):
            table = _deep_merge(old, table)
        merged[name] = table
    return merged


def _same_kind(name: str, old: Tables, new: Tables) -> bool:
    key = KIND_KEYS.get(name)
    return key not in new or new[key] == old.get(key, LORA_METHOD if key == "method" else None)


def _deep_merge(base: Tables, over: Tables) -> Tables:
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        merged[key] = _deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_overrides(overrides: Sequence[str], settable: Sequence[str]) -> Tables:
    """The tables of `table.key=value` overrides; only those that are `settable` may be named.

    Raises:
        ConfigError: an override is malformed, or its table is unknown.
    """
    tables: Tables = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        table, *path = key.strip().split(".")
        if not equals or not path or not all(path):
            raise ConfigError(f"--set {override}: expected table.key=value")
        if table not in settable:
            raise ConfigError(
                f"--set {override}: unknown table {table!r}{did_you_mean(table, settable)}; "
                f"known: {', '.join(settable)}"
            )
        # Not by merge: the order of overrides is no matter, that of a schedule's keys either.
        node = tables.setdefault(table, {})
        for name in path[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {override}: {name!r} was set to a value before")
        node[path[-1]] = _parse_value(override, text)
    return tables


def _parse_value(override: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"--set {override}: {text!r} is not a TOML value; a string needs its quotes, as in "
            "--set 'profile.name=\"ideal\"'"
        ) from error
    if len(parsed) != 1:
        raise ConfigError(f"--set {override!r}: one value at a time")
    return parsed["value"]
