"""What users call on tensors: cast, quantize and perturb, as properties that hold for any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from texts import PARAMETRIC, all_texts, axes_of
from torch import Tensor
from values import all_bf16, random_bits, same_bits

import aqnsim
from aqnsim import ConfigError, NoiseKey, RelativeGaussian, UnknownNameError, errors, formats
from aqnsim.formats import BlockFormat, Format, element_of

KEY = NoiseKey(seed=0, site="demo", step=0)
NAMES = [*formats.ALL, *PARAMETRIC]
SCALARS = [n for n in NAMES if isinstance(formats.get(n), Format)]
SIGNED = [n for n in NAMES if element_of(formats.get(n)).signed]
MX = [n for n in NAMES if isinstance(f := formats.get(n), BlockFormat) and f.scale_format == "e8m0"]
# The others take their scales from a quotient that is rounded, or from the whole tensor: a second cast may move values.
IDEMPOTENT = [*SCALARS, *MX]
TABLED = [n for n in SCALARS if element_of(formats.get(n)).bits <= 16]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
properties = settings(max_examples=30, deadline=None, derandomize=True)
arrays = hnp.arrays(
    "float32",
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=70),
    elements=st.floats(-1e6, 1e6, width=32) | st.floats(-1, 1, width=32),
)
ordinary = hnp.arrays("float32", st.integers(1, 100), elements=st.integers(-4096, 4096).map(lambda i: i / 64))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


# ---- cast ----------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 50), (2, 3, 40), (0,), (4, 0)])
def test_cast_keeps_shape_and_dtype_and_leaves_its_input(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = tensor(*shape, dtype=dtype)
    before = x.clone()
    y = aqnsim.cast(x, name)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.equal(x, before)


def along_an_axis(name: str, t: Tensor, data: st.DataObject) -> int:
    return data.draw(st.sampled_from(axes_of(name, t.dim())))


@pytest.mark.parametrize("name", IDEMPOTENT)
@properties
@given(x=arrays, data=st.data())
def test_cast_is_idempotent(name: str, x: object, data: st.DataObject) -> None:
    t = torch.from_numpy(x)
    axis = along_an_axis(name, t, data)
    once = aqnsim.cast(t, name, axis=axis)
    assert same_bits(aqnsim.cast(once, name, axis=axis), once)


@pytest.mark.parametrize("name", SIGNED)
@properties
@given(x=arrays)
def test_cast_is_odd(name: str, x: object) -> None:
    t, fmt = torch.from_numpy(x), formats.get(name)
    if not element_of(fmt).symmetric:  # two's complement has one more negative number, which tiny scales reach
        t = t.clamp(-fmt.max, fmt.max) if isinstance(fmt, Format) else t.where(t.abs() > 1e-30, 0.0)
    negated, y = aqnsim.cast(-t, name), aqnsim.cast(t, name)
    assert torch.equal(negated, -y)  # zeros of either sign are equal here
    if element_of(fmt).has_negative_zero and name != "hif4":
        assert same_bits(negated, -y)


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-away", "nearest-down", "toward-zero", "up", "down"])
def test_casts_of_scalar_formats_never_decrease(name: str, rounding: str) -> None:
    for x in (all_bf16(), random_bits(200_000, seed=1)):
        t = torch.from_numpy(x.copy())
        t = t[~t.isnan()].sort().values
        y = aqnsim.cast(t if element_of(formats.get(name)).signed else t[t >= 0], name, rounding=rounding)
        assert bool((y[1:] >= y[:-1]).all())


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("rule", formats.SCALE_RULES["e8m0"])
@properties
@given(x=ordinary, exponent=st.integers(-40, 40))
def test_mx_formats_do_not_see_a_power_of_two(name: str, rule: str, x: object, exponent: int) -> None:
    t, text = torch.from_numpy(x), f"{name}(scale={rule})"
    factor = 2.0**exponent
    assert same_bits(aqnsim.cast(t * factor, text), aqnsim.cast(t, text) * factor)


@pytest.mark.parametrize("name", TABLED)
@properties
@given(x=ordinary)
def test_cast_gives_the_nearest_number(name: str, x: object) -> None:
    element = element_of(formats.get(name))
    t = torch.from_numpy(x).double()
    t = t.clamp(element.min, element.max) if element.signed else t.abs().clamp(element.min, element.max)
    values = torch.tensor(formats.all_values(element), dtype=torch.float64)
    above = torch.searchsorted(values, t).clamp(max=len(values) - 1)
    nearest = torch.minimum((values[above] - t).abs(), (values[(above - 1).clamp(min=0)] - t).abs())
    assert torch.equal((aqnsim.cast(t.float(), name).double() - t).abs(), nearest)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(formats.get(n), BlockFormat)])
@properties
@given(x=ordinary)
def test_cast_of_a_block_errs_by_at_most_a_quarter_of_its_largest_value(name: str, x: object) -> None:
    t = torch.from_numpy(x)  # the widest step is the one that the top of E2M1 leaves
    assert bool(((aqnsim.cast(t, name) - t).abs() <= t.abs().max() / 4).all())


@pytest.mark.parametrize("text", all_texts())
def test_the_gradient_is_straight_through(text: str) -> None:
    x = tensor(3, 70).requires_grad_()
    gradient = tensor(3, 70)
    y = aqnsim.cast(x, text, key=KEY if formats.random_bits(formats.get(text)) else None)
    assert not torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], gradient)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4_g128", "fp8_e4m3_1x128", "hif4", "mxfp4(block=32x32)"])
@properties
@given(data=st.data())
def test_a_cast_along_an_axis_is_the_cast_of_the_moved_axis(name: str, data: st.DataObject) -> None:
    t = tensor(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70)))
    swapped = aqnsim.cast(t.transpose(1, 2), name, axis=-2).transpose(1, 2)
    assert same_bits(swapped, aqnsim.cast(t, name, axis=-1))
    assert same_bits(
        aqnsim.cast(t.contiguous(), name), aqnsim.cast(t.transpose(1, 2).contiguous().transpose(1, 2), name)
    )


def test_the_rounding_can_be_given_beside_the_format() -> None:
    x = torch.tensor([2.5, -2.5, 3.5])
    expected = {
        None: [2, -2, 4],
        "nearest-even": [2, -2, 4],
        "nearest-away": [3, -3, 4],
        "nearest-down": [2, -2, 3],
        "toward-zero": [2, -2, 3],
        "up": [3, -2, 4],
        "down": [2, -3, 3],
    }
    for rounding, values in expected.items():
        assert aqnsim.cast(x, "fp4_e2m1", rounding=rounding).tolist() == values
        assert rounding is None or aqnsim.cast(x, f"fp4_e2m1(rounding={rounding})").tolist() == values


def test_random_bits_are_a_function_of_the_key_and_the_logical_row() -> None:
    x = tensor(8, 40)

    def run(t: Tensor, rows: Tensor | None = None, **other: object) -> Tensor:
        key = NoiseKey(**{**KEY.__dict__, **other})
        return aqnsim.cast(t, "bf16", rounding="stochastic", key=key, rows=rows)

    whole = run(x)
    assert same_bits(run(x), whole)
    assert same_bits(run(x[3:5], rows=torch.tensor([3, 4])), whole[3:5])
    for other in ({"seed": 1}, {"site": "x"}, {"step": 1}, {"phase": "eval"}, {"stream": "input"}):
        assert not torch.equal(run(x, **other), whole), other
    mean = torch.stack([run(x, step=i) for i in range(400)]).double().mean(0)
    assert float((mean - x).abs().max()) < float((whole - x).abs().max()) / 4


# ---- quantize ------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1,), (7,), (33,), (3, 50), (35, 3, 41), (), (0,), (3, 0)])
def test_dequantize_is_cast(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = tensor(*shape, dtype=dtype)
    for axis in axes_of(name, max(x.dim(), 1)):
        q = aqnsim.quantize(x, name, axis=axis)
        assert same_bits(q.dequantize(), aqnsim.cast(x, name, axis=axis))


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(formats.get(n), BlockFormat)])
def test_dequantize_is_cast_for_blocks_of_any_magnitude(name: str) -> None:
    bits = torch.from_numpy(random_bits(64_000, seed=2).copy()).view(-1, 64)
    gentle = torch.randn(500, 64) * torch.exp2(torch.randint(-145, 120, (500, 1)))
    zeros = torch.zeros(2, 64)
    for x in (bits, gentle, zeros, -zeros):
        assert same_bits(aqnsim.quantize(x, name).dequantize(), aqnsim.cast(x, name))


def test_codes_and_scales_of_mxfp4() -> None:
    x = torch.zeros(2, 33)
    x[0, :4] = torch.tensor([6.0, -0.5, 1.0, -6.0])
    x[1, 32] = 3.0
    q = aqnsim.quantize(x, "mxfp4")
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == (2, 17)
    # the even index is the low nibble; 0x7 is 6, 0x9 is -0.5, 0x2 is 1, 0xF is -6
    assert q.codes[0, :3].tolist() == [0x97, 0xF2, 0x00]
    assert q.codes[1, 16] == 0x07  # 3 is 6 times the scale 1/2, in a block of its own; the high nibble is padding
    assert q.scales is not None
    assert q.scales.dtype == torch.uint8
    assert q.scales.tolist() == [[127, 0], [0, 126]]  # E8M0: 2^0; 2^-127 for zeros; 2^-1
    assert q.tensor_scale == 1


def test_codes_and_scales_of_nvfp4() -> None:
    x = torch.zeros(32)
    x[0], x[1], x[16] = 1.0, -0.5, 0.25
    q = aqnsim.quantize(x, "nvfp4")
    assert q.codes.shape == (16,)
    assert q.codes[0] == 0xD7  # 1 is 6 steps of 1/6, -0.5 is -3
    assert q.codes[8] == 0x07
    assert q.scales is not None
    assert q.scales.dtype == torch.float8_e4m3fn
    assert q.scales.float().tolist() == [448, 112]
    assert q.tensor_scale == torch.tensor(1.0) / 2688


def test_a_nan_block_has_the_scale_code_of_nan() -> None:
    x = torch.ones(64)
    x[5] = torch.nan
    q = aqnsim.quantize(x, "mxfp4")
    assert q.scales is not None
    assert q.scales.tolist() == [255, 125]


def test_codes_of_a_scalar_format_are_those_of_the_format() -> None:
    fmt = formats.get("fp8_e4m3")
    assert isinstance(fmt, Format)
    codes = [c for c in range(256) if abs(fmt.decode(c)) <= fmt.max]
    q = aqnsim.quantize(torch.tensor([fmt.decode(c) for c in codes]), "fp8_e4m3")
    assert q.codes.tolist() == codes
    assert q.scales is None


# ---- perturb -------------------------------------------------------------------------------------------------------


@DTYPES
def test_perturb_is_a_function_of_its_arguments(dtype: torch.dtype) -> None:
    y, error = tensor(6, 40, dtype=dtype), RelativeGaussian(0.05)
    out = aqnsim.perturb(y, error, KEY)
    assert out.dtype == dtype
    assert same_bits(aqnsim.perturb(y, error, KEY), out)
    for other in ({"seed": 1}, {"site": "x"}, {"step": 1}, {"phase": "eval"}, {"stream": "input"}):
        assert not torch.equal(aqnsim.perturb(y, error, NoiseKey(**{**KEY.__dict__, **other})), out), other
    rows = torch.tensor([3, 4])
    assert same_bits(aqnsim.perturb(y[3:5], error, KEY, rows=rows), out[3:5])


def test_noise_has_the_size_that_was_asked_for() -> None:
    y = torch.full((1000, 1000), 2.0)
    noise = (aqnsim.perturb(y, RelativeGaussian(0.05), KEY) - y) / 2
    assert noise.std().item() == pytest.approx(0.05, rel=5e-3)
    assert abs(noise.mean().item()) < 2e-4
    noise = aqnsim.perturb(y, aqnsim.AbsoluteGaussian(0.05), KEY) - y
    assert noise.std().item() == pytest.approx(0.05, rel=5e-3)


def test_several_models_act_in_order_and_are_rounded_once() -> None:
    y = tensor(30, 40, dtype=torch.bfloat16)
    models = [RelativeGaussian(0.05), errors.Saturation(1.5)]
    out = aqnsim.perturb(y, models, KEY)
    assert same_bits(out, aqnsim.perturb(y.float(), models[0], KEY).clamp(-1.5, 1.5).bfloat16())
    assert same_bits(out, aqnsim.perturb(y, tuple(models), KEY))


def test_a_repetition_of_a_run_is_seen_by_models_that_ask_for_it() -> None:
    y, again = tensor(30, 40), NoiseKey(**{**KEY.__dict__, "run": 1})
    usual, each = RelativeGaussian(0.05), RelativeGaussian(0.05, draw="per_run")
    assert same_bits(aqnsim.perturb(y, usual, again), aqnsim.perturb(y, usual, KEY))
    assert same_bits(aqnsim.perturb(y, each, KEY), aqnsim.perturb(y, usual, KEY))
    assert not torch.equal(aqnsim.perturb(y, each, again), aqnsim.perturb(y, each, KEY))


# ---- clear errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    x = torch.ones(4, 32).to(dtype)
    for call in (
        lambda: aqnsim.cast(x, "mxfp4"),
        lambda: aqnsim.quantize(x, "mxfp4"),
        lambda: aqnsim.perturb(x, RelativeGaussian(0.1), KEY),
    ):
        message = f"expected a float32, bfloat16 or float16 tensor, got {dtype}: convert it first"
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize("axis", [2, -3, 100])
def test_an_axis_out_of_range_is_refused(axis: int) -> None:
    for function in (aqnsim.cast, aqnsim.quantize):
        with pytest.raises(ConfigError, match=f"axis {axis} is out of range for a tensor of 2 dimensions"):
            function(torch.ones(2, 3), "mxfp4", axis=axis)


def test_unknown_names_come_with_the_closest() -> None:
    x = torch.ones(4)
    with pytest.raises(UnknownNameError, match=r"unknown format 'mxpf4' .did you mean 'mxfp4'"):
        aqnsim.cast(x, "mxpf4")
    with pytest.raises(UnknownNameError, match=r"unknown rounding 'nearest'.*did you mean 'nearest-even'"):
        aqnsim.cast(x, "mxfp4", rounding="nearest")
    with pytest.raises(AttributeError, match="did you mean 'quantize'"):
        aqnsim.quantise  # noqa: B018


def test_what_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="draws no random bits"):
        aqnsim.cast(torch.ones(4), "mxfp4", key=KEY)
    with pytest.raises(ConfigError, match="draws no random bits"):
        aqnsim.cast(torch.ones(4), "mxfp4", rows=torch.arange(1))


def test_other_mistakes_get_one_clear_error() -> None:
    x = torch.ones(4)
    with pytest.raises(ConfigError, match=r"expected a torch\.Tensor, got list"):
        aqnsim.cast([1.0], "mxfp4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="such as RelativeGaussian"):
        aqnsim.perturb(x, 0.05, KEY)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a NoiseKey"):
        aqnsim.perturb(x, RelativeGaussian(0.1), 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"expected 2 int64 rows, .* got torch.int64 \[3\]"):
        aqnsim.perturb(torch.ones(2, 4), RelativeGaussian(0.1), KEY, rows=torch.arange(3))
    with pytest.raises(ConfigError, match="cannot store the NaN values of the input"):
        aqnsim.quantize(torch.tensor([torch.nan]), "int8")
    with pytest.raises(ConfigError, match="draws random bits: pass key=NoiseKey"):
        aqnsim.cast(x, "bf16", rounding="stochastic")
    with pytest.raises(ConfigError, match="tiles lie in the last two axes, but blocks run along axis 0"):
        aqnsim.cast(torch.ones(2, 3, 4), "mxfp4(block=16x16)", axis=0)
    for error in ([], [0.05], "saturation(limit=1)"):
        with pytest.raises(ConfigError, match=r"such as RelativeGaussian\(0\.05\), or several, got"):
            aqnsim.perturb(x, error, KEY)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pass it as magnitude"):
        aqnsim.perturb(x, RelativeGaussian(0.1, reference="absdot"), KEY)
    with pytest.raises(UnknownNameError, match=r"unknown phase 'trian' .did you mean 'train'"):
        NoiseKey(phase="trian")
    with pytest.raises(ConfigError, match=r"run must be an integer in 0\.\.2\^31-1, got 2147483648"):
        NoiseKey(run=1 << 31)
    for step in (-1, 1 << 30, 1.5):
        with pytest.raises(ConfigError, match="step must be an integer"):
            NoiseKey(step=step)  # type: ignore[arg-type]


# ---- results in given tensors --------------------------------------------------------------------------------------

PERTURBED = RelativeGaussian(0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "hif4", "fp8_e4m3_tensor", "int4_g128", "fp8_e4m3_128x128", "hif8"])
def test_a_result_is_written_where_it_is_asked_for(name: str, dtype: torch.dtype) -> None:
    for axis in (0, 1):
        x = torch.randn(70, 66, generator=torch.Generator().manual_seed(2)).to(dtype)
        expected, out = aqnsim.cast(x, name, axis), torch.empty_like(x)
        assert aqnsim.cast(x, name, axis, out=out) is out
        assert same_bits(out.float(), expected.float())
        q, other = aqnsim.quantize(x, name, axis), aqnsim.quantize(torch.ones_like(x), name, axis)
        assert aqnsim.quantize(x, name, axis, out=other) is other
        assert torch.equal(other.codes, q.codes)
        assert q.dequantize(out=out.zero_()) is out
        assert same_bits(out.float(), expected.float())
        assert aqnsim.cast(x.t().contiguous().t(), name, axis, out=out.zero_()) is out
        assert same_bits(out.float(), expected.float())
        assert aqnsim.cast(x, name, axis, out=x) is x
        assert same_bits(x.float(), expected.float())


def test_noise_is_added_in_place_and_to_another_dtype() -> None:
    y, key = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)), NoiseKey(seed=1, site="out")
    expected, held = aqnsim.perturb(y, PERTURBED, key), torch.empty(5, 300, dtype=torch.bfloat16)
    aqnsim.perturb(y, PERTURBED, key, out=held)
    assert same_bits(held.float(), expected.bfloat16().float())
    assert aqnsim.perturb(y, PERTURBED, key, out=y) is y
    assert same_bits(y, expected)


def test_a_result_that_cannot_be_written_is_refused() -> None:
    x, key = torch.ones(8, 64), NoiseKey()
    store = torch.ones(8 * 64 + 32)
    for out, message in [
        (torch.ones(8, 32), r"expected out torch.float32 \[8, 64\], got torch.float32 \[8, 32\]"),
        (x.bfloat16(), r"expected out torch.float32 \[8, 64\], got torch.bfloat16"),
        (torch.ones(64, 8).t(), r"expected a contiguous out, got strides \[1, 8\]"),
        ([1.0], "expected a torch.Tensor as out, got list"),
    ]:
        with pytest.raises(ConfigError, match=message):
            aqnsim.cast(x, "mxfp4", out=out)  # type: ignore[arg-type]
    shared, beside = store[: 8 * 64].view(8, 64), store[32:].view(8, 64)
    for call in (
        lambda: aqnsim.cast(shared, "mxfp4", out=beside),
        lambda: aqnsim.perturb(shared, PERTURBED, key, out=beside),
    ):
        with pytest.raises(ConfigError, match="out shares a part of its memory with an input"):
            call()
    trains = torch.ones(8, 64, requires_grad=True)
    q = aqnsim.quantize(x, "mxfp4")
    for call in (
        lambda: aqnsim.cast(trains, "mxfp4", out=x),
        lambda: aqnsim.cast(x, "mxfp4", out=trains),
        lambda: aqnsim.perturb(trains, PERTURBED, key, out=x),
    ):
        with pytest.raises(ConfigError, match="out= has no gradient, but a tensor requires one"):
            call()
    with torch.no_grad():
        aqnsim.cast(trains, "mxfp4", out=torch.empty(8, 64))
    with pytest.raises(ConfigError, match=r"expected out of \(format, shape, dtype, axis\)"):
        aqnsim.quantize(x, "nvfp4", out=q)
    with pytest.raises(ConfigError, match=r"dequantize: expected out torch.float32 \[8, 64\]"):
        q.dequantize(out=torch.empty(8, 63))
