"""Ten million random bit patterns through every element format, kernel against reference and against the exact model.

All 2^32 are for ``python tests/exhaustive/sweep.py``, which takes minutes; its outcome is recorded and checked here.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from exhaustive.sweep import RESULTS, ROUNDINGS, U32, staircase
from texts import ELEMENTS
from values import bits, random_bits

from aqnsim import formats, reference
from aqnsim.backends import cpu
from aqnsim.formats import Format, element_of

MANY = 10_000_000


def kernel(x: np.ndarray, fmt: Format) -> U32:
    return bits(cpu.cast(torch.from_numpy(x), str(fmt), -1, 0, None, None, False)[0].numpy())


def model(x: np.ndarray, name: str, fmt: Format) -> U32:
    patterns = x.view(np.uint32)
    magnitudes, negative = patterns & 0x7FFFFFFF, patterns >> 31 == 1
    result = np.full(len(x), 0x7FC00000, np.uint32)
    for sign in (False, True):
        starts, values = staircase(name, fmt.rounding, fmt.overflow, sign)
        which = (negative == sign) & (magnitudes <= 0x7F800000)
        result[which] = values[np.searchsorted(starts, magnitudes[which], side="right") - 1]
    return result


@pytest.mark.parametrize("name", ELEMENTS)
def test_ten_million_random_inputs(name: str) -> None:
    fmt, x = element_of(formats.get(name)), random_bits(MANY, seed=31)
    got = kernel(x, fmt)
    assert np.array_equal(got, model(x, name, fmt))
    for part in range(0, MANY, MANY // 10):
        here = slice(part, part + MANY // 10)
        assert np.array_equal(got[here], bits(reference.round_to(x[here], fmt)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ELEMENTS)
def test_a_million_random_inputs_by_every_rounding(name: str, rounding: str) -> None:
    fmt, x = element_of(formats.with_rounding(formats.get(name), rounding)), random_bits(1_000_000, seed=32)
    got = kernel(x, fmt)
    assert np.array_equal(got, model(x, name, fmt))
    assert np.array_equal(got[:100_000], bits(reference.round_to(x[:100_000], fmt)))


def test_the_recorded_sweep_covers_every_element_format_without_a_mismatch() -> None:
    outcomes = json.loads(RESULTS.read_text())
    assert {o["format"] for o in outcomes} == set(ELEMENTS)
    own = {n: element_of(formats.get(n)).rounding for n in ELEMENTS}
    assert set(own.items()) <= {(o["format"], o["rounding"]) for o in outcomes}
    assert [o for o in outcomes if o["mismatches"] or o["inputs"] != 1 << 32] == []
