"""Formats of blocks against the libraries that use them, executed: bit for bit, with the exceptions named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from oracles import COMPRESSED_TENSORS, TORCHAO, judged_by
from test_block_formats import SMALL, around, block_format, headed_by, pair
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize, per_tensor_amax_to_scale
from values import F32, bits

from aqnsim import formats, reference
from aqnsim.reference import Blocks

Codes = npt.NDArray[np.int64]

SPECIAL = {**SMALL, "zeros": pair(0.0, 0.0), "infinity": pair(1.0, np.inf), "nan": pair(1.0, np.nan)}


def heavy_tailed(shape: tuple[int, int], seed: int) -> F32:
    """Student's t, a wide lognormal, or ties, by the seed; rows of other magnitudes, and a whole block of zeros."""
    rng = np.random.default_rng(seed)
    rows = np.exp2(rng.integers(-3, 4, (shape[0], 1)))
    if seed % 3 == 0:
        x = rng.standard_t(2, shape) * rows
    elif seed % 3 == 1:
        x = rng.standard_normal(shape) * np.exp2(rng.normal(0, 4, shape))
    else:
        x = rng.integers(-64, 65, shape) / 16 * rows
    x[rng.random(shape) < 0.02] = 0
    x[0, :32] = 0
    return (x * 2.0 ** rng.integers(-20, 20)).astype(np.float32)


# ---- torchao: MX ----------------------------------------------------------------------------------------------------

E8M0 = formats.element_of(formats.get("e8m0"))
MX = [text for text in judged_by(TORCHAO) if text.startswith("mx")]
DTYPES = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6_e2m3": DTYPE_FP6_E2M3,
    "mxfp6_e3m2": DTYPE_FP6_E3M2,
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
}
every_mx = pytest.mark.parametrize("text", MX)


@dataclass(frozen=True)
class Packed:
    """What a library stores, and what that stands for."""

    scales: npt.NDArray[Any]
    codes: Codes
    values: F32


def torchao_mx(text: str, x: F32) -> Packed:
    fmt = block_format(text)
    dtype = DTYPES[fmt.name]
    scale, data = to_mx(torch.from_numpy(x), dtype, 32, ScaleCalculationMode[fmt.scale.upper()])
    values = to_dtype(data, scale, dtype, 32, torch.float32).numpy()
    codes = unpack_uint4(data) if fmt.name == "mxfp4" else data.view(torch.uint8)
    return Packed(scale.view(torch.uint8).numpy(), codes.numpy().astype(np.int64), values)


def ours(text: str, x: F32) -> Packed:
    """The same of ours: the bytes of E8M0 scales, other scales as they are."""
    fmt = block_format(text)
    got: Blocks = reference.blocks_of(x, fmt)
    scales = reference.encode(got.scales, E8M0) if fmt.scale_format == "e8m0" else got.scales
    return Packed(scales, reference.encode(got.elements, fmt.element), got.values)


def assert_same(a: Packed, b: Packed) -> None:
    assert np.array_equal(a.scales, b.scales)
    assert np.array_equal(a.codes, b.codes)
    assert np.array_equal(bits(a.values), bits(b.values))


def mx_blocks(seed: int) -> F32:
    """Blocks of 32, heavy-tailed and of ties, whose scales stay above E8M0's smallest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (2000, 32)) * np.exp2(rng.integers(-85, 100, (2000, 1)))
    x[::2] = rng.integers(-64, 65, (1000, 32)) / 8 * np.exp2(rng.integers(-85, 100, (1000, 1)))
    x[rng.random(x.shape) < 0.03] = 0
    x[rng.random(x.shape) < 0.01] = -0.0
    return x.astype(np.float32)


@every_mx
def test_mx_equals_torchao(text: str) -> None:
    x = mx_blocks(seed=1)
    assert_same(ours(text, x), torchao_mx(text, x))


def just_above_a_step_of_rceil(text: str, x: F32) -> npt.NDArray[np.bool_]:
    """Blocks that torchao's RCEIL gives too small a scale: log2 in fp32 does not tell 2^k from what is just above."""
    fmt = block_format(text)
    largest = np.abs(x).max(axis=-1).astype(np.float64)
    digits = np.frexp(largest / fmt.element.max)[0] * 2
    return (digits > 1) & (digits < 1 + 2.0**-18) & (fmt.scale == "rceil")


@every_mx
def test_mx_equals_torchao_where_a_rule_steps(text: str) -> None:
    element = block_format(text).element
    steps = [1.0, 1.75, element.max / 2.0**element.max_exponent]
    steps += [2 - 2.0 ** -(element.mantissa_bits + extra) for extra in range(3)]
    x = headed_by(np.concatenate([around([d * 2.0**e for d in steps]) for e in (-40, -1, 0, 7, 60)]), 32, seed=2)
    excepted = just_above_a_step_of_rceil(text, x)
    assert excepted.mean() < 0.2
    assert_same(ours(text, x[~excepted]), torchao_mx(text, x[~excepted]))


