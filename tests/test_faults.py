"""Memory faults: what is read back, where they hit, how often, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from texts import MX, PARAMETRIC, all_texts, axes_of
from torch import Tensor
from values import random_bits, same_bits

import aqnsim
from aqnsim import ConfigError, NoiseKey, UnknownNameError, formats, reference
from aqnsim.faults import faulty_cast
from aqnsim.formats import BlockFormat, element_of, get
from aqnsim.quantized import pack, unpack
from aqnsim.reference import faults

NAMED = [*formats.ALL, *(str(get(name)) for name in PARAMETRIC)]
BLOCKS = [t for t in all_texts() if isinstance(get(t), BlockFormat)]
SCALED = [t for t in BLOCKS if get(t).block != "tensor"]  # type: ignore[union-attr]
KEY = NoiseKey(seed=3, site="memory", step=2)
WORD = KEY.clock & 0xFFFFFFFF


def with_targets(texts: list[str]) -> list[tuple[str, str]]:
    """Each text with each target that a fault can have in it."""
    return [(text, target) for text in texts for target in faults.TARGETS if target == "codes" or text in SCALED]


every_format = pytest.mark.parametrize("text", [*NAMED, *(t for t in BLOCKS if t not in NAMED)])
every_scaled_format = pytest.mark.parametrize("text", SCALED)


def values(*shape: int, seed: int = 0) -> Tensor:
    """Normal values; of each seventh row another magnitude, and zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.dim() > 1:
        x[::7] *= 2.0**-12
        x[1::7] *= 2.0**9
        x[2::7, ..., ::3] = 0.0
    return x


def cast(x: Tensor, text: str, axis: int = -1, rows: Tensor | None = None) -> Tensor:
    drawn = bool(formats.random_bits(get(text)))
    return aqnsim.cast(x, text, axis, key=KEY if drawn else None, rows=rows if drawn else None)


def faulty(
    x: Tensor, text: str, axis: int = -1, target: str = "codes", rate: float = 1.0, bit: int | None = None, **more: Any
) -> tuple[Tensor, int, float]:
    return faulty_cast(x, text, axis, target=target, rate=rate, bit=bit, key=KEY.value, step=WORD, **more)


def packed(x: Tensor, text: str, axis: int = -1) -> aqnsim.Quantized:
    return aqnsim.quantize(x, text, axis, key=KEY if formats.random_bits(get(text)) else None)


def some_bits(width: int) -> list[int]:
    return list(range(width)) if width <= 8 else [0, 1, width // 2, width - 2, width - 1]


# ---- what is read back ----------------------------------------------------------------------------------------------


@every_format
def test_a_rate_of_zero_is_the_cast(text: str) -> None:
    x = values(9, 70)
    for dtype in (torch.float32, torch.bfloat16):
        for _, target in with_targets([text]):
            y, hits, expected = faulty(x.to(dtype), text, target=target, rate=0.0)
            assert same_bits(y, cast(x.to(dtype), text))
            assert (hits, expected) == (0, 0.0)


@every_format
def test_every_code_is_read_with_the_bit_flipped(text: str) -> None:
    x, element = values(5, 3, 70), element_of(get(text))
    for axis in axes_of(text, 3):
        q = packed(x, text, axis)
        codes = unpack(q.codes, element.bits, q.shape)
        for bit in some_bits(element.bits):
            flipped = dataclasses.replace(q, codes=pack(codes ^ (1 << bit), element.bits))
            y, hits, expected = faulty(x, text, axis, bit=bit)
            assert same_bits(y, flipped.dequantize()), (axis, bit)
            assert hits == expected == x.numel()


@every_scaled_format
def test_every_scale_is_read_with_the_bit_flipped(text: str) -> None:
    x = values(40, 3, 70)
    for axis in axes_of(text, 3):
        q = packed(x, text, axis)
        assert q.scales is not None
        raw = q.scales.view(torch.uint8 if q.scales.element_size() == 1 else torch.int32)
        for bit in some_bits(8 * raw.element_size()):
            flip = torch.tensor(1 << bit, dtype=torch.int64).to(raw.dtype)
            flipped = dataclasses.replace(q, scales=(raw ^ flip).view(q.scales.dtype))
            y, hits, expected = faulty(x, text, axis, "scales", bit=bit)
            assert same_bits(y, flipped.dequantize()), (axis, bit)
            assert hits == expected == q.scales.numel()


@pytest.mark.parametrize("name", ["fp4_e2m1", "int4", "fp8_e4m3", "hif8", "bf16"])
def test_a_single_code_by_hand(name: str) -> None:
    fmt = get(name)
    assert isinstance(fmt, formats.Format)
    for bit in range(fmt.bits):
        y, _, _ = faulty(torch.tensor([1.0, -1.0, 0.0]), name, bit=bit)
        expected = [fmt.decode(fmt.encode(v) ^ (1 << bit)) for v in (1.0, -1.0, 0.0)]
        assert same_bits(y, torch.tensor(expected))


def test_the_lowest_bit_of_an_mx_scale_is_a_factor_of_two_and_the_highest_2_to_the_128() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, -6.0]])  # of scale 2^0, code 127
    assert faulty(x, "mxfp4", target="scales", bit=7)[0].isnan().all()  # code 255
    assert torch.equal(faulty(x, "mxfp4", target="scales", bit=6)[0], x * 2.0**-64)
    assert torch.equal(faulty(2 * x, "mxfp4", target="scales", bit=0)[0], 4 * x)  # code 128


