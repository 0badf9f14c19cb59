"""Packed tensors: what they stand for, their layouts beside those of other libraries, and their files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from texts import all_texts, axes_of
from torch import Tensor
from values import random_bits, same_bits

import aqnsim
from aqnsim import ConfigError, NoiseKey, Quantized, UnknownNameError, formats
from aqnsim.formats import BlockFormat, element_of, get
from aqnsim.quantized import load, pack, save, swizzle, unpack, unswizzle

TEXTS = all_texts()
NAMED_AND_BLOCKS = [text for text in TEXTS if text in formats.ALL or isinstance(get(text), BlockFormat)]
BLOCKS = [text for text in TEXTS if isinstance(get(text), BlockFormat)]
DTYPES = (torch.float32, torch.bfloat16)
KEY = NoiseKey(seed=3, site="packed", step=2)


def key_of(text: str) -> NoiseKey | None:
    return KEY if formats.random_bits(get(text)) else None


def values(*shape: int, seed: int = 0) -> Tensor:
    """Normal values; of each seventh row another magnitude, and zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.dim() > 1:
        x[::7] *= 2.0**-12
        x[1::7] *= 2.0**9
        x[2::7, ..., ::3] = 0.0
    return x


def check(x: Tensor, text: str, axis: int = -1) -> Quantized:
    """``x`` packed, which must stand for the cast of ``x``."""
    key = key_of(text)
    q = aqnsim.quantize(x, text, axis, key=key)
    assert same_bits(q.dequantize(), aqnsim.cast(x, text, axis, key=key)), (text, x.shape, x.dtype, axis)
    return q


# ---- what they stand for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_dequantize_is_the_cast_along_every_axis(text: str) -> None:
    x = values(9, 3, 70)
    for dtype in DTYPES:
        for axis in axes_of(text, 3):
            check(x.to(dtype), text, axis)
    for shape in ((37,), (0,), (3, 0), (0, 3), ()):
        x = values(*shape)
        for axis in axes_of(text, max(x.dim(), 1)):
            q = check(x, text, axis)
            assert (q.shape, q.dtype, q.axis) == (x.shape, x.dtype, axis)


@pytest.mark.parametrize("text", BLOCKS)
def test_dequantize_is_the_cast_of_strided_tensors(text: str) -> None:
    x = values(70, 66)
    for view in (x.t(), x[:, ::2], x[::3], x[1:2].expand(33, 66), x.t()[5:, 3::2]):
        assert not view.is_contiguous()
        for axis in axes_of(text, 2):
            same = aqnsim.quantize(view.contiguous(), text, axis, key=key_of(text))
            q = check(view, text, axis)
            assert torch.equal(q.codes, same.codes)


@pytest.mark.parametrize("text", [t for t in BLOCKS if not formats.random_bits(get(t))])
def test_dequantize_is_the_cast_of_blocks_of_any_magnitude(text: str) -> None:
    generator = torch.Generator().manual_seed(1)
    power = torch.exp2(torch.randint(-145, 120, (130, 1), generator=generator).float())
    for x in (torch.randn(130, 256, generator=generator) * power, torch.zeros(2, 256), -torch.zeros(2, 256)):
        check(x, text)


def refusal(x: Tensor, text: str) -> str:
    """What is said where a tensor cannot be packed; nothing where it can."""
    try:
        check(x, text)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("text", NAMED_AND_BLOCKS)
def test_a_nan_is_stored_or_refused(text: str) -> None:
    x = values(4, 70)
    x[1, 5], x[2, 6], x[3, 69] = torch.nan, torch.inf, -torch.inf
    if message := refusal(x, text):
        assert "cannot store the NaN values of the input; remove them first" in message
        assert not element_of(get(text)).has_nan
        assert aqnsim.cast(x, text, key=key_of(text)).isnan().any()


