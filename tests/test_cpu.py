"""The C++ kernels equal the numpy definitions, bit for bit: formats, noise and what they report of themselves."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from chains import LONGER, all_chains, draws, singles
from scipy import stats as scipy_stats
from test_reference import PHILOX
from texts import PARAMETRIC, all_texts, axes_of
from torch import Tensor
from values import all_bf16, all_fp16, bits, critical, random_bits, same_bits

from aqnsim import BackendError, ConfigError, _core, errors, formats, reference
from aqnsim.backends import cpu
from aqnsim.backends import reference as slow
from aqnsim.formats import BlockFormat, Format, element_of
from aqnsim.receipts import STATS
from aqnsim.rng import DRAWS, clock, coordinates, key_of

NAMES = [*formats.ALL, *PARAMETRIC]
TEXTS = all_texts()
COUNTS = ("calls", "count", "changed", "injected_n", "saturated", "nonfinite", "hits")
SUMS = ("error2", "reference2", "injected2", "requested2", "expected_hits")
every_text = pytest.mark.parametrize("text", TEXTS)
every_format = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KEY = key_of(0, "site", "output")
STEP = torch.tensor(5)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_same_stats(got: Tensor, expected: Tensor, sums: bool = True) -> None:
    a, b = (dict(zip(STATS, t.tolist(), strict=True)) for t in (got, expected))
    assert {k: a[k] for k in COUNTS} == {k: b[k] for k in COUNTS}
    if sums:
        for k in SUMS:
            assert a[k] == pytest.approx(b[k], rel=2e-4), k


def assert_same_cast(x: Tensor, name: str, axis: int = -1, sums: bool = True) -> Tensor:
    got, got_stats = cpu.cast(x, name, axis, KEY, STEP, None, True)
    expected, expected_stats = slow.cast(x, name, axis, KEY, STEP, None, True)
    assert same_bits(got, expected)
    assert_same_stats(got_stats, expected_stats, sums)
    quiet, zeros = cpu.cast(x, name, axis, KEY, STEP, None, False)
    assert same_bits(quiet, got)
    assert not zeros.any()
    return got


# ---- cast ----------------------------------------------------------------------------------------------------------


@every_text
def test_cast_of_every_bf16_and_fp16_value(text: str) -> None:
    bf16 = torch.from_numpy(all_bf16().copy())
    fp16 = torch.from_numpy(all_fp16().copy())
    # finite values in order, then all bit patterns shuffled: NaN and Inf in some blocks only
    for x in (bf16[bf16.isfinite()], bf16[torch.from_numpy(np.random.default_rng(1).permutation(1 << 16))], fp16):
        assert_same_cast(x, text, sums=False)
    assert_same_cast(bf16.bfloat16(), text, sums=False)


@every_text
def test_cast_of_random_fp32_bits(text: str) -> None:
    x = torch.from_numpy(random_bits(1 << 17, seed=2).copy())
    x[: 1 << 16].nan_to_num_(0.0, 1.0, -1.0)  # half without NaN and Inf, which would hide the rest of a block
    assert_same_cast(x[: 1 << 16].view(64, -1), text, sums=False)
    assert_same_cast(x[1 << 16 : -16].view(-1, 48), text, sums=False)


@every_text
def test_cast_of_every_critical_value(text: str) -> None:
    element = element_of(formats.get(text))
    if element.bits > 16:  # 2^18 numbers and more: those of fp32's first binades and of random ones
        values = np.concatenate([random_bits(20_000, seed=19), np.arange(1 << 15, dtype=np.uint32).view(np.float32)])
        x = torch.from_numpy(values)
    else:
        x = torch.from_numpy(critical(element))
    x = x[x.isfinite()]
    assert_same_cast(x, text, sums=False)
    # each value in a block of its own, beside one that fixes the block's scale
    pairs = torch.stack([x, torch.full_like(x, float(element.max))], dim=1)
    assert_same_cast(pairs, text, sums=False)


@every_text
@pytest.mark.parametrize("shape", [(5, 7, 37), (1, 33), (64,), (3, 200), (2, 3, 4, 5), (129, 70)], ids=str)
def test_cast_along_any_axis_of_odd_sizes(text: str, shape: tuple[int, ...]) -> None:
    x = normal_tensor(*shape, seed=3)
    for axis in axes_of(text, len(shape)):
        for t in (x, x.bfloat16()):
            assert same_bits(
                assert_same_cast(t, text, axis), cpu.cast(t, text, axis - len(shape), KEY, STEP, None, False)[0]
            )


@every_text
def test_blocks_of_every_magnitude(text: str) -> None:
    """Blocks from fp32's smallest to its largest, with zeros, infinities and NaN in some of them."""
    rng = np.random.default_rng(20)
    exponents = np.linspace(-148, 126, 275).round()[:, None]
    x = (rng.standard_normal((275, 70)) * np.exp2(exponents)).astype(np.float32)
    x[7], x[9], x[11, 5], x[13, 40], x[15, 3] = 0.0, -0.0, np.inf, np.nan, -np.inf
    for axis in axes_of(text, 2):
        assert_same_cast(torch.from_numpy(x), text, axis, sums=False)
        assert_same_cast(torch.from_numpy(x[20:]), text, axis, sums=False)  # none that hides a whole tensor


