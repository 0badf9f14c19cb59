"""The CUDA kernels, run by threads that the host plays, equal the C++ kernels bit for bit.

They are the kernels that a GPU runs, compiled by another compiler: this proves their arithmetic, their indices and
their reductions. tests/test_cpu.py holds the C++ kernels to the numpy definitions for the same inputs.
"""

from __future__ import annotations

import re

import cuda_host
import numpy as np
import pytest
import torch
from chains import all_chains
from test_cpu import KEY, NAMES, STEP, TEXTS, assert_same_stats, normal_tensor
from texts import axes_of
from torch import Tensor
from values import all_bf16, all_fp16, bits, critical, random_bits, same_bits

from aqnsim import BackendError, ConfigError, accumulator, backends, errors, formats
from aqnsim.backends import cpu, cuda, fields
from aqnsim.backends import reference as slow
from aqnsim.backends.cuda import Kernels, kernels
from aqnsim.formats import BlockFormat, element_of
from aqnsim.formats import random_bits as draws
from aqnsim.rng import clock

every_text = pytest.mark.parametrize("text", TEXTS)
every_format = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> cuda_host.Host:
    return cuda_host.Host(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def host(built: cuda_host.Host) -> Kernels:
    return Kernels(built)


def assert_same_cast(host: Kernels, x: Tensor, text: str, axis: int = -1, rows: Tensor | None = None) -> None:
    expected, expected_stats = cpu.cast(x, text, axis, KEY, STEP, rows, True)
    got, stats = host.cast(x, text, axis, KEY, STEP, rows, True)
    assert same_bits(got, expected)
    assert_same_stats(stats, expected_stats, sums=False)
    quiet, zeros = host.cast(x, text, axis, KEY, STEP, rows, False)
    assert same_bits(quiet, expected)
    assert not zeros.any()


# ---- cast -----------------------------------------------------------------------------------------------------------


@every_text
def test_cast_of_every_bf16_and_fp16_value(host: Kernels, text: str) -> None:
    bf16 = torch.from_numpy(all_bf16().copy())
    shuffled = bf16[torch.from_numpy(np.random.default_rng(1).permutation(1 << 16))]
    assert_same_cast(host, bf16[bf16.isfinite()], text)
    assert_same_cast(host, torch.from_numpy(all_fp16().copy()), text)
    assert_same_cast(host, shuffled.bfloat16().view(64, 1024), text)


@every_text
def test_cast_of_critical_values_and_random_bits(host: Kernels, text: str) -> None:
    element = element_of(formats.get(text))
    x = torch.from_numpy(random_bits(1 << 14, seed=2) if element.bits > 16 else critical(element)[: 1 << 14])
    x = x[x.isfinite()]
    # each value in a block of its own, beside one that fixes the block's scale
    assert_same_cast(host, torch.stack([x, torch.full_like(x, float(element.max))], dim=1), text)
    assert_same_cast(host, torch.from_numpy(random_bits(1 << 14, seed=3).copy()).view(-1, 64), text)


@every_text
@pytest.mark.parametrize("shape", [(5, 7, 37), (64,), (3, 256), (129, 70)], ids=str)
def test_cast_along_any_axis(host: Kernels, text: str, shape: tuple[int, ...]) -> None:
    x = normal_tensor(*shape, seed=3)
    for axis in axes_of(text, len(shape)):
        for t in (x, x.bfloat16()):
            assert_same_cast(host, t, text, axis)


@every_text
def test_blocks_of_every_magnitude(host: Kernels, text: str) -> None:
    exponents = np.linspace(-148, 126, 138).round()[:, None]
    x = (np.random.default_rng(20).standard_normal((138, 64)) * np.exp2(exponents)).astype(np.float32)
    x[7], x[9], x[11, 5], x[13, 40], x[15, 3] = 0.0, -0.0, np.inf, np.nan, -np.inf
    for axis in axes_of(text, 2):
        assert_same_cast(host, torch.from_numpy(x), text, axis)
        assert_same_cast(host, torch.from_numpy(x[20:]), text, axis)  # none that hides a whole tensor


@every_text
def test_quantize_gives_the_same_parts(host: Kernels, text: str) -> None:
    x = normal_tensor(35, 3, 48, seed=6)
    for axis in axes_of(text, 3):
        parts = host.elements(x, text, axis, KEY, STEP, None), cpu.elements(x, text, axis, KEY, STEP, None)
        for got, expected in zip(*parts, strict=True):
            assert torch.equal(got, expected) if got.dtype == torch.int32 else same_bits(got, expected)


@every_format
def test_cast_equals_the_definition(host: Kernels, name: str) -> None:
    x = normal_tensor(40, 96, seed=7) * 3
    x[3, 5], x[4, 6] = torch.inf, torch.nan
    for axis in axes_of(name, 2):
        for t in (x, x.bfloat16(), x.half()):
            got, stats = host.cast(t, name, axis, KEY, STEP, None, True)
            expected, expected_stats = slow.cast(t, name, axis, KEY, STEP, None, True)
            assert same_bits(got, expected)
            assert_same_stats(stats, expected_stats)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,)], ids=str)
