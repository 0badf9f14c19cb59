"""The random Hadamard transform against a matrix product, and what makes it a step around a cast."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as sylvester
from torch import Tensor
from values import same_bits

import aqnsim
from aqnsim import ConfigError, NoiseKey
from aqnsim.rotation import SIZES, TE_SIGNS

KEY = NoiseKey(seed=0, site="demo")
every_size = pytest.mark.parametrize("size", SIZES)


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@every_size
def test_it_is_a_product_with_sylvester_s_matrix(size: int) -> None:
    x, signs = tensor(5, 3 * size), torch.where(tensor(size) > 0, 1.0, -1.0)
    matrix = torch.from_numpy(sylvester(size)).double() / size**0.5
    expected = (x.double().view(5, 3, size) * signs) @ matrix
    got = aqnsim.hadamard(x, size, signs=signs)
    assert torch.allclose(got.double(), expected.view(5, -1), atol=2e-6)


def test_sums_of_integers_are_exact() -> None:
    x = torch.randint(-100, 100, (4, 64), generator=torch.Generator().manual_seed(1)).float()
    expected = (x.view(4, 4, 16) @ torch.from_numpy(sylvester(16)).float()) / 4
    assert torch.equal(aqnsim.hadamard(x), expected.view(4, 64))


@every_size
@pytest.mark.parametrize("signs", [None, KEY], ids=["plain", "random"])
def test_the_inverse_brings_back_what_was_transformed(size: int, signs: NoiseKey | None) -> None:
    x = tensor(3, 2 * size, 4)
    there = aqnsim.hadamard(x, size, axis=1, signs=signs)
    assert not torch.allclose(there, x)
    assert torch.allclose(aqnsim.hadamard(there, size, axis=1, signs=signs, inverse=True), x, atol=1e-6)


def test_a_product_of_two_transformed_operands_is_the_product() -> None:
    a, b = tensor(8, 64), tensor(16, 64)
    rotated = aqnsim.hadamard(a, signs=torch.tensor(TE_SIGNS)) @ aqnsim.hadamard(b, signs=torch.tensor(TE_SIGNS)).T
    assert torch.allclose(rotated, a @ b.T, atol=1e-5)


def test_signs_of_a_key_are_a_function_of_it() -> None:
    x = torch.eye(128)
    first = aqnsim.hadamard(x, 128, signs=KEY)
    assert same_bits(aqnsim.hadamard(x, 128, signs=KEY), first)
    assert not same_bits(aqnsim.hadamard(x, 128, signs=NoiseKey(seed=1, site="demo")), first)
    signs = first[:, 0] * 128**0.5  # column 0 of H is all ones
    assert torch.allclose(signs.abs(), torch.ones(128))
    assert 40 < int((signs > 0).sum()) < 88


def test_it_spreads_an_outlier_that_a_block_format_cannot_hold() -> None:
    x = tensor(64, 64) * 0.01
    x[:, 5] = 10.0

    def error(y: Tensor) -> float:
        return float((y - x)[:, :5].square().mean())

    rotated = aqnsim.hadamard(aqnsim.cast(aqnsim.hadamard(x, 64, signs=KEY), "mxfp8_e4m3"), 64, signs=KEY, inverse=True)
    assert error(aqnsim.cast(x, "mxint8")) > 0.9 * float(x[:, :5].square().mean())  # the small values are lost
    assert float((rotated - x).square().mean()) < 0.02


def test_its_gradient_is_its_inverse() -> None:
    x, g = tensor(2, 32).requires_grad_(), tensor(2, 32)
    y = aqnsim.hadamard(x, 32, signs=KEY)
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], aqnsim.hadamard(g, 32, signs=KEY, inverse=True), atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda t: aqnsim.hadamard(t.float(), 16).double(), tensor(16).double().requires_grad_(), eps=1e-2, atol=1e-3
    )


def test_bfloat16_is_computed_in_fp32_and_rounded_once() -> None:
    x = tensor(4, 32).bfloat16()
    assert same_bits(aqnsim.hadamard(x), aqnsim.hadamard(x.float()).bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 24}, "size must be one of 16, 32, 64, 128, got 24"),
        ({"axis": 2}, "axis 2 is out of range"),
        ({"size": 64}, "has 32 elements, expected a multiple of 64"),
        ({"signs": torch.ones(8)}, "signs must be 16 values"),
        ({"signs": torch.zeros(16)}, "signs must be 16 values"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aqnsim.hadamard(torch.ones(2, 32), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a float32, bfloat16 or float16 tensor"):
        aqnsim.hadamard(torch.ones(16, dtype=torch.float64))
