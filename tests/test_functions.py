"""Functions from tables: the bits of the reference, the stated bounds, order, special values, gradients, graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from values import EDGES, random_bits, same_bits

from aqnsim import ConfigError, UnknownNameError, functions
from aqnsim.approximation import FUNCTIONS, LIMITS, Table, parse
from aqnsim.reference import functions as reference

EXP, RECIPROCAL = "table(function='exp', index_bits=6)", "table(function='reciprocal', index_bits=6)"
RSQRT, TANH, ERF = (f"table(function='{name}', index_bits=6)" for name in ("rsqrt", "tanh", "erf"))
BOTH = f"{EXP} + {RECIPROCAL}"

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
}
TABLES = [Table(f, bits, order) for f in FUNCTIONS for bits in (1, 2, 5, 8, 12, 16) for order in (0, 1)]
TABLES += [Table(f, bits, 1, newton) for f in ("reciprocal", "rsqrt") for bits in (3, 6, 10) for newton in (1, 2, 3)]
every_table = pytest.mark.parametrize("table", TABLES, ids=str)

LAYERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "softmax": (lambda x, w, b: functions.softmax(x, -1, EXP), lambda x, w, b: _reference("softmax", x, -1, EXP)),
    "softmax, reciprocal": (
        lambda x, w, b: functions.softmax(x, 0, BOTH),
        lambda x, w, b: _reference("softmax", x, 0, BOTH),
    ),
    "rms_norm": (
        lambda x, w, b: functions.rms_norm(x, w, 1e-6, 0, RSQRT),
        lambda x, w, b: _reference("rms_norm", x, w, 1e-6, 0, RSQRT),
    ),
    "rms_norm, offset": (
        lambda x, w, b: functions.rms_norm(x, w, 1e-5, 1, RSQRT),
        lambda x, w, b: _reference("rms_norm", x, w, 1e-5, 1, RSQRT),
    ),
    "layer_norm": (
        lambda x, w, b: functions.layer_norm(x, w, b, 1e-5, RSQRT),
        lambda x, w, b: _reference("layer_norm", x, w, b, 1e-5, RSQRT),
    ),
    "silu": (lambda x, w, b: functions.silu(x, EXP), lambda x, w, b: _reference("silu", x, EXP)),
    "silu, reciprocal": (lambda x, w, b: functions.silu(x, BOTH), lambda x, w, b: _reference("silu", x, BOTH)),
    "gelu, erf": (lambda x, w, b: functions.gelu(x, "erf", ERF), lambda x, w, b: _reference("gelu", x, "erf", ERF)),
    "gelu, tanh": (
        lambda x, w, b: functions.gelu(x, "tanh", TANH),
        lambda x, w, b: _reference("gelu", x, "tanh", TANH),
    ),
}
EXACT_LAYERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": lambda x, w, b: x.softmax(-1),
    "softmax, reciprocal": lambda x, w, b: x.softmax(0),
    "rms_norm": lambda x, w, b: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6),
    "rms_norm, offset": lambda x, w, b: torch.nn.functional.rms_norm(x, w.shape, 1 + w, 1e-5),
    "layer_norm": lambda x, w, b: torch.nn.functional.layer_norm(x, w.shape, w, b, 1e-5),
    "silu": lambda x, w, b: torch.nn.functional.silu(x),
    "silu, reciprocal": lambda x, w, b: torch.nn.functional.silu(x),
    "gelu, erf": lambda x, w, b: torch.nn.functional.gelu(x),
    "gelu, tanh": lambda x, w, b: torch.nn.functional.gelu(x, approximate="tanh"),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def _reference(name: str, *arguments: Any) -> Any:
    held = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments[:-1]]
    return getattr(reference, name)(*held, parse(arguments[-1]))


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def approximated(x: Tensor, table: Table) -> Tensor:
    return functions.evaluate(x, table.function, str(table))


def sweep(function: str) -> Tensor:
    """Dense inputs over the range in which a function has normal results, ascending."""
    if function == "exp":
        return torch.linspace(-87.3, 88.5, 200_001)
    if function in LIMITS:
        return torch.linspace(-10, 10, 200_001)
    significand, exponent = torch.linspace(1, 2, 2001)[:-1], torch.arange(-126.0, 126)
    return (significand * torch.exp2(exponent)[:, None]).flatten()


# ---- bits -----------------------------------------------------------------------------------------------------------


@every_table
def test_every_value_has_the_bits_of_the_reference(table: Table) -> None:
    x = np.concatenate([random_bits(50_000, seed=1), EDGES, -EDGES, sweep(table.function).numpy()[::9]])
    expected = reference.evaluate(x, table.function, parse(str(table)))
    assert expected.dtype == np.float32
    assert same_bits(approximated(torch.from_numpy(x), table), torch.from_numpy(expected))


@pytest.mark.parametrize("text", [EXP, BOTH])
def test_a_sigmoid_has_the_bits_of_the_reference(text: str) -> None:
    x = np.concatenate([random_bits(50_000, seed=2), EDGES, -EDGES, sweep("exp").numpy()[::9]])
    got = functions.evaluate(torch.from_numpy(x), "sigmoid", text)
    assert same_bits(got, torch.from_numpy(reference.evaluate(x, "sigmoid", parse(text))))


@every_layer
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (4, 1), (2, 3, 64), (1, 129), (0, 4)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-20, 1e20])
def test_every_layer_has_the_bits_of_the_reference(layer: str, shape: tuple[int, ...], scale: float) -> None:
    torch_path, numpy_path = LAYERS[layer]
    if layer == "softmax, reciprocal" and shape[0] == 0:
        shape = (4, 0)
    x, w, b = tensor(*shape) * scale, tensor(shape[-1], seed=1), tensor(shape[-1], seed=2)
    if shape[-1] == 0 and "norm" in layer:
        shape = (0, 4)
    assert same_bits(torch_path(x, w, b), torch.from_numpy(np.ascontiguousarray(numpy_path(x, w, b))))


@every_layer
def test_strides_change_nothing(layer: str) -> None:
    x, w, b = tensor(6, 40)[:, ::2], tensor(20, seed=1), tensor(20, seed=2)
    assert same_bits(LAYERS[layer][0](x, w, b), LAYERS[layer][0](x.contiguous(), w, b))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(-(2**18), 2**18), min_size=1, max_size=40))
def test_a_tree_of_halves_adds_every_term_once(terms: list[int]) -> None:
    assert functions._tree_sum(torch.tensor(terms).float()).item() == sum(terms)  # of integers, exact in any order


# ---- error and order ------------------------------------------------------------------------------------------------


@every_table
def test_the_error_is_within_its_bound(table: Table) -> None:
    x = sweep(table.function)
    y, exact = approximated(x, table).double(), EXACT[table.function](x.double())
    error, bound = (y - exact).abs(), torch.full_like(exact, table.max_error)
    if table.function not in LIMITS:
        error = error / exact
    if table.function == "exp":
        bound += 2**-23 * x.abs()
    assert (error <= bound).all(), (error / bound).max()
    if not table.newton and table.max_error > 2**-18:
        assert (error / bound).max() > 0.3  # the bound says something
    if table.function == "exp":  # where x log2(e) is exact enough, the table alone decides
        assert (error <= 1.02 * table.max_error)[x.abs() < 0.1].all()


@pytest.mark.parametrize("table", [t for t in TABLES if not t.newton], ids=str)
def test_without_newton_steps_a_function_keeps_its_order(table: Table) -> None:
    base = sweep(table.function)
    near = torch.from_numpy(random_bits(200_000, seed=3).copy())
    near = near[near.isfinite() & ((near > 0) | (table.function not in ("reciprocal", "rsqrt")))]
    edge = torch.tensor([1.0, 2.0, 4.0, 0.5, *(i / 16 for i in range(1, 64))])
    steps = torch.cat([edge, edge.nextafter(edge + 9), edge.nextafter(edge - 9)])  # around the ends of intervals
    y = approximated(torch.cat([base, near, steps]).sort().values, table)
    low, high = (y[1:], y[:-1]) if table.function in ("reciprocal", "rsqrt") else (y[:-1], y[1:])
    assert (low <= high).all()


@pytest.mark.parametrize("function", ["exp", "reciprocal", "rsqrt"])
@pytest.mark.parametrize("order", [0, 1])
def test_powers_are_scaled_exactly(function: str, order: int) -> None:
    table = Table(function, 3, order)
    x = torch.linspace(1, 4, 301)[:-1]
    if function == "reciprocal":
        assert torch.equal(approximated(x * 2.0**40, table), approximated(x, table) * 2.0**-40)
    if function == "rsqrt":
        assert torch.equal(approximated(x * 2.0**40, table), approximated(x, table) * 2.0**-20)
        assert not torch.equal(approximated(x * 2, table) * math.sqrt(2), approximated(x, table))
    if function == "exp":
        assert approximated(torch.tensor([0.0]), table).item() == 1.0


def test_tables_meet_their_entries() -> None:
    for bits in (2, 5):
        nodes = torch.tensor([1 + i / 2**bits for i in range(2**bits)])
        for order in (0, 1):
            table = Table("reciprocal", bits, order)
            assert torch.equal(approximated(nodes, table), nodes.double().reciprocal().float())


# ---- special values -------------------------------------------------------------------------------------------------


@every_table
def test_special_values_are_those_of_the_exact_function(table: Table) -> None:
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    assert same_bits(approximated(ends, table), EXACT[table.function](ends))
    large = torch.tensor([3e38, -3e38, 200.0, -200.0])
    if table.function == "exp":
        assert approximated(large, table).tolist() == [torch.inf, 0.0, torch.inf, 0.0]
    if table.function in LIMITS:
        assert approximated(large, table).tolist() == [1.0, -1.0, 1.0, -1.0]
    if table.function == "rsqrt":
        assert approximated(torch.tensor([-1e-45, -1.0]), table).isnan().all()


@pytest.mark.parametrize("function", ["reciprocal", "rsqrt"])
def test_subnormal_inputs_are_numbers_as_any_other(function: str) -> None:
    table = Table(function, 8)
    x = torch.tensor([2.0**-149, 3 * 2.0**-149, 2.0**-130, 2.0**-127, 1.5 * 2.0**-127])
    exact = EXACT[function](x.double()).float()
    y = approximated(x, table)
    assert torch.equal(y.isinf(), exact.isinf())
    kept = ~y.isinf()
    assert ((y[kept] / exact[kept] - 1).abs() <= table.max_error).all()


def test_subnormal_results_are_rounded_once() -> None:
    table = Table("exp", 16)
    x = torch.linspace(-103.9, -87.4, 5001)
    steps = (approximated(x, table).double() - torch.exp(x.double())).abs() * 2.0**149
    relative = (table.max_error + 2**-23 * x.abs()) * torch.exp(x.double()) * 2.0**149
    assert (steps <= 0.5 + relative).all()
    large = torch.tensor([2.0**127, 1.5 * 2.0**127])
    y = approximated(large, Table("reciprocal", 10))
    assert y.tolist() == [2.0**-127, pytest.approx(2.0**-127 / 1.5, rel=1e-6)]


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", EXACT)
@pytest.mark.parametrize("order", [0, 1])
def test_the_gradient_is_the_exact_derivative_at_the_result(function: str, order: int) -> None:
    text = str(Table("exp" if function == "sigmoid" else function, 5, order))
    x = (torch.linspace(0.1, 5, 400) if function in ("reciprocal", "rsqrt") else torch.linspace(-5, 5, 400)).double()
    y = functions.evaluate(x.float(), function, text)
    expected = {
        "exp": y,
        "reciprocal": -(y**2),
        "rsqrt": -(y**3) / 2,
        "tanh": 1 - y**2,
        "erf": 2 / math.sqrt(math.pi) * torch.exp(-(x.float() ** 2)),
        "sigmoid": y * (1 - y),
    }[function]
    at = x.float().requires_grad_()
    (gradient,) = torch.autograd.grad(functions.evaluate(at, function, text).sum(), at)
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-7)
    fine = str(Table("exp" if function == "sigmoid" else function, 16))
    (gradient,) = torch.autograd.grad(functions.evaluate(at, function, fine).sum(), at)
    inputs = x.requires_grad_()
    (exact,) = torch.autograd.grad(EXACT[function](inputs).sum(), inputs)
    assert torch.allclose(gradient.double(), exact, rtol=1e-4, atol=1e-5)


@every_layer
def test_a_layer_and_its_gradient_are_near_the_exact_ones(layer: str) -> None:
    arguments = [tensor(5, 33), tensor(33, seed=1), tensor(33, seed=2)]
    g = tensor(5, 33, seed=3)
    found = []
    for layers in ({k: v[0] for k, v in LAYERS.items()}, EXACT_LAYERS):
        inputs = [t.clone().requires_grad_() for t in arguments]
        y = layers[layer](*inputs)
        found.append((y.detach(), *torch.autograd.grad(y, inputs, g, allow_unused=True)))
    for ours, exact in zip(*found, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert (ours - exact).abs().max() < 5e-3 * exact.abs().max()
    assert not torch.equal(found[0][0], found[1][0])


def test_a_softmax_s_gradient_is_that_of_its_own_probabilities() -> None:
    x, g = tensor(4, 9).requires_grad_(), tensor(4, 9, seed=1)
    for text in ("table(function='exp', index_bits=2, order=0)", BOTH):
        p = functions.softmax(x, -1, text)
        expected = p * (g - (g * p).sum(-1, keepdim=True))
        tolerance = 1e-6 if text != BOTH else 1e-3  # rows of p sum to 1 but for the reciprocal's error
        assert torch.allclose(torch.autograd.grad(p, x, g)[0], expected, atol=tolerance)


def test_gradients_of_saturated_activations_are_finite() -> None:
    x = torch.tensor([-1000.0, -100.0, -20.0, 20.0, 100.0, 1000.0]).requires_grad_()
    for y in (functions.silu(x, BOTH), functions.gelu(x, "erf", ERF), functions.gelu(x, "tanh", TANH)):
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(gradient, torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), atol=1e-6)


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 33, 1000])
def test_rows_of_a_softmax_sum_to_one_within_the_bound(n: int) -> None:
    x = tensor(200, n) * 5
    rounding = (math.ceil(math.log2(n)) + 2) * 2.0**-24
    coarse = "table(function='exp', index_bits=1, order=0)"
    assert ((functions.softmax(x, -1, coarse).double().sum(-1) - 1).abs() <= rounding).all()
    table = parse(RECIPROCAL).of("reciprocal")
    assert table is not None
    off = (functions.softmax(x, -1, f"{coarse} + {RECIPROCAL}").double().sum(-1) - 1).abs()
    assert (off <= rounding + table.max_error).all()
    assert n == 1 or off.max() > rounding


def test_masked_entries_of_a_softmax_are_zero() -> None:
    x = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, -torch.inf, 3.0], [-torch.inf] * 3])
    p = functions.softmax(x, -1, BOTH)
    assert p[0].tolist() == [0.5, 0.0, 0.5]
    assert p[1].tolist() == [0.0, 0.0, 1.0]
    assert p[2].isnan().all()  # as torch


def test_a_softmax_runs_along_any_axis() -> None:
    x = tensor(3, 4, 5)
    for dim in (0, 1, 2, -1, -2):
        expected = functions.softmax(x.movedim(dim, -1), -1, EXP).movedim(-1, dim)
        assert same_bits(functions.softmax(x, dim, EXP), expected)


def test_norms_without_weights_are_those_with_ones() -> None:
    x, one = tensor(4, 12), torch.ones(12)
    assert same_bits(functions.rms_norm(x, None, 1e-6, 0, RSQRT), functions.rms_norm(x, one, 1e-6, 0, RSQRT))
    assert same_bits(
        functions.layer_norm(x, None, None, 1e-5, RSQRT), functions.layer_norm(x, one, 0 * one, 1e-5, RSQRT)
    )


def test_a_bfloat16_weight_is_widened_before_the_offset_is_added() -> None:
    x, w = tensor(4, 12), (tensor(12, seed=1) / 100).bfloat16()
    assert same_bits(functions.rms_norm(x, w, 1e-6, 1, RSQRT), functions.rms_norm(x, w.float(), 1e-6, 1, RSQRT))


# ---- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*FUNCTIONS, "sigmoid"])
def test_opcheck_evaluate(function: str) -> None:
    text = BOTH if function == "sigmoid" else str(Table(function, 4))
    for x in (tensor(3, 5).abs() + 0.1, (tensor(4, 6).abs() + 0.1).t().requires_grad_()):
        torch.library.opcheck(torch.ops.aqnsim.evaluate.default, (x, function, text))


def test_compiled_layers_and_gradients_equal_eager_ones() -> None:
    def every(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        return [torch_path(x, w, b) for torch_path, _ in LAYERS.values()]

    inputs = [tensor(6, 70).requires_grad_(), tensor(70, seed=1), tensor(70, seed=2)]
    torch.compiler.reset()
    eager, compiled = every(*inputs), torch.compile(every, fullgraph=True)(*inputs)
    for name, ours, theirs in zip(LAYERS, compiled, eager, strict=True):
        assert same_bits(ours, theirs), name
    for name, ours, theirs in zip(LAYERS, compiled, eager, strict=True):
        g = tensor(6, 70, seed=3)
        gradients = [torch.autograd.grad(y, inputs[0], g, retain_graph=True)[0] for y in (ours, theirs)]
        assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6), name


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: functions.evaluate(x.bfloat16(), "exp", EXP), "exp: expected a float32 tensor, got torch.bfloat16"),
        (lambda x: functions.evaluate([1.0], "exp", EXP), "exp: expected a float32 tensor, got list"),
        (lambda x: functions.softmax(x.double(), -1, EXP), "softmax: expected a float32 tensor, got torch.float64"),
        (lambda x: functions.softmax(x, 2, EXP), r"softmax: axis 2 of shape \[2, 3\] must exist and hold an element"),
        (lambda x: functions.softmax(x[:, :0], -1, EXP), r"axis -1 of shape \[2, 0\] must exist and hold"),
        (lambda x: functions.softmax(x, -1, RSQRT), "softmax needs a table of 'exp'"),
        (lambda x: functions.softmax(x, -1, f"{EXP} + {RSQRT}"), "softmax computes no 'rsqrt'"),
        (lambda x: functions.rms_norm(x, None, 1e-6, 0, BOTH), "rms_norm needs a table of 'rsqrt'"),
        (lambda x: functions.layer_norm(x, None, None, 1e-6, EXP), "layer_norm needs a table of 'rsqrt'"),
        (lambda x: functions.silu(x, RECIPROCAL), "sigmoid needs a table of 'exp'"),
        (lambda x: functions.gelu(x, "tanh", ERF), "gelu of variant 'tanh' needs a table of 'tanh'"),
        (lambda x: functions.evaluate(x, "exp", "exp"), "expected table"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(torch.ones(2, 3))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'sigmoid'"):
        functions.evaluate(torch.ones(2), "sigmoids", EXP)
    with pytest.raises(UnknownNameError, match="known: erf, tanh"):
        functions.gelu(torch.ones(2), "none", ERF)
