"""The Triton kernels compiled for GPUs that are not there: what is in the machine code, and what is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from triton_kernels import Compiled, compiled

from aqnsim.backends import get
from aqnsim.backends.triton import cast, gemm, perturb
from aqnsim.profiles import Forward, OpSpec

MODULES = [cast, perturb, gemm]
KEY, STEP = -0x123456789ABCDEF, torch.tensor(5)
NOISE = "relative-gaussian(sigma=0.05)"
APPROXIMATIONS = ("ex2.", "lg2.", "sin.", "cos.", "rsqrt.approx", "sqrt.approx", "rcp.approx")
every_gpu = pytest.mark.parametrize("arch", [80, 90, 100])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton-cache"))


def casts(
    arch: int, text: str, dtype: torch.dtype, folder: Path, axis: int = -1, measure: bool = False
) -> list[Compiled]:
    x = torch.empty(512, 1024, dtype=dtype)
    return compiled(arch, MODULES, lambda: cast.cast(x, text, axis, KEY, STEP, None, measure), folder)


def perturbs(arch: int, error: str, dtype: torch.dtype, folder: Path, measure: bool = False) -> list[Compiled]:
    y, rows = torch.empty(512, 1024, dtype=dtype), torch.arange(512)
    return compiled(arch, MODULES, lambda: perturb.perturb(y, error, KEY, STEP, rows, None, None, measure), folder)


def assert_exact(kernel: Compiled) -> None:
    """No contraction, no flushed subnormals, no fp64, no approximated function, nothing spilt to memory."""
    code = re.sub(r"//.*", "", kernel.ptx)
    assert "fma.rn" not in code
    assert ".ftz" not in code
    assert not re.search(r"\.f64\b", code)
    assert not [a for a in APPROXIMATIONS if a in code]
    assert re.search(r"STACK:0 .*LOCAL:0", kernel.usage), kernel.usage


def assert_wide(kernel: Compiled, loads: str = "ld.global.v4") -> None:
    """Elements come and go 128 bits at a time."""
    assert loads in kernel.ptx
    assert "st.global.v4" in kernel.ptx


@every_gpu
@every_dtype
@pytest.mark.parametrize(
    "text", ["mxfp4", "nvfp4", "hif8", "fp8_e4m3", "fp8_e4m3_token", "mxfp8_e4m3(rounding=stochastic)"]
)
def test_casts_are_exact_and_wide(arch: int, dtype: torch.dtype, text: str, tmp_path: Path) -> None:
    kernels = casts(arch, text, dtype, tmp_path)
    for kernel in kernels:
        assert_exact(kernel)
    assert [k.name for k in kernels][-1] == "cast_kernel"
    assert_wide(kernels[-1])


@pytest.mark.parametrize(
    "text",
    ["mxfp4(scale=mse)", "nvfp4(scale=4over6-mse)", "nvfp4(scale=modelopt)", "hif4", "fp8_e4m3_128x128", "int4_g128"],
)
def test_casts_of_other_rules_are_exact(text: str, tmp_path: Path) -> None:
    for kernel in casts(90, text, torch.float32, tmp_path):
        assert_exact(kernel)


@every_dtype
@pytest.mark.parametrize("text", ["mxfp4", "mxfp8_e4m3(block=32x32)"])
def test_casts_across_rows_are_wide(dtype: torch.dtype, text: str, tmp_path: Path) -> None:
    (kernel,) = casts(90, text, dtype, tmp_path, axis=0)
    assert_exact(kernel)
    assert_wide(kernel)


@every_gpu
@every_dtype
@pytest.mark.parametrize("error", [NOISE, "spike(rate=0.01, size=100)", f"{NOISE} + saturation(limit=448)"])
def test_errors_are_exact_and_wide(arch: int, dtype: torch.dtype, error: str, tmp_path: Path) -> None:
    (kernel,) = perturbs(arch, error, dtype, tmp_path)
    assert_exact(kernel)
    assert_wide(kernel)


@every_dtype
def test_what_is_measured_is_exact_too(dtype: torch.dtype, tmp_path: Path) -> None:
    (kernel,) = casts(90, "mxfp4", dtype, tmp_path, measure=True)
    assert_exact(kernel)
    assert_wide(kernel)


@every_dtype
def test_kernels_stay_as_short_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    (cast_kernel,), (noise_kernel,) = casts(90, "mxfp4", dtype, tmp_path), perturbs(90, NOISE, dtype, tmp_path)
    assert cast_kernel.per_element() < 32
    assert noise_kernel.per_element() < 72


def test_contraction_is_what_the_option_turns_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aqnsim.backends.triton import launch

    monkeypatch.setitem(launch.OPTIONS, "enable_fp_fusion", True)
    (kernel,) = perturbs(90, NOISE, torch.float32, tmp_path)
    assert "fma.rn" in kernel.ptx


def test_numbers_of_an_error_do_not_compile_it_anew(tmp_path: Path) -> None:
    kernels = perturbs(90, NOISE, torch.float32, tmp_path) + perturbs(
        90, "relative-gaussian(sigma=0.25)", torch.float32, tmp_path
    )
    assert len({k.ptx for k in kernels}) == 1


@pytest.mark.parametrize("arch", [80, 90])
def test_a_linear_layer_compiles_to_one_kernel(arch: int, tmp_path: Path) -> None:
    spec = OpSpec(forward=Forward(input="mxfp4", error=NOISE)).text
    x, w = torch.empty(256, 256, dtype=torch.bfloat16), torch.empty(256, 256, dtype=torch.bfloat16)
    linear = get("triton").ops["linear"]
    (kernel,) = compiled(
        arch, MODULES, lambda: linear(x, w, None, spec, True, [KEY] * 12, STEP, torch.arange(256)), tmp_path
    )
    assert "mma" in kernel.ptx
    assert "fma.rn" not in kernel.ptx
    assert ".ftz" not in kernel.ptx