def test_bfloat16_is_rounded_once_after_reading() -> None:
    x = values(9, 64).bfloat16()
    for text, target in (("fp8_e4m3", "codes"), ("mxfp4", "scales"), ("int4_g128", "scales")):
        y, _, _ = faulty(x, text, target=target)
        assert same_bits(y, faulty(x.float(), text, target=target)[0].bfloat16())


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "target"), with_targets([*NAMED, *(t for t in BLOCKS if t not in NAMED)]))
def test_faults_have_the_bits_of_the_reference(text: str, target: str) -> None:
    fmt = get(text)
    for shape in ((9, 3, 70), (37,), (), (0, 3), (3, 0)):
        x = values(*shape)
        count = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else int(x.dim() == 0)
        rows = torch.randint(0, 1 << 62, (count,), generator=torch.Generator().manual_seed(1))
        for axis in axes_of(text, max(x.dim(), 1)):
            for rate, bit, given in ((0.3, None, rows), (0.6, 2 if element_of(fmt).bits > 2 else 0, None)):
                y, hits, _ = faulty(x, text, axis, target, rate, bit, rows=given)
                expected, hit = faults.faulty_cast(
                    x.numpy(),
                    fmt,
                    axis,
                    target=target,
                    rate=rate,
                    bit=bit,
                    key=KEY.value,
                    step=WORD,
                    rows=None if given is None else given.numpy(),
                )
                assert same_bits(y, torch.from_numpy(np.array(expected, np.float32))), (shape, axis, rate)
                assert hits == hit.sum()


@pytest.mark.parametrize(("text", "target"), with_targets([*NAMED, *(t for t in BLOCKS if "special" in t)]))
def test_bad_values_have_the_bits_of_the_reference(text: str, target: str) -> None:
    x = random_bits(12 * 64, seed=5).reshape(12, 64).copy()
    x[1] = 0
    y, _, _ = faulty(torch.from_numpy(x), text, target=target, rate=0.5)
    expected, _ = faults.faulty_cast(x, get(text), -1, target=target, rate=0.5, bit=None, key=KEY.value, step=WORD)
    assert same_bits(y, torch.from_numpy(expected))


@pytest.mark.parametrize("text", ["int8", "fp4_e2m1", "mxfp4(special=element)"])
def test_a_nan_that_no_code_holds_stays(text: str) -> None:
    x = torch.ones(64)
    x[3] = torch.nan
    y, hits, _ = faulty(x, text, bit=0)
    assert hits == 64
    assert y.isnan().nonzero().tolist() == [[3]]


def test_a_block_that_was_nan_by_its_scale_alone_reads_as_zeros() -> None:
    x = torch.ones(64)
    x[3] = torch.nan
    y, _, _ = faulty(x, "mxfp4", target="scales", bit=0)
    assert y[:32].tolist() == [0.0] * 32
    assert faulty(x, "mxfp4", bit=0)[0][:32].isnan().all()


