"""All about one format: what its fields mean, its range, every number or kind of number, a block worked through."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aqnsim.cli.output import Section, Table
from aqnsim.cli.tables import block_text, scale_text
from aqnsim.formats import AnyFormat, BlockFormat, Format, element_of, get, random_bits

EXAMPLE = (0.02, -0.11, 0.37, 0.5, -0.8, 1.3, -2.4, 5.1)
"""What the page of a block format works through."""

_RANGES = (
    "bits",
    "codes",
    "max",
    "min",
    "min_normal",
    "min_subnormal",
    "eps",
    "max_exponent",
    "min_exponent",
    "has_inf",
    "has_nan",
    "has_negative_zero",
    "is_integer",
)
_LINE = 32  # characters of a binade on the number line
_MOST_BINADES = 48  # that are printed one by one
_ALL_CODES = 8  # bits up to which every code is listed


def describe(fmt: AnyFormat) -> dict[str, Any]:
    """Everything about a format as plain data; numbers may be Inf and NaN."""
    data: dict[str, Any] = {
        "format": str(fmt),
        "name": fmt.name,
        "source": fmt.source,
        "unverified": fmt.unverified,
        "fields": [{"name": f, "value": _plain(getattr(fmt, f)), "meaning": m} for f, m in _meanings(fmt).items()],
    }
    if isinstance(fmt, BlockFormat):
        example = worked_example(fmt)
        return data | {
            "geometry": geometry(fmt),
            "scale": scale_text(fmt),
            "bits": fmt.bits,
            "example": dataclasses.asdict(example),
            "element": describe(fmt.element),
        }
    data["ranges"] = {name: getattr(fmt, name) for name in _RANGES}
    data["binades"] = [dataclasses.asdict(binade) for binade in binades(fmt)]
    if fmt.bits <= _ALL_CODES:
        return data | {"codes": [fmt.decode(code) for code in range(fmt.codes)]}
    return data | {"kinds": [dataclasses.asdict(kind) for kind in kinds(fmt)]}


def page(fmt: AnyFormat, what: str = "format") -> list[Section]:
    """The same for readers; a block format's page ends with that of its element."""
    head = [f"source: {fmt.source or '-'}"]
    if fmt.unverified:
        head.append(f"unverified: {fmt.unverified}")
    fields: Table = [("field", "value", "meaning")]
    fields += [(name, _spelt(getattr(fmt, name)), meaning) for name, meaning in _meanings(fmt).items()]
    sections = [Section(f"{what} {fmt}", "\n".join(head)), Section("fields", fields)]
    if isinstance(fmt, BlockFormat):
        return [*sections, *_block_sections(fmt), *page(fmt.element, "element")]
    return [*sections, _range_section(fmt), _line_section(fmt), _code_section(fmt)]


def number(value: float) -> str:
    """A value exactly: a short decimal, or a power of two with its factor.

    >>> number(448.0), number(2.0**-9), number(-1.5 * 2.0**-17)
    ('448', '2^-9', '-1.5*2^-17')
    """
    short = f"{value:.9g}"
    if not math.isfinite(value) or (float(short) == value and len(short) <= 10 and "e" not in short):
        return short
    fraction, exponent = math.frexp(value)
    factor = f"{2 * fraction:.17g}"
    power = f"2^{exponent - 1}"
    return {"1": power, "-1": f"-{power}"}.get(factor, f"{factor}*{power}")


# ---- fields and ranges ----------------------------------------------------------------------------------------------


def _meanings(fmt: AnyFormat) -> dict[str, str]:
    """What each field means, by the docstring of its class."""
    text = (inspect.getdoc(type(fmt)) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    known = {name: _without_markup(" ".join(meaning.split())) for name, meaning in entries}
    return {f.name: known.get(f.name, "") for f in dataclasses.fields(fmt)}


def _without_markup(text: str) -> str:
    return re.sub(r":\w+:`([^`]*)`|\*(\w+)\*|``", r"\1\2", text)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Format) else value


def _spelt(value: Any) -> str:
    if value in ((), ""):
        return "-"
    if isinstance(value, tuple):  # a tile, or a taper
        return " ".join(map(str, value)) if isinstance(value[0], tuple) else "x".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return number(value) if isinstance(value, float) else str(value)


def _range_section(fmt: Format) -> Section:
    rows: Table = [("range", "value", "meaning")]
    for name in _RANGES:
        value = getattr(fmt, name)
        meaning = (getattr(type(fmt), name).__doc__ or "").splitlines()[:1]
        rows.append((name, _both(value), _without_markup("".join(meaning))))
    return Section("ranges", rows)