@every_format
def test_cast_does_not_depend_on_threads(name: str, threads: int) -> None:
    x = normal_tensor(300, 701, seed=4)
    for axis in axes_of(name, 2):
        got, stats = cpu.cast(x, name, axis, KEY, STEP, None, True)
        torch.set_num_threads(3 - threads)
        other, other_stats = cpu.cast(x, name, axis, KEY, STEP, None, True)
        torch.set_num_threads(threads)
        assert same_bits(got, other)
        assert torch.equal(stats, other_stats)
        assert_same_cast(x, name, axis)


@every_format
@every_dtype
def test_cast_of_other_strides(name: str, dtype: torch.dtype) -> None:
    base = normal_tensor(64, 96, seed=5).to(dtype)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.t(),
        lambda t: t[::2, 1::3],
        lambda t: t[:, 5].expand(4, 64),
        lambda t: t.view(2, 4, 8, 96).contiguous(memory_format=torch.channels_last),
    ]
    for view in views:
        x = view(base)
        got = assert_same_cast(x, name)
        assert same_bits(got, cpu.cast(x.clone().contiguous(), name, -1, KEY, STEP, None, False)[0])


@every_format
@every_dtype
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,)])
def test_cast_of_empty_and_scalar_tensors(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1.3, dtype=dtype)
    assert assert_same_cast(x, name).shape == shape
    assert_same_parts(x, name, -1)


def assert_same_parts(x: Tensor, text: str, axis: int) -> None:
    parts = cpu.elements(x, text, axis, KEY, STEP, None), slow.elements(x, text, axis, KEY, STEP, None)
    for got, expected in zip(*parts, strict=True):
        assert torch.equal(got, expected) if got.dtype == torch.int32 else same_bits(got, expected)


@every_text
def test_elements_and_scales_are_the_reference_s(text: str) -> None:
    x = normal_tensor(35, 3, 50, seed=6)
    for axis in axes_of(text, 3):
        for t in (x, x.bfloat16()):
            assert_same_parts(t, text, axis)


# ---- stochastic rounding -------------------------------------------------------------------------------------------

STOCHASTIC = [t for t in TEXTS if formats.random_bits(formats.get(t))]


def test_random_words_are_those_of_the_reference() -> None:
    rows = np.random.default_rng(21).integers(0, 1 << 63, 7)
    pairs = np.stack([rows, [0, 1, 2, 3, 129, 1 << 32, (1 << 33) - 1]], axis=1)
    for ids in (rows, pairs):
        for columns in (1, 4, 127, 130, 260):
            got = torch.empty(7, columns, dtype=torch.int32)
            address = torch.from_numpy(ids).data_ptr()
            _core.random_words(got.data_ptr(), address, ids.ndim == 2, 7, columns, KEY & (2**64 - 1), 9, 2)
            assert np.array_equal(got.numpy().view(np.uint32), reference.random_words(ids, columns, KEY, 9))


@pytest.mark.parametrize("text", ["fp8_e4m3(rounding=stochastic)", "mxfp4(rounding=stochastic-8)"])
def test_stochastic_rounding_does_not_depend_on_how_the_tensor_is_split(text: str, threads: int) -> None:
    x = normal_tensor(600, 320, seed=22)
    rows = torch.from_numpy(np.random.default_rng(23).permutation(600))

    def run(t: Tensor, ids: Tensor | None) -> Tensor:
        return cpu.cast(t, text, -1, KEY, STEP, ids, False)[0]

    whole = run(x, rows)
    assert same_bits(torch.cat([run(x[i : i + 77], rows[i : i + 77]) for i in range(0, 600, 77)]), whole)
    order = torch.from_numpy(np.random.default_rng(24).permutation(600))
    assert same_bits(run(x[order], rows[order]), whole[order])
    assert same_bits(run(x[:, :128], rows), whole[:, :128])
    assert same_bits(run(x.t().contiguous().t(), rows), whole)
    assert same_bits(run(x.view(20, 30, 320), rows).view(600, 320), whole)
    torch.set_num_threads(3 - threads)
    assert same_bits(run(x, rows), whole)
    assert not same_bits(run(x, None), whole)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3", "hif8", "int8", "bf16"])