@pytest.mark.parametrize("text", ["int8", "fp4_e2m1", "mxfp4(special=element)", "mxint8(special=element)"])
def test_a_nan_without_a_code_is_refused(text: str) -> None:
    x = torch.ones(64)
    x[3] = torch.nan
    with pytest.raises(ConfigError, match=r"cannot store the NaN values.*choose nan=zero or nan=max"):
        aqnsim.quantize(x, text)
    name, _, fields = text.rstrip(")").partition("(")
    for nan in ("zero", "max"):
        check(x, f"{name}({', '.join(filter(None, [fields, f'nan={nan}']))})")


@pytest.mark.parametrize("text", ["mxfp4", "mxint8", "nvfp4(scale=torchao)", "int4_g128", "hif4"])
def test_a_nan_is_stored_where_the_scale_of_its_block_has_a_code_for_it(text: str) -> None:
    x = values(4, 256)
    x[1, 5] = torch.nan
    assert check(x, text).dequantize()[1, 5].isnan()


def test_a_stochastic_cast_is_packed_with_the_same_random_bits() -> None:
    x, rows = values(6, 64), torch.tensor([9, 4, 1, 0, 7, 3])
    q = aqnsim.quantize(x, "mxfp4", rounding="stochastic-8", key=KEY, rows=rows)
    assert q.format == "mxfp4(rounding=stochastic-8)"
    assert same_bits(q.dequantize(), aqnsim.cast(x, "mxfp4", rounding="stochastic-8", key=KEY, rows=rows))
    assert not torch.equal(q.codes, aqnsim.quantize(x, "mxfp4", rounding="stochastic-8", key=KEY).codes)


def test_many_values_are_encoded_as_few_are() -> None:
    x = torch.from_numpy(random_bits((1 << 20) + 5, seed=4).copy())  # more than are encoded at a time
    codes = aqnsim.quantize(x, "fp8_e5m2").codes
    assert torch.equal(codes[-1000:], aqnsim.quantize(x[-1000:], "fp8_e5m2").codes)
    assert torch.equal(codes[:1000], aqnsim.quantize(x[:1000], "fp8_e5m2").codes)


@pytest.mark.parametrize(
    ("text", "codes", "scales"),
    [
        ("mxfp4", 6 * 33, 6 * 3),
        ("mxfp6_e3m2", 6 * 51, 6 * 3),  # 66 codes fill 17 groups of four, of three bytes each
        ("mxfp8_e4m3", 6 * 66, 6 * 3),
        ("int2", 6 * 17, 0),
        ("int4_g128", 6 * 33, 6 * 4),
        ("hif4", 6 * 33, 6 * 2 * 4),
        ("bf16", 6 * 66 * 2, 0),
        ("tf32", 6 * 66 * 4, 0),
    ],
)
def test_the_size_is_that_of_the_codes_and_the_scales(text: str, codes: int, scales: int) -> None:
    q = aqnsim.quantize(values(6, 66), text)
    assert q.codes.nbytes == codes
    assert q.nbytes == codes + scales + 4


# ---- packing --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 5, 6, 8, 16, 20]),
    shape=st.lists(st.integers(0, 13), max_size=3).map(tuple),
    order=st.sampled_from(["low-first", "high-first"]),
    seed=st.integers(0, 99),
)
def test_unpack_gives_back_what_was_packed(bits: int, shape: tuple[int, ...], order: Any, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits, order)
    assert torch.equal(unpack(packed, bits, codes.shape, order), codes)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_codes_fill_bytes_as_digits_fill_a_number(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (24,), generator=torch.Generator().manual_seed(0))
    digits = [f"{code:0{bits}b}" for code in codes.tolist()]
    number = int("".join(digits), 2).to_bytes(3 * bits, "big")
    assert bytes(pack(codes, bits, "high-first").tolist()) == number
    number = int("".join(reversed(digits)), 2).to_bytes(3 * bits, "little")
    assert bytes(pack(codes, bits, "low-first").tolist()) == number


