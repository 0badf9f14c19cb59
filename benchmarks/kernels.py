"""The kernels, each with its target, timed beside ``Tensor.copy_`` of the same dtype and size; on any backend."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import aqnsim
from aqnsim import backends
from aqnsim.rng import key_of
from benchmarks.records import Row
from benchmarks.timing import Call, Clock, alternate, clock_of

RELATIVE = "relative-gaussian(sigma=0.05)"
KEY, STEP = key_of(0, "benchmarks", "output"), torch.tensor(3)
COLUMNS = 4096
BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Of a buffer, by device type: beyond every cache, and on a GPU long enough to hide a launch."""


@dataclass(frozen=True)
class Setting:
    """What a suite is to run.

    Attributes:
        suite: its name.
        backend: whose ops are timed.
        device: where.
        repeats: rounds that count.
        quick: tiny tensors, to see that everything runs; the figures say nothing.
        dtypes: of the inputs.
        only: a pattern that names of kernels must match.
    """

    suite: str
    backend: str = "cpu"
    device: str = "cpu"
    repeats: int = 9
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    only: str = "*"

    @property
    def clock(self) -> Clock:
        """For calls on the device."""
        return clock_of(self.device)

    @property
    def threads(self) -> int:
        """Of the CPU, where they count."""
        return torch.get_num_threads() if torch.device(self.device).type == "cpu" else 0

    def op(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        """The backend's own op, without the call path of torch."""
        return backends.get(self.backend).ops[name]

    def has(self, kernel: Kernel) -> bool:
        """Whether the kernel was asked for and the backend can run it."""
        return fnmatch.fnmatch(kernel.name, self.only) and kernel.op in backends.get(self.backend).ops

    def elements(self, dtype: torch.dtype) -> int:
        """Of a buffer."""
        return 1 << 14 if self.quick else BYTES[torch.device(self.device).type] // dtype.itemsize

    def values(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Standard normals ``[rows, COLUMNS]``, a few drawn and repeated: drawing all would take longer than timing."""
        drawn = torch.randn(min(elements, 1 << 20), generator=torch.Generator().manual_seed(0)).to(self.device, dtype)
        return drawn.repeat(math.ceil(elements / drawn.numel()))[:elements].view(-1, min(COLUMNS, elements))


@dataclass(frozen=True)
class Kernel:
    """Something to time.

    Attributes:
        name: in tables.
        op: that the backend must offer.
        prepare: of a setting and a tensor; the call to time.
        moved: bytes that must be read and written, of a tensor.
        beside: another candidate that the result is a ratio to; ``copy_`` where empty.
        metric: what the targets are about.
        targets: by dtype.
    """

    name: str
    op: str
    prepare: Callable[[Setting, Tensor], Call]
    moved: Callable[[Tensor], float]
    beside: str = "copy_"
    metric: str = "of copy_"
    targets: dict[torch.dtype, float] = field(default_factory=dict)


# ---- calls ----------------------------------------------------------------------------------------------------------


def cast_call(s: Setting, x: Tensor, text: str, axis: int = -1, measure: bool = False) -> Call:
    """A cast by the backend's op."""
    op = s.op("cast")
    return lambda: op(x, text, axis, KEY, STEP, None, measure)


def perturb_call(s: Setting, y: Tensor, error: str = RELATIVE, measure: bool = False) -> Call:
    """A perturbation by the backend's op."""
    op = s.op("perturb")
    return lambda: op(y, error, KEY, STEP, None, None, None, measure)


def quantize_call(s: Setting, x: Tensor, text: str) -> Call:
    """Packed codes and scales."""
    return _served(s, lambda: aqnsim.quantize(x, text))


def dequantize_call(s: Setting, x: Tensor, text: str) -> Call:
    """Values of packed codes and scales."""
    made: list[aqnsim.Quantized] = []

    def run() -> Tensor:
        if not made:  # in the round that does not count: codes of a whole buffer are not made for what is not timed
            made.append(aqnsim.quantize(x, text))
        return made[0].dequantize()

    return _served(s, run)


def _served(s: Setting, run: Call) -> Call:
    """A call of the public functions, with the setting's backend behind them."""

    def served() -> object:
        backends.use(s.backend, torch.device(s.device).type)
        return run()

    return served


# ---- the table ------------------------------------------------------------------------------------------------------


def _targets(fp32: float, bf16: float) -> dict[torch.dtype, float]:
    return {torch.float32: fp32, torch.bfloat16: bf16}


def _cast(
    text: str, targets: dict[torch.dtype, float], axis: int = -1, measure: bool = False, reads: int = 1
) -> Kernel:
    along = "" if axis == -1 else f" along axis {axis}"
    return Kernel(
        name=f"cast {text}{along}{' measured' if measure else ''}",
        op="cast",
        prepare=lambda s, x: cast_call(s, x, text, axis, measure),
        moved=lambda x: (reads + 1) * x.nbytes,
        targets=targets,
    )


def _packed(text: str) -> list[Kernel]:
    fmt = aqnsim.formats.get(text)

    def moved(x: Tensor) -> float:
        return x.nbytes + x.numel() * fmt.bits / 8

    common = {"op": "quantize", "moved": moved, "metric": "of limit", "targets": _targets(0.8, 0.8)}
    return [
        Kernel(name=f"quantize {text}", prepare=lambda s, x: quantize_call(s, x, text), **common),  # type: ignore[arg-type]
        Kernel(name=f"dequantize {text}", prepare=lambda s, x: dequantize_call(s, x, text), **common),  # type: ignore[arg-type]
    ]


def _stochastic(name: str) -> Kernel:
    text = f"{name}(rounding=stochastic)"
    return Kernel(
        name=f"cast {text}",
        op="cast",
        prepare=lambda s, x: cast_call(s, x, text),
        moved=lambda x: 2 * x.nbytes,
        metric="Gelt/s",
        targets=_targets(1.0, 1.0),
    )


def _perturb(beside: str, metric: str, targets: dict[torch.dtype, float], measure: bool = False) -> Kernel:
    return Kernel(
        name=f"perturb {RELATIVE}{' measured' if measure else ''}",
        op="perturb",
        prepare=lambda s, x: perturb_call(s, x, measure=measure),
        moved=lambda x: 2 * x.nbytes,
        beside=beside,
        metric=metric,
        targets=targets,
    )


NORMAL, FORMULA = "normal_", "y + randn_like(y) * y.abs() * s"
MX, PLAIN, STRIDED = _targets(0.9, 0.8), _targets(0.8, 0.6), _targets(0.5, 0.4)
NONE: dict[torch.dtype, float] = {}

KERNELS = [
    *(_cast(text, MX) for text in ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8")),
    _cast("nvfp4", _targets(0.6, 0.5), reads=2),
    _cast("fp8_e4m3_tensor", PLAIN, reads=2),
    *(_cast(text, PLAIN) for text in ("fp8_e4m3", "hif8", "e3m4")),
    *(_cast(text, NONE) for text in ("hif4", "int4_g128", "fp8_e4m3_1x128")),
    _cast("mxfp4", STRIDED, axis=-2),
    *(_cast(text, STRIDED) for text in ("mxfp4(block=32x32)", "fp8_e4m3_128x128")),
    *(_cast(text, NONE, measure=True) for text in ("mxfp4", "fp8_e4m3")),
    *(kernel for text in ("mxfp4", "mxfp8_e4m3", "nvfp4") for kernel in _packed(text)),
    *(_stochastic(name) for name in ("mxfp4", "fp8_e4m3")),
    _perturb("copy_", "Gelt/s", _targets(1.5, 2.0)),
    _perturb(NORMAL, "times", _targets(3, 3)),
    _perturb(FORMULA, "times", _targets(10, 10)),
    _perturb("copy_", "Gelt/s", NONE, measure=True),
]
"""Every kernel with its target; a target of the same kernel beside another candidate is an entry of its own."""


def _others(x: Tensor, out: Tensor) -> dict[str, tuple[Call, int]]:
    """What kernels are timed beside, and the bytes that each moves."""
    return {
        "copy_": (lambda: out.copy_(x), 2 * x.nbytes),
        NORMAL: (lambda: out.normal_(), x.nbytes),
        FORMULA: (lambda: x + torch.randn_like(x) * x.abs() * 0.05, 0),
    }


def rows(s: Setting) -> Iterator[Row]:
    """The kernels on a buffer of each dtype."""
    for dtype in s.dtypes:
        kernels = [k for k in KERNELS if s.has(k)]
        yield from timed(s, kernels, s.values(s.elements(dtype), dtype), judged=not s.quick)


def timed(s: Setting, kernels: list[Kernel], x: Tensor, judged: bool) -> Iterator[Row]:
    """Kernels on one tensor, each by turns with what it is timed beside: nothing runs between the two that could warm
    caches or clocks for one of them. Targets are for large tensors."""
    others = _others(x, torch.empty_like(x))
    for k in kernels:
        beside, moved = others[k.beside]
        seconds = alternate({k.beside: beside, k.name: k.prepare(s, x)}, s.repeats, s.clock)
        if len(seconds) < 2:
            continue
        yield Row(
            suite=s.suite,
            kernel=k.name,
            dtype=str(x.dtype).removeprefix("torch."),
            elements=x.numel(),
            threads=s.threads,
            moved=round(k.moved(x)) if k.beside == "copy_" else 0,
            seconds=seconds[k.name],
            beside=k.beside,
            beside_seconds=seconds[k.beside],
            beside_moved=moved,
            metric=k.metric,
            target=k.targets.get(x.dtype) if judged else None,
        )


# ---- calls and sizes ------------------------------------------------------------------------------------------------

OVERHEAD_US = 15.0
INNER = 200  # calls in one timing: one is too short for a clock


def overhead(s: Setting) -> Iterator[Row]:
    """Microseconds of one call from Python on 1 Ki elements, by the public functions and by the ops."""
    backends.use(s.backend, torch.device(s.device).type)
    x, key, error = torch.randn(1024, device=s.device), aqnsim.NoiseKey(), aqnsim.RelativeGaussian(0.05)
    ops, inner = torch.ops.aqnsim, 2 if s.quick else INNER
    calls: dict[str, Call] = {
        "aqnsim.cast mxfp4": lambda: aqnsim.cast(x, "mxfp4"),
        "aqnsim.perturb": lambda: aqnsim.perturb(x, error, key),
        "ops.cast mxfp4": lambda: ops.cast(x, "mxfp4", -1, 0, None, None, False),
        "ops.perturb": lambda: ops.perturb(x, RELATIVE, KEY, STEP, None, None, None, False),
        "ops.cast mxfp4 measured": lambda: ops.cast(x, "mxfp4", -1, 0, None, None, True),
    }
    calls = {name: call for name, call in calls.items() if fnmatch.fnmatch(name, s.only)}
    seconds = alternate({name: _repeated(call, inner) for name, call in calls.items()}, s.repeats)
    for name, spent in seconds.items():
        target = None if "measured" in name or not s.threads else OVERHEAD_US
        yield Row(
            suite=s.suite,
            kernel=f"call {name}",
            dtype="float32",
            elements=1024,
            threads=s.threads,
            seconds=[t / inner for t in spent],
            metric="us",
            target=target,
        )


def _repeated(call: Call, times: int) -> Call:
    def run() -> None:
        for _ in range(times):
            call()

    return run


SCALED = ("cast mxfp4", f"perturb {RELATIVE}")


def scaling(s: Setting) -> Iterator[Row]:
    """bf16 of 2^12 to 2^30 elements, on 1 thread and on all."""
    before = torch.get_num_threads()
    kernels = [k for k in KERNELS if k.name in SCALED and k.beside == "copy_" and s.has(k)]
    try:
        for threads in sorted({1, before}) if s.threads else (before,):
            torch.set_num_threads(threads)
            for exponent in range(12, 15 if s.quick else 31, 2):
                yield from timed(s, kernels, s.values(1 << exponent, torch.bfloat16), judged=False)
    finally:
        torch.set_num_threads(before)