def test_stochastic_rounding_goes_up_as_often_as_it_should(name: str, bits: int) -> None:
    """Chi-square over values at known shares of the way to the next number, in normal and subnormal binades."""
    fmt = formats.get(name)
    assert isinstance(fmt, Format)
    n, statistic, cases = 1 << 14, 0.0, 0
    values = [v for v in (*fmt.values()[:3], 1.0, *fmt.values()[-3:-1]) if v < fmt.max]
    for low in dict.fromkeys(values):
        high = fmt.next_up(low)
        for share in (1 / 8, 3 / 8, 1 / 2, 7 / 8):
            x = torch.full((64, n // 64), low + share * (high - low))
            step = torch.tensor(cases)
            y, _ = cpu.cast(x, f"{name}(rounding=stochastic-{bits})", -1, KEY, step, None, False)
            assert bool(((y == low) | (y == high)).all())
            p = int(share * 2**bits) / 2**bits  # the share that so few bits can tell
            ups = int((y == high).sum())
            if p == 0:
                assert ups == 0
                continue
            statistic += (ups - n * p) ** 2 / (n * p * (1 - p))
            cases += 1
    assert scipy_stats.chi2.sf(statistic, cases) > 1e-3


@pytest.mark.parametrize("text", STOCHASTIC)
def test_stochastic_rounding_stays_between_the_neighbours_of_a_value(text: str) -> None:
    x = normal_tensor(40, 64, seed=25)
    x = x if element_of(formats.get(text)).signed else x.abs()
    up, down = (
        cpu.cast(x, str(formats.with_rounding(formats.get(text), r)), -1, 0, None, None, False)[0]
        for r in ("up", "down")
    )
    y = cpu.cast(x, text, -1, KEY, STEP, None, False)[0]
    assert bool(((y == up) | (y == down)).all())


@pytest.mark.parametrize("backend", [cpu, slow], ids=["cpu", "reference"])
def test_a_stochastic_rounding_without_a_step_is_refused(backend: object) -> None:
    with pytest.raises(ConfigError, match="draws random bits: pass a key"):
        backend.cast(torch.ones(4), "bf16(rounding=stochastic)", -1, 0, None, None, False)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"expected 1 int64 rows, as \[1\] .*got torch.int64 \[2\]"):
        backend.cast(torch.ones(4), "bf16(rounding=stochastic)", -1, 0, STEP, torch.arange(2), False)  # type: ignore[attr-defined]


def test_one_infinity_does_not_spoil_what_a_cast_reports_of_the_rest() -> None:
    x = normal_tensor(8, 64, seed=7)
    x[0, 3], x[1, 5] = torch.inf, torch.nan
    for name in ("mxfp4", "fp8_e4m3", "bf16"):
        _, stats = cpu.cast(x, name, -1, KEY, STEP, None, True)
        assert stats.isfinite().all(), name
        assert_same_stats(stats, slow.cast(x, name, -1, KEY, STEP, None, True)[1])


def test_a_cast_reports_what_it_did() -> None:
    x = torch.tensor([6.0, 6.5, 0.25, 1.0, -7.0, 0.0])
    out, stats = cpu.cast(x, "fp4_e2m1", -1, KEY, STEP, None, True)
    assert out.tolist() == [6, 6, 0, 1, -6, 0]
    s = dict(zip(STATS, stats.tolist(), strict=True))
    assert s["count"] == 6
    assert s["changed"] == 3
    assert s["saturated"] == 2
    assert s["error2"] == 0.25 + 0.0625 + 1
    assert s["reference2"] == 36 + 42.25 + 0.0625 + 1 + 49


# ---- Philox and the normal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert tuple(_core.philox(counter, key)) == expected


def kernel_normal(rows: int, columns: int, key: int, step: int) -> Tensor:
    out = torch.empty(rows, columns)
    _core.normal(out.data_ptr(), rows, columns, key & (2**64 - 1), step)
    return out


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return kernel_normal(2048, 2051, KEY, 3)


def test_normal_equals_the_reference(sample: Tensor) -> None:
    assert sample.numel() > 4_000_000
    assert same_bits(sample, torch.from_numpy(reference.normal(np.arange(2048), 2051, KEY, 3)))


def test_normal_is_normal(sample: Tensor) -> None:
    z = sample.double().flatten().numpy()
    n = z.size
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(scipy_stats.skew(z)) < 4 * np.sqrt(6 / n)
    assert abs(scipy_stats.kurtosis(z)) < 4 * np.sqrt(24 / n)
    assert 4.5 < np.abs(z).max() < 6.6
    assert scipy_stats.kstest(z[:1_000_000], "norm").pvalue > 1e-3
    tail = (np.abs(z) > 4).mean()
    expected = 2 * scipy_stats.norm.sf(4)
    assert abs(tail - expected) < 4 * np.sqrt(expected / n)


def test_normals_of_different_coordinates_are_independent(sample: Tensor) -> None:
    z = sample[:1024, :2048]
    others = {
        "column": sample[:1024, 1:2049],
        "next in the block of four": sample[:1024, 2:2050],
        "row": sample[1:1025, :2048],
        "step": kernel_normal(1024, 2048, KEY, 4),
        "seed": kernel_normal(1024, 2048, key_of(1, "site", "output"), 3),
        "site": kernel_normal(1024, 2048, key_of(0, "site2", "output"), 3),
        "phase": kernel_normal(1024, 2048, KEY, 1 << 30 | 3),
        "model of a chain": kernel_normal(1024, 2048, *coordinates(KEY, 3, model=1)),
        "part of a model": kernel_normal(1024, 2048, *coordinates(KEY, 3, part=1)),
        "run": kernel_normal(1024, 2048, *coordinates(KEY, 1 << 32 | 3, "per_run")),
        "stream": kernel_normal(1024, 2048, key_of(0, "site", "grad-input"), 3),
    }
    limit = 4 / np.sqrt(z.numel())
    for name, other in others.items():
        for power in (1, 2):  # squares too: Box-Muller pairs share a radius
            r = torch.corrcoef(torch.stack([z.flatten() ** power, other.flatten() ** power]))[0, 1]
            assert abs(r) < limit, (name, power, float(r))


def test_keys_tell_fields_apart() -> None:
    assert key_of(1, "2", "output") != key_of(12, "", "output")
    assert key_of(0, "a", "boutput") != key_of(0, "ab", "output")


# ---- perturb -------------------------------------------------------------------------------------------------------

RELATIVE = "relative-gaussian(sigma=0.05)"
CHAINS = all_chains()
SIZED = [t for t in singles() if getattr(errors.parse(t), "sigma", 1) > 0]
every_chain = pytest.mark.parametrize("chain", CHAINS)
CLOCK = clock(5, "eval", run=3)


def magnitude_for(chain: str, y: Tensor) -> Tensor | None:
    return 1 + normal_tensor(*y.shape, seed=30).reshape(y.shape).abs() if "absdot" in chain else None


def perturbed(
    backend: Any,
    y: Tensor,
    chain: str,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    measure: bool = True,
    at: int = CLOCK,
) -> tuple[Tensor, Tensor]:
    return backend.perturb(y, chain, KEY, torch.tensor(at), rows, magnitude_for(chain, y), dtype, measure)


def run(y: Tensor, chain: str = RELATIVE, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return perturbed(cpu, y, chain, rows)


def stats_of(y: Tensor, chain: str, **kwargs: Any) -> dict[str, float]:
    return dict(zip(STATS, perturbed(cpu, y, chain, **kwargs)[1].tolist(), strict=True))


def assert_same_perturb(
    y: Tensor, chain: str, rows: Tensor | None = None, dtype: torch.dtype | None = None, sums: bool = True
) -> None:
    got, got_stats = perturbed(cpu, y, chain, rows, dtype)
    expected, expected_stats = perturbed(slow, y, chain, rows, dtype)
    assert same_bits(got, expected)
    assert_same_stats(got_stats, expected_stats, sums)
    quiet, zeros = perturbed(cpu, y, chain, rows, dtype, measure=False)
    assert same_bits(quiet, got)
    assert not zeros.any()


def some_rows(n: int, pairs: bool, seed: int = 9) -> Tensor:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(0, 1 << 63, n))
    first = torch.from_numpy(rng.integers(0, 1 << 33, n))
    first[:: max(n // 5, 1)] = torch.arange(len(first[:: max(n // 5, 1)]))
    return torch.stack([rows, first], 1) if pairs else rows


def test_every_model_has_a_kernel_and_a_reference() -> None:
    assert {errors.parse(t).kind for t in CHAINS if " + " not in t} == set(errors.MODELS)
    assert {k.kind for k in cpu.KINDS} == set(errors.MODELS)


@every_chain
@every_dtype
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16], ids=["same", "to fp32", "to bf16"])
def test_perturb_equals_the_reference(chain: str, dtype: torch.dtype, out: torch.dtype | None) -> None:
    for columns in (1, 3, 127, 128, 129, 260):
        y = normal_tensor(17, columns, seed=8).to(dtype)
        for rows in (None, some_rows(17, pairs=False), some_rows(17, pairs=True)):
            assert_same_perturb(y, chain, rows=rows, dtype=out)


@every_chain
def test_rows_that_begin_in_column_0_need_no_pair(chain: str) -> None:
    y, rows = normal_tensor(17, 133, seed=8), some_rows(17, pairs=False)
    pairs = torch.stack([rows, torch.zeros_like(rows)], 1)
    (a, a_stats), (b, b_stats) = run(y, chain, rows), run(y, chain, pairs)
    assert same_bits(a, b)
    assert_same_stats(a_stats, b_stats)


@every_chain
def test_a_row_that_begins_further_on_is_a_part_of_the_whole_row(chain: str) -> None:
    y, rows = normal_tensor(5, 300, seed=8), some_rows(5, pairs=False)
    magnitude = magnitude_for(chain, y)

    def part(begin: int, end: int, pairs: Tensor) -> Tensor:
        m = None if magnitude is None else magnitude[:, begin:end]
        return cpu.perturb(y[:, begin:end], chain, KEY, torch.tensor(CLOCK), pairs, m, None, True)[0]

    whole = run(y, chain, rows)[0]
    for begin, end in ((0, 1), (1, 2), (2, 130), (3, 300), (127, 257), (128, 256), (295, 299)):
        pairs = torch.stack([rows, torch.full_like(rows, begin)], 1)
        assert same_bits(part(begin, end, pairs), whole[:, begin:end]), (begin, end)


@every_chain
def test_perturb_of_random_fp32_bits(chain: str) -> None:
    y = torch.from_numpy(random_bits(1 << 17, seed=10).copy()).view(-1, 1 << 9)
    assert_same_perturb(y, chain, sums=False)
    assert_same_perturb(y, chain, dtype=torch.bfloat16, sums=False)


@every_chain
@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (0, 5), (2, 3, 4)])
def test_perturb_of_any_shape(chain: str, shape: tuple[int, ...]) -> None:
    assert_same_perturb(normal_tensor(*shape, seed=11).reshape(shape), chain)


