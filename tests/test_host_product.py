"""The host's product: its error, what its bits depend on, and the kernel that misses in the same pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from values import same_bits

from aqnsim import ConfigError, _core
from aqnsim.accumulator import HOST
from aqnsim.backends import compose, cpu, host
from aqnsim.rng import clock

CLOCK = torch.tensor(clock(5, "train"))
COMPOSED = compose.missed_product(cpu.gemm, cpu.perturb)
ERRORS = [
    "relative-gaussian(sigma=0.05)",
    "relative-gaussian(sigma=0.05, reference=absdot)",
    "absolute-gaussian(sigma=0.5)",
    "spike(rate=0.1, size=3)",
    "systematic-bias(gain=0.1) + bit-flip(rate=0.1)",
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """The same matrix, row after row, column after column, and as a part of a wider one."""
    wide = torch.cat([x, x], -1)
    return [x, x.mT.contiguous().mT, wide[..., : x.shape[-1]]]


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 300), k=st.integers(0, 1100), n=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_product_is_within_the_bound_of_any_order_of_fp32_sums(m: int, k: int, n: int, seed: int) -> None:
    a, b = normal(m, k, seed=seed), normal(k, n, seed=seed + 100)
    y, exact = host.gemm(a, b), a.double() @ b.double()
    assert y.dtype == torch.float32
    assert bool(((y - exact).abs() <= k * 2**-24 * (a.double().abs() @ b.double().abs())).all())


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (13, 33, 17), (253, 515, 259), (12, 1024, 32)])
def test_the_layout_of_its_operands_changes_no_bit(m: int, k: int, n: int) -> None:
    a, b = normal(2, m, k), normal(2, k, n, seed=1)
    results = [host.gemm(x, y) for x in layouts(a) for y in layouts(b)]
    assert all(same_bits(y, results[0]) for y in results[1:])


@pytest.mark.skipif(not _core.has_product(), reason="torch's fp32 product chooses its order by shape")
def test_an_element_depends_on_its_row_and_its_column_alone() -> None:
    a, b = normal(3, 300, 700), normal(3, 700, 290, seed=1)
    y = host.gemm(a, b)
    assert same_bits(host.gemm(a[1:2, 37:101], b[1:2, :, 5:200]), y[1:2, 37:101, 5:200])
    assert same_bits(host.gemm(a[2, 299:], b[2, :, 289:]), y[2, 299:, 289:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same_bits(host.gemm(a, b), y)
    finally:
        torch.set_num_threads(threads)


def test_infinities_and_nans_reach_the_elements_of_their_row_or_column() -> None:
    a, b = normal(14, 35), normal(35, 20, seed=1).abs()
    a[3, 34], b[7, 5] = torch.inf, torch.nan
    y = host.gemm(a, b)
    assert bool(y[:, 5].isnan().all())
    assert bool((y[3, :5] == torch.inf).all())
    assert bool(y[:3, :5].isfinite().all())


def test_subnormal_operands_count_as_zeros_where_the_instruction_runs() -> None:
    a, b = torch.full((1, 2), 2.0**-130).bfloat16(), torch.ones(2, 1).bfloat16()
    assert host.gemm(a, b).item() == (0 if _core.has_product() else 2.0**-129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 3, 1), (7, 40, 150), (300, 70, 600)])
def test_a_fused_product_is_the_composition(dtype: torch.dtype, error: str, m: int, k: int, n: int) -> None:
    a, b, bias = normal(m, k), normal(k, n, seed=1), normal(n, seed=2)
    rows = torch.arange(m) * 7 + 3
    pairs = torch.stack([rows, rows % 5 + 1000], 1)
    for shift, is_missed in ((None, False), (bias, False), (bias, True)):
        for ids in (None, rows, pairs):
            args = (a, b, HOST, shift, is_missed, error, 12345, CLOCK, ids, dtype, True)
            (y, stats), (expected, measured) = cpu.missed(*args), COMPOSED(*args)
            assert same_bits(y, expected)
            torch.testing.assert_close(stats, measured, rtol=1e-6, atol=0)
            assert same_bits(cpu.missed(*args[:-1], False)[0], expected)


def test_a_batch_has_the_rows_of_its_matrices_one_after_the_other() -> None:
    a, b = normal(2, 3, 20, 40), normal(2, 3, 40, 30, seed=1)
    args = (HOST, None, False, ERRORS[0], 7, CLOCK, torch.arange(120), torch.bfloat16, True)
    assert same_bits(cpu.missed(a, b, *args)[0], COMPOSED(a, b, *args)[0])


def test_what_is_measured_does_not_depend_on_threads() -> None:
    args = (normal(600, 64), normal(64, 700, seed=1), HOST, normal(700, seed=2), False, ERRORS[0], 7, CLOCK, None)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cpu.missed(*args, torch.bfloat16, True))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(y, found[0][0]) and torch.equal(stats, found[0][1]) for y, stats in found)


def test_without_the_instruction_it_is_the_product_of_torch_in_fp32() -> None:
    code = (
        "import torch; from aqnsim.backends import host; from test_host_product import normal;"
        "a, b = normal(30, 70), normal(70, 50, seed=1);"
        "print(host.unit(), torch.equal(host.gemm(a, b), a.float() @ b.float()))"
    )
    env = os.environ | {"AQNSIM_ISA": "baseline", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["torch", "fp32", "True"], done.stderr


@pytest.mark.skipif(not _core.has_product(), reason="torch refuses them in its own words")
def test_shapes_that_do_not_fit_are_refused() -> None:
    a = normal(4, 8)
    with pytest.raises(ConfigError, match=r"product: expected .* got \[4, 8\], \[4, 8\] and None"):
        host.gemm(a, a)
    with pytest.raises(ConfigError, match=r"got \[4, 8\], \[8, 4\] and \[8\]"):
        host.product(a, a.t(), torch.float32, torch.ones(8))
