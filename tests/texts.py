"""Format texts that tests share: every named format, and every choice that a format leaves open."""

from __future__ import annotations

from collections.abc import Iterator

from aqnsim import formats
from aqnsim.formats import ROUNDINGS, SCALE_RULES, BlockFormat, Format

ELEMENTS = [n for n, f in formats.ALL.items() if isinstance(f, Format)]
PARAMETRIC = ["e5m0", "e2m3", "e3m4", "e8m10", "e8m22", "e4m3fn", "e5m2fnuz"]
MX = ["mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "mxfp4(element=fp4_e1m2)"]


def _with(text: str, *fields: str) -> str:
    name, _, given = text.rstrip(")").partition("(")
    return str(formats.get(f"{name}({', '.join([*filter(None, [given]), *fields])})"))


def _element_choices(name: str) -> Iterator[str]:
    fmt = formats.get(name)
    assert isinstance(fmt, Format)
    for rounding in [*ROUNDINGS, "stochastic-8", "stochastic-1"]:
        if rounding != "hif8-hybrid" or fmt.taper:
            yield _with(name, f"rounding={rounding}")
    for overflow in ["saturate"] + ["inf"] * fmt.has_inf + ["nan"] * fmt.has_nan:
        for rounding in ("nearest-even", "nearest-away", "toward-zero", "up", "down"):
            yield _with(name, f"overflow={overflow}", f"rounding={rounding}")
    yield _with(name, "subnormals=flush")
    if not fmt.has_nan:
        yield from (_with(name, "nan=zero"), _with(name, "nan=max"))


def _block_choices() -> Iterator[str]:
    for name in MX:
        yield from (_with(name, f"scale={rule}") for rule in SCALE_RULES["e8m0"])
        for fields in (
            ("special=element",),
            ("special=element", "scale=mse"),
            ("zero_scale=one",),
            ("block=7",),
            ("block=32x32",),
            ("block=32x32", "scale=mse"),
            ("block=16x16", "scale=rceil"),
            ("rounding=stochastic",),
            ("rounding=nearest-away",),
            ("subnormals=flush",),
        ):
            yield _with(name, *fields)
    yield from (_with("nvfp4", f"scale={rule}") for rule in SCALE_RULES["fp8_e4m3"])
    for fields in (
        ("scale=4over6-mae", "scale_max=256"),
        ("scale=4over6-mse", "scale_max=256"),
        ("scale=4over6-mse", "block=16x16"),
        ("block=16x16",),
        ("rounding=stochastic",),
    ):
        yield _with("nvfp4", *fields)
    yield from (
        "hif4(rounding=stochastic-4)",
        "fp8_e4m3_1x128(scale=te)",
        "fp8_e4m3_1x128(scale=te-pow2)",
        "fp8_e4m3_128x128(scale=te)",
        "fp8_e4m3_token(scale=te)",
        "fp8_e4m3_tensor(scale=amax)",
        "int4_g128(amax_to=7.5)",
        "int4_g128(block=tensor, rounding=stochastic)",
        "int8_token(block=tensor)",
    )


def all_texts() -> list[str]:
    """Every named format and every derived one, each once, in its canonical spelling."""
    found = [*formats.ALL, *PARAMETRIC]
    for name in ELEMENTS:
        found += _element_choices(name)
    return list(dict.fromkeys(str(formats.get(t)) for t in [*found, *_block_choices()]))


def axes_of(text: str, dims: int) -> range:
    """The axes along which a format's blocks can run in a tensor of so many dimensions."""
    fmt = formats.get(text)
    if not isinstance(fmt, BlockFormat):
        return range(dims - 1, dims)
    tiled = fmt.tile is not None and fmt.tile[0] > 1
    return range(max(dims - 2, 0) if tiled else 0, dims)
