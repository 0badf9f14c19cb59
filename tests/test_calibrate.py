"""Calibration: planted errors are found again, with their size; what does not fit is said; profiles come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import aqnsim
from aqnsim import ConfigError, accumulator
from aqnsim.calibrate import Calibration, Sample, calibrate, measure, read, to_profile, write
from aqnsim.calibrate.fitting import rounds_to
from aqnsim.cli import main

SHAPES = [(96, 64, 96), (96, 1024, 96)]


def missing(error: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A product in fp64 that misses by `error` of the exact result and of |A| @ |B|, then is rounded."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        exact, absdot = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        return error(exact, absdot).to(a.dtype)

    return product


def normal(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(like.numel()))


def found(product: Callable[[Tensor, Tensor], Tensor], dtype: str = "bfloat16") -> Calibration:
    (calibration,) = calibrate(measure(dtypes=[dtype], shapes=SHAPES, product=product))
    return calibration


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("reference", ["output", "absdot"])
@pytest.mark.parametrize("sigma", [1e-4, 0.05])
def test_a_planted_error_is_found_with_its_size_and_reference(dtype: str, reference: str, sigma: float) -> None:
    """Also far below what the dtype can hold: half an ulp of bf16 is 2e-3 to 4e-3."""

    def error(exact: Tensor, absdot: Tensor) -> Tensor:
        return exact + sigma * normal(exact) * (exact.abs() if reference == "output" else absdot)

    c = found(missing(error), dtype)
    assert c.fit.reference == reference
    assert c.fit.sigma == pytest.approx(sigma, rel=0.05)
    assert c.fit.is_good
    assert all(f.sigma == pytest.approx(sigma, rel=0.1) for f in c.by_k)
    assert c.warnings == ()
    assert c.units == ()


def test_no_error_is_no_error() -> None:
    c = found(missing(lambda exact, absdot: exact))
    assert c.fit.error is None
    assert all(e.rounded_right == 1 for e in c.errors.values())
    assert to_profile(c, "exact", {"measured": "here"}).rules[0].spec.forward.error is None


MISFITS = {
    "one sigma does not serve every K": lambda y, m: y + 1e-3 * normal(y) * m * (1 + 9 * (m > 300)),
    "add a spike": lambda y, m: y + m * torch.where(normal(y) > 3, 0.5, 1e-3 * normal(y.t()).t()),
    "add systematic-bias(gain=0.0": lambda y, m: y + y.abs() * (0.02 + 0.05 * normal(y)),
    "were stored as 0": lambda y, m: torch.where(y.abs() < 0.5, 0.0, y),
    "are not normal": lambda y, m: y + y.abs() * 0.05 * normal(y) ** 3,
}


@pytest.mark.parametrize("warning", MISFITS)
def test_what_one_normal_law_cannot_say_is_a_warning(warning: str) -> None:
    assert any(warning in w for w in found(missing(MISFITS[warning])).warnings)


def test_a_matrix_unit_is_recognised_by_its_bits() -> None:
    gemm = aqnsim.backends.get("cpu").ops["gemm"]
    c = found(lambda a, b: gemm(a.float(), b.float(), "hopper_fp8").to(a.dtype))
    assert "hopper_fp8" in c.units
    assert "ieee_fp32" not in c.units
    forward = to_profile(c, "unit", {"measured": "here"}).rules[0].spec.forward
    assert accumulator.get(forward.accumulator) == accumulator.get("hopper_fp8")
    assert forward.error is None


def test_the_profile_misses_as_the_device_did() -> None:
    """Emulated, the fitted profile changes as many values, and as far, as the device that it was fitted to."""

    def error(exact: Tensor, absdot: Tensor) -> Tensor:
        return exact + 2e-4 * normal(exact) * absdot

    c = found(missing(error))
    layer = torch.nn.Linear(1024, 96, bias=False)
    x = torch.randn(96, 1024).bfloat16().float()
    layer.weight.data = torch.randn(96, 1024).bfloat16().float()
    with aqnsim.emulate(layer, to_profile(c, "device", {"measured": "here"})) as emu:
        y = layer(x)
        assert emu.receipts()[-2].requested == c.fit.error
    emulated = calibrate(
        [Sample("emulated", x.bfloat16(), layer.weight.detach().t().bfloat16(), y.detach().bfloat16())]
    )
    assert emulated[0].fit.sigma == pytest.approx(2e-4, rel=0.1)
    assert emulated[0].errors[1024].rmse == pytest.approx(c.errors[1024].rmse, rel=0.05)
    assert emulated[0].errors[1024].rounded_right == pytest.approx(c.errors[1024].rounded_right, rel=0.1)


def test_intervals_hold_what_rounds_to_a_value_and_no_more() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = torch.cat([torch.randn(500), torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])]).to(dtype)
        low, high = (torch.from_numpy(end) for end in rounds_to(y))
        assert bool((low < y.double()).all() & (y.double() < high).all())
        inside, step = (low + high) / 2, (high - low) * 1e-3
        for at, same in ((low + step, True), (high - step, True), (inside, True), (low - step, False)):
            assert bool(((at.to(dtype) == y) == same).all())


def test_dumps_come_back_and_bad_ones_are_named(tmp_path: Path) -> None:
    samples = measure(shapes=[(4, 8, 4)], dtypes=("bfloat16", "float32"))
    write(samples, tmp_path / "dump.safetensors")
    again = read(tmp_path / "dump.safetensors")
    assert {s.name for s in again} == {s.name for s in samples}
    assert all(torch.equal(s.y, next(t.y for t in again if t.name == s.name)) for s in samples)
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"expected a \[M, K\], b \[K, N\] and y \[M, N\], got \[4, 8\]"):
        Sample("x", samples[0].a, samples[0].b, samples[0].y[:2])
    with pytest.raises(ConfigError, match="NaN or infinite"):
        Sample("x", samples[0].a, samples[0].b, samples[0].y / 0)
    with pytest.raises(ConfigError, match="expected one of bfloat16"):
        measure(dtypes=["int8"])
    with pytest.raises(ConfigError, match="no products"):
        calibrate([])


def test_the_command_measures_fits_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump, toml, data, plot = (tmp_path / n for n in ("d.safetensors", "device.toml", "found.json", "fit.png"))
    measured = ["calibrate", "--k", "64", "--k", "256", "--save", str(dump), "--out", str(toml)]
    assert main([*measured, "--json", str(data), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16: relative-gaussian" in printed or "bfloat16: no error" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    (fitted,) = json.loads(data.read_text())
    profile = aqnsim.profiles.load(toml)
    assert "device cpu, seed 0" in profile.source["measured"]
    assert profile.rules[0].spec.forward.output == "bf16"
    assert profile.rules[0].spec.forward.error == (None if fitted["units"] else fitted["error"])
    assert main(["calibrate", "--from", str(dump)]) == 0
    assert capsys.readouterr().out == printed.removesuffix(f"{toml}\n")
    assert main(["calibrate", "--dtype", "bfloat16", "--dtype", "float16", "--k", "64", "--out", str(toml)]) == 2
    assert "one profile of one dtype" in capsys.readouterr().err
