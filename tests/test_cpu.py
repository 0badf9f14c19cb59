"""The C++ kernels equal the numpy definitions, bit for bit: formats, noise and what they report of themselves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from test_reference import PHILOX
from texts import PARAMETRIC, all_texts, axes_of
from torch import Tensor
from values import all_bf16, all_fp16, bits, critical, random_bits, same_bits

from aqnsim import ConfigError, _core, formats, reference
from aqnsim.backends import cpu
from aqnsim.backends import reference as slow
from aqnsim.errors import AbsoluteGaussian, ErrorModel, RelativeGaussian
from aqnsim.formats import BlockFormat, Format, element_of
from aqnsim.receipts import STATS
from aqnsim.rng import key_of

NAMES = [*formats.ALL, *PARAMETRIC]
TEXTS = all_texts()
COUNTS = ("calls", "count", "changed", "injected_n", "saturated", "nonfinite")
SUMS = ("error2", "reference2", "injected2", "requested2")
every_text = pytest.mark.parametrize("text", TEXTS)
every_format = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KEY = key_of(0, "site", "train", "output")
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
    parts = cpu.quantize(x, text, axis, KEY, STEP, None), slow.quantize(x, text, axis, KEY, STEP, None)
    for got, expected in zip(*parts, strict=True):
        assert torch.equal(got, expected) if got.dtype == torch.int32 else same_bits(got, expected)


@every_text
def test_quantize_gives_the_reference_s_parts(text: str) -> None:
    x = normal_tensor(35, 3, 50, seed=6)
    for axis in axes_of(text, 3):
        for t in (x, x.bfloat16()):
            assert_same_parts(t, text, axis)


# ---- stochastic rounding -------------------------------------------------------------------------------------------

STOCHASTIC = [t for t in TEXTS if formats.random_bits(formats.get(t))]


def test_random_words_are_those_of_the_reference() -> None:
    rows = np.random.default_rng(21).integers(0, 1 << 63, 7)
    for columns in (1, 4, 127, 130, 260):
        got = torch.empty(7, columns, dtype=torch.int32)
        _core.random_words(got.data_ptr(), torch.from_numpy(rows).data_ptr(), 7, columns, KEY & (2**64 - 1), 9, 2)
        assert np.array_equal(got.numpy().view(np.uint32), reference.random_words(rows, columns, KEY, 9))


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
    with pytest.raises(ConfigError, match="expected 1 int64 rows, got 2"):
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
        "seed": kernel_normal(1024, 2048, key_of(1, "site", "train", "output"), 3),
        "site": kernel_normal(1024, 2048, key_of(0, "site2", "train", "output"), 3),
        "phase": kernel_normal(1024, 2048, key_of(0, "site", "rollout", "output"), 3),
        "stream": kernel_normal(1024, 2048, key_of(0, "site", "train", "grad-input"), 3),
    }
    limit = 4 / np.sqrt(z.numel())
    for name, other in others.items():
        for power in (1, 2):  # squares too: Box-Muller pairs share a radius
            r = torch.corrcoef(torch.stack([z.flatten() ** power, other.flatten() ** power]))[0, 1]
            assert abs(r) < limit, (name, power, float(r))


def test_keys_tell_fields_apart() -> None:
    assert key_of(1, "2", "train", "output") != key_of(12, "", "train", "output")
    assert key_of(0, "a", "btrain", "output") != key_of(0, "ab", "train", "output")


# ---- perturb -------------------------------------------------------------------------------------------------------

MODELS = [RelativeGaussian(0.05), AbsoluteGaussian(0.3), RelativeGaussian(0.0)]
every_model = pytest.mark.parametrize("model", MODELS, ids=str)


def run(
    y: Tensor,
    model: ErrorModel,
    step: int = 5,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return cpu.perturb(y, str(model), KEY, torch.tensor(step), rows, dtype, True)


def assert_same_perturb(
    y: Tensor,
    model: ErrorModel,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    sums: bool = True,
) -> None:
    got, got_stats = run(y, model, rows=rows, dtype=dtype)
    expected, expected_stats = slow.perturb(y, str(model), KEY, torch.tensor(5), rows, dtype, True)
    assert same_bits(got, expected)
    assert_same_stats(got_stats, expected_stats, sums)
    quiet, zeros = cpu.perturb(y, str(model), KEY, torch.tensor(5), rows, dtype, False)
    assert same_bits(quiet, got)
    assert not zeros.any()


@every_model
@every_dtype
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16], ids=["same", "to fp32", "to bf16"])
@pytest.mark.parametrize("columns", [1, 3, 4, 127, 128, 129, 260])
def test_perturb_equals_the_reference(
    model: ErrorModel, dtype: torch.dtype, out: torch.dtype | None, columns: int
) -> None:
    y = normal_tensor(37, columns, seed=8).to(dtype)
    assert_same_perturb(y, model, dtype=out)
    rows = torch.from_numpy(np.random.default_rng(9).integers(0, 1 << 63, 37))
    assert_same_perturb(y, model, rows=rows, dtype=out)
    assert not same_bits(run(y, MODELS[0], rows=rows)[0], run(y, MODELS[0])[0])


@every_model
def test_perturb_of_random_fp32_bits(model: ErrorModel) -> None:
    y = torch.from_numpy(random_bits(1 << 20, seed=10).copy()).view(-1, 100 * 4 + 1 + 623)
    assert_same_perturb(y, model, sums=False)
    assert_same_perturb(y, model, dtype=torch.bfloat16, sums=False)


@every_model
@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (0, 5), (2, 3, 4)])
def test_perturb_of_any_shape(model: ErrorModel, shape: tuple[int, ...]) -> None:
    assert_same_perturb(normal_tensor(*shape, seed=11).reshape(shape), model)


@every_model
def test_infinities_and_nan_pass(model: ErrorModel) -> None:
    y = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    out, stats = run(y, model)
    assert same_bits(out[:3], y[:3])
    assert out[3].isfinite()
    assert stats.isfinite().all()
    assert dict(zip(STATS, stats.tolist(), strict=True))["nonfinite"] == 3


@every_dtype
def test_noise_does_not_depend_on_how_the_tensor_is_split(dtype: torch.dtype, threads: int) -> None:
    y = normal_tensor(600, 301, seed=12).to(dtype)
    rows = torch.from_numpy(np.random.default_rng(13).permutation(600))
    whole, whole_stats = run(y, MODELS[0], rows=rows)
    parts = [run(y[i : i + 77], MODELS[0], rows=rows[i : i + 77])[0] for i in range(0, 600, 77)]
    assert same_bits(torch.cat(parts), whole)
    order = torch.from_numpy(np.random.default_rng(14).permutation(600))
    assert same_bits(run(y[order], MODELS[0], rows=rows[order])[0], whole[order])
    assert same_bits(run(y[:, :130], MODELS[0], rows=rows)[0], whole[:, :130])
    assert same_bits(run(y.t().contiguous().t(), MODELS[0], rows=rows)[0], whole)
    assert same_bits(run(y.view(20, 30, 301), MODELS[0], rows=rows)[0].view(600, 301), whole)
    torch.set_num_threads(3 - threads)
    again, again_stats = run(y, MODELS[0], rows=rows)
    assert same_bits(again, whole)
    assert torch.equal(again_stats, whole_stats)


def test_noise_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, _ = run(torch.ones(4, 4), MODELS[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same_bits(run(torch.ones(4, 4), MODELS[0])[0], first)


def test_an_error_reports_the_sigma_that_it_realised() -> None:
    y = normal_tensor(512, 1024, seed=15)
    for model in MODELS[:2]:
        _, stats = run(y, model)
        s = dict(zip(STATS, stats.tolist(), strict=True))
        n = s["injected_n"]
        assert n == y.numel()
        low, high = scipy_stats.chi2.ppf([0.0005, 0.9995], n)
        assert low < s["injected2"] / model.sigma**2 < high  # type: ignore[attr-defined]
        assert s["changed"] / n > 0.99


@pytest.mark.parametrize("backend", [cpu, slow], ids=["cpu", "reference"])
def test_rows_of_another_number_or_type_are_refused(backend: object) -> None:
    y, step = torch.ones(4, 3), torch.tensor(0)
    for rows in (torch.arange(1), torch.arange(5), torch.arange(4, dtype=torch.int32)):
        with pytest.raises(ConfigError, match="expected 4 int64 rows"):
            backend.perturb(y, str(MODELS[0]), KEY, step, rows, None, False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", [cpu, slow], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_are_refused(backend: object, dtype: torch.dtype) -> None:
    x = torch.ones(4, 4, dtype=dtype)
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        backend.cast(x, "mxfp4", -1, KEY, STEP, None, False)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        backend.perturb(x, str(MODELS[0]), KEY, torch.tensor(0), None, None, False)  # type: ignore[attr-defined]


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
        for model in MODELS:
            h.update(bits(run(t, model)[0].float().numpy()).tobytes())
    return h.hexdigest()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
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
