"""The CUDA kernels of ``csrc/cuda``, compiled for each format and error model by NVRTC through CuPy.

Nothing waits for the device, so that all of it can be captured in a CUDA graph: the tensor's largest magnitude, the
clock (where it is a tensor on the device) and what is measured stay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aqnsim._errors import BackendError, ConfigError
from aqnsim.accumulator import HOST
from aqnsim.backends import Backend, register
from aqnsim.backends.checks import check_chain, check_dtype, check_gemm, check_rows, shape_in_rows
from aqnsim.backends.compose import compositions, packings
from aqnsim.backends.cuda import kernels
from aqnsim.backends.cuda.kernels import SUMS, THREADS, Kernel
from aqnsim.backends.cuda.launch import Launcher, Nvrtc
from aqnsim.backends.fields import KINDS, blocks_view, model_numbers, needs_amax, scaling_fields
from aqnsim.backends.half import casts_half, perturbs_half
from aqnsim.errors import ErrorModel, rate_of, sigma_of
from aqnsim.formats import AnyFormat, BlockFormat, get, random_bits, scale_shape
from aqnsim.receipts import STATS

MOST_BLOCKS = 8192
"""Threads walk over what is left. The same for every device, so that sums are added in one order."""

PLAIN, MEASURED, UNSCALED = range(3)  # the enum Mode of csrc/cuda/cast.cuh
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_IN_LANES = (16, 32, 64, 128)  # lengths of blocks of cast_rows
_HELD = (16, 32, 64, 128)  # and of cast_held; a block that is searched or HiFloat4 is looked at several times, up to 64
_WARP = 32


def cast_call(fmt: AnyFormat, view: tuple[int, int, int], t: str, mode: int) -> tuple[str, int]:
    """The function of csrc/cuda/cast.cuh that casts a tensor of that view, and how many values a thread takes."""
    k, (_, high, wide) = scaling_fields(fmt), view
    n, vector = k["columns"], 4 if t == "float" else 8
    common = f"Spec, {t}, Mode({mode})"
    if k["rows"] == 0:
        return f"cast_elements<{common}>", vector
    looks = isinstance(fmt, BlockFormat) and (fmt.scale in ("mse", "hif4") or fmt.scale.startswith("4over6"))
    whole = high == 1 and wide % n == 0 if n else False
    if k["rows"] == 1 and not looks and whole and n in _IN_LANES:
        return f"cast_rows<{common}, {n}>", vector
    if k["rows"] == 1 and n in _HELD and (high > 1 or looks) and (n <= 64 or not looks):
        return f"cast_held<{common}, {n}, {str(whole).lower()}>", n
    of_block = k["rows"] * (n or wide)
    team = _WARP if looks or of_block <= 1024 else THREADS
    return f"cast_team<{common}, {team}>", max(1, of_block // team)


@lru_cache(maxsize=4096)
def cast_kernel(
    text: str, view: tuple[int, int, int], dtype: torch.dtype, mode: int, whole_draws: bool = True
) -> tuple[Kernel, int]:
    """The kernel that casts a tensor of that view, and how many values a thread takes at a time."""
    fmt = get(text)
    call, values = cast_call(fmt, view, _TYPES[dtype], mode)
    alone = call.startswith("cast_held") and random_bits(fmt) > 0  # a block and its random words fill the registers
    return Kernel("cast.cuh", call, "CastArgs", kernels.format_spec(fmt, whole_draws), alone), values


@lru_cache(maxsize=1024)
def chain_kernel(
    models: tuple[ErrorModel, ...], into: tuple[torch.dtype, torch.dtype], whole: bool, shifted: bool, measure: bool
) -> Kernel:
    """The kernel of a chain of models: from and into dtypes; rows of whole vectors; rows with first columns."""
    types = ", ".join(_TYPES[t] for t in into)
    flags = ", ".join(str(flag).lower() for flag in (whole, shifted, measure))
    return Kernel("perturb.cuh", f"perturb<Spec, {types}, {flags}>", "PerturbArgs", kernels.chain_spec(models))


_FINISH = Kernel("measure.cuh", "finish", "FinishArgs")
_AMAX = {t: Kernel("cast.cuh", f"amax<{name}>", "AmaxArgs") for t, name in _TYPES.items()}


def _blocks(threads: int) -> int:
    return min(MOST_BLOCKS, max(1, -(-threads // THREADS)))


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, from an address that 16 bytes can be read at; a view that begins elsewhere is copied."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _clock(step: Tensor | None, device: torch.device) -> tuple[int, int]:
    """The clock by its address, or, where it is not on the device, by value."""
    if step is not None and step.dtype != torch.int64:
        raise ConfigError(f"expected an int64 step, got {step.dtype}: make one with aqnsim.rng.clock")
    if step is not None and step.device == device:
        return step.data_ptr(), 0
    return 0, 0 if step is None else int(step)


def _row_ids(what: str, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    if rows is not None and rows.device != x.device:
        raise ConfigError(f"{what}: rows are on {rows.device}, the tensor on {x.device}: move them there once")
    rows = check_rows(what, x, rows)
    return rows, (0, 0) if rows is None else (rows.data_ptr(), int(rows.dim() == 2))


class Kernels:
    """The primitives over a launcher."""

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch
        self.cast = casts_half(self._cast)
        self.perturb = perturbs_half(self._perturb)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        """What a backend offers: the primitives and the ops composed of them."""
        return {
            "cast": self.cast,
            **packings(self.elements),
            "perturb": self.perturb,
            "gemm": self.gemm,
            **compositions(self.cast, self.perturb, self.gemm),
        }

    def _finished(self, parts: Tensor | None, x: Tensor, models: Sequence[ErrorModel] = ()) -> Tensor:
        """The ``STATS`` of what a kernel left in ``parts``; zeros where it measured nothing."""
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=x.device)
        if parts is not None:
            asked = (sigma_of(models) or 0.0) ** 2, rate_of(models)
            args = kernels.FinishArgs(parts.data_ptr(), stats.data_ptr(), len(parts), x.numel(), *asked)
            self._launch(_FINISH, 1, args, x.device)
        return stats

    def _amax(self, x: Tensor) -> Tensor:
        """The bits of the largest magnitude, on the device."""
        found = torch.zeros((), dtype=torch.int32, device=x.device)
        if x.numel():
            args = kernels.AmaxArgs(x.data_ptr(), found.data_ptr(), x.numel())
            self._launch(_AMAX[x.dtype], _blocks(x.numel() // (16 // x.element_size())), args, x.device)
        return found

    def _run_cast(
        self,
        x: Tensor,
        fmt: str,
        axis: int,
        key: int,
        step: Tensor | None,
        rows: Tensor | None,
        mode: int,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The cast tensor, what was measured, and the tensor's largest magnitude where the format asks for it."""
        f = get(fmt)
        x, out = _aligned(x), torch.empty(x.shape, dtype=check_dtype(x), device=x.device)
        amax = self._amax(x) if needs_amax(f) else None
        if random_bits(f) and step is None:
            raise ConfigError(f"cast: the rounding of {fmt} draws random bits: pass a key")
        ids, row_ids = _row_ids("cast", x, rows if random_bits(f) else None)
        view, row_major = blocks_view(f, tuple(x.shape), axis)
        columns = max(shape_in_rows(x)[1], 1)
        whole_draws = columns % (16 // x.element_size()) == 0 and not row_ids[1]
        kernel, values = cast_kernel(fmt, view, x.dtype, mode, whole_draws or not random_bits(f))
        blocks = _blocks(-(-x.numel() // values))
        parts = torch.empty(blocks, SUMS, dtype=torch.float64, device=x.device) if mode == MEASURED else None
        args = kernels.CastArgs(
            x.data_ptr(),
            out.data_ptr(),
            _address(scales),
            _address(amax),
            _address(parts),
            row_ids,
            _clock(step if random_bits(f) else None, x.device),
            key & (2**64 - 1),
            columns,
            *view,
            row_major,
        )
        self._launch(kernel, blocks, args, x.device)
        del ids  # until here: the kernel's stream is torch's, which reuses memory in order
        return out, parts, amax

    def _cast(
        self, x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None, measure: bool
    ) -> tuple[Tensor, Tensor]:
        scale_shape(get(fmt), tuple(x.shape), axis)  # refuses what the kernels cannot see
        out, parts, _ = self._run_cast(x, fmt, axis, key, step, rows, MEASURED if measure else PLAIN)
        return out, self._finished(parts, x)

    def elements(
        self, x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        f = get(fmt)
        check_dtype(x)
        x = x.float()
        one = torch.ones((), device=x.device)
        if not isinstance(f, BlockFormat):
            return self._run_cast(x, fmt, axis, key, step, rows, PLAIN)[0], one, one
        kind = torch.int32 if f.scale_format == "hif4" else torch.float32
        scales = torch.empty(scale_shape(f, tuple(x.shape), axis), dtype=kind, device=x.device)
        out, _, amax = self._run_cast(x, fmt, axis, key, step, rows, UNSCALED, scales)
        if f.scale_format == "fp8_e4m3" and amax is not None:
            kernel = Kernel("cast.cuh", "tensor_scale<Spec>", "TensorScaleArgs", kernels.format_spec(f))
            self._launch(kernel, 1, kernels.TensorScaleArgs(amax.data_ptr(), one.data_ptr()), x.device)
        return out, scales, one

    def _perturb(
        self,
        y: Tensor,
        error: str,
        key: int,
        step: Tensor,
        rows: Tensor | None,
        magnitude: Tensor | None,
        dtype: torch.dtype | None,
        measure: bool,
    ) -> tuple[Tensor, Tensor]:
        y = _aligned(y)
        check_dtype(y)
        out = torch.empty(y.shape, dtype=dtype or y.dtype, device=y.device)
        ids, row_ids = _row_ids("perturb", y, rows)
        models, magnitude = check_chain(error, y, magnitude, out.dtype)
        if len(models) > kernels.MOST_MODELS or any(type(m) not in KINDS for m in models):
            known = ", ".join(k.kind for k in KINDS)
            raise BackendError(
                f"backend 'cuda' has kernels for chains of at most {kernels.MOST_MODELS} models of {known}; got {error}"
            )
        magnitude = None if magnitude is None else _aligned(magnitude)
        count, columns = shape_in_rows(y)
        vector = 16 // y.element_size()
        whole = columns % vector == 0
        kernel = chain_kernel(models, (y.dtype, out.dtype), whole, bool(row_ids[1]), measure)
        blocks = _blocks(count * -(-columns // (vector if whole else 4)))
        parts = torch.empty(blocks, SUMS, dtype=torch.float64, device=y.device) if measure else None
        numbers = [
            kernels.ModelNumbers(
                *model_numbers(m), getattr(m, "last_hit", 0), getattr(m, "lanes", 0), getattr(m, "bit", 0)
            )
            for m in models
        ]
        args = kernels.PerturbArgs(
            y.data_ptr(),
            out.data_ptr(),
            _address(magnitude),
            _address(parts),
            row_ids,
            _clock(step, y.device),
            key & (2**64 - 1),
            count,
            columns,
            tuple(numbers),
        )
        if y.numel():
            self._launch(kernel, blocks, args, y.device)
        elif parts is not None:
            parts.zero_()
        del ids
        return out, self._finished(parts, y, models)

    def gemm(self, a: Tensor, b: Tensor, text: str) -> Tensor:
        if text == HOST:
            return a.float() @ b.float()
        shape = check_gemm(a, b)
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32, device=a.device)
        kernel = Kernel("gemm.cuh", f"gemm<Spec, {_TYPES[a.dtype]}>", "GemmArgs", kernels.accumulator_spec(text))
        if out.numel():
            args = kernels.GemmArgs(a.data_ptr(), b.data_ptr(), out.data_ptr(), *shape)
            self._launch(kernel, _blocks(math.prod(out.shape)), args, a.device)
        return out


BACKEND = register(Backend(name="cuda", devices=("cuda",), ops=Kernels(Nvrtc()).ops()))
