"""Kernels in Triton: the twins of ``csrc/core``, bit-equal to ``aqnsim.reference``.

They serve CUDA tensors. With ``TRITON_INTERPRET=1`` in the environment before the first import, Triton's interpreter
runs them, on CPU tensors too: slowly, to test them without a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from aqnsim._errors import BackendError
from aqnsim.accumulator import HOST

if find_spec("triton") is None:
    raise BackendError("backend 'triton' needs Triton, which is not installed: pip install 'aqnsim[triton]'")

from aqnsim.backends import Backend, register
from aqnsim.backends.compose import compositions, packings
from aqnsim.backends.triton import cast, gemm, perturb
from aqnsim.backends.triton.bits import INTERPRETED


def torch_gemm(a: Tensor, b: Tensor, text: str) -> Tensor:
    """torch's product in fp32: accumulators are emulated elsewhere.

    Raises:
        BackendError: an accumulator.
    """
    if text == HOST:
        return a.float() @ b.float()
    raise BackendError(f"backend 'triton' has no kernel for accumulator {text!r}; available: cpu, cuda, reference")


_COMPOSED = compositions(cast.cast, perturb.perturb, torch_gemm)

BACKEND = register(
    Backend(
        name="triton",
        devices=("cpu", "cuda") if INTERPRETED.value else ("cuda",),
        ops={
            "cast": cast.cast,
            **packings(cast.elements),
            "perturb": perturb.perturb,
            **_COMPOSED,
            "linear": gemm.fused(_COMPOSED["linear"]),
        },
    )
)
