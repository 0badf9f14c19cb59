"""The element formats against the conversion functions of NVIDIA's CUDA headers, built on the host."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import nvidia
import pytest
from oracles import HEADERS
from values import F32, all_bf16, all_fp16, bits, critical, random_bits

from aqnsim import formats, reference
from aqnsim.formats import Format, element_of

INCLUDE = Path(next(iter(nvidia.__path__))) / "cu13" / "include"


@dataclass(frozen=True)
class Conversion:
    """A function of the headers, by the text of ours that it must equal."""

    text: str
    function: str
    kind: int = 0
    saturate: int = 1


CONVERSIONS = [
    Conversion("fp8_e4m3", "fp8"),
    Conversion("fp8_e4m3(overflow=nan)", "fp8", saturate=0),
    Conversion("fp8_e5m2", "fp8", 1),
    Conversion("fp8_e5m2(overflow=inf)", "fp8", 1, saturate=0),
    Conversion("fp6_e2m3(nan=max)", "fp6"),
    Conversion("fp6_e3m2(nan=max)", "fp6", 1),
    Conversion("fp4_e2m1(nan=max)", "fp4"),
    Conversion("e8m0(rounding=up)", "e8m0", 1),
    Conversion("e8m0(rounding=toward-zero)", "e8m0", 0),
    Conversion("e8m0(rounding=up, overflow=nan)", "e8m0", 1, saturate=0),
]
every_conversion = pytest.mark.parametrize("conversion", CONVERSIONS, ids=lambda c: c.text)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("cuda") / "oracle.so"
    source = Path(__file__).with_name("cuda_oracle.cpp")
    headers = [f"-I{INCLUDE}", f"-I{INCLUDE / 'cccl'}"]
    subprocess.run(["c++", "-O2", "-shared", "-fPIC", *headers, source, "-o", built], check=True)
    return ctypes.CDLL(str(built))


def pointer(a: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def decoded(library: ctypes.CDLL, c: Conversion, codes: npt.NDArray[np.uint8]) -> F32:
    out = np.empty(len(codes), np.float32)
    library[f"decode_{c.function}"](pointer(out), pointer(codes), ctypes.c_int64(len(codes)), c.kind)
    return out


def encoded(library: ctypes.CDLL, c: Conversion, x: F32) -> npt.NDArray[np.uint8]:
    out = np.empty(len(x), np.uint8)
    x = np.ascontiguousarray(x)
    library[f"encode_{c.function}"](pointer(out), pointer(x), ctypes.c_int64(len(x)), c.kind, c.saturate)
    return out


def element(text: str) -> Format:
    return element_of(formats.get(text))


@every_conversion
def test_every_code_decodes_as_nvidia_s(library: ctypes.CDLL, conversion: Conversion) -> None:
    codes = np.arange(element(conversion.text).codes, dtype=np.uint8)
    ours = reference.decode(codes, element(conversion.text))
    assert np.array_equal(bits(ours), bits(decoded(library, conversion, codes)))


@every_conversion
def test_every_input_encodes_as_nvidia_s(library: ctypes.CDLL, conversion: Conversion) -> None:
    fmt = element(conversion.text)
    for x in (all_bf16(), all_fp16(), critical(fmt), random_bits(1_000_000, seed=7)):
        if conversion.function == "e8m0":  # no sign: theirs is dropped, ours makes negative values NaN
            x = x[~np.signbit(x)]
        ours = reference.round_to(x, fmt)
        theirs = decoded(library, conversion, encoded(library, conversion, x))
        assert np.array_equal(bits(ours), bits(theirs))


def test_what_the_registry_says_of_the_headers_is_what_is_compared() -> None:
    compared: dict[str, set[str]] = {}
    for c in CONVERSIONS:
        compared.setdefault(element(c.text).name, set()).add(element(c.text).rounding)
    assert compared == {name: set(roundings) for name, (_, roundings) in HEADERS.items()}