@pytest.mark.parametrize("name", ["mxfp4", "fp8_e4m3", "int8"])
def test_a_stochastic_rounding_changes_no_hit(name: str) -> None:
    x, sign = 1 + values(50, 64).sigmoid(), element_of(get(name)).bits - 1
    stochastic = str(formats.with_rounding(get(name), "stochastic"))
    assert not same_bits(cast(x, name), cast(x, stochastic))
    hits = [faulty(x, text, rate=0.3, bit=sign)[0] != cast(x, text) for text in (name, stochastic)]
    assert torch.equal(*hits)
    assert 0.25 < hits[0].float().mean() < 0.35


# ---- where they hit -------------------------------------------------------------------------------------------------


def test_a_scale_s_fault_changes_its_block_and_no_other() -> None:
    x = values(64, 256).abs() + 0.5
    for text, size in (("mxfp4", 32), ("nvfp4", 16), ("int4_g128", 128), ("hif4", 64)):
        y, hits, _ = faulty(x, text, target="scales", rate=0.05, bit=1)
        changed = (y != cast(x, text)).unflatten(-1, (-1, size))
        assert 0 < hits == changed.any(-1).sum() < changed[..., 0].numel()
        if text != "hif4":  # whose elements may be 0
            assert torch.equal(changed.any(-1), (changed | (y == 0).view_as(changed)).all(-1))


def test_a_scale_of_a_tile_changes_the_tile() -> None:
    x = values(64, 64).abs() + 0.5
    y, hits, _ = faulty(x, "mxfp8_e4m3(block=16x32)", target="scales", rate=0.4, bit=0)
    changed = (y != cast(x, "mxfp8_e4m3(block=16x32)")).reshape(4, 16, 2, 32).any(3).any(1)
    assert 0 < hits == changed.sum() < 8


@pytest.mark.parametrize("bit", [None, 3])
def test_hits_are_as_many_as_their_rate_says(bit: int | None) -> None:
    x = torch.ones(2000, 500)
    for rate in (1e-4, 0.01, 0.5, 0.9):
        y, hits, expected = faulty(x, "fp8_e4m3", rate=rate, bit=bit)
        assert expected == pytest.approx(rate * x.numel(), rel=1e-4)
        assert abs(hits - expected) < 5 * math.sqrt(expected * (1 - rate))
        assert hits == (y != 1).sum()


def test_hits_are_spread_over_rows_and_columns_as_chance_spreads_them() -> None:
    y, hits, _ = faulty(torch.ones(400, 400), "int8", rate=0.1, bit=0)
    for counts in ((y != 1).sum(0).double(), (y != 1).sum(1).double()):
        chi2 = ((counts - hits / 400).square() / (hits / 400 * 0.9)).sum()
        assert abs(chi2 - 399) < 5 * math.sqrt(2 * 399)


