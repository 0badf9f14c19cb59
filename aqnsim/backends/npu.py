"""Ascend NPUs through torch_npu: INT8 products on the device; all else on the host, where that is asked for by name.

Two backends, so that nothing is ever computed elsewhere in silence:

- ``npu`` runs what the device multiplies itself, :data:`NATIVE`, and refuses every other format and error model.
- ``npu-host`` does the same, and runs everything else in the cpu backend: each such call waits for the device, and
  copies its tensors to the host and back.

torch_npu queues its ops on the current NPU stream by itself; no stream is made or waited for here.

Written against torch_npu's documentation of ``npu_dynamic_quant`` and ``npu_quant_matmul``, and tested with a stub that
follows it. It has not run on silicon: hold it to ``aqnsim conformance --backend npu-host --device npu`` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aqnsim import formats
from aqnsim._errors import BackendError
from aqnsim.backends import OPS, Backend, get, register
from aqnsim.backends.compose import compositions
from aqnsim.receipts import STATS

NATIVE = (("int8_token", "int8_channel"),)
"""Pairs of formats, of input and weight, of which the device makes the product: INT8, sums in INT32."""

_CODES = tuple(str(formats.get(f)) for pair in NATIVE for f in pair)
_DTYPES = (torch.bfloat16, torch.float16)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 like ``x``, and the scale of each row, fp32: the largest magnitude of a row becomes 127."""
    import torch_npu  # type: ignore[import-not-found]

    if x.dtype not in _DTYPES:
        raise BackendError(
            f"npu_dynamic_quant takes bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}: "
            "load the model in one of them, or choose aqnsim.use_backend('npu-host') and emulate(..., native=False)"
        )
    codes, scale = torch_npu.npu_dynamic_quant(x)
    return codes, scale.float()


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, input: str | None, weight_format: str) -> Tensor:
    """``x W^T + b`` by the device, ``[rows, out]`` in the dtype of ``x``.

    Args:
        x: ``[rows, in]``, bfloat16 or float16.
        weight: ``[out, in]``, of the same dtype; quantized at each call.
        input, weight_format: a pair of :data:`NATIVE`.

    Raises:
        BackendError: another dtype.
    """
    import torch_npu

    codes, of_token = _quantized(x)
    weights, of_channel = _quantized(weight)
    product: Tensor = torch_npu.npu_quant_matmul(
        codes, weights.t(), of_channel, pertoken_scale=of_token, bias=bias, output_dtype=x.dtype
    )
    return product


def _cast(x: Tensor, fmt: str, axis: int, *_: Any) -> tuple[Tensor, Tensor]:
    """The cast of an operand of a native product, which its gradients need; unmeasured."""
    if str(formats.get(fmt)) not in _CODES or axis not in (-1, x.dim() - 1):
        raise _refused(f"cast to {fmt!r} along axis {axis}")
    codes, scale = _quantized(x)
    return (codes.float() * scale[..., None]).to(x.dtype), torch.zeros(len(STATS), dtype=torch.float64, device=x.device)


def _perturb(y: Tensor, error: str, *_: Any) -> tuple[Tensor, Tensor]:
    raise _refused(f"perturb by {error!r}")


def _gemm(a: Tensor, b: Tensor, accumulator: str) -> Tensor:
    raise _refused(f"gemm with accumulator {accumulator!r}")


def _refused(what: str) -> BackendError:
    return BackendError(
        f"backend 'npu' does not {what}: the device itself makes {', '.join(f'{a} x {b}' for a, b in NATIVE)}. "
        "aqnsim.use_backend('npu-host') runs the rest on the host's CPU, with two copies a call"
    )


def on_host(op: str) -> Callable[..., Any]:
    """An op of the cpu backend for tensors of another device; results go back to where the first came from."""

    def run(first: Tensor, *args: Any) -> Any:
        def fetched(value: Any) -> Any:
            return value.cpu() if isinstance(value, Tensor) else value

        given = [first, *args]
        on_cpu = [fetched(value) for value in given]
        result = get("cpu").ops[op](*on_cpu)
        if result is None:  # an op that writes to given tensors: the host's are copies of them
            for there, here in zip(given, on_cpu, strict=True):
                if isinstance(there, Tensor) and there is not here:
                    there.copy_(here)
            return None
        return result.to(first.device) if isinstance(result, Tensor) else tuple(t.to(first.device) for t in result)

    return run


def ops(host: bool) -> dict[str, Callable[..., Any]]:
    """The ops of ``npu``, or of ``npu-host``."""
    if host:
        return {**{op: on_host(op) for op in OPS if op in get("cpu").ops}, "native_linear": native_linear}
    primitives: dict[str, Callable[..., Any]] = {"cast": _cast, "perturb": _perturb, "gemm": _gemm}
    return {**primitives, **compositions(_cast, _perturb, _gemm), "native_linear": native_linear}


register(Backend("npu", ("npu",), ops(host=False), NATIVE))
register(Backend("npu-host", ("npu",), ops(host=True), NATIVE))