@every_chain
def test_infinities_and_nan_pass(chain: str) -> None:
    y = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    out, stats = run(y, chain)
    assert same_bits(out[:3], y[:3])
    assert stats.isfinite().all()
    s = stats_of(y, chain)
    assert s["nonfinite"] == 3 + (not out[3].isfinite())
    assert s["hits"] <= chain.count("rate=")


@pytest.mark.parametrize("text", [t for t in LONGER if "bit-flip" not in t])
@every_dtype
def test_a_chain_is_its_models_one_after_the_other_in_fp32(text: str, dtype: torch.dtype) -> None:
    y, rows = normal_tensor(9, 140, seed=31).to(dtype), np.arange(9)
    magnitude = magnitude_for(text, y)
    m = None if magnitude is None else magnitude.numpy()
    expected = y.float().numpy()
    for place, model in enumerate(errors.chain(text)):
        key = coordinates(KEY, CLOCK, model=place)[0]
        one = magnitude if "absdot" in str(model) else None
        alone = torch.from_numpy(expected.copy())
        got = cpu.perturb(alone, str(model), key, torch.tensor(CLOCK), None, one, torch.float32, True)[0]
        expected = reference.perturb(expected, [model], key, CLOCK, rows, m)[0]
        assert same_bits(got, torch.from_numpy(expected))
    assert same_bits(run(y, text)[0], torch.from_numpy(expected).to(dtype))


