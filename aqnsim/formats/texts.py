"""Texts of formats: ``name(field=value, ...)``, the form in which they travel through ops, profiles and files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from aqnsim._errors import ConfigError, unknown
from aqnsim.formats.block import AnyFormat, BlockFormat, element_of
from aqnsim.formats.element import Format, stochastic_bits
from aqnsim.formats.names import ALL, named

_SPELT = re.compile(r"\s*([\w.-]+)\s*(?:\(([^()]*)\))?\s*\Z")
_FIXED = ("name", "source", "unverified", "taper", "has_zero", "signed")
_OF_ELEMENT = ("rounding", "overflow", "subnormals", "nan")


def get(name: str | AnyFormat) -> AnyFormat:
    """The format of that name or text.

    A text is a name of :data:`ALL`, or ``e{E}m{M}`` (IEEE-like: bias ``2^(E-1) - 1``, an all-ones exponent for Inf and
    NaN, overflow to Inf), ``e{E}m{M}fn`` or ``e{E}m{M}fnuz``; after it, in brackets, fields with other values. Fields
    of a block format's element (rounding, overflow, subnormals, nan) are given as if they were the block format's.

    Raises:
        UnknownNameError: no such format or field; the message names the closest.
        ConfigError: a value that the field cannot have.

    >>> get("e3m4").max
    15.5
    >>> get("nvfp4(scale=torchao)").scale, get("mxfp4(block=16x16)").block
    ('torchao', (16, 16))
    """
    if isinstance(name, (Format, BlockFormat)):
        if get(str(name)) != name:
            raise ConfigError(
                f"format {name.name!r} differs from the registered format of that name in more than its text "
                f"{str(name)!r} can say; formats are passed between processes by text: add it to aqnsim.formats.ALL"
            )
        return name
    if not isinstance(name, str):
        raise ConfigError(f"expected a format or its name, got {name!r}")
    return _get(name)


@lru_cache(maxsize=4096)
def _get(text: str) -> AnyFormat:
    match = _SPELT.match(text)
    base = named(match[1]) if match else None
    if match is None or base is None:
        raise unknown("format", text, ALL)
    if match[2] is None:
        return base
    fields: dict[str, str] = {}
    for part in match[2].split(","):
        key, equals, value = (s.strip() for s in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"format {text!r}: expected field=value, got {part.strip()!r}")
        if key in fields:
            raise ConfigError(f"format {text!r}: field {key!r} is given twice")
        fields[key] = value
    return _override(base, {k: _parsed(base, k, v) for k, v in fields.items()})


def _fields(fmt: AnyFormat) -> dict[str, Any]:
    """Field by name as a text gives them: those of the element stand beside the block format's own."""
    own = {f.name: getattr(fmt, f.name) for f in dataclasses.fields(fmt) if f.name not in _FIXED}
    if isinstance(fmt, BlockFormat):
        own |= {k: getattr(fmt.element, k) for k in _OF_ELEMENT}
    return own


def _parsed(fmt: AnyFormat, field: str, text: str) -> Any:
    """A field's value from its text, by the type that the field has."""
    known = _fields(fmt)
    if field not in known:
        raise unknown(f"field of format {fmt.name!r}", field, known)
    try:
        if field == "element":
            return fmt.element if isinstance(fmt, BlockFormat) and text == fmt.element.name else get(text)
        if field == "block":
            if text in ("axis", "tensor"):
                return text
            sides = tuple(int(s) for s in text.split("x"))
            return sides[0] if len(sides) == 1 else sides
        if field in ("amax_to", "scale_max"):
            return float(text)
        if isinstance(known[field], bool):
            return {"true": True, "false": False}[text]
        return int(text) if isinstance(known[field], int) else text
    except (ValueError, KeyError) as error:
        raise ConfigError(f"format {fmt.name!r}: {field} cannot be {text!r}") from error


def _override(fmt: AnyFormat, values: Mapping[str, Any]) -> AnyFormat:
    if isinstance(fmt, Format):
        return dataclasses.replace(fmt, **values)
    element = values.get("element", fmt.element)
    if not isinstance(element, Format):
        raise ConfigError(f"format {fmt.name!r}: its element must be an element format, got {element}")
    inner = {k: v for k, v in values.items() if k in _OF_ELEMENT}
    if inner:
        element = dataclasses.replace(element, **inner)
    return dataclasses.replace(fmt, **{**{k: v for k, v in values.items() if k not in _OF_ELEMENT}, "element": element})


def text_of(fmt: AnyFormat) -> str:
    """The canonical text: the name and, in the order of the fields, what differs from the format of that name."""
    base = named(fmt.name)
    if base is None or type(base) is not type(fmt):
        raise ConfigError(f"format {fmt.name!r} is not registered; add it to aqnsim.formats.ALL, or derive it from one")
    usual = _fields(base)
    if isinstance(fmt, BlockFormat) and isinstance(base, BlockFormat) and fmt.element.name != base.element.name:
        usual |= {k: getattr(named(fmt.element.name), k) for k in _OF_ELEMENT}
    different = []
    for field, value in _fields(fmt).items():
        if field == "element":
            if value.name != usual["element"].name:
                different.append(f"element={value.name}")
        elif value != usual[field]:
            different.append(f"{field}={_spelt(value)}")
    return f"{fmt.name}({', '.join(different)})" if different else fmt.name


def _spelt(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def random_bits(fmt: AnyFormat) -> int:
    """How many random bits an element's rounding draws: 0 for a deterministic one.

    >>> random_bits(get("mxfp4")), random_bits(get("mxfp4(rounding=stochastic-8)"))
    (0, 8)
    """
    return stochastic_bits(element_of(fmt).rounding)


def with_rounding(fmt: AnyFormat, rounding: str | None) -> AnyFormat:
    """The format with another rounding of its elements; as it is where ``rounding`` is None."""
    return fmt if rounding is None else _override(fmt, {"rounding": rounding})