@pytest.mark.parametrize("name", DTYPES)
def test_exception_of_torchao_rceil_just_above_a_step(name: str) -> None:
    element = block_format(name).element
    x = headed_by(np.nextafter(np.float32([element.max * 2.0**20, element.max * 2.0**-20]), np.float32(np.inf)), 32, 3)
    assert just_above_a_step_of_rceil(f"{name}(scale=rceil)", x).all()
    assert (ours(f"{name}(scale=rceil)", x).scales == torchao_mx(f"{name}(scale=rceil)", x).scales + 1).all()
    assert (np.abs(reference.blocks_of(x, block_format(f"{name}(scale=rceil)")).scaled) <= element.max).all()


@every_mx
def test_mx_of_zeros_of_a_nan_and_of_the_largest_values_equals_torchao(text: str) -> None:
    x = np.zeros((5, 32), np.float32)
    x[1] = -0.0
    x[2, :2] = np.nan, 1.0
    x[3, :2] = 3e38, 1.0
    x[4, :2] = -3.4028235e38, 1.0
    got, expected = ours(text, x), torchao_mx(text, x)
    assert np.array_equal(got.scales, expected.scales)
    assert got.scales.ravel().tolist()[:3] == [0, 0, 0xFF]
    assert np.array_equal(bits(got.values), bits(expected.values))


@every_mx
def test_exception_of_torchao_an_infinity_stays_alone(text: str) -> None:
    x = np.ones((1, 32), np.float32)
    x[0, 3] = np.inf
    assert (torchao_mx(text, x).scales != 0xFF).all()
    assert ours(text, x).scales.tolist() == [[0xFF]]
    assert np.isnan(ours(text, x).values).all()


@every_mx
def test_exception_of_torchao_the_smallest_scale_is_stored_but_not_used(text: str) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 2.0**-126
    got, theirs = ours(text, x), torchao_mx(text, x)
    assert got.scales.tolist() == theirs.scales.tolist() == [[0]]
    assert got.values[0, 0] == 2.0**-126
    assert theirs.values[0, 0] <= 2.0**-127, "it scales by 2^-126, or not at all, and back by 2^-127"


# ---- torchao: NVFP4 -------------------------------------------------------------------------------------------------


def torchao_nvfp4(x: F32) -> tuple[Packed, float]:
    """Its two-level NVFP4, and the scale of the tensor."""
    t = torch.from_numpy(x)
    of_tensor = per_tensor_amax_to_scale(t.abs().amax())
    packed = NVFP4Tensor.to_nvfp4(t, per_tensor_scale=of_tensor)
    scale, data = nvfp4_quantize(t, 16, of_tensor)
    assert torch.equal(packed.scale.view(torch.uint8), scale.view(torch.uint8))
    codes = unpack_uint4(data).numpy().astype(np.int64)
    return Packed(scale.float().numpy(), codes, packed.dequantize(torch.float32).numpy()), float(of_tensor)


@pytest.mark.parametrize("seed", range(9))
def test_nvfp4_equals_torchao(seed: int) -> None:
    x = heavy_tailed((128, 512), seed)
    expected, of_tensor = torchao_nvfp4(x)
    assert_same(ours("nvfp4(scale=torchao)", x), expected)
    assert reference.blocks_of(x, block_format("nvfp4(scale=torchao)")).tensor_scale == of_tensor


@pytest.mark.parametrize("name", SPECIAL)
def test_special_nvfp4_blocks_equal_torchao(name: str) -> None:
    x = SPECIAL[name][None]
    expected, of_tensor = torchao_nvfp4(x)
    got = reference.blocks_of(x, block_format("nvfp4(scale=torchao)"))
    assert np.array_equal(got.scales, expected.scales, equal_nan=True)
    assert np.array_equal(got.tensor_scale, np.float32(of_tensor), equal_nan=True)
    # the exception: what becomes 0 * Inf is NaN here, and some E2M1 number there, which has no code for NaN
    number = ~np.isnan(got.elements)
    assert number.any() == (name not in ("nan", "zeros"))
    assert np.array_equal(bits(got.values[number]), bits(expected.values[number]))


# ---- compressed-tensors ---------------------------------------------------------------------------------------------


def _args(bits: int, kind: str, strategy: str, **other: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=True, **other)


