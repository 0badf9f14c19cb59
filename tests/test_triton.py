"""The Triton kernels equal the numpy definitions, bit for bit: in Triton's interpreter, without a GPU.

The variable that chooses the interpreter is read as kernels are defined, so checks run in processes of their own. The
grade is: casts, random words, normals and errors bit-equal, counts equal, sums of squares within 1e-4. A product adds
in an order of its own, so its operands are small integers, whose sums are exact.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_kernels import interpreted

import aqnsim
from aqnsim import BackendError, backends

CHECKS = [
    "every_format",
    "every_bf16",
    "every_choice",
    "random_words",
    "every_error",
    "tile_sizes",
    "linear_layers",
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_interpreter_agrees_with_the_reference(check: str) -> None:
    worker = Path(__file__).with_name("triton_worker.py")
    done = subprocess.run([sys.executable, worker, check], env=interpreted(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"


def test_without_the_interpreter_it_serves_gpus_alone() -> None:
    assert backends.get("triton").devices == ("cuda",)
    with pytest.raises(BackendError, match="serves cuda, not 'cpu'"):
        aqnsim.use_backend("triton", "cpu")
    aqnsim.use_backend("triton")
    assert backends.chosen()["cuda"] == "triton"


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, aqnsim; aqnsim.cast; print('aqnsim.backends.triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_triton_the_error_names_the_extra() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from aqnsim import backends\n"
        "try:\n  backends.get('triton')\n"
        "except Exception as e:\n  print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("BackendError")
    assert "pip install 'aqnsim[triton]'" in done.stdout


def test_accumulators_are_refused() -> None:
    from aqnsim.backends.triton import torch_gemm

    with pytest.raises(BackendError, match="no kernel for accumulator"):
        torch_gemm(torch.ones(2, 2), torch.ones(2, 2), "accumulator(fraction_bits=6)")