@pytest.mark.parametrize("text", ["fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "tf32"])
def test_a_random_bit_is_each_as_often(text: str) -> None:
    fmt = element_of(get(text))
    x = torch.full((300, 200), 1.0)
    y, hits, _ = faulty(x, text)
    codes = reference.encode(y.numpy(), fmt)
    if fmt.has_nan:
        codes = codes[~np.isnan(y.numpy())]
    counts = [int((codes == fmt.encode(1.0) ^ (1 << bit)).sum()) for bit in range(fmt.bits)]
    assert hits == sum(counts) == x.numel()
    assert abs(np.array(counts) - hits / fmt.bits).max() < 5 * math.sqrt(hits / fmt.bits)


def test_a_fault_is_a_function_of_key_step_and_place() -> None:
    x = values(8, 64)
    one = faulty(x, "mxfp4", rate=0.2)[0]
    assert same_bits(one, faulty(x, "mxfp4", rate=0.2)[0])
    common = {"target": "codes", "rate": 0.2, "bit": None}
    for key, step in ((KEY.value + 1, WORD), (KEY.value, WORD + 1)):
        assert not same_bits(one, faulty_cast(x, "mxfp4", -1, key=key, step=step, **common)[0])  # type: ignore[arg-type]
    assert not same_bits(one, faulty(x, "mxfp4", rate=0.2, rows=torch.arange(8) + 1)[0])


def test_hits_of_a_small_rate_are_hits_of_a_larger_one() -> None:
    x = torch.ones(100, 100)
    few, many = (faulty(x, "int8", rate=rate, bit=0)[0] != 1 for rate in (0.01, 0.1))
    assert (many | ~few).all()
    assert few.any()


@pytest.mark.parametrize(
    ("text", "target"), with_targets(["bf16", "fp8_e4m3(rounding=stochastic)", "hif8", *MX, "int8_token", "hif4"])
)
def test_rows_have_their_faults_however_the_batch_is_split(text: str, target: str) -> None:
    x, rows = values(12, 70), torch.randperm(12, generator=torch.Generator().manual_seed(0)) << 20
    whole, hits, expected = faulty(x, text, target=target, rate=0.3, rows=rows)
    parts = [faulty(x[part], text, target=target, rate=0.3, rows=rows[part]) for part in torch.arange(12).split(5)]
    assert same_bits(whole, torch.cat([y for y, _, _ in parts]))
    assert hits == sum(n for _, n, _ in parts)
    assert expected == pytest.approx(sum(n for _, _, n in parts))
    batched = faulty(x.view(3, 4, 70), text, target=target, rate=0.3, rows=rows)[0]
    assert same_bits(whole, batched.view(12, 70))


def test_strides_change_nothing() -> None:
    x = values(66, 140)
    for view in (x.t(), x[:, ::2], x[::3]):
        for target in faults.TARGETS:
            expected = faulty(view.contiguous(), "mxfp4", target=target, rate=0.3)[0]
            assert same_bits(faulty(view, "mxfp4", target=target, rate=0.3)[0], expected)


def test_the_input_stays_as_it_is_and_no_gradient_passes() -> None:
    x = values(4, 64).requires_grad_()
    before = x.detach().clone()
    for text, target in with_targets(["bf16", "mxfp4", "fp8_e4m3_token"]):
        y, _, _ = faulty(x, text, target=target)
        assert not y.requires_grad
    assert same_bits(x.detach(), before)


@pytest.mark.parametrize("text", [t for t in [*NAMED, *BLOCKS] if t not in SCALED])
def test_scales_that_are_no_block_s_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"fault in scales: .*; use"):
        faulty(values(2, 8), text, target="scales")


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("bf16", {"target": "scales"}, "fault in scales: bf16 has none; use target='codes'"),
        ("fp8_e4m3_tensor", {"target": "scales"}, "the scale of fp8_e4m3_tensor is the whole tensor's"),
        ("fp8_e4m3", {"rate": 1.5}, r"rate must be 0, or a share from 2\^-32 to 1, got 1.5"),
        ("fp8_e4m3", {"rate": 1e-11}, r"rate must be 0, or a share from 2\^-32 to 1, got 1e-11"),
        ("fp8_e4m3", {"rate": math.nan}, "rate must be 0"),
        ("fp8_e4m3", {"bit": 8}, r"bit must be 0 \(the lowest\) .. 7 or None for a random one, got 8"),
        ("mxfp4", {"bit": 4}, r".. 3 or None"),
        ("mxfp4", {"bit": 8, "target": "scales"}, r".. 7 or None"),
        ("fp8_e4m3", {"bit": 1.0}, "got 1.0"),
        ("fp8_e4m3", {"rows": torch.arange(3)}, "expected 2 int64 rows, as"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        faulty(torch.ones(2, 64), text, **arguments)


def test_other_refusals() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'codes'"):
        faulty(torch.ones(2), "bf16", target="code")
    with pytest.raises(ConfigError, match="expected a float32, bfloat16 or float16 tensor"):
        faulty(torch.ones(2).double(), "bf16")
    with pytest.raises(ConfigError, match=r"step must be in 0\.\.2\^32-1"):
        faulty_cast(torch.ones(2), "bf16", -1, target="codes", rate=1.0, bit=0, key=0, step=-1)
