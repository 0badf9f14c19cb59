"""The conformance suite: our backends pass it, and it finds bugs that were planted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aqnsim import BackendError, UnknownNameError, backends, conformance, errors, formats
from aqnsim.backends.compose import compositions
from aqnsim.cli import main
from aqnsim.conformance import CHAINS, GRADES, LAWS, Check
from aqnsim.formats import element_of
from aqnsim.receipts import STATS

Op = Callable[..., tuple[Tensor, ...]]


def failures(checks: list[Check]) -> list[Check]:
    return [c for c in checks if not c.passed]


def test_the_cpu_backend_passes() -> None:
    checks = conformance.run("cpu", "cpu", quick=True)
    assert failures(checks) == []
    assert {c.grade for c in checks} == set(GRADES)
    names = {c.name for c in checks}
    assert {f"edges {name}" for name in formats.ALL} <= names
    assert {f"perturb {text}" for text in CHAINS} <= names


@pytest.mark.parametrize("name", [n for n, law in LAWS.items() if law.grade != "bit"] + ["layout", "linear"])
def test_the_reference_passes_what_it_does_not_define(name: str) -> None:
    assert failures(conformance.run("reference", quick=True, laws=[name])) == []


def test_every_registry_is_covered() -> None:
    assert {m.kind for text in CHAINS for m in errors.chain(text)} == set(errors.MODELS)
    choices = [formats.get(t) for quick in (True, False) for t in LAWS["choices"].cases(quick)]
    rules = {(f.scale_format, f.scale) for f in choices if isinstance(f, formats.BlockFormat)}
    assert rules >= {(k, r) for k, found in formats.SCALE_RULES.items() for r in found if k != "hif4"}
    roundings = {element_of(formats.get(t)).rounding for t in LAWS["roundings"].cases(False)}
    assert roundings >= set(formats.ROUNDINGS) - {"stochastic"}


@pytest.mark.parametrize("name", formats.ALL)
def test_edges_hold_every_number_and_tie_of_a_small_format(name: str) -> None:
    element = element_of(formats.get(name))
    x = set(conformance.edges(element).tolist())
    if element.bits > 8:
        assert {element.max, element.min_normal, element.min_subnormal, element.min_subnormal / 2} <= x
        return
    values = element.values()
    ties = {(a + b) / 2 for a, b in pairwise(values)}
    assert x >= {*values, *ties, *(-v for v in values), *(-t for t in ties)}


# ---- planted bugs ---------------------------------------------------------------------------------------------------


def ties_away(cast: Op) -> Op:
    def run(x: Tensor, fmt: str, *args: Any) -> tuple[Tensor, ...]:
        f = formats.get(fmt)
        away = element_of(f).rounding == "nearest-even"
        return cast(x, str(formats.with_rounding(f, "nearest-away")) if away else fmt, *args)

    return run


def no_sign_of_zero(cast: Op) -> Op:
    def run(*args: Any) -> tuple[Tensor, ...]:
        y, stats = cast(*args)
        return y + 0.0, stats

    return run


def flushed_subnormals(cast: Op) -> Op:
    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return cast(x.where((x.abs() >= 2.0**-126) | x.isnan(), 0.0 * x), *args)

    return run


def nan_becomes_zero(cast: Op) -> Op:
    def run(*args: Any) -> tuple[Tensor, ...]:
        y, stats = cast(*args)
        return y.where(~y.isnan(), 0.0), stats

    return run


def rows_ignored(op: Op) -> Op:
    return lambda *args: op(*(None if is_rows(a) else a for a in args))


def first_columns_ignored(op: Op) -> Op:
    return lambda *args: op(*(a[:, 0] if is_rows(a) and a.dim() == 2 else a for a in args))


def is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() > 0


def noise_by_tile(perturb: Op) -> Op:
    """Each 128 columns draw what the first 128 drew."""

    def run(y: Tensor, error: str, key: int, step: Tensor, rows: Any, *args: Any) -> tuple[Tensor, ...]:
        whole = perturb(y, error, key, step, rows, *args)
        if not y.numel() or args[0] is not None:
            return whole
        tiles = [perturb(tile, error, key, step, rows, *args)[0] for tile in y.reshape(*y.shape or (1,)).split(128, -1)]
        return torch.cat(tiles, -1).reshape(y.shape), whole[1]

    return run


def rounded_before_the_error(perturb: Op) -> Op:
    def run(y: Tensor, error: str, key: int, step: Tensor, rows: Any, m: Any, dtype: Any, measure: bool) -> Any:
        return perturb(y.to(dtype or y.dtype).to(y.dtype), error, key, step, rows, m, dtype, measure)

    return run


def global_generator(perturb: Op) -> Op:
    def run(y: Tensor, error: str, *args: Any) -> tuple[Tensor, ...]:
        out, stats = perturb(y, error, *args)
        return (out + 0.1 * torch.randn_like(out) if "gaussian" in error else out), stats

    return run


def one_more_hit(perturb: Op) -> Op:
    def run(*args: Any) -> tuple[Tensor, ...]:
        y, stats = perturb(*args)
        stats[STATS.index("hits")] += stats[0]
        return y, stats

    return run


def loose_sums(op: Op) -> Op:
    def run(*args: Any) -> tuple[Tensor, ...]:
        y, stats = op(*args)
        stats[STATS.index("reference2")] *= 1 + 1e-5
        return y, stats

    return run


def always_measures(op: Op) -> Op:
    return lambda *args: op(*args[:-1], True)


def carry_lost(cast: Op) -> Op:
    """What rounds up to the next power of two keeps the exponent that it had."""

    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        y, stats = cast(x, *args)
        power = (y.float().frexp().mantissa.abs() == 0.5) & (y.abs() > x.abs())
        return y.where(~power, y / 2), stats

    return run


def scale_off_by_one(cast: Op) -> Op:
    """The block's exponent is one too small."""

    def run(x: Tensor, fmt: str, *args: Any) -> tuple[Tensor, ...]:
        y, stats = cast(x, fmt, *args)
        return (cast(x * 2, fmt, *args)[0] / 2 if fmt.startswith("mx") else y), stats

    return run