_NVFP4 = "nvfp4(scale=compressed_tensors)"
_UINT8 = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8, "dynamic": True}
_E4M3 = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn, "dynamic": "local"}
ARGS = {
    "mxfp4(scale=even)": _args(4, "float", "group", group_size=32, **_UINT8),
    "mxfp6_e2m3(scale=even)": _args(6, "float", "group", group_size=32, **_UINT8),
    _NVFP4: _args(4, "float", "tensor_group", group_size=16, observer="static_minmax", **_E4M3),
    "fp8_e4m3_tensor(scale=amax)": _args(8, "float", "tensor", dynamic=True),
    "fp8_e4m3_channel": _args(8, "float", "channel"),
    "int4_g128(amax_to=7.5)": _args(4, "int", "group", group_size=128, dynamic=True),
    "int8_channel(amax_to=127.5)": _args(8, "int", "channel"),
}


def test_every_format_that_compressed_tensors_may_judge_is_compared() -> None:
    assert sorted(ARGS) == sorted(judged_by(COMPRESSED_TENSORS))


@dataclass(frozen=True)
class Fake:
    """compressed-tensors' scales, quantised and dequantised values."""

    scales: F32
    elements: F32
    values: F32
    tensor_scale: float


def compressed_tensors(text: str, x: F32) -> Fake:
    args, t = ARGS[text], torch.from_numpy(x.copy())
    of_tensor = generate_gparam(t.amin(), t.amax()) if text == _NVFP4 else None
    if args.strategy == "channel":
        scale, zero = calculate_qparams(t.amin(-1, keepdim=True), t.amax(-1, keepdim=True), args)
    else:
        scale, zero = compute_dynamic_scales_and_zp(t, args, torch.nn.Identity(), of_tensor)
    q = quantize(t, scale, zero, args, global_scale=of_tensor)
    y = dequantize(q, scale, zero, args, global_scale=of_tensor)
    return Fake(scale.float().numpy(), q.numpy(), y.numpy(), 1.0 if of_tensor is None else of_tensor.item())


def without_its_epsilon(text: str, theirs: Fake) -> F32:
    """Its fp32 scales, with 1 where it takes 2^-23: for a block of zeros, which either scale leaves as it is."""
    epsilon = (theirs.scales == 2.0**-23) & (block_format(text).scale_format == "fp32")
    return np.where(epsilon, np.float32(1), theirs.scales)


@pytest.mark.parametrize("text", ARGS)
@pytest.mark.parametrize("seed", range(6))
def test_formats_of_compressed_tensors_equal_it(text: str, seed: int) -> None:
    x = heavy_tailed((128, 512), seed)
    got, expected = reference.blocks_of(x, block_format(text)), compressed_tensors(text, x)
    assert got.tensor_scale == expected.tensor_scale
    assert np.array_equal(got.scales, without_its_epsilon(text, expected).reshape(got.scales.shape))
    assert np.array_equal(got.elements, expected.elements)
    assert np.array_equal(got.values, expected.values)
    negative = x < 0  # an integer has no -0, and -0 becomes +0 there
    if block_format(text).element.has_negative_zero:
        assert np.array_equal(np.signbit(got.values)[negative], np.signbit(expected.values)[negative])


@pytest.mark.parametrize("name", SPECIAL)
def test_special_nvfp4_blocks_equal_compressed_tensors(name: str) -> None:
    x = SPECIAL[name][None]
    got, expected = reference.blocks_of(x, block_format(_NVFP4)), compressed_tensors(_NVFP4, x)
    assert got.tensor_scale == expected.tensor_scale
    assert np.array_equal(got.scales, expected.scales, equal_nan=True)
    assert np.array_equal(bits(got.elements), bits(expected.elements))
    assert np.array_equal(bits(got.values), bits(expected.values))


@pytest.mark.parametrize("text", [t for t in ARGS if t.startswith(("fp8", "int"))])
def test_zeros_tiny_and_bad_values_equal_compressed_tensors(text: str) -> None:
    for value in (0.0, 1e-42, 3e38, np.inf, np.nan):
        x = np.zeros((1, 256), np.float32)
        x[0, 0], x[0, 1] = value, min(abs(value), 1.0)
        got, expected = reference.blocks_of(x, block_format(text)), compressed_tensors(text, x)
        scales = without_its_epsilon(text, expected).reshape(got.scales.shape)
        assert np.array_equal(got.scales, scales, equal_nan=True)
        assert np.array_equal(got.values, expected.values, equal_nan=True)


def test_exception_of_compressed_tensors_bad_and_huge_values_under_mx() -> None:
    for value in (np.inf, 3e38):
        x = np.ones((1, 32), np.float32)
        x[0, 0] = value
        theirs = compressed_tensors("mxfp4(scale=even)", x)
        assert np.isinf(theirs.scales).all(), "not a number that E8M0 has"
        assert ours("mxfp4(scale=even)", x).scales.tolist() == [[0xFF if np.isinf(value) else 253]]