def _both(value: Any) -> str:
    """A number's exact spelling, and its decimal one where that is another."""
    exact = _spelt(value)
    return f"{exact} = {value:.6g}" if "^" in exact else exact


# ---- the number line ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binade:
    """The numbers from ``2^exponent`` up to, and without, the next power of two.

    Attributes:
        exponent: of the first number.
        mantissa_bits: log2 of the evenly spaced places between the two powers of two.
        values: how many of the places have a number: fewer where codes are Inf or NaN.
        subnormal: whether the numbers lie below the smallest normal one.
    """

    exponent: int
    mantissa_bits: int
    values: int
    subnormal: bool

    def value(self, index: int) -> float:
        """The binade's number of an index from 0."""
        return math.ldexp((1 << self.mantissa_bits) + index, self.exponent - self.mantissa_bits)


def binades(fmt: Format) -> list[Binade]:
    """The positive numbers of a format, binade by binade, ascending."""
    lowest = math.frexp(fmt.min_subnormal)[1] - 1
    return [_binade(fmt, exponent) for exponent in range(lowest, fmt.max_exponent + 1)]


def _binade(fmt: Format, exponent: int) -> Binade:
    if fmt.taper:
        width = next(bits for limit, bits in fmt.taper if abs(exponent) <= limit)
    else:
        width = fmt.mantissa_bits - max(0, fmt.min_exponent - exponent)
    up_to_max = int(math.ldexp(fmt.max - 2.0**exponent, width - exponent)) + 1
    subnormal = not fmt.is_integer and 2.0**exponent < fmt.min_normal
    return Binade(exponent, width, min(1 << width, up_to_max), subnormal)


def _line_section(fmt: Format) -> Section:
    title = "number line: positive numbers, one binade a line"
    if fmt.subnormals == "flush":
        title += "; no cast gives those below min_normal"
    rows: Table = [("binade", "mantissa bits", "values", "line", "numbers")]
    every = binades(fmt)
    if len(every) <= _MOST_BINADES:
        return Section(title, rows + [_line_row(b) for b in every])
    for _, same in itertools.groupby(every, key=lambda b: (b.mantissa_bits, b.values, b.subnormal)):
        run = list(same)
        rows += [_line_row(b) for b in (run if len(run) <= 5 else run[:2])]
        if len(run) > 5:
            rows.append(
                ("...", str(run[0].mantissa_bits), str(run[0].values), f"{len(run) - 4} binades like these", "")
            )
            rows += [_line_row(b) for b in run[-2:]]
    return Section(title, rows)


def _line_row(binade: Binade) -> tuple[str, ...]:
    places = [int(_LINE * math.log2(1 + i / 2**binade.mantissa_bits)) for i in range(min(binade.values, 4 * _LINE))]
    if binade.values > 4 * _LINE:
        places = list(range(_LINE))
    line = "".join("|" if i in places else "." for i in range(_LINE))
    indices = range(binade.values) if binade.values <= 8 else (0, 1, binade.values - 1)
    shown = [number(binade.value(i)) for i in indices]
    if binade.values > 8:
        shown.insert(2, "...")
    width = f"{binade.mantissa_bits}{' subnormal' if binade.subnormal else ''}"
    return (f"2^{binade.exponent}", width, str(binade.values), line, " ".join(shown))


