"""The named formats, each with its source."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from aqnsim.formats.block import AnyFormat, Block, BlockFormat
from aqnsim.formats.element import Format, Specials

_OCP_FP8 = "OCP 8-bit Floating Point Specification (OFP8) v1.0"
_OCP_MX = "OCP Microscaling Formats (MX) Specification v1.0"
_IEEE = "IEEE 754-2019"
_FNUZ = "Noune et al., 8-bit Numerical Formats for Deep Neural Networks (arXiv 2206.02915)"
_HIF8 = "Luo et al., Ascend HiFloat8 Format for Deep Learning (arXiv 2409.16626)"
_HIF4 = "HiFloat4 (arXiv 2602.11287), order of operations of the Ascend model compression toolkit (amct)"
_TE = "NVIDIA TransformerEngine"
_HF32_DOUBT = "vendor sources give 10 or 11 mantissa bits and four roundings; not compared with silicon"


def ieee_like(name: str, exponent_bits: int, mantissa_bits: int, specials: Specials = "ieee") -> Format:
    """The format that ``e{E}m{M}`` names, or ``e{E}m{M}fn`` and ``e{E}m{M}fnuz`` with fewer special codes."""
    bias = 2 ** (exponent_bits - 1) - (0 if specials == "fnuz" else 1)
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        specials=specials,
        overflow="inf" if specials == "ieee" else "saturate",
        source={"ieee": _IEEE, "fn": _OCP_FP8, "fnuz": _FNUZ, "none": ""}[specials],
    )


def _integer(name: str, bits: int, symmetric: bool, step_exponent: int, source: str) -> Format:
    return Format(
        name=name,
        exponent_bits=0,
        mantissa_bits=bits - 1,
        bias=2 - bits - step_exponent,
        specials="none",
        symmetric=symmetric,
        source=source,
    )


def _element_formats() -> list[Format]:
    def fp(name: str, e: int, m: int, bias: int, specials: Specials, source: str, **other: Any) -> Format:
        return Format(name=name, exponent_bits=e, mantissa_bits=m, bias=bias, specials=specials, source=source, **other)

    return [
        fp("fp4_e2m1", 2, 1, 1, "none", _OCP_MX),
        fp("fp4_e1m2", 1, 2, 1, "none", _HIF4 + ": S1P2"),
        fp("fp6_e2m3", 2, 3, 1, "none", _OCP_MX),
        fp("fp6_e3m2", 3, 2, 3, "none", _OCP_MX),
        fp("fp8_e4m3", 4, 3, 7, "fn", _OCP_FP8),
        fp("fp8_e5m2", 5, 2, 15, "ieee", _OCP_FP8),
        fp("fp8_e4m3fnuz", 4, 3, 8, "fnuz", _FNUZ),
        fp("fp8_e5m2fnuz", 5, 2, 16, "fnuz", _FNUZ),
        fp("fp8_e3m4", 3, 4, 3, "ieee", _IEEE),
        fp("fp8_e4m3_ieee", 4, 3, 7, "ieee", _IEEE),
        fp("fp8_ue5m3", 5, 3, 15, "fn", "AMD Quark and Intel auto-round: unsigned scale format", signed=False),
        fp("fp8_ue6m2", 6, 2, 48, "fn", _HIF4 + ": block scale", signed=False, has_zero=False),
        fp("e8m0", 8, 0, 127, "fn", _OCP_MX, signed=False, has_zero=False),
        Format(
            name="hif8",
            exponent_bits=5,
            mantissa_bits=3,
            bias=16,
            taper=((3, 3), (7, 2), (15, 1), (22, 0)),
            rounding="nearest-away",
            overflow="inf",
            source=_HIF8,
        ),
        fp("bf16", 8, 7, 127, "ieee", "upper half of IEEE 754 binary32", overflow="inf"),
        fp("fp16", 5, 10, 15, "ieee", _IEEE, overflow="inf"),
        fp("tf32", 8, 10, 127, "ieee", "PTX ISA, cvt.rna.tf32.f32", rounding="nearest-away", overflow="inf"),
        fp("hf32", 8, 11, 127, "ieee", "CANN ATC, --allow_hf32", overflow="inf", unverified=_HF32_DOUBT),
        _integer("int2", 2, False, 0, "two's complement"),
        _integer("int4", 4, False, 0, "two's complement"),
        _integer("int8", 8, False, 0, "two's complement"),
        _integer("mxint8_element", 8, True, -6, _OCP_MX + ", section 5.3.4"),
    ]


def _block_formats(elements: Mapping[str, Format]) -> list[BlockFormat]:
    def mx(name: str, element: str) -> BlockFormat:
        return BlockFormat(
            name=name, element=elements[element], block=32, scale_format="e8m0", scale="floor", source=_OCP_MX
        )

    def scaled(name: str, element: str, block: Block, source: str, scale: str = "amax") -> BlockFormat:
        return BlockFormat(
            name=name, element=elements[element], block=block, scale_format="fp32", scale=scale, source=source
        )

    deepseek = "DeepSeek-V3 (arXiv 2412.19437), section 3.3"
    integer = "symmetric absmax"
    return [
        mx("mxfp4", "fp4_e2m1"),
        mx("mxfp6_e2m3", "fp6_e2m3"),
        mx("mxfp6_e3m2", "fp6_e3m2"),
        mx("mxfp8_e4m3", "fp8_e4m3"),
        mx("mxfp8_e5m2", "fp8_e5m2"),
        mx("mxint8", "mxint8_element"),
        BlockFormat(
            name="nvfp4",
            element=elements["fp4_e2m1"],
            block=16,
            scale_format="fp8_e4m3",
            scale="te",
            source=_TE + ", NVFP4 recipe (core_nvfp4.cuh)",
        ),
        BlockFormat(
            name="hif4",
            element=dataclasses.replace(elements["fp4_e1m2"], rounding="nearest-away"),
            block=64,
            scale_format="hif4",
            scale="hif4",
            source=_HIF4,
            unverified="one public reference; not compared with silicon",
        ),
        scaled("fp8_e4m3_tensor", "fp8_e4m3", "tensor", _TE + ", current scaling", "te"),
        scaled("fp8_e5m2_tensor", "fp8_e5m2", "tensor", _TE + ", current scaling", "te"),
        scaled("fp8_e4m3_token", "fp8_e4m3", "axis", "one scale a token: absmax over its channels"),
        scaled("fp8_e4m3_channel", "fp8_e4m3", "axis", "one scale an output channel: absmax over its inputs"),
        scaled("fp8_e4m3_1x128", "fp8_e4m3", 128, deepseek),
        scaled("fp8_e4m3_128x128", "fp8_e4m3", (128, 128), deepseek),
        scaled("int4_g128", "int4", 128, integer),
        scaled("int8_channel", "int8", "axis", integer),
        scaled("int8_token", "int8", "axis", integer),
    ]


def _build() -> dict[str, AnyFormat]:
    elements = {f.name: f for f in _element_formats()}
    return {**elements, **{f.name: f for f in _block_formats(elements)}}


ALL: MappingProxyType[str, AnyFormat] = MappingProxyType(_build())
"""Every named format."""

_PARAMETRIC = re.compile(r"e([1-8])m(0|[1-9][0-9]?)(fn|fnuz)?\Z")


def named(name: str) -> AnyFormat | None:
    """The format of a plain name: one of :data:`ALL`, or a parametric one; None where there is neither."""
    if name in ALL:
        return ALL[name]
    match = _PARAMETRIC.match(name)
    if not match:
        return None
    e, m, suffix = int(match[1]), int(match[2]), match[3]
    widest = 22 if suffix is None else 10
    if not (e >= 2 and m <= widest) or (suffix is not None and m == 0):
        return None
    specials: Specials = "fn" if suffix == "fn" else "fnuz" if suffix == "fnuz" else "ieee"
    return ieee_like(name, e, m, specials)