def saturates_to_infinity(cast: Op) -> Op:
    def run(x: Tensor, fmt: str, *args: Any) -> tuple[Tensor, ...]:
        y, stats = cast(x, fmt, *args)
        return y.where(~((y.abs() < x.abs()) & (y.abs() == y.abs().max())), y.sign() * torch.inf), stats

    return run


def axes_swapped(cast: Op) -> Op:
    def run(x: Tensor, fmt: str, axis: int, *args: Any) -> tuple[Tensor, ...]:
        block = isinstance(formats.get(fmt), formats.BlockFormat) and x.dim() > 1
        return cast(x, fmt, {-1: -2, -2: -1}[axis] if block else axis, *args)

    return run


def blocks_of_the_flat_tensor(cast: Op) -> Op:
    """Blocks go on from one row into the next."""

    def run(x: Tensor, fmt: str, axis: int, *args: Any) -> tuple[Tensor, ...]:
        if axis != -1 or fmt != "mxfp4":
            return cast(x, fmt, axis, *args)
        y, stats = cast(x.reshape(1, -1), fmt, axis, *args)
        return y.reshape(x.shape), stats

    return run


def rounds_to_nearest_instead(cast: Op) -> Op:
    return lambda x, fmt, *args: cast(x, fmt.replace("rounding=stochastic", "rounding=nearest-even"), *args)


def biased_stochastic(cast: Op) -> Op:
    """One random bit where many were asked for."""
    return lambda x, fmt, *args: cast(x, fmt.replace("=stochastic)", "=stochastic-1)"), *args)


def clock_ignored(op: Op) -> Op:
    stopped = torch.tensor(0)
    return lambda *args: op(*(stopped if is_clock(a) else a for a in args))


