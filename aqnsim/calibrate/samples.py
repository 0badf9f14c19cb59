"""Products as a device made them, beside what they should have been."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aqnsim._errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = tuple((128, k, 128) for k in (64, 256, 1024, 4096))
"""Of M, K, N: an error that grows with K shows over a factor of 64."""


@dataclass(frozen=True)
class Sample:
    """One product ``A @ B`` of a device.

    Attributes:
        name: of the product in tables.
        a: ``[M, K]``, and b: ``[K, N]``, in the dtype that the device was given.
        y: ``[M, N]`` as the device stored it.
    """

    name: str
    a: Tensor
    b: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        m, k, n = (*self.a.shape, *self.b.shape[1:])[:3] if self.a.dim() == self.b.dim() == 2 else (-1, -1, -1)
        if self.b.shape[:1] != (k,) or self.y.shape != (m, n):
            raise ConfigError(
                f"sample {self.name!r}: expected a [M, K], b [K, N] and y [M, N], got {list(self.a.shape)}, "
                f"{list(self.b.shape)} and {list(self.y.shape)}"
            )
        if self.y.dtype not in DTYPES.values():
            raise ConfigError(f"sample {self.name!r}: y is {self.y.dtype}, expected one of {', '.join(DTYPES)}")
        if not bool(self.y.isfinite().all()):
            raise ConfigError(
                f"sample {self.name!r}: y has NaN or infinite values; take operands whose product has none"
            )

    @property
    def k(self) -> int:
        """Products that are added for each value."""
        return self.a.shape[1]

    @property
    def dtype(self) -> str:
        """Of the stored result."""
        return str(self.y.dtype).removeprefix("torch.")

    def exact(self) -> Tensor:
        """``A @ B`` in fp64: off by 2^-53 of ``|A| @ |B|`` at most K times, far below what any device stores."""
        return self.a.double() @ self.b.double()

    def absdot(self) -> Tensor:
        """``|A| @ |B|`` in fp64: what an error of ``reference=absdot`` is relative to."""
        return self.a.double().abs() @ self.b.double().abs()


def measure(
    device: str = "cpu",
    dtypes: Iterable[str] = ("bfloat16",),
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    seed: int = 0,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> list[Sample]:
    """Run products of standard normals on a device.

    Args:
        device: a torch device.
        dtypes: of the operands, names of :data:`DTYPES`.
        shapes: of M, K, N.
        seed: of the operands, which do not depend on the device.
        product: what is calibrated; by default the device's own GEMM.

    >>> [(s.dtype, s.k) for s in measure(shapes=[(4, 8, 4)], dtypes=("float32", "bfloat16"))]
    [('float32', 8), ('bfloat16', 8)]
    """
    samples = []
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
        for m, k, n in shapes:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
            a = torch.randn(m, k, generator=generator).to(DTYPES[name])
            b = torch.randn(k, n, generator=generator).to(DTYPES[name])
            y = product(a.to(device), b.to(device)).cpu()
            samples.append(Sample(f"{name} {m}x{k}x{n}", a, b, y))
    return samples


def read(path: Path) -> list[Sample]:
    """Read a dump: a safetensors file with ``NAME.a``, ``NAME.b`` and ``NAME.y`` for each product.

    Raises:
        ConfigError: there is no such file, or a product lacks one of the three.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a dump holds NAME.a, NAME.b and NAME.y for each product")
    tensors = load_file(path)
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    lacking = [f"{n}.{part}" for n in names for part in "aby" if f"{n}.{part}" not in tensors]
    if lacking or not names:
        raise ConfigError(f"{path}: a product is NAME.a, NAME.b and NAME.y; missing {', '.join(lacking) or 'all'}")
    return [Sample(n, tensors[f"{n}.a"], tensors[f"{n}.b"], tensors[f"{n}.y"]) for n in names]


def write(samples: Iterable[Sample], path: Path) -> None:
    """Write a dump that :func:`read` reads, on the machine with the device."""
    from safetensors.torch import save_file

    parts = {f"{s.name}.{part}": getattr(s, part).contiguous() for s in samples for part in "aby"}
    save_file(parts, path)