def test_cast_of_empty_and_scalar_tensors(host: Kernels, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1.3, dtype=dtype)
    assert_same_cast(host, x, name)
    for got, expected in zip(
        host.elements(x, name, -1, 0, STEP, None), slow.elements(x, name, -1, 0, STEP, None), strict=True
    ):
        assert torch.equal(got, expected)


@every_format
def test_cast_of_other_strides_and_of_odd_addresses(host: Kernels, name: str) -> None:
    base, other = normal_tensor(64, 97, seed=5), normal_tensor(64 * 97 + 1, seed=6).bfloat16()
    for x in (base.t(), base[::2, 1::3], base.flatten()[1:6145], base.flatten()[3:4099].view(64, 64)):
        for t in (x, other[1 : x.numel() + 1].view(x.shape)):
            assert_same_cast(host, t, name)


@pytest.mark.parametrize("text", [t for t in TEXTS if draws(formats.get(t))])
def test_stochastic_rounding_of_logical_rows(host: Kernels, text: str) -> None:
    x, rng = normal_tensor(30, 64, seed=8), np.random.default_rng(9)
    ids = torch.from_numpy(rng.integers(0, 1 << 63, 30))
    pairs = torch.stack([ids, torch.from_numpy(rng.integers(0, 1 << 33, 30))], dim=1)
    for rows in (ids, pairs):
        for axis in axes_of(text, 2):
            assert_same_cast(host, x, text, axis, rows)
            assert_same_cast(host, x[:, :37], text, axis, rows)


@every_format
def test_cast_and_what_it_reports_do_not_depend_on_the_grid(built: cuda_host.Host, host: Kernels, name: str) -> None:
    x = normal_tensor(64, 640, seed=4)
    for axis in axes_of(name, 2):
        whole, stats = host.cast(x, name, axis, KEY, STEP, None, True)
        again = host.cast(x, name, axis, KEY, STEP, None, True)[1]
        assert torch.equal(stats, again)
        assert_same_stats(stats, cpu.cast(x, name, axis, KEY, STEP, None, True)[1])
        for blocks in (1, 3, 500):
            assert same_bits(Kernels(built.with_blocks(blocks)).cast(x, name, axis, KEY, STEP, None, False)[0], whole)


# ---- perturb --------------------------------------------------------------------------------------------------------


def perturb(
    k: Kernels | object, y: Tensor, chain: str, rows: Tensor | None, dtype: torch.dtype | None, at: int
) -> tuple[Tensor, Tensor]:
    magnitude = y.float().abs() * 2 + 1 if "absdot" in chain else None
    return k.perturb(y, chain, KEY, torch.tensor(at), rows, magnitude, dtype, True)  # type: ignore[union-attr]


def assert_same_perturbation(
    host: Kernels,
    y: Tensor,
    chain: str,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    at: int = clock(5, "train", 3),
) -> None:
    if dtype == torch.bfloat16 and re.search(r"bit=(1[6-9]|2|3)", chain):
        return
    got, stats = perturb(host, y, chain, rows, dtype, at)
    expected, expected_stats = perturb(cpu, y, chain, rows, dtype, at)
    assert same_bits(got, expected)
    assert_same_stats(stats, expected_stats)


@pytest.mark.parametrize("chain", all_chains())
def test_every_chain_of_errors(host: Kernels, chain: str) -> None:
    y, rng = normal_tensor(37, 72, seed=11), np.random.default_rng(12)
    y[3, 5], y[4, 6], y[5] = torch.inf, torch.nan, 0.0
    ids = torch.from_numpy(rng.integers(0, 1 << 63, 37))
    pairs = torch.stack([ids, torch.from_numpy(rng.integers(0, 1 << 33, 37))], dim=1)
    for rows in (None, ids, pairs):
        for columns in (72, 64, 37, 1):
            for dtype in (torch.float32, torch.bfloat16):
                for out in (torch.float32, torch.bfloat16):
                    assert_same_perturbation(host, y[:, :columns].to(dtype), chain, rows, out)


@pytest.mark.parametrize("chain", [c for c in all_chains() if "bit-flip" not in c])
def test_every_chain_of_errors_of_every_bf16_value(host: Kernels, chain: str) -> None:
    y = torch.from_numpy(all_bf16().copy()).view(256, 256)
    got, _ = perturb(host, y.bfloat16(), chain, None, None, 9)
    assert same_bits(got, perturb(cpu, y.bfloat16(), chain, None, None, 9)[0])


@pytest.mark.parametrize("chain", ["relative-gaussian(sigma=0.05)", "spike(rate=0.1, size=3.0)"])
def test_perturbation_equals_the_definition(host: Kernels, chain: str) -> None:
    y = normal_tensor(30, 64, seed=13)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got, stats = perturb(host, y.to(dtype), chain, None, None, 9)
        expected, expected_stats = perturb(slow, y.to(dtype), chain, None, None, 9)
        assert same_bits(got, expected)
        assert_same_stats(stats, expected_stats)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)], ids=str)