def test_a_tensors_elements_are_those_of_its_codes() -> None:
    x = torch.tensor([[6.0, -0.5, 1.0]])
    q = aqnsim.quantize(x * 4, "mxfp4")
    assert torch.equal(q.elements(), x)
    assert q.codes.tolist() == [[0x97, 0x02]]


# ---- the layouts of other libraries ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mx() -> Any:
    return pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_codes_and_scales_are_the_bytes_of_torchao_mx(name: str, rule: str, dtype: torch.dtype, mx: Any) -> None:
    element = {
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
    }[name]
    x = values(128, 256).to(dtype)
    scales, codes = mx.to_mx(x, element, 32, mx.ScaleCalculationMode(rule))
    q = aqnsim.quantize(x, f"{name}(scale={rule})")
    ours = unpack(q.codes, 6, q.shape).to(torch.uint8) if "fp6" in name else q.codes  # torchao does not pack them
    assert torch.equal(ours, codes.view(torch.uint8))
    assert q.scales is not None
    assert torch.equal(q.scales, scales.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_codes_and_scales_are_the_bytes_of_torchao_nvfp4(dtype: torch.dtype) -> None:
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = values(128, 256).to(dtype)
    of_tensor = nvfp4.per_tensor_amax_to_scale(x.abs().max())
    scales, codes = nvfp4.nvfp4_quantize(x, 16, of_tensor)
    q = aqnsim.quantize(x, "nvfp4(scale=torchao)")
    assert torch.equal(q.codes, codes)
    assert q.scales is not None
    assert torch.equal(q.scales.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(q.tensor_scale, of_tensor)


def test_codes_and_scales_are_the_bytes_of_compressed_tensors_nvfp4() -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    args = library.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    x = values(128, 256)
    blocks = x.unflatten(-1, (16, 16))
    of_tensor = utils.generate_gparam(x.min(), x.max())
    scales, _ = utils.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=of_tensor)
    codes = nvfp4.pack_fp4_to_uint8(forward.quantize(x, scales, None, args, global_scale=of_tensor))
    q = aqnsim.quantize(x, "nvfp4(scale=compressed_tensors)")
    assert torch.equal(q.codes, codes)
    assert q.scales is not None
    assert torch.equal(q.scales.float(), scales)
    assert torch.equal(q.tensor_scale.reshape(1), of_tensor)


def test_codes_of_6_bits_are_the_bytes_of_compressed_tensors() -> None:
    mxfp6 = pytest.importorskip("compressed_tensors.compressors.mxfp6.helpers")
    q = aqnsim.quantize(values(16, 64), "mxfp6_e2m3")
    assert torch.equal(q.codes, mxfp6.pack_fp6_to_uint8(q.elements()))


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (127, 5), (129, 4), (300, 13), (32, 40), (0, 4), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float32])
def test_swizzled_scales_are_those_of_torchao(shape: tuple[int, int], dtype: torch.dtype) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = torch.randint(0, 120, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = swizzle(scales)
    assert flat.dtype == dtype
    assert flat.numel() == -(-shape[0] // 128) * 128 * -(-shape[1] // 4) * 4
    if flat.numel():
        assert torch.equal(flat.float(), utils.to_blocked(scales.float()).flatten())
        assert torch.equal(unswizzle(flat, *shape).float(), utils.from_blocked(flat.float(), *shape))
    assert torch.equal(unswizzle(flat, *shape).float(), scales.float())


def test_what_cannot_be_swizzled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"swizzle: expected scales \[rows, blocks\], got shape \[4\]"):
        swizzle(torch.zeros(4))
    with pytest.raises(ConfigError, match="unswizzle: 129 x 4 scales fill 1024 entries, got 512"):
        unswizzle(torch.zeros(512), 129, 4)


# ---- files ----------------------------------------------------------------------------------------------------------


def same(a: Quantized, b: Quantized) -> bool:
    plain = all(getattr(a, field) == getattr(b, field) for field in ("format", "shape", "dtype", "axis"))
    assert plain, (a, b)
    pairs = [(a.codes, b.codes), (a.tensor_scale, b.tensor_scale)]
    assert (a.scales is None) == (b.scales is None)
    if a.scales is not None and b.scales is not None:
        pairs.append((a.scales, b.scales))
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(-1), y.view(-1)) for x, y in pairs)


