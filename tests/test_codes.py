"""Codes by the C++ kernels: those of the numpy definition, for every format, layout and input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from texts import all_texts, axes_of
from torch import Tensor
from values import critical, random_bits, same_bits

from aqnsim import _core, formats, reference
from aqnsim.backends import cpu
from aqnsim.backends import reference as slow
from aqnsim.formats import Format, element_of, get
from aqnsim.packing import code_dtype, pack, packed_shape

TEXTS = all_texts()
STEP = torch.tensor(5)
ELEMENTS: dict[str, Format] = {element_of(get(t)).name: element_of(get(t)) for t in TEXTS}


def assert_same_parts(x: Tensor, text: str, axis: int) -> None:
    parts = (backend.BACKEND.ops["quantize"](x, text, axis, 7, STEP, None) for backend in (cpu, slow))
    for got, expected in zip(*parts, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        if got.dtype == torch.float32:
            assert same_bits(got, expected)
        else:
            assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_is_decoded_and_encoded(name: str) -> None:
    fmt = ELEMENTS[name]
    codes = np.arange(min(fmt.codes, 1 << 19))
    values = torch.from_numpy(reference.decode(codes, fmt))
    packed, one = pack(torch.from_numpy(codes), fmt.bits), torch.ones(())
    decoded = cpu.BACKEND.ops["dequantize"](packed, one, one, str(fmt), 0, values.shape, torch.float32)
    assert same_bits(decoded, values)
    values = values[~(values < fmt.min)]  # a symmetric integer leaves its lowest code unused
    found = torch.empty(packed_shape(values.shape, fmt.bits), dtype=code_dtype(fmt.bits))
    lost = _core.encode(values.data_ptr(), found.data_ptr(), (1, len(values)), cpu._codes(fmt), 2)
    expected = pack(torch.from_numpy(reference.encode(values.numpy(), fmt)), fmt.bits)
    assert torch.equal(found.to(torch.int32), expected.to(torch.int32))
    assert lost == 0


@pytest.mark.parametrize("text", TEXTS)
def test_codes_and_scales_are_the_reference_s(text: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(35, 3, 70, generator=g)
    x[3], x[4, 1], x[5] = 0.0, -0.0, x[5] * 2.0**-130
    x[6:] *= torch.exp2(torch.randint(-40, 40, (29, 3, 1), generator=g).float())
    for dtype in (torch.float32, torch.bfloat16):
        for axis in axes_of(text, 3):
            assert_same_parts(x.to(dtype), text, axis)
        assert_same_parts(x.to(dtype).reshape(105, 70)[:, :64].contiguous(), text, 1)


@pytest.mark.parametrize("text", [t for t in TEXTS if element_of(get(t)).bits <= 8])
def test_every_critical_value_has_the_reference_s_code(text: str) -> None:
    x = torch.from_numpy(critical(element_of(get(text))))
    x = x[x.isfinite()] if element_of(get(text)).nan == "keep" and not element_of(get(text)).has_nan else x
    assert_same_parts(x, text, 0)
    pairs = torch.full((len(x), 32), float(element_of(get(text)).max))
    pairs[:, 5] = x  # each beside one that fixes the block's scale
    pairs = pairs[x.isfinite()]
    assert_same_parts(pairs, text, 1)
    assert_same_parts(pairs.bfloat16(), text, 1)


@pytest.mark.parametrize("text", ["mxfp8_e5m2", "mxfp8_e4m3", "nvfp4", "fp8_e4m3_token", "hif8", "hif4", "fp8_e5m2"])
def test_infinities_and_nans_have_the_reference_s_codes(text: str) -> None:
    x = torch.from_numpy(random_bits(1 << 16, seed=3).copy()).view(-1, 64)
    x[::2].nan_to_num_(0.0, 1.0, -1.0)
    assert_same_parts(x[:, :48].contiguous(), text, 1)
    assert_same_parts(x.nan_to_num(0.0), text, 1)


def test_codes_do_not_depend_on_threads() -> None:
    x, before = torch.randn(300, 704, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    for text in [t for t in formats.ALL if element_of(get(t)).bits <= 8 and element_of(get(t)).signed]:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            q = cpu.BACKEND.ops["quantize"](x, text, 1, 0, None, None)
            values = cpu.BACKEND.ops["dequantize"](*q, text, 1, x.shape, torch.bfloat16)
            found.append((q[0].view(torch.uint8), values))
        torch.set_num_threads(before)
        assert torch.equal(found[0][0], found[1][0])
        assert same_bits(found[0][1], found[1][1])
