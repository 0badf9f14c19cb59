"""The CUDA kernels compile for every architecture, by NVRTC and by nvcc, and their machine code is as it should be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import aqnsim
from aqnsim.backends.cuda import MEASURED, PLAIN, cast_kernel, chain_kernel
from aqnsim.backends.cuda.kernels import OPTIONS, Kernel, accumulator_spec, format_spec
from aqnsim.errors import chain
from benchmarks import sass
from benchmarks.sass import ARCHS, Case, Code

CSRC = Path(__file__).parents[1] / "csrc"
CASES = sass.cases()
FAST = [c for c in CASES if c.fast and "hif4" not in c.name]

every_arch = pytest.mark.parametrize("arch", ARCHS)


def ids(case: Case) -> str:
    return f"{case.name}-{case.dtype}".replace("torch.", "")


every_case = pytest.mark.parametrize("case", CASES, ids=ids)
every_fast_case = pytest.mark.parametrize("case", FAST, ids=ids)
no_fp64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F\.F64|F2F\.F32\.F64|I2F\.F64|.*\.F64")
transcendental = re.compile(r"MUFU\.(?!RSQ|RCP)")


@every_arch
@every_case
def test_no_thread_keeps_values_in_memory(case: Case, arch: str) -> None:
    code = sass.code(case.kernel, arch)
    assert code.local == 0
    assert [op for op in code.opcodes if re.match(r"LDL|STL", op)] == []
    assert code.registers <= 255


@every_arch
@every_fast_case
def test_fast_paths_move_16_bytes_at_a_time(case: Case, arch: str) -> None:
    opcodes = sass.code(case.kernel, arch).opcodes
    assert any(re.match(r"LDG\.E\.128", op) for op in opcodes)
    assert any(re.match(r"STG\.E\.128", op) for op in opcodes)


@every_arch
@every_case
def test_only_what_is_measured_is_in_fp64(case: Case, arch: str) -> None:
    found = {op for op in sass.code(case.kernel, arch).opcodes if no_fp64.match(op)}
    assert bool(found) == ("measured" in case.name), found


@every_arch
@every_case
def test_no_transcendental_and_no_contraction(case: Case, arch: str) -> None:
    code = sass.code(case.kernel, arch)
    assert [op for op in code.opcodes if transcendental.match(op)] == []
    if not any(op.startswith("MUFU") for op in code.opcodes):  # IEEE division and roots are made of fused operations
        assert [op for op in code.opcodes if op.startswith("FFMA")] == []


@pytest.mark.parametrize("gpu", ["A100", "H100"])
@pytest.mark.parametrize("text", ["fp8_e4m3", "mxfp4", "mxfp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_casts_wait_for_memory_not_for_instructions(text: str, dtype: torch.dtype, gpu: str) -> None:
    case = next(c for c in CASES if c.name == f"cast {text}" and c.dtype == dtype)
    device = sass.DEVICES[gpu]
    assert sass.code(case.kernel, device.arch).per_value(dtype.itemsize) < device.threshold(case.moved)


def remaining() -> list[Kernel]:
    """Kernels that the table has no row for."""
    f, b = torch.float32, torch.bfloat16
    models = chain("spike(rate=0.1, size=3) + relative-gaussian(sigma=0.1, reference=absdot) + bit-flip(rate=0.1)")
    tiles = [("fp8_e4m3_128x128", f, PLAIN), ("mxfp4(block=32x32, scale=mse)", b, PLAIN), ("int8_token", f, MEASURED)]
    return [
        *(cast_kernel(text, (1, 4096, 4096), dtype, mode)[0] for text, dtype, mode in tiles),
        cast_kernel("nvfp4(scale=4over6-mse)", (4096, 1, 4096), f, PLAIN)[0],
        cast_kernel("hif4(rounding=stochastic-4)", (1, 512, 100), b, MEASURED, False)[0],
        chain_kernel(models, (b, f), False, True, True),
        *(Kernel("gemm.cuh", "gemm<Spec, bf16>", "GemmArgs", accumulator_spec(u)) for u in ("hopper_fp8", "ieee_fp32")),
        Kernel("cast.cuh", "amax<bf16>", "AmaxArgs"),
        Kernel("cast.cuh", "tensor_scale<Spec>", "TensorScaleArgs", format_spec(aqnsim.formats.get("nvfp4"))),
        Kernel("measure.cuh", "finish", "FinishArgs"),
    ]


@every_arch
def test_every_other_kernel_compiles_and_keeps_no_values_in_memory(arch: str) -> None:
    for kernel in remaining():
        assert sass.code(kernel, arch).local == 0, kernel.call


def test_nvcc_compiles_them_too(tmp_path: Path) -> None:
    """One file with several kernels, from the headers as they are included, for all architectures."""
    chosen = [c.kernel for c in CASES if c.dtype == torch.bfloat16][::3] + remaining()[:7:3]
    lines = [f'#include "cuda/{file}.cuh"' for file in ("cast", "perturb", "gemm")]
    for i, k in enumerate(chosen):
        lines.append(f"namespace aqn::cuda::n{i} {{ struct Spec {{\n{k.spec}}}; }}")
        lines.append(f'extern "C" __global__ void __launch_bounds__(256) k{i}(const aqn::cuda::{k.args} args) {{')
        lines.append(f"  using namespace aqn; using namespace aqn::cuda; using aqn::cuda::n{i}::Spec;")
        lines.append(f"  aqn::cuda::{k.call}(args);\n}}")
    source, built = tmp_path / "kernels.cu", tmp_path / "kernels.fatbin"
    source.write_text("\n".join(lines) + "\n")
    archs = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHS]
    options = [o.replace("--", "-", 1) if not o.startswith("-std") else o for o in OPTIONS]
    run = [
        sass.tool("nvcc"),
        *options,
        *archs,
        f"-I{CSRC}",
        *sass.include_options(),
        "-fatbin",
        "-t0",
        source,
        "-o",
        built,
    ]
    subprocess.run(run, check=True)
    assert built.stat().st_size > 0


def test_loops_are_found_and_counted() -> None:
    body = [(0x10, "LDG.E.128 R4, desc[UR6][R4.64]"), (0x20, "FADD R4, R4, 1"), (0x30, "STG.E.128 [R2.64], R4")]
    code = Code(((0, "S2R R0, SR_TID.X"), *body, (0x40, "BRA 0x10"), (0x50, "EXIT"), (0x60, "BRA 0x60")), 8, 0)
    assert code.loops() == [[text for _, text in body] + ["BRA 0x10"]]
    assert code.per_value(4) == 1.0
    assert sass.stored_bytes(["STG.E [R2.64], R4", "STG.E.U16 [R2.64], R4", "STG.E.64 desc[UR4][R2.64], R4"]) == 14


def test_the_table_goes_between_the_marks_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "rows", lambda: [("cast", "float32", "H100", "24", "28.2", "79.9", "memory", "100%")])
    page = sass.page_with_table("before\n<!-- sass -->\nold\n<!-- end of sass -->\nafter\n")
    assert page.startswith("before\n<!-- sass -->\nCompiled by NVRTC 13.")
    assert "| cast | float32 | H100 |" in page
    assert page.endswith("|\n<!-- end of sass -->\nafter\n")
    with pytest.raises(aqnsim.ConfigError, match="no place for the table"):
        sass.page_with_table("none")


def test_thresholds_follow_from_a_datasheet() -> None:
    device = sass.Device("sm_90", 100, 1e9, 1e12)
    assert device.threshold(8) == 100 * 128 * 1e9 * 8 / 1e12
