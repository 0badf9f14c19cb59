"""Backends of a GPU, on one: the bits of the reference, receipts of the C++ kernels, streams and CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from chains import all_chains
from test_cpu import KEY, NAMES, TEXTS, assert_same_stats, normal_tensor
from texts import axes_of
from torch import Tensor
from values import all_bf16, random_bits, same_bits

from aqnsim import accumulator, backends, emulate
from aqnsim.backends import cpu
from aqnsim.backends import reference as slow
from aqnsim.rng import clock

GPU_BACKENDS = [name for name in ("cuda", "triton") if name in backends.names()]
CLOCK = torch.tensor(clock(5, "train", 3))
Ops = Mapping[str, Any]


@pytest.fixture(params=GPU_BACKENDS)
def name(request: pytest.FixtureRequest, gpu: torch.device) -> str:
    backends.use(request.param, "cuda")  # conftest puts the former ones back
    return request.param


@pytest.fixture
def ops(name: str) -> Ops:
    return backends.get(name).ops


def on(device: torch.device, *args: Any) -> list[Any]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


def back(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [r.cpu() for r in results]


# ---- conformance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_cast(ops: Ops, gpu: torch.device, text: str) -> None:
    bf16, wild = torch.from_numpy(all_bf16().copy()), torch.from_numpy(random_bits(1 << 16, seed=2).copy())
    cases = [(bf16[bf16.isfinite()], -1), (bf16.bfloat16().view(64, -1), -1), (wild.view(64, -1), -1)]
    cases += [(normal_tensor(129, 70, seed=3), axis) for axis in axes_of(text, 2)]
    cases += [(normal_tensor(64, 256, seed=4).bfloat16(), axis) for axis in axes_of(text, 2)]
    for x, axis in cases:
        got, stats = back(ops["cast"](*on(gpu, x, text, axis, KEY, CLOCK, None, True)))
        expected, expected_stats = cpu.cast(x, text, axis, KEY, CLOCK, None, True)
        assert same_bits(got, expected)
        assert_same_stats(stats, expected_stats, sums=False)
        quiet, _ = back(ops["cast"](*on(gpu, x, text, axis, KEY, CLOCK, None, False)))
        assert same_bits(quiet, expected)


@pytest.mark.parametrize("text", NAMES)
def test_cast_equals_the_definition_and_quantize_its_parts(ops: Ops, gpu: torch.device, text: str) -> None:
    x = normal_tensor(40, 96, seed=7) * 3
    for axis in axes_of(text, 2):
        for t in (x, x.bfloat16(), x.half()):
            got, stats = back(ops["cast"](*on(gpu, t, text, axis, KEY, CLOCK, None, True)))
            expected, expected_stats = slow.cast(t, text, axis, KEY, CLOCK, None, True)
            assert same_bits(got, expected)
            assert_same_stats(stats, expected_stats)
        parts = back(ops["elements"](*on(gpu, x, text, axis, KEY, CLOCK, None)))
        for part, wanted in zip(parts, slow.elements(x, text, axis, KEY, CLOCK, None), strict=True):
            assert torch.equal(part, wanted) if part.dtype == torch.int32 else same_bits(part, wanted)


@pytest.mark.parametrize("chain", all_chains())
def test_perturb(ops: Ops, gpu: torch.device, chain: str) -> None:
    y, rng = normal_tensor(37, 72, seed=11), np.random.default_rng(12)
    y[3, 5], y[4, 6], y[5] = torch.inf, torch.nan, 0.0
    ids = torch.from_numpy(rng.integers(0, 1 << 63, 37))
    pairs = torch.stack([ids, torch.from_numpy(rng.integers(0, 1 << 33, 37))], dim=1)
    for rows in (None, ids, pairs):
        for t in (y, y[:, :37].contiguous(), y.bfloat16()):
            magnitude = t.float().abs() * 2 + 1 if "absdot" in chain else None
            args = (t, chain, KEY, CLOCK, rows, magnitude, None, True)
            got, stats = back(ops["perturb"](*on(gpu, *args)))
            expected, expected_stats = cpu.perturb(*args)
            assert same_bits(got, expected)
            assert_same_stats(stats, expected_stats)


@pytest.mark.parametrize("unit", accumulator.MATRIX_UNITS)
def test_gemm(ops: Ops, gpu: torch.device, unit: str) -> None:
    if "gemm" not in ops:
        pytest.fail("this backend has no gemm")
    a, b = normal_tensor(2, 33, 100, seed=1).bfloat16(), normal_tensor(2, 100, 70, seed=2).bfloat16()
    assert same_bits(ops["gemm"](a.to(gpu), b.to(gpu), unit).cpu(), cpu.gemm(a, b, unit))


@pytest.mark.parametrize("profile", ["mxfp4-w4a4", "nvfp4-w4a4", "noise-5pct-all-ops"])
def test_receipts_of_a_model_are_those_of_the_cpu(name: str, gpu: torch.device, profile: str) -> None:
    def run(device: torch.device) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 32)).to(device)
        with emulate(model, profile) as emu:
            emu.begin_step(3)
            x = torch.linspace(-1, 1, 16 * 64).view(16, 64).to(device)
            model(x).square().mean().backward()
            return [r.to_dict() for r in emu.receipts()]

    # products are added in another order on a GPU: what was asked for and how often is the same, shares are alike
    for here, there in zip(run(gpu), run(torch.device("cpu")), strict=True):
        exact = ("site", "phase", "stream", "requested", "calls", "elements")
        assert {k: here[k] for k in exact} == {k: there[k] for k in exact}
        assert here["changed"] == pytest.approx(there["changed"], abs=0.02)


# ---- invariance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "fp8_e4m3_128x128", "mxfp4(rounding=stochastic)"])
def test_a_large_cast_repeats_itself_and_its_receipt(ops: Ops, gpu: torch.device, text: str) -> None:
    x = torch.randn(4096, 4096, device=gpu, dtype=torch.bfloat16)
    first, stats = ops["cast"](x, text, -1, KEY, CLOCK, None, True)
    for _ in range(3):
        again, other = ops["cast"](x, text, -1, KEY, CLOCK, None, True)
        assert torch.equal(again, first)
        assert torch.equal(stats, other)
    whole = cpu.cast(x.cpu(), text, -1, KEY, CLOCK, None, True)
    assert same_bits(first.cpu(), whole[0])
    assert_same_stats(stats.cpu(), whole[1])


def test_noise_does_not_depend_on_how_a_tensor_is_split(ops: Ops, gpu: torch.device) -> None:
    y, rows = torch.randn(600, 320, device=gpu), torch.randperm(600, device=gpu)

    def run(t: Tensor, ids: Tensor) -> Tensor:
        return ops["perturb"](t, "relative-gaussian(sigma=0.05)", KEY, CLOCK, ids, None, None, False)[0]

    whole = run(y, rows)
    assert torch.equal(torch.cat([run(y[i : i + 77], rows[i : i + 77]) for i in range(0, 600, 77)]), whole)
    order = torch.randperm(600, device=gpu)
    assert torch.equal(run(y[order], rows[order]), whole[order])
    assert torch.equal(run(y[:, :128], rows), whole[:, :128])


# ---- streams and graphs ---------------------------------------------------------------------------------------------


def test_kernels_run_on_the_current_stream(ops: Ops, gpu: torch.device) -> None:
    x = torch.randn(2048, 2048, device=gpu)
    expected = ops["cast"](x, "nvfp4", -1, KEY, CLOCK, None, False)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whatever runs on another stream is done long before
        late = x.clone()
        late.mul_(2).div_(2)
        got = ops["cast"](late, "nvfp4", -1, KEY, CLOCK, None, False)[0]
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("op", ["mxfp4", "nvfp4", "mxfp4(rounding=stochastic)", "relative-gaussian(sigma=0.05)"])
def test_a_recorded_graph_follows_its_input_and_its_clock(ops: Ops, gpu: torch.device, op: str) -> None:
    x, step = torch.randn(256, 512, device=gpu), CLOCK.to(gpu)

    def run() -> tuple[Tensor, Tensor]:
        if "gaussian" in op:
            return ops["perturb"](x, op, KEY, step, None, None, None, True)
        return ops["cast"](x, op, -1, KEY, step, None, True)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, and loads what it compiled
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stats = run()
    for value in (7, 8):
        x.copy_(torch.randn(256, 512))
        step.fill_(clock(value, "rollout"))
        graph.replay()
        expected, expected_stats = run()
        assert torch.equal(out, expected)
        assert torch.equal(stats, expected_stats)


def test_any_device_serves(ops: Ops) -> None:
    for index in range(torch.cuda.device_count()):
        x = torch.randn(64, 64, device=f"cuda:{index}")
        assert same_bits(
            ops["cast"](x, "mxfp4", -1, 0, None, None, False)[0].cpu(),
            cpu.cast(x.cpu(), "mxfp4", -1, 0, None, None, False)[0],
        )