def test_perturbation_of_any_shape_and_grid(built: cuda_host.Host, host: Kernels, shape: tuple[int, ...]) -> None:
    assert_same_perturbation(host, normal_tensor(*shape, seed=14), "relative-gaussian(sigma=0.05)")
    y = normal_tensor(70, 96, seed=15)
    whole = perturb(host, y, "absolute-gaussian(sigma=0.1)", None, None, 3)[0]
    for blocks in (1, 2, 100):
        assert same_bits(
            perturb(Kernels(built.with_blocks(blocks)), y, "absolute-gaussian(sigma=0.1)", None, None, 3)[0], whole
        )


def test_too_long_a_chain_is_refused(host: Kernels) -> None:
    chain = " + ".join(["dead-zone(threshold=0.1)"] * 9)
    with pytest.raises(BackendError, match="at most 8 models"):
        perturb(host, torch.ones(4), chain, None, None, 0)


# ---- gemm -----------------------------------------------------------------------------------------------------------


ACCUMULATORS = [
    *accumulator.MATRIX_UNITS,
    "accumulator(fraction_bits=23, chunk=8, order=pairwise, rounding=nearest-even, result_rounding=nearest-even)",
    "accumulator(fraction_bits=10, chunk=16, rounding=nearest-even, promote=32)",
    "accumulator(fraction_bits=20, chunk=5, order=products-first, subnormals=flush)",
    "accumulator(fraction_bits=20, chunk=5, order=even-odd, result_bits=10, min_exponent=-6)",
]


@pytest.mark.parametrize("text", ACCUMULATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemm_equals_the_cpu_kernels(host: Kernels, text: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(16)
    for seed, spread in enumerate((0, 8, 60)):
        a, b = normal_tensor(2, 5, 100, seed=seed), normal_tensor(2, 100, 7, seed=seed + 10)
        a, b = (t * torch.exp2(torch.from_numpy(rng.integers(-spread, spread + 1, t.shape))).float() for t in (a, b))
        if seed == 1:
            a[0, 1, 3], b[1, 4, 2], a[1, 2, 50] = torch.inf, torch.nan, -torch.inf
        assert same_bits(host.gemm(a.to(dtype), b.to(dtype), text), cpu.gemm(a.to(dtype), b.to(dtype), text))


# ---- the backend ----------------------------------------------------------------------------------------------------


def test_a_clock_elsewhere_is_passed_by_value(host: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    y, step = normal_tensor(4, 64, seed=17), torch.tensor(clock(7, "eval", 2))
    by_address = host.perturb(y, "absolute-gaussian(sigma=1.0, draw=per_run)", 3, step, None, None, None, False)[0]
    monkeypatch.setattr(cuda, "_clock", lambda step, device: (0, int(step)))
    by_value = host.perturb(y, "absolute-gaussian(sigma=1.0, draw=per_run)", 3, step, None, None, None, False)[0]
    assert same_bits(by_address, by_value)


def test_what_is_refused(host: Kernels) -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ConfigError, match="draws random bits: pass a key"):
        host.cast(x, "bf16(rounding=stochastic)", -1, 0, None, None, False)
    with pytest.raises(ConfigError, match=r"expected an int64 step, got torch\.int32"):
        host.cast(x, "bf16(rounding=stochastic)", -1, 0, torch.tensor(1, dtype=torch.int32), None, False)
    with pytest.raises(ConfigError, match="rows are on meta, the tensor on cpu"):
        host.perturb(x, "dead-zone(threshold=1)", 0, STEP, torch.arange(2, device="meta"), None, None, False)


def test_literals_mean_the_same_bits() -> None:
    for value in (0.0, -0.0, 448.0, float("nan"), float("inf"), 2**-149, 1 / 3):
        held = formats.float32(value) if value == value else value
        assert np.array_equal(bits(cuda_host.number(kernels.literal(held))), bits(held))
    assert (kernels.literal(True), kernels.literal(-127), kernels.literal(2**31)) == ("true", "-127", "2147483648u")


def test_a_kernel_is_one_source_without_includes() -> None:
    for file in cuda_host.FILES:
        text = kernels.header(file)
        assert set(re.findall(r"#include (.*)", text)) <= {"<cstdint>", "<cmath>"}  # which NVRTC is not shown
        assert text.count("struct RowIds {") <= 1


def test_every_error_model_has_a_kernel() -> None:
    assert {k.kind for k in fields.KINDS} == set(errors.MODELS)


def test_every_scale_rule_has_a_kernel() -> None:
    rules = {(f, rule) for f, every in formats.SCALE_RULES.items() for rule in every}
    assert set(fields.SCALES) == rules
    assert isinstance(formats.get("mxfp4"), BlockFormat)


def test_the_backend_is_known_without_a_gpu_and_without_cupy() -> None:
    assert backends.chosen()["cuda"] == "cuda"
    assert set(backends.get("cuda").ops) == set(backends.get("cpu").ops)
