"""The kernels on AArch64: built by a cross compiler, run by an emulator, equal to the numpy definitions bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from values import all_bf16, random_bits, same_bits

from aqnsim import formats
from aqnsim.backends import cpu
from aqnsim.backends import reference as slow
from aqnsim.backends.checks import shape_in_rows
from aqnsim.backends.fields import blocks_view, element_fields, needs_amax, scaling_fields
from aqnsim.errors import RelativeGaussian
from aqnsim.formats import element_of
from aqnsim.rng import coordinates, key_of

SOURCES = Path(__file__).parent.parent / "csrc" / "cpu"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++17", "-O3", "-static", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
KEY, STEP = key_of(0, "site", "output"), torch.tensor(5)
FORMATS = (
    "mxfp4",
    "mxfp8_e5m2(overflow=inf)",
    "mxint8",
    "mxfp6_e2m3(block=32x32)",
    "mxfp4(rounding=stochastic)",
    "nvfp4",
    "hif4",
    "fp8_e4m3",
    "hif8",
    "int4_g128",
    "fp8_e4m3_tensor",
    "bf16(rounding=stochastic)",
    "fp16",
)

Driver = Callable[..., Tensor]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        reason = f"no {' and no '.join(missing)}; Debian has them in g++-aarch64-linux-gnu and qemu-user"
        if "neon" in os.environ.get("AQNSIM_REQUIRE", "").split(","):
            pytest.fail(f"AQNSIM_REQUIRE asks for neon: {reason}")
        pytest.skip(reason)
    program = tmp_path_factory.mktemp("neon") / "driver"
    names = ("-DAQN_ISA=baseline", '-DAQN_ISA_NAME="baseline"')
    sources = (Path(__file__).with_name("neon_driver.cpp"), SOURCES / "kernels.cpp")
    subprocess.run([COMPILER, *FLAGS, *names, *map(str, sources), "-o", str(program)], check=True)

    def run(op: str, x: Tensor, *numbers: object) -> Tensor:
        pattern = x.contiguous().view(torch.uint8).numpy().tobytes()
        command = [EMULATOR, str(program), op, str(len(pattern)), *map(number, numbers)]
        out = subprocess.run(command, input=pattern, stdout=subprocess.PIPE, check=True).stdout
        return torch.frombuffer(bytearray(out), dtype=x.dtype).view(x.shape)

    return run


def number(value: Any) -> str:
    """An argument as the driver reads it: floats by their bits, all integers modulo 2^64."""
    pattern = np.float32(value).view(np.uint32) if isinstance(value, float) else value
    return str(int(pattern) % 2**64)


def arguments(x: Tensor, text: str, axis: int) -> list[object]:
    fmt = formats.get(text)
    element, scaling = element_fields(element_of(fmt)), scaling_fields(fmt)
    shape, row_major = blocks_view(fmt, tuple(x.shape), axis)
    draws = (shape_in_rows(x)[1], *coordinates(KEY, int(STEP))) if formats.random_bits(fmt) else (0, 0, 0)
    code = cpu._DTYPES[x.dtype]
    return [code, *shape, row_major, needs_amax(fmt), *draws, *element.values(), *scaling.values()]


def values() -> Tensor:
    """Normals over many binades, every finite bfloat16 in order, and bit patterns with NaN and Inf among them."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(1 << 15) * np.exp2(rng.integers(-40, 40, 1 << 10).repeat(32))
    bf16 = all_bf16()
    parts = spread, bf16[np.isfinite(bf16)][: 1 << 16], random_bits(1 << 15, seed=1)
    x = np.concatenate([np.asarray(p, np.float32) for p in parts])
    return torch.from_numpy(x[: x.size // 260 * 260].reshape(-1, 260))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", FORMATS)
def test_casts_on_aarch64(driver: Driver, text: str, dtype: torch.dtype) -> None:
    x = values().to(dtype)
    finite = torch.where(x.isfinite(), x, torch.ones((), dtype=dtype))
    for t, axis in ((finite[:, :256].contiguous(), 1), (x, 1), (x, 0)):
        if text == "fp8_e4m3_tensor" and t is x:
            continue  # one NaN is all that would be seen
        expected = slow.cast(t, text, axis, KEY, STEP, None, False)[0]
        assert same_bits(driver("cast", t, *arguments(t, text, axis)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_noise_on_aarch64(driver: Driver, dtype: torch.dtype) -> None:
    x = values().to(dtype)
    expected = slow.perturb(x, str(RelativeGaussian(0.05)), KEY, STEP, None, None, None, False)[0]
    got = driver("perturb", x, cpu._DTYPES[dtype], *x.shape, 0.05, *coordinates(KEY, int(STEP)))
    assert same_bits(got, expected)