# ---- codes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Consecutive codes of one kind.

    Attributes:
        kind: such as ``subnormal`` or ``negative Inf``.
        codes: how many.
        first, last: the codes.
        values: of the first three codes and the last, or of all if they are at most four.
    """

    kind: str
    codes: int
    first: int
    last: int
    values: tuple[float, ...]


def kinds(fmt: Format) -> list[Kind]:
    """All codes of a format that is not tapered, in runs of one kind."""
    starts = sorted({start for start in _possible_starts(fmt) if start < fmt.codes})
    found = []
    for _, run in itertools.groupby(itertools.pairwise([*starts, fmt.codes]), key=lambda r: _kind_of(fmt, r[0])):
        parts = list(run)
        first, last = parts[0][0], parts[-1][1] - 1
        shown = range(first, last + 1) if last - first < 4 else (*range(first, first + 3), last)
        values = tuple(fmt.decode(code) for code in shown)
        found.append(Kind(_kind_of(fmt, first), last - first + 1, first, last, values))
    return found


def _possible_starts(fmt: Format) -> Iterator[int]:
    """Codes at which a kind can begin: zero, the first above it, the first normal one, the exponent of all ones."""
    magnitudes = 1 << (fmt.bits - fmt.signed)
    for sign in range(1 + fmt.signed):
        for start in (0, 1, 1 << fmt.mantissa_bits, magnitudes - (1 << fmt.mantissa_bits), magnitudes - 1):
            yield sign * magnitudes + start
            yield sign * magnitudes + start + 1


def _kind_of(fmt: Format, code: int) -> str:
    value = fmt.decode(code)
    if math.isnan(value):
        return "NaN"
    if fmt.is_integer and value < fmt.min:
        return "unused"
    sign = "negative " if math.copysign(1.0, value) < 0 else ""
    if math.isinf(value):
        return f"{sign}Inf"
    if value == 0:
        return f"{sign}zero"
    if fmt.is_integer:
        return f"{sign}integer"
    return f"{sign}{'subnormal' if abs(value) < fmt.min_normal else 'normal'}"


def _code_section(fmt: Format) -> Section:
    digits = -(-fmt.bits // 4)
    if fmt.bits <= _ALL_CODES:
        columns = min(8, fmt.codes)
        rows: Table = [("code", *(f"+{i}" for i in range(columns)))]
        for first in range(0, fmt.codes, columns):
            rows.append((f"0x{first:0{digits}x}", *(number(fmt.decode(first + i)) for i in range(columns))))
        return Section(f"codes: the values of all {fmt.codes}", rows)
    rows = [("kind", "codes", "first", "last", "values")]
    for kind in kinds(fmt):
        values = [number(value) for value in kind.values]
        if kind.codes > len(values):
            values.insert(3, "...")
        row = (kind.kind, str(kind.codes), f"0x{kind.first:0{digits}x}", f"0x{kind.last:0{digits}x}", " ".join(values))
        rows.append(row)
    return Section(f"codes: {fmt.codes}, by kind", rows)


# ---- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One block, worked through; four lists of the same length.

    Attributes:
        inputs: what is cast.
        scaled: the inputs brought to the element format's range by the scale.
        elements: what those round to.
        outputs: what the elements stand for.
        scale: the block's scale, as text.
    """

    inputs: list[float]
    scaled: list[float]
    elements: list[float]
    outputs: list[float]
    scale: str


def worked_example(fmt: BlockFormat) -> Example:
    """:data:`EXAMPLE` as one block, by the definition of the format."""
    import numpy as np  # here, so that element formats need no numpy

    from aqnsim import reference

    x = np.array(EXAMPLE, np.float32)
    words = reference.random_words(np.arange(1), len(x), key=0, word=0)[0] if random_bits(fmt) else None
    blocks = reference.blocks_of(x, fmt, words=words)
    inputs, scaled, elements, outputs = (
        part.astype(np.float64).tolist() for part in (x, blocks.scaled, blocks.elements, blocks.values)
    )
    return Example(inputs, scaled, elements, outputs, _scale_of(fmt, blocks))


def _scale_of(fmt: BlockFormat, blocks: Any) -> str:
    """The scale of the first block, and the tensor's."""
    scale = blocks.scales.reshape(-1)[0]
    if fmt.scale_format == "hif4":
        levels = int(scale) & 0xFFFFFFFF
        wide = element_of(get("fp8_ue6m2")).decode(levels & 0xFF)
        return f"{number(wide)}, doubled for eights 0b{levels >> 8 & 0xFF:08b} and fours 0b{levels >> 16:016b}"
    if fmt.scale_format == "fp8_e4m3":
        return f"{number(float(scale))}, of the tensor {float(blocks.tensor_scale):.6g}"
    return f"{float(scale):.6g}" if fmt.scale_format == "fp32" else number(float(scale))


def geometry(fmt: BlockFormat) -> str:
    """Which values share a scale, in words."""
    if fmt.block == "tensor":
        return "all values of a tensor share a scale"
    if fmt.block == "axis":
        return "all values along the axis share a scale"
    if isinstance(fmt.block, tuple):
        return f"tiles of {fmt.block[1]} values along the axis and {fmt.block[0]} along the other share a scale"
    return f"{fmt.block} values along the axis share a scale; the last block may be shorter"


def _block_sections(fmt: BlockFormat) -> list[Section]:
    block: Table = [
        ("block", "value", "meaning"),
        ("geometry", block_text(fmt), geometry(fmt)),
        ("scale", scale_text(fmt), "the scale's format, and the rule that gives a block its scale"),
        ("bits", f"{fmt.bits:g}", "storage a value, the block's scale included"),
    ]
    example = worked_example(fmt)
    columns = zip(example.inputs, example.scaled, example.elements, example.outputs, strict=True)
    rows: Table = [("in", "scaled", "element", "out")]
    rows += [(f"{x:.6g}", f"{scaled:.6g}", number(element), f"{out:.6g}") for x, scaled, element, out in columns]
    return [Section("block", block), Section(f"a block of {len(EXAMPLE)} values, scale {example.scale}", rows)]
