"""How a result leaves an op in one pass: equal to perturb, cast and a conversion one after the other."""

from __future__ import annotations

import pytest
import torch
from test_cpu import KEY, LONGER, RELATIVE, STEP, every_dtype, every_text, normal_tensor, perturbed, some_rows
from torch import Tensor
from values import random_bits, same_bits

from aqnsim.backends import cpu
from aqnsim.backends import reference as slow
from aqnsim.backends.compose import finished
from aqnsim.receipts import STATS

KEYS = (KEY, KEY + 1)
COMPOSED = finished(cpu.cast, cpu.perturb)
SUMS = [STATS.index(name) for name in ("error2", "reference2", "injected2")]
every_out = pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=["to fp32", "to bf16"])


def assert_same_finish(
    x: Tensor, error: str, output: str, dtype: torch.dtype, rows: Tensor | None = None, sums: bool = True
) -> Tensor:
    arguments = (x, error, output, dtype, KEYS, STEP, rows)
    (got, got_stats), (expected, expected_stats) = (run(*arguments, True) for run in (cpu.finish, COMPOSED))
    assert same_bits(got, expected)
    a, b = got_stats.clone(), expected_stats.clone()
    assert not sums or torch.allclose(a[:, SUMS], b[:, SUMS], rtol=1e-6, atol=0)
    a[:, SUMS] = b[:, SUMS] = 0
    assert torch.equal(a, b)
    quiet, zeros = cpu.finish(*arguments, False)
    assert same_bits(quiet, got)
    assert not zeros.any()
    return got


@every_text
@every_dtype
@every_out
def test_finish_is_perturb_and_cast(text: str, dtype: torch.dtype, out: torch.dtype) -> None:
    for shape in ((3, 5, 64), (7, 131), (2, 300), (70,)):
        x = normal_tensor(*shape, seed=1).to(dtype)
        assert_same_finish(x, "", text, out)
        rows = some_rows(x.numel() // x.shape[-1], pairs=True)
        assert_same_finish(x, RELATIVE, text, out, rows)
        assert_same_finish(x[..., 1:], RELATIVE, text, out, rows)


@pytest.mark.parametrize("text", ["mxfp4", "hif4", "fp8_e4m3", "int8_token", "mxfp4(block=48)", "nvfp4"])
@pytest.mark.parametrize("columns", [4096, 4097, 8192 + 32, 9000])
def test_rows_that_are_longer_than_a_chunk(text: str, columns: int) -> None:
    assert_same_finish(normal_tensor(5, columns, seed=2), RELATIVE, text, torch.bfloat16)


@every_dtype
@every_out
def test_finish_of_any_bits(dtype: torch.dtype, out: torch.dtype) -> None:
    x = torch.from_numpy(random_bits(1 << 15, seed=3).copy()).view(-1, 256).to(dtype)
    for text in ("mxfp4", "fp8_e5m2", "bf16", "hif8"):
        assert_same_finish(x, RELATIVE, text, out, sums=False)


@pytest.mark.parametrize("error", ["", *[text for text in LONGER if "absdot" not in text]])
@pytest.mark.parametrize(
    "output", ["", "mxfp4", "mxfp4(rounding=stochastic)", "mxfp4 + bit-flip(rate=0.1, target=codes)"]
)
@every_dtype
def test_chains_and_faults_take_their_way(error: str, output: str, dtype: torch.dtype) -> None:
    x = normal_tensor(20, 96, seed=4).to(dtype)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        assert_same_finish(x, error if out != torch.float16 or "bit-flip" not in error else "", output, out)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5)])
def test_finish_of_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    assert assert_same_finish(torch.full(shape, 1.3), RELATIVE, "mxfp4", torch.bfloat16).shape == shape


def test_finish_does_not_depend_on_threads() -> None:
    x = normal_tensor(300, 700, seed=5)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(cpu.finish(x, RELATIVE, "mxfp4", torch.bfloat16, KEYS, STEP, None, True))
    torch.set_num_threads(before)
    (a, a_stats), (b, b_stats) = results
    assert same_bits(a, b)
    assert torch.equal(a_stats, b_stats)


# ---- what perturb measures on whole tiles --------------------------------------------------------------------------


@every_dtype
@every_out
@pytest.mark.parametrize("scale", [1e-44, 1e-37, 1e-30, 1e-20, 1e-15, 1e-10, 1.0, 1e15, 1e18, 1e20, 1e36])
def test_a_relative_error_is_measured_at_any_size(scale: float, dtype: torch.dtype, out: torch.dtype) -> None:
    y = (normal_tensor(6, 256, seed=6) * scale).to(dtype)
    y[0], y[1, 5], y[2, 7], y[3, :128], y[4, 200] = 0, torch.inf, torch.nan, -0.0, 3e38
    for rows in (y, y[5:], y[:1]):
        (got, got_stats), (expected, expected_stats) = (
            perturbed(backend, rows, RELATIVE, dtype=out) for backend in (cpu, slow)
        )
        assert same_bits(got, expected)
        assert torch.allclose(got_stats, expected_stats, rtol=2e-6, atol=0)


def test_an_error_that_vanishes_is_measured_as_none() -> None:
    y = normal_tensor(4, 512, seed=7).bfloat16()
    for sigma in (0.0, 1e-9):
        out, stats = perturbed(cpu, y, f"relative-gaussian(sigma={sigma})")
        s = dict(zip(STATS, stats.tolist(), strict=True))
        assert same_bits(out, y)
        assert (s["changed"], s["error2"], s["injected_n"]) == (0, 0, y.numel())
        assert s["reference2"] == pytest.approx(float(y.double().square().sum()), rel=1e-6)
