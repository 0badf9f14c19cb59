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
from torch import Tensor
from values import all_bf16, bits, critical, random_bits, same_bits

from aqnsim import ConfigError, _core, formats, reference
from aqnsim.backends import cpu
from aqnsim.backends import reference as slow
from aqnsim.errors import AbsoluteGaussian, ErrorModel, RelativeGaussian
from aqnsim.formats import Format, element_of
from aqnsim.receipts import STATS
from aqnsim.rng import key_of

NAMES = [*formats.ALL, "e5m0", "e8m0", "e2m3", "e3m4", "e8m10"]
COUNTS = ("calls", "count", "changed", "injected_n", "saturated", "nonfinite")
SUMS = ("error2", "reference2", "injected2", "requested2")
every_format = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KEY = key_of(0, "site", "train", "output")


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
    got, got_stats = cpu.cast(x, name, axis, "nearest-even", True)
    expected, expected_stats = slow.cast(x, name, axis, "nearest-even", True)
    assert same_bits(got, expected)
    assert_same_stats(got_stats, expected_stats, sums)
    quiet, zeros = cpu.cast(x, name, axis, "nearest-even", False)
    assert same_bits(quiet, got)
    assert not zeros.any()
    return got


# ---- cast ----------------------------------------------------------------------------------------------------------


@every_format
@every_dtype
def test_cast_of_every_bf16_value(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(all_bf16().copy()).to(dtype)
    assert_same_cast(x[x.isfinite()], name, sums=False)
    # all bit patterns, with NaN and Inf in some blocks only
    assert_same_cast(x[torch.from_numpy(np.random.default_rng(1).permutation(1 << 16))], name, sums=False)


@every_format
def test_cast_of_random_fp32_bits(name: str) -> None:
    x = torch.from_numpy(random_bits(1 << 20, seed=2).copy())
    x[: 1 << 19].nan_to_num_(0.0, 1.0, -1.0)  # half without NaN and Inf, which would hide the rest of a block
    assert_same_cast(x[: 1 << 19].view(64, -1), name, sums=False)
    assert_same_cast(x[1 << 19 : -32].view(-1, 48), name, sums=False)


@every_format
def test_cast_of_every_critical_value(name: str) -> None:
    x = torch.from_numpy(critical(element_of(formats.get(name))))
    x = x[x.isfinite()]
    assert_same_cast(x, name, sums=False)
    # each value in a block of its own, beside one that fixes the block's scale
    pairs = torch.stack([x, torch.full_like(x, float(element_of(formats.get(name)).max))], dim=1)
    assert_same_cast(pairs, name, sums=False)


@every_format
@every_dtype
@pytest.mark.parametrize("shape", [(5, 7, 37), (1, 33), (64,), (3, 200), (2, 3, 4, 5), (129, 70)])
def test_cast_along_any_axis_of_odd_sizes(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = normal_tensor(*shape, seed=3).to(dtype)
    for axis in range(-len(shape), len(shape)):
        assert_same_cast(x, name, axis)


@every_format
def test_cast_does_not_depend_on_threads(name: str, threads: int) -> None:
    x = normal_tensor(300, 701, seed=4)
    for axis in (0, 1):
        got, stats = cpu.cast(x, name, axis, "nearest-even", True)
        torch.set_num_threads(3 - threads)
        other, other_stats = cpu.cast(x, name, axis, "nearest-even", True)
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
        assert same_bits(got, cpu.cast(x.clone().contiguous(), name, -1, "nearest-even", False)[0])


@every_format
@every_dtype
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,)])
def test_cast_of_empty_and_scalar_tensors(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1.3, dtype=dtype)
    assert assert_same_cast(x, name).shape == shape
    elements, scales, tensor_scale = cpu.quantize(x, name, 0)
    for got, expected in zip((elements, scales, tensor_scale), slow.quantize(x, name, 0), strict=True):
        assert same_bits(got, expected)


@pytest.mark.parametrize("name", [n for n in formats.ALL if element_of(formats.get(n)).bits <= 8])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quantize_gives_the_reference_s_parts(name: str, axis: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = normal_tensor(35, 3, 50, seed=6).to(dtype)
        for got, expected in zip(cpu.quantize(x, name, axis), slow.quantize(x, name, axis), strict=True):
            assert same_bits(got, expected)


def test_one_infinity_does_not_spoil_what_a_cast_reports_of_the_rest() -> None:
    x = normal_tensor(8, 64, seed=7)
    x[0, 3], x[1, 5] = torch.inf, torch.nan
    for name in ("mxfp4", "fp8_e4m3", "bf16"):
        _, stats = cpu.cast(x, name, -1, "nearest-even", True)
        assert stats.isfinite().all(), name
        assert_same_stats(stats, slow.cast(x, name, -1, "nearest-even", True)[1])


def test_a_cast_reports_what_it_did() -> None:
    x = torch.tensor([6.0, 6.5, 0.25, 1.0, -7.0, 0.0])
    out, stats = cpu.cast(x, "fp4_e2m1", -1, "nearest-even", True)
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_other_dtypes_are_refused(backend: object, dtype: torch.dtype) -> None:
    x = torch.ones(4, 4, dtype=dtype)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        backend.cast(x, "mxfp4", -1, "nearest-even", False)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        backend.perturb(x, str(MODELS[0]), KEY, torch.tensor(0), None, None, False)  # type: ignore[attr-defined]


# ---- every instruction set -----------------------------------------------------------------------------------------


def digest() -> str:
    """A hash over casts and noise of all formats, for comparison between processes."""
    h = hashlib.sha256()
    x = torch.from_numpy(random_bits(40_000, seed=16).copy())
    tensors = [x.view(-1, 100), normal_tensor(77, 300, seed=17), normal_tensor(301, 77, seed=18)]
    for t in [*tensors, *[t.bfloat16() for t in tensors]]:
        for name in NAMES:
            for axis in (0, 1):
                out, stats = cpu.cast(t, name, axis, "nearest-even", True)
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
    assert {f.overflow for f in map(formats.get, NAMES) if isinstance(f, Format)} == {"saturate", "inf"}