def test_files_give_back_every_format(tmp_path: Path) -> None:
    packed = {
        f"layer.{number}.weight": aqnsim.quantize(values(5, 70).to(dtype), text, key=key_of(text))
        for number, (text, dtype) in enumerate((t, d) for t in NAMED_AND_BLOCKS for d in DTYPES)
    }
    packed["columns"] = aqnsim.quantize(values(5, 70), "mxfp4", axis=0)
    packed["scalar"], packed["empty"] = (aqnsim.quantize(x, "mxfp4") for x in (torch.tensor(1.5), torch.ones(3, 0)))
    save(packed, tmp_path / "all.safetensors")
    found = load(tmp_path / "all.safetensors")
    assert found.keys() == packed.keys()
    assert [name for name in packed if not same(packed[name], found[name])] == []
    assert same_bits(found["columns"].dequantize(), packed["columns"].dequantize())
    assert [p.name for p in tmp_path.iterdir()] == ["all.safetensors"]


def test_a_files_entries_can_be_read_by_others(tmp_path: Path) -> None:
    q = aqnsim.quantize(values(5, 70), "mxfp4")
    save({"a.b": q, "plain": aqnsim.quantize(values(3), "bf16")}, tmp_path / "x.safetensors")
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as file:
        assert set(file.keys()) == {"a.b.codes", "a.b.scales", "a.b.tensor_scale", "plain.codes", "plain.tensor_scale"}
        assert torch.equal(file.get_tensor("a.b.codes"), q.codes)
        about = json.loads(file.metadata()["aqnsim.quantized"])
    assert about["a.b"] == {"format": "mxfp4", "shape": [5, 70], "dtype": "float32", "axis": 1}


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    old, new = (aqnsim.quantize(values(64, seed=seed), "mxfp4") for seed in (0, 1))
    save({"a": old}, path)

    def failing(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ConfigError, match=r"x.safetensors' cannot be written: .*No space left on device"):
        save({"a": new}, path)
    monkeypatch.undo()
    assert same(load(path)["a"], old)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_save_that_is_interrupted_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save({"a": aqnsim.quantize(values(64), "mxfp4")}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written_or_read_are_named(tmp_path: Path) -> None:
    q = aqnsim.quantize(values(64), "mxfp4")
    with pytest.raises(ConfigError, match=r"none/x.safetensors' cannot be written"):
        save({"a": q}, tmp_path / "none/x.safetensors")
    with pytest.raises(ConfigError, match=r"cannot be written: .*directory"):
        save({"a": q}, tmp_path)
    with pytest.raises(ConfigError, match=r"none.safetensors': no such file"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ConfigError, match=r"text.safetensors': not a safetensors file"):
        load(tmp_path / "text.safetensors")
    save_file({"a.codes": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="holds no quantized tensors of aqnsim; expected one written by save"):
        load(tmp_path / "other.safetensors")


def test_a_file_with_a_format_that_is_not_known_is_refused(tmp_path: Path) -> None:
    q = aqnsim.quantize(values(64), "mxfp4")
    entries = {"a.codes": q.codes, "a.tensor_scale": q.tensor_scale}
    about = {"a": {"format": "mxfp5", "shape": [64], "dtype": "float32", "axis": 0}}
    save_file(entries, tmp_path / "x.safetensors", metadata={"aqnsim.quantized": json.dumps(about)})
    with pytest.raises(UnknownNameError, match="unknown format 'mxfp5'"):
        load(tmp_path / "x.safetensors")
