"""Formats as data: every code against two independent libraries, and the cost of importing them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import gfloat
import ml_dtypes
import numpy as np
import pytest
from gfloat.formats import (
    format_info_bfloat16,
    format_info_binary16,
    format_info_ocp_e2m1,
    format_info_ocp_e2m3,
    format_info_ocp_e3m2,
    format_info_ocp_e4m3,
    format_info_ocp_e5m2,
)

from aqnsim import ConfigError, UnknownNameError, formats
from aqnsim.formats import BlockFormat, Format

ORACLES = {
    "fp4_e2m1": (ml_dtypes.float4_e2m1fn, format_info_ocp_e2m1),
    "fp6_e2m3": (ml_dtypes.float6_e2m3fn, format_info_ocp_e2m3),
    "fp6_e3m2": (ml_dtypes.float6_e3m2fn, format_info_ocp_e3m2),
    "fp8_e4m3": (ml_dtypes.float8_e4m3fn, format_info_ocp_e4m3),
    "fp8_e5m2": (ml_dtypes.float8_e5m2, format_info_ocp_e5m2),
    "fp16": (np.float16, format_info_binary16),
    "bf16": (ml_dtypes.bfloat16, format_info_bfloat16),
}
ELEMENTS = [f for f in formats.ALL.values() if isinstance(f, Format)]
BLOCKS = [f for f in formats.ALL.values() if isinstance(f, BlockFormat)]


def bits(values: object) -> np.ndarray:
    """fp64 bit patterns with one NaN, so that -0 differs from 0 and NaN equals NaN."""
    a = np.asarray(values, np.float64)
    return np.where(np.isnan(a), np.uint64(0x7FF8 << 48), a.view(np.uint64))


def test_every_element_format_has_both_oracles() -> None:
    assert {f.name for f in ELEMENTS} == set(ORACLES)


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)
def test_every_code_decodes_as_ml_dtypes(fmt: Format) -> None:
    dtype = np.dtype(ORACLES[fmt.name][0])
    codes = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = codes.view(dtype).astype(np.float64)
    assert np.array_equal(bits([fmt.decode(int(c)) for c in codes]), bits(expected))


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)
def test_every_code_decodes_as_gfloat(fmt: Format) -> None:
    info = ORACLES[fmt.name][1]
    codes = np.arange(1 << fmt.bits)
    expected = gfloat.decode_ndarray(info, codes)
    assert np.array_equal(bits([fmt.decode(int(c)) for c in codes]), bits(expected))


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)
def test_properties_are_those_of_finfo(fmt: Format) -> None:
    info = ml_dtypes.finfo(ORACLES[fmt.name][0])
    assert fmt.bits == info.bits
    assert fmt.max == float(info.max)
    assert fmt.min_normal == float(info.smallest_normal)
    assert fmt.min_subnormal == float(info.smallest_subnormal)
    assert fmt.eps == float(info.eps)
    assert fmt.max_exponent == math.floor(math.log2(float(info.max)))
    assert fmt.has_inf == bool(np.isinf(np.float64(np.asarray(np.inf, ORACLES[fmt.name][0]))))


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)
def test_values_ascend_from_zero_to_max(fmt: Format) -> None:
    values = fmt.values()
    assert values[0] == 0.0
    assert values[1] == fmt.min_subnormal
    assert values[-1] == fmt.max
    assert all(a < b for a, b in itertools.pairwise(values))
    assert 1.0 + fmt.eps in values


def test_values_tables() -> None:
    assert formats.get("fp4_e2m1").values() == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert len(formats.get("fp6_e2m3").values()) == 32
    assert len(formats.get("fp6_e3m2").values()) == 32
    assert len(formats.get("fp8_e4m3").values()) == 127
    assert len(formats.get("fp8_e5m2").values()) == 124


def test_names_sources_and_sizes_of_all_formats() -> None:
    assert {"mxfp4", "mxfp8_e4m3", "nvfp4", "fp4_e2m1", "bf16"} <= set(formats.ALL)
    for name, fmt in formats.ALL.items():
        assert fmt.name == name
        assert fmt.source, f"{name} has no source"
        assert formats.get(name) is fmt
    assert {f.name: (f.block, f.bits) for f in BLOCKS} == {
        "mxfp4": (32, 4.25),
        "mxfp6_e2m3": (32, 6.25),
        "mxfp6_e3m2": (32, 6.25),
        "mxfp8_e4m3": (32, 8.25),
        "mxfp8_e5m2": (32, 8.25),
        "nvfp4": (16, 4.5),
    }


def test_all_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(TypeError):
        formats.ALL["mine"] = formats.get("bf16")  # type: ignore[index]


def test_unknown_format_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mxfp4'"):
        formats.get("mxfp5")
    with pytest.raises(UnknownNameError, match="did you mean 'fp8_e4m3'"):
        formats.get("fp8-e4m3")


@pytest.mark.parametrize("name", ["e1m2", "e9m2", "e4m11", "e4", "em", "e4m3x", "E4M3", ""])
def test_what_is_not_a_parametric_format_is_unknown(name: str) -> None:
    with pytest.raises(UnknownNameError, match="known: bf16"):
        formats.get(name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e3m4", ml_dtypes.float8_e3m4),
        ("e4m3", ml_dtypes.float8_e4m3),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e5m10", np.float16),
        ("e8m7", ml_dtypes.bfloat16),
    ],
)
def test_parametric_formats_are_ieee_like(name: str, dtype: type) -> None:
    fmt = formats.get(name)
    assert isinstance(fmt, Format)
    codes = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = codes.view(np.dtype(dtype)).astype(np.float64)
    assert np.array_equal(bits([fmt.decode(int(c)) for c in codes]), bits(expected))
    assert fmt.overflow == "inf"


def test_a_format_that_differs_from_the_registered_one_is_refused() -> None:
    other = dataclasses.replace(formats.get("fp4_e2m1"), max=4.0)
    with pytest.raises(ConfigError, match="'fp4_e2m1' differs from the registered"):
        formats.get(other)
    assert formats.get(formats.get("e3m4")).max == 15.5


def test_codes_outside_the_format_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"code 16 is out of range 0\.\.15"):
        formats.get("fp4_e2m1").decode(16)
    with pytest.raises(ConfigError, match="code -1"):
        formats.get("fp4_e2m1").decode(-1)


@pytest.mark.parametrize(
    "change",
    [
        {"exponent_bits": 0},
        {"exponent_bits": 9},
        {"mantissa_bits": -1},
        {"mantissa_bits": 11},
        {"max": 0.0},
        {"max": math.nan},
        {"max": math.inf},
        {"overflow": "wrap"},
    ],
)
def test_element_formats_are_validated(change: dict[str, object]) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=r"'mine'|wrap"):
        dataclasses.replace(formats.get("fp4_e2m1"), name="mine", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"block": 0},
        {"block": 257},
        {"scale": "e8m0-flor"},
        {"scale": "e4m3-two-level", "element": formats.get("fp8_e4m3")},
    ],
)
def test_block_formats_are_validated(change: dict[str, object]) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=r"'mine'|e8m0-flor"):
        dataclasses.replace(formats.get("mxfp4"), name="mine", **change)


def test_rounding_names() -> None:
    assert formats.check_rounding(None) == "nearest-even"
    with pytest.raises(UnknownNameError, match="did you mean 'nearest-even'"):
        formats.check_rounding("nearest-evn")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["formats", "errors", "profiles"])
def test_the_nouns_import_neither_torch_nor_numpy(module: str) -> None:
    loaded = run(f"import sys, aqnsim.{module}; print(*sorted(sys.modules))").split()
    assert f"aqnsim.{module}" in loaded
    assert not {"torch", "numpy"} & set(loaded)


def test_importing_the_package_does_not_import_torch() -> None:
    loaded = run("import sys, aqnsim; print(*sorted(sys.modules))").split()
    assert "torch" not in loaded


def test_the_package_adds_less_than_300_ms_to_torch() -> None:
    code = (
        "import time, torch; t = time.perf_counter(); import aqnsim; aqnsim.cast; aqnsim.emulate;"
        "print(time.perf_counter() - t)"
    )
    assert min(float(run(code)) for _ in range(2)) < 0.3
