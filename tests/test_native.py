"""Products that the device makes itself: no error is emulated in them, and receipts say so. Backends elsewhere."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aqnsim
from aqnsim import BackendError, backends
from aqnsim.backends import Backend
from aqnsim.profiles import Profile, Rule
from aqnsim.profiles.spec import Forward, GradInput, OpSpec

EXAMPLE = Path(__file__).parents[1] / "examples" / "aqnsim-backend-example"
PAIR = ("int8_token", "int8_channel")
ERROR = "relative-gaussian(sigma=0.05)"


def profile(error: str | None = ERROR, grad_error: str | None = None, weight: str = PAIR[1]) -> Profile:
    spec = OpSpec(forward=Forward(input=PAIR[0], weight=weight, error=error), grad_input=GradInput(error=grad_error))
    return Profile(
        name="int8", description="", source={"definition": "a test"}, rules=(Rule(kind="linear", spec=spec),)
    )


@pytest.fixture
def chip() -> Iterator[list[tuple[int, ...]]]:
    """A backend that multiplies a pair of formats natively and writes down what it was given."""
    seen: list[tuple[int, ...]] = []

    def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, input: str, weight_format: str) -> Tensor:
        assert (input, weight_format) == PAIR
        seen.append(tuple(x.shape))
        return torch.nn.functional.linear(x, weight, bias) + 1  # not what an emulation would give

    ops = {**backends.get("cpu").ops, "native_linear": native_linear}
    with backends.registered(Backend("chip", ("cpu",), ops, native=(PAIR,))) as name:
        backends.use(name)
        yield seen


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))


def test_a_native_product_is_the_devices_and_its_receipt_says_what_was_left_out(chip: list[tuple[int, ...]]) -> None:
    m, x = model(), torch.randn(2, 3, 32)
    with aqnsim.emulate(m, profile()) as emu:
        y = m[0](x)
        m[1](y)
        found = [(r.site, r.stream, r.requested, r.calls) for r in emu.receipts() if r.phase == "train"]
        assert torch.equal(y, torch.nn.functional.linear(x.reshape(-1, 32), m[0].weight, m[0].bias).view(2, 3, 16) + 1)
        assert "native int8_token x int8_channel, without relative-gaussian(sigma=0.05)" in str(emu.report())
    text = f"native int8_token x int8_channel, without {ERROR}"
    assert found == [("0", "output", text, 1), ("1", "output", text, 1)]
    assert chip == [(6, 32), (6, 16)]


def test_gradients_of_a_native_product_are_straight_through_and_miss_as_the_profile_says(
    chip: list[tuple[int, ...]],
) -> None:
    m, x = model(), torch.randn(5, 32, requires_grad=True)
    with aqnsim.emulate(m, profile(error=None)):
        y = m[0](x)
        g = torch.randn_like(y)
        y.backward(g)
        m[1](y)
        cast_w, cast_x = aqnsim.cast(m[0].weight, PAIR[1]), aqnsim.cast(x, PAIR[0])
    assert torch.equal(x.grad, g @ cast_w)
    assert torch.equal(m[0].weight.grad, g.t() @ cast_x)
    m = model()
    with aqnsim.emulate(m, profile(grad_error=ERROR)) as emu:
        m(x).sum().backward()
        sigmas = [r.realised_sigma for r in emu.receipts() if r.stream == "grad-input"]
    assert len(sigmas) == 2
    assert all(s == pytest.approx(0.05, rel=0.5) for s in sigmas)


def test_what_is_not_native_is_emulated(chip: list[tuple[int, ...]]) -> None:
    for asked, native in ((profile(weight="mxfp4"), True), (profile(), False)):
        m = model()
        with aqnsim.emulate(m, asked, native=native) as emu:
            m(torch.randn(4, 32))
            assert {r.requested for r in emu.receipts() if r.stream == "output"} == {ERROR}
    assert chip == []


def test_native_products_compile(chip: list[tuple[int, ...]]) -> None:
    m, x = model(), torch.randn(4, 32)
    with aqnsim.emulate(m, profile()):
        eager = m(x)
        compiled = torch.compile(m, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)


def test_backends_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(BackendError, match="declares native formats but has no op 'native_linear'"):
        backends.register(Backend("mine", ("cpu",), {}, native=(PAIR,)))
    with pytest.raises(aqnsim.UnknownNameError, match="did you mean 'mxfp4'"):
        backends.register(Backend("mine", ("cpu",), {"native_linear": print}, native=(("mxfp4", "mxfp5"),)))


# ---- other packages -------------------------------------------------------------------------------------------------


def test_an_entry_point_must_load_a_backend_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("other", "tests_other:BACKEND", backends.GROUP)
    module = types.ModuleType("tests_other")
    monkeypatch.setitem(sys.modules, "tests_other", module)
    monkeypatch.setattr(backends, "_plugins", lambda: {"other": point})
    for held, shown in ((3, "a int"), (Backend("another", ("cpu",), {}), "backend 'another'")):
        module.BACKEND = held  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match=rf"'other'.*loads {shown}: expected an .*Backend named 'other'"):
            backends.get("other")
    assert "other" in backends.names()


def test_the_example_package_is_found_conforms_and_multiplies(tmp_path: Path) -> None:
    """Installed as a user would, into a folder of its own."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(EXAMPLE)]
    subprocess.run(install, check=True)
    code = """
import torch, aqnsim
from aqnsim import backends, conformance
assert "example" in backends.names()
checks = conformance.run("example", quick=True, laws=["edges", "shapes", "linear", "native"])
failed = [c.name for c in checks if not c.passed]
assert any(c.law == "native" for c in checks)
assert not failed, failed
aqnsim.use_backend("example")
m = torch.nn.Linear(64, 32)
x = torch.randn(8, 64)
with aqnsim.emulate(m, "int8-w8a8") as emu:
    y = m(x)
    print(emu.receipts()[-1].requested)
with aqnsim.emulate(m, "int8-w8a8", native=False) as emu:
    emulated = m(x)
assert torch.allclose(y, emulated, rtol=1e-5, atol=1e-5)
"""
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "native int8_token x int8_channel"