def test_bits_flip_in_the_stored_pattern() -> None:
    y = normal_tensor(50, 40, seed=32)
    for bit in (0, 3, 22, 31):
        out = run(y, f"bit-flip(rate=1, bit={bit})")[0]
        mask = -(1 << 31) if bit == 31 else 1 << bit
        assert torch.equal(out.view(torch.int32), y.view(torch.int32) ^ mask)
    for bit in (0, 3, 15):
        out = perturbed(cpu, y, f"bit-flip(rate=1, bit={bit})", dtype=torch.bfloat16)[0]
        mask = -(1 << 15) if bit == 15 else 1 << bit
        assert torch.equal(out.view(torch.int16), y.bfloat16().view(torch.int16) ^ mask)
    for dtype, ints, width in ((torch.float32, torch.int32, 32), (torch.bfloat16, torch.int16, 16)):
        ones = torch.ones(1000, 64, dtype=dtype)
        out = run(ones, "bit-flip(rate=1)")[0]
        flipped = (out.view(ints) ^ ones.view(ints)).long() & (1 << width) - 1
        places = flipped.double().log2()
        assert torch.equal(places, places.round())
        assert scipy_stats.chisquare(places.long().flatten().bincount(minlength=width).numpy()).pvalue > 1e-3


def test_the_deterministic_models_do_what_they_say() -> None:
    y = torch.tensor([0.0, -0.0, 0.4, -0.4, 0.5, -2.0, 3.0])
    assert same_bits(run(y, "dead-zone(threshold=0.5)")[0], torch.tensor([0, 0, 0, 0, 0.5, -2, 3]))
    assert same_bits(run(y, "saturation(limit=2.5)")[0], torch.tensor([0, -0.0, 0.4, -0.4, 0.5, -2, 2.5]))
    assert same_bits(run(y, "systematic-bias(gain=0.5, offset=1)")[0], y + (0.5 * y + 1))
    assert same_bits(run(y, "stuck(rate=1, value=-0.0)")[0], torch.zeros(7))


