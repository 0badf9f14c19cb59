"""The host's own product of matrices, which every backend of the CPU starts from.

Where errors act, a product is needed in fp32. For bf16 operands that is a kernel of ours over the processor's own
instruction, ``vdpbf16ps``, where it has one; else, and for all other dtypes, it is torch's product of the operands
widened to fp32. Both add in fp32; which sums are rounded is the host's matter (docs/semantics.md).
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from aqnsim._errors import ConfigError

_PARALLEL_FROM = 1 << 18  # products: below, waking threads costs more than they save


def unit() -> str:
    """What multiplies bf16 matrices."""
    return "vdpbf16ps" if _has_product() else "torch fp32"


@cache
def _has_product() -> bool:
    """Whether the CPU kernels are built, which a machine with a GPU may lack, and the processor runs this one."""
    if find_spec("aqnsim._core") is None:
        return False
    from aqnsim import _core

    return bool(_core.has_product())


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel of ours multiplies these."""
    return a.dtype == b.dtype == torch.bfloat16 and _has_product()


def gemm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32, of ``[..., m, k]`` and ``[..., k, n]`` in any floating dtypes.

    >>> gemm(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    if not multiplies(a, b):
        return a.float() @ b.float()
    return product(a, b, torch.float32)[0]


def product(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    bias_is_missed: bool = False,
    rows: tuple[int, bool] = (0, False),
    models: list[object] | None = None,
    measure: bool = False,
) -> tuple[Tensor, list[float]]:
    """The kernel: the product after its bias and what acts on it, and what that measured.

    Args:
        a, b: for which :func:`multiplies`.
        dtype: of the result: float32, or bfloat16 where models act.
        rows: the address of logical rows and whether they have first columns, as kernels take them.
        models: of ``_core.ErrorModel``.

    Raises:
        ConfigError: shapes that do not fit.
    """
    from aqnsim import _core

    if min(a.dim(), b.dim()) < 2 or a.shape[-1] != b.shape[-2] or (bias is not None and bias.shape != b.shape[-1:]):
        raise ConfigError(
            f"product: expected [..., m, k], [..., k, n] and a bias [n], got {list(a.shape)}, {list(b.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    batch = a.shape[:-2]
    if batch != b.shape[:-2]:
        batch = torch.broadcast_shapes(batch, b.shape[:-2])
    (m, k), n = a.shape[-2:], b.shape[-1]
    out = torch.empty((*batch, m, n), dtype=dtype)
    a, b = _matrices(a, batch), _matrices(b, batch)
    shift = None if bias is None else bias.float().contiguous()
    stats = _core.product(
        (a.data_ptr(), b.data_ptr(), 0 if shift is None else shift.data_ptr(), out.data_ptr()),
        (a.stride(), b.stride()),
        int(dtype == torch.bfloat16),
        (math.prod(batch), m, k, n),
        bias_is_missed,
        *rows,
        models or [],
        measure,
        torch.get_num_threads() if out.numel() * k >= _PARALLEL_FROM else 1,
    )
    return out, stats


def _matrices(x: Tensor, batch: torch.Size) -> Tensor:
    """``[batch, rows, columns]``, of which rows or columns are neighbours in memory."""
    x = x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:])
    return x if 1 in x.stride()[1:] else x.contiguous()