# ---- Ascend ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The Ascend backends over a stub of what torch_npu documents, on CPU tensors."""

    def npu_dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype in (torch.bfloat16, torch.float16)
        scale = x.float().abs().amax(-1) / 127
        return (x.float() / scale[..., None]).round().clamp(-128, 127).to(torch.int8), scale

    def npu_quant_matmul(
        x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype
    ) -> Tensor:
        assert x1.dtype == x2.dtype == torch.int8
        assert scale.dtype == pertoken_scale.dtype == torch.float32
        assert scale.shape == (x2.shape[1],)
        assert pertoken_scale.shape == (x1.shape[0],)
        assert output_dtype in (torch.bfloat16, torch.float16)
        y = (x1.int() @ x2.int()).float() * scale * pertoken_scale[:, None]
        return (y if bias is None else y + bias.float()).to(output_dtype)

    stub = types.ModuleType("torch_npu")
    stub.npu_dynamic_quant = npu_dynamic_quant  # type: ignore[attr-defined]
    stub.npu_quant_matmul = npu_quant_matmul  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", stub)
    from aqnsim.backends import npu as module

    yield module
    for name in ("npu", "npu-host"):
        backends._REGISTERED.pop(name, None)
    sys.modules.pop("aqnsim.backends.npu", None)


@pytest.mark.parametrize("host", [False, True])
def test_an_npu_multiplies_int8_and_its_gradients_are_those_of_the_emulation(npu: Any, host: bool) -> None:
    m, x = model().bfloat16(), torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    with backends.registered(Backend("stub", ("cpu",), npu.ops(host), npu.NATIVE)) as name:
        backends.use(name)
        with aqnsim.emulate(m, profile(error=None)) as emu:
            y = m(x)
            y.sum().backward()
            assert {r.requested for r in emu.receipts()} == {"native int8_token x int8_channel"}
    native = x.grad
    x.grad = None
    backends.use("cpu")
    with aqnsim.emulate(m, profile(error=None)):
        emulated = m(x)
        emulated.sum().backward()
    assert torch.allclose(y.float(), emulated.float(), rtol=2**-6, atol=2**-6)
    assert torch.allclose(native.float(), x.grad.float(), rtol=2**-6, atol=2**-6)


def test_an_npu_refuses_what_it_does_not_multiply_and_says_where_it_would_run(npu: Any) -> None:
    with backends.registered(Backend("stub", ("cpu",), npu.ops(host=False), npu.NATIVE)) as name:
        backends.use(name)
        for run in (
            lambda: aqnsim.cast(torch.ones(4), "mxfp4"),
            lambda: aqnsim.perturb(torch.ones(4), aqnsim.RelativeGaussian(0.05), key=aqnsim.NoiseKey(0, "x")),
        ):
            with pytest.raises(BackendError, match="use_backend\\('npu-host'\\) runs the rest on the host's CPU"):
                run()
        with pytest.raises(BackendError, match="takes bfloat16 and float16, got float32"):
            npu.native_linear(torch.ones(2, 4), torch.ones(3, 4), None, *PAIR)


def test_the_host_gives_what_the_cpu_backend_gives(npu: Any) -> None:
    with backends.registered(Backend("stub", ("cpu",), npu.ops(host=True), npu.NATIVE)) as name:
        from aqnsim import conformance

        laws = ["shapes", "out", "quantize", "layout", "linear", "matmul", "stage"]
        assert [c for c in conformance.run(name, quick=True, laws=laws) if not c.passed] == []
    assert backends.get("npu").devices == ("npu",)


def test_an_npu_without_torch_npu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from aqnsim.cli import main

    assert backends.lacks("npu") == backends.lacks("npu-host") == "torch_npu"
    assert main(["backends"]) == 0
    assert "needs torch_npu, which is not installed" in capsys.readouterr().out