def is_clock(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 0


def key_ignored(perturb: Op) -> Op:
    return lambda y, error, key, *args: perturb(y, error, 1, *args)


def applied_twice(perturb: Op) -> Op:
    def run(y: Tensor, error: str, *args: Any) -> tuple[Tensor, ...]:
        return perturb(perturb(y, error, *args[:-2], y.dtype, False)[0], error, *args)

    return run


def absolute_not_relative(perturb: Op) -> Op:
    return lambda y, error, *args: perturb(y, error.replace("relative-gaussian", "absolute-gaussian"), *args)


def too_small(perturb: Op) -> Op:
    return lambda y, error, *args: perturb(y, error.replace("sigma=0.05", "sigma=0.04"), *args)


def never_applied(perturb: Op) -> Op:
    def run(y: Tensor, error: str, *args: Any) -> tuple[Tensor, ...]:
        _, stats = perturb(y, error, *args)
        return y.to(args[-2] or y.dtype), stats

    return run


def no_straight_through(backward: Op) -> Op:
    """The derivative of rounding, which is 0."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        *grads, stats = backward(*args)
        return *(0 * g for g in grads), stats

    return run


def gradient_of_the_master(backward: Op) -> Op:
    """The backward multiplies by the weight as it was before its cast."""
    return lambda g, x, w, spec, cast_weight, *args: backward(g, x, w, spec, False, *args)


def gradients_share_the_forwards_noise(backward: Op) -> Op:
    def run(*args: Any) -> tuple[Tensor, ...]:
        return backward(*(a[:4] * 3 if isinstance(a, list) and len(a) == 12 else a for a in args))

    return run


def operands_swapped(matmul: Op) -> Op:
    return lambda a, b, transposed, *args: matmul(a, b if transposed else b.flip(-1), transposed, *args)


def sums_in_bfloat16(linear: Op) -> Op:
    def run(x: Tensor, w: Tensor, *args: Any) -> tuple[Tensor, ...]:
        y, stats = linear(x, w, *args)
        return y.bfloat16().to(y.dtype), stats

    return run


def nibbles_swapped(quantize: Op) -> Op:
    def run(x: Tensor, fmt: str, *args: Any) -> tuple[Tensor, ...]:
        codes, *rest = quantize(x, fmt, *args)
        packed = codes.dtype == torch.uint8 and element_of(formats.get(fmt)).bits == 4
        return (codes << 4 | codes >> 4 if packed else codes), *rest

    return run


def nothing_written(op: Op) -> Op:
    return lambda *args: None  # type: ignore[return-value]


def error_left_out(stage: Op) -> Op:
    return lambda x, steps, *args: stage(x, [steps[0], "", steps[2]], *args)


MUTANTS = {
    "carry lost": ("cast", carry_lost, ("edges", "every bf16")),
    "scale off by one": ("cast", scale_off_by_one, ("edges", "blocks")),
    "saturates to infinity": ("cast", saturates_to_infinity, ("edges",)),
    "axes swapped": ("cast", axes_swapped, ("blocks", "shapes")),
    "blocks of the flat tensor": ("cast", blocks_of_the_flat_tensor, ("shapes", "blocks")),
    "rounds to nearest instead": ("cast", rounds_to_nearest_instead, ("stochastic", "stochastic mean")),
    "one random bit": ("cast", biased_stochastic, ("stochastic", "stochastic mean")),
    "cast ignores the clock": ("cast", clock_ignored, ("stochastic",)),
    "perturb ignores the clock": ("perturb", clock_ignored, ("perturb", "normal")),
    "perturb ignores the key": ("perturb", key_ignored, ("perturb", "normal")),
    "error applied twice": ("perturb", applied_twice, ("perturb",)),
    "absolute, not relative": ("perturb", absolute_not_relative, ("perturb",)),
    "error too small": ("perturb", too_small, ("perturb",)),
    "error never applied": ("perturb", never_applied, ("perturb", "normal", "receipts")),
    "no straight-through gradient": ("linear_backward", no_straight_through, ("linear",)),
    "gradient of the master weight": ("linear_backward", gradient_of_the_master, ("linear",)),
    "gradients share the forward's noise": ("linear_backward", gradients_share_the_forwards_noise, ("linear",)),
    "gradients of a product share its noise": ("matmul_backward", gradients_share_the_forwards_noise, ("matmul",)),
    "operands swapped": ("matmul", operands_swapped, ("matmul",)),
    "sums in bfloat16": ("linear", sums_in_bfloat16, ("linear sums",)),
    "nibbles swapped": ("quantize", nibbles_swapped, ("quantize",)),
    "nothing written": ("cast_out", nothing_written, ("out",)),
    "error left out of a stage": ("stage", error_left_out, ("stage",)),
    "ties away": ("cast", ties_away, ("edges", "every bf16", "linear")),
    "no sign of zero": ("cast", no_sign_of_zero, ("edges", "every bf16")),
    "flushed subnormals": ("cast", flushed_subnormals, ("edges", "blocks")),
    "NaN becomes 0": ("cast", nan_becomes_zero, ("edges", "blocks")),
    "cast ignores rows": ("cast", rows_ignored, ("stochastic", "layout")),
    "cast ignores first columns": ("cast", first_columns_ignored, ("stochastic", "layout")),
    "cast sums loosely": ("cast", loose_sums, ("receipts",)),
    "cast always measures": ("cast", always_measures, ("receipts",)),
    "noise by tile": ("perturb", noise_by_tile, ("perturb", "layout")),
    "perturb ignores first columns": ("perturb", first_columns_ignored, ("perturb", "layout")),
    "rounded before the error": ("perturb", rounded_before_the_error, ("perturb",)),
    "global generator": ("perturb", global_generator, ("perturb", "determinism")),
    "one more hit": ("perturb", one_more_hit, ("perturb",)),
}


@pytest.fixture
def registered() -> Iterator[Callable[[dict[str, Op]], str]]:
    """Registers the cpu backend with some ops replaced, under a name that is gone afterwards."""
    with ExitStack() as until_the_end:

        def register(ops: dict[str, Op]) -> str:
            cpu = backends.get("cpu").ops
            primitives = {op: ops.get(op, cpu[op]) for op in ("cast", "perturb", "gemm")}
            everything = {**cpu, **compositions(**primitives), **ops}  # type: ignore[arg-type]
            return until_the_end.enter_context(backends.registered(backends.Backend("mutant", ("cpu",), everything)))

        yield register


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_is_found(mutant: str, registered: Callable[[dict[str, Op]], str]) -> None:
    op, planted, laws = MUTANTS[mutant]
    name = registered({op: planted(backends.get("cpu").ops[op])})
    for law in laws:
        found = failures(conformance.run(name, quick=True, laws=[law]))
        assert found, f"{law} did not see it"
        assert all(c.name.startswith(law) and c.detail for c in found)


def test_a_weight_that_is_not_cast_is_found(registered: Callable[[dict[str, Op]], str]) -> None:
    linear = backends.get("cpu").ops["linear"]
    name = registered({"linear": lambda x, w, bias, spec, cast_weight, *rest: linear(x, w, bias, spec, False, *rest)})
    assert failures(conformance.run(name, quick=True, laws=["linear"]))
    assert failures(conformance.run(name, quick=True, laws=["linear sums"]))


def test_what_a_backend_raises_is_a_failed_check(registered: Callable[[dict[str, Op]], str]) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    checks = conformance.run(registered({"quantize": broken}), quick=True, laws=["quantize"])
    assert {c.detail for c in failures(checks)} == {"RuntimeError: no kernel image is available"}
    assert len(failures(checks)) == len(formats.ALL)


def test_laws_of_ops_that_a_backend_lacks_do_not_apply() -> None:
    cpu = backends.get("cpu").ops
    with backends.registered(backends.Backend("casts", ("cpu",), {"cast": cpu["cast"]})) as name:
        checks = conformance.run(name, quick=True, laws=["strides", "perturb", "linear"])
    assert [c.name for c in failures(checks)] == ["offers"]
    assert "no cast_out, elements, quantize" in checks[0].detail
    assert len(checks) == 1 + len(formats.ALL)


def test_a_violation_names_the_value(registered: Callable[[dict[str, Op]], str]) -> None:
    name = registered({"cast": ties_away(backends.get("cpu").ops["cast"])})
    found = failures(conformance.run(name, quick=True, laws=["edges"]))
    check = next(c for c in found if c.name == "edges fp4_e2m1")
    assert "edges in float32" in check.detail
    assert "of 0x1.0000000000000p-2: expected 0x0.0p+0, got 0x1.0000000000000p-1" in check.detail


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="backend"):
        conformance.run("cpo")
    with pytest.raises(UnknownNameError, match="did you mean 'edges'"):
        conformance.run("cpu", laws=["edge"])
    with pytest.raises(BackendError, match="serves cpu, not 'cuda'"):
        conformance.run("cpu", "cuda")


def test_the_suite_needs_neither_pytest_nor_scipy_nor_kernels() -> None:
    code = (
        "import json, sys; from aqnsim import conformance; conformance.run('reference', quick=True, laws=['shapes']);"
        "print(json.dumps([m for m in ('pytest', 'scipy', 'typer', 'rich', 'safetensors', 'aqnsim._core')"
        " if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_backend_that_conforms_is_reported_with_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["conformance", "--backend", "cpu", "--quick", "--law", "stage", "--law", "matmul"]
    page, data = tmp_path / "page.html", tmp_path / "checks.json"
    assert main([*arguments, "--html", str(page), "--json", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "cpu on cpu: conforms, 9 of 9 checks hold" in printed
    found = json.loads(data.read_text())
    assert found["conforms"] is True
    assert {c["law"] for c in found["checks"]} == {"offers", "stage", "matmul"}
    assert set(found["not_run"]) == set(LAWS) - {"stage", "matmul"}
    assert "cpu on cpu: conforms" in page.read_text()


def test_a_backend_that_does_not_is_reported_with_status_1_and_where(
    registered: Callable[[dict[str, Op]], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, page = registered({"cast": carry_lost(backends.get("cpu").ops["cast"])}), tmp_path / "page.html"
    assert main(["conformance", "--backend", name, "--quick", "--law", "edges", "--html", str(page)]) == 1
    printed = capsys.readouterr().out
    assert "mutant on cpu: FAILS" in printed
    assert "edges fp8_e4m3" in printed
    assert "What failed" in page.read_text()
    assert page.read_text().count("<td>edges ") > len(formats.ALL) // 2