def test_a_relative_error_may_be_one_of_the_magnitude() -> None:
    y, chain = normal_tensor(20, 40, seed=33), "relative-gaussian(sigma=0.05, reference=absdot)"
    magnitude = magnitude_for(chain, y)
    assert magnitude is not None
    z = torch.from_numpy(reference.normal(np.arange(20), 40, *coordinates(KEY, CLOCK)))
    assert same_bits(run(y, chain)[0], y + (torch.tensor(0.05) * z) * magnitude)


def test_lanes_break_in_columns_that_repeat() -> None:
    y, lanes = normal_tensor(30, 700, seed=34), 24
    out = run(y, f"stuck(rate=0.25, value=77, lanes={lanes})")[0]
    hit = (out == 77).all(0)
    assert torch.equal(hit, (out == 77).any(0))
    assert 0 < int(hit[:lanes].sum()) < lanes
    assert torch.equal(hit[lanes:], hit[:-lanes])


# ---- how often a model draws ---------------------------------------------------------------------------------------

SAME = {  # whether another step, phase or run gives the same numbers
    "per_phase": (False, False, True),
    "per_step": (False, True, True),
    "frozen": (True, True, True),
    "per_run": (False, False, False),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("chain", [t for t in SIZED if draws(errors.parse(t)) and "draw" not in t])
def test_what_a_draw_sees_of_the_clock(chain: str, draw: str) -> None:
    y, text = normal_tensor(40, 60, seed=35), f"{chain[:-1]}, draw={draw})"
    whole = perturbed(cpu, y, text, at=clock(5, "train", 3))[0]
    others = clock(6, "train", 3), clock(5, "rollout", 3), clock(5, "train", 4)
    assert tuple(same_bits(perturbed(cpu, y, text, at=at)[0], whole) for at in others) == SAME[draw]


def test_without_a_repetition_all_draws_of_a_run_are_those_of_a_phase() -> None:
    y = normal_tensor(40, 60, seed=35)
    per_run, per_phase = (
        perturbed(cpu, y, f"relative-gaussian(sigma=0.1, draw={draw})", at=clock(5, "train"))[0]
        for draw in ("per_run", "per_phase")
    )
    assert same_bits(per_run, per_phase)


def test_models_of_a_chain_share_no_numbers() -> None:
    y = torch.zeros(1000, 1000)
    z = [torch.from_numpy(reference.normal(np.arange(1000), 1000, *coordinates(KEY, CLOCK, model=m))) for m in (0, 1)]
    twice = run(y, "absolute-gaussian(sigma=1) + absolute-gaussian(sigma=1)")[0]
    assert same_bits(twice, z[0] + z[1])
    assert abs(float(torch.corrcoef(torch.stack(z).flatten(1))[0, 1])) < 4 / 1000
    spikes = "spike(rate=0.25, size=1)"
    first, second = run(y, spikes)[0], run(run(y, spikes + " + " + spikes)[0], "saturation(limit=100)")[0]
    kept = first != 0
    assert float((second != first)[kept].double().mean()) == pytest.approx(0.25, abs=4e-3)  # the second hit


# ---- what is reported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [t for t in CHAINS if "rate=" in t and "lanes" not in t])
def test_a_rate_is_realised(chain: str) -> None:
    y = normal_tensor(500, 512, seed=36)
    s, n = stats_of(y, chain), y.numel()
    rates = [m.rate for m in errors.chain(chain) if hasattr(m, "rate")]
    assert s["expected_hits"] == pytest.approx(sum(rates) * n)
    spread = math.sqrt(sum(n * r * (1 - r) for r in rates))
    assert abs(s["hits"] - s["expected_hits"]) <= 4 * spread
    assert s["injected_n"] == s["injected2"] == s["requested2"] == 0


def test_a_rare_hit_comes_as_often_as_it_should() -> None:
    y = torch.zeros(1 << 12, 1 << 12)
    hits = stats_of(y, f"stuck(rate={2.0**-20}, value=1)")["hits"]
    low, high = scipy_stats.poisson.ppf([0.0005, 0.9995], 16)
    assert low <= hits <= high
    assert int((run(y, f"stuck(rate={2.0**-20}, value=1)")[0] == 1).sum()) == hits


@pytest.mark.parametrize(
    "chain", ["saturation(limit=1)", RELATIVE + " + saturation(limit=1)", RELATIVE + " + " + RELATIVE]
)
def test_a_chain_that_is_not_one_gaussian_has_no_sigma(chain: str) -> None:
    s = stats_of(normal_tensor(50, 60, seed=37), chain)
    assert s["injected_n"] == s["injected2"] == s["requested2"] == s["hits"] == s["expected_hits"] == 0
    assert s["changed"] > 0


@pytest.mark.parametrize("scale", [2.0**-140, 1e-30, 1e-22, 1.0, 1.8e19, 1e30, 3e37])
def test_sums_of_squares_hold_values_of_any_size(scale: float) -> None:
    y = torch.tensor([[3.0, -4.0]]) * scale
    exact = y.double().square().sum()
    s = stats_of(y, "systematic-bias(gain=-2)")
    assert s["reference2"] == pytest.approx(float(exact), rel=1e-12)
    assert s["error2"] == pytest.approx(4 * float(exact), rel=1e-12)
    _, stats = cpu.cast(y, "int8(rounding=toward-zero)" if scale < 1e-3 else "bf16", -1, KEY, STEP, None, True)
    assert stats[STATS.index("reference2")] == pytest.approx(float(exact), rel=1e-12)
    if scale < 1e-3:
        assert stats[STATS.index("error2")] == pytest.approx(float(exact), rel=1e-12)
    s = stats_of(torch.full((1, 4096), scale), f"absolute-gaussian(sigma={scale})")
    assert s["injected2"] / s["requested2"] == pytest.approx(1, abs=0.1)


@every_dtype
def test_noise_does_not_depend_on_how_the_tensor_is_split(dtype: torch.dtype, threads: int) -> None:
    y = normal_tensor(600, 301, seed=12).to(dtype)
    rows = torch.from_numpy(np.random.default_rng(13).permutation(600))
    whole, whole_stats = run(y, rows=rows)
    parts = [run(y[i : i + 77], rows=rows[i : i + 77])[0] for i in range(0, 600, 77)]
    assert same_bits(torch.cat(parts), whole)
    order = torch.from_numpy(np.random.default_rng(14).permutation(600))
    assert same_bits(run(y[order], rows=rows[order])[0], whole[order])
    assert same_bits(run(y[:, :130], rows=rows)[0], whole[:, :130])
    assert same_bits(run(y.t().contiguous().t(), rows=rows)[0], whole)
    assert same_bits(run(y.view(20, 30, 301), rows=rows)[0].view(600, 301), whole)
    torch.set_num_threads(3 - threads)
    again, again_stats = run(y, rows=rows)
    assert same_bits(again, whole)
    assert torch.equal(again_stats, whole_stats)


def test_noise_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, _ = run(torch.ones(4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same_bits(run(torch.ones(4, 4))[0], first)


@pytest.mark.parametrize("chain", [t for t in SIZED if "sigma" in t])
def test_an_error_reports_the_sigma_that_it_realised(chain: str) -> None:
    y = normal_tensor(512, 1024, seed=15)
    s, n = stats_of(y, chain), y.numel()
    sigma = errors.parse(chain).sigma  # type: ignore[attr-defined]
    assert s["injected_n"] == n
    assert s["requested2"] == pytest.approx(sigma**2 * n)
    low, high = scipy_stats.chi2.ppf([0.0005, 0.9995], n)
    assert low < s["injected2"] / sigma**2 < high
    assert s["changed"] / n > 0.99


both = pytest.mark.parametrize("backend", [cpu, slow], ids=["cpu", "reference"])


@both
def test_rows_of_another_number_or_type_are_refused(backend: Any) -> None:
    y = torch.ones(4, 3)
    for rows in (
        torch.arange(1),
        torch.arange(5),
        torch.arange(4, dtype=torch.int32),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(4, 3, dtype=torch.int64),
    ):
        with pytest.raises(ConfigError, match=r"expected 4 int64 rows, as \[4\] or with .* as \[4, 2\], got"):
            perturbed(backend, y, RELATIVE, rows)
    for first in (-1, 1 << 33):
        rows = torch.tensor([[0, 0], [1, first], [2, 0], [3, 0]])
        with pytest.raises(ConfigError, match=r"expected first columns in 0\.\.2\^33-1, got"):
            perturbed(backend, y, RELATIVE, rows)
        with pytest.raises(ConfigError, match=r"cast: expected first columns"):
            backend.cast(y, "bf16(rounding=stochastic)", -1, KEY, STEP, rows, False)


@both
def test_a_magnitude_that_does_not_fit_is_refused(backend: Any) -> None:
    y, at, absdot = torch.ones(4, 3), torch.tensor(0), "relative-gaussian(sigma=0.1, reference=absdot)"
    for error, magnitude, message in (
        (absdot, None, r"is relative to \|A\| @ \|B\|: pass it as magnitude"),
        (absdot, torch.ones(3, 4), r"expected a float32 magnitude of shape \[4, 3\], got torch.float32 \[3, 4\]"),
        (absdot, torch.ones(4, 3).bfloat16(), "expected a float32 magnitude"),
        (RELATIVE, torch.ones(4, 3), "no model of .* uses a magnitude; do not pass one"),
    ):
        with pytest.raises(ConfigError, match=message):
            backend.perturb(y, error, KEY, at, None, magnitude, None, False)


@both
def test_flips_that_perturb_cannot_do_are_refused(backend: Any) -> None:
    y = torch.ones(4, 3)
    for target in ("codes", "scales"):
        with pytest.raises(ConfigError, match=f"acts on the {target} of a cast; perturb has none: use target=value"):
            perturbed(backend, y, f"bit-flip(rate=0.1, target={target})")
    with pytest.raises(ConfigError, match=r"on a bfloat16 result: expected bit in -1\.\.15"):
        perturbed(backend, y, "bit-flip(rate=0.1, bit=16)", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="must be the last of its chain"):
        perturbed(backend, y, "bit-flip(rate=0.1) + saturation(limit=1)")


def test_a_model_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(cpu.KINDS, errors.BitFlip)
    with pytest.raises(BackendError, match=r"no kernel for bit-flip\(rate=0.1\); it has: relative-gaussian"):
        run(torch.ones(4), "bit-flip(rate=0.1)")


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_are_refused(backend: Any, dtype: torch.dtype) -> None:
    x = torch.ones(4, 4, dtype=dtype)
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        backend.cast(x, "mxfp4", -1, KEY, STEP, None, False)
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        perturbed(backend, x, RELATIVE)


# ---- every instruction set -----------------------------------------------------------------------------------------


def digest() -> str:
    """A hash over casts and noise of all formats, for comparison between processes."""
    h = hashlib.sha256()
    x = torch.from_numpy(random_bits(40_000, seed=16).copy())
    tensors = [x.view(-1, 100), normal_tensor(77, 300, seed=17), normal_tensor(301, 77, seed=18)]
    for t in [*tensors, *[t.bfloat16() for t in tensors]]:
        for name in TEXTS:
            for axis in axes_of(name, 2):
                out, stats = cpu.cast(t, name, axis, KEY, STEP, None, True)
                counts = torch.stack([stats[STATS.index(k)] for k in COUNTS])
                h.update(bits(out.float().numpy()).tobytes() + counts.numpy().tobytes())
        rows = some_rows(t.shape[0], pairs=True)
        for chain in CHAINS:
            h.update(bits(run(t, chain, rows)[0].float().numpy()).tobytes())
    return h.hexdigest()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = "import test_cpu; from aqnsim import _core; print(_core.isa(), test_cpu.digest())"
    env = os.environ | {"AQNSIM_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if f"AQNSIM_ISA={isa} cannot run here" in done.stderr:
        pytest.skip(f"this processor cannot run {isa}")
    assert done.stdout.split() == [isa, digest()], done.stderr


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    env = os.environ | {"AQNSIM_ISA": "avx3"}
    code = "from aqnsim import _core; _core.isa()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "AQNSIM_ISA=avx3 cannot run here; this processor runs: baseline" in done.stderr


def test_formats_of_every_kind_are_covered() -> None:
    elements = [element_of(formats.get(t)) for t in TEXTS]
    assert {e.overflow for e in elements} == {"saturate", "inf", "nan"}
    assert {e.rounding for e in elements} >= set(formats.ROUNDINGS)
    blocks = [f for f in map(formats.get, TEXTS) if isinstance(f, BlockFormat)]
    assert {(f.scale_format, f.scale) for f in blocks} == {(k, r) for k, rs in formats.SCALE_RULES.items() for r in rs}
