"""The laws as a suite that any backend must pass, ours or not; numpy and torch only, nothing is fetched.

A law is a small function of the backend under test and of one case, such as a format. It returns what it compared, and
raises :class:`Violation` where the backend breaks it. The truth is :mod:`aqnsim.reference`. A new law is one function
under :func:`law`; new formats and error models are found in their registries.

>>> checks = run("reference", laws=["normal"])
>>> [(c.name, c.grade, c.passed) for c in checks]
[('offers', 'bit', True), ('normal', 'statistical', True)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aqnsim import backends, formats
from aqnsim._errors import BackendError, unknown
from aqnsim.accumulator import MATRIX_UNITS
from aqnsim.formats import ROUNDINGS, SCALE_RULES, AnyFormat, BlockFormat, Format, element_of
from aqnsim.profiles.spec import Forward, GradInput, GradWeight, OpSpec
from aqnsim.receipts import STATS
from aqnsim.rng import clock, key_of

GRADES = ("bit", "bound", "statistical")
"""How a law is held: bit for bit; within an error bound, where an order of addition is free; or as chance allows."""

COUNTS = ("calls", "count", "changed", "injected_n", "saturated", "nonfinite", "hits")
"""Statistics that are whole numbers; the others are sums, held to SUM_TOLERANCE."""

SUM_TOLERANCE = 1e-6
KEY = key_of(0, "conformance", "output")
CLOCK = clock(5, "eval", run=3)


@dataclass(frozen=True)
class Check:
    """One law on one case.

    Attributes:
        name: the law and the case.
        grade: one of :data:`GRADES`.
        passed: whether the law held.
        detail: what was compared, or how the law broke.
    """

    name: str
    grade: str
    passed: bool
    detail: str


class Violation(Exception):  # noqa: N818  (it is what a law finds, not an error of the suite)
    """A law does not hold; the text says where."""


@dataclass(frozen=True)
class Subject:
    """The backend under test: its ops take tensors of any device and give results on the CPU.

    Attributes:
        backend: its name.
        device: a torch device that it serves.
        quick: whether laws run on fewer cases and smaller tensors.
    """

    backend: str
    device: str
    quick: bool

    def __call__(self, op: str, *args: Any) -> tuple[Tensor, ...]:
        run = backends.get(self.backend).ops[op]
        return _on_cpu(run(*(self._placed(a) for a in args)))

    def _placed(self, value: Any) -> Any:
        """A tensor on the device; a clock, which is a scalar integer, stays on the CPU, as an emulation has it."""
        if not isinstance(value, Tensor) or (value.dim() == 0 and value.dtype == torch.int64):
            return value
        return value.to(self.device)


def _on_cpu(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    parts = (result,) if isinstance(result, Tensor) else result
    return tuple(t.detach().cpu() for t in parts)


def truth(op: str, *args: Any) -> tuple[Tensor, ...]:
    """The reference's result."""
    return _on_cpu(backends.get("reference").ops[op](*args))


# ---- the registry ---------------------------------------------------------------------------------------------------

Cases = Callable[[bool], Iterable[str]]


@dataclass(frozen=True)
class Law:
    """A law by name.

    Attributes:
        name: what a check's name begins with.
        grade: one of :data:`GRADES`.
        needs: the ops that it runs; it does not apply to a backend that offers not all of them.
        cases: by ``quick``; a law without cases has one, the empty text.
        holds: of subject and case; returns what was compared and raises Violation.
    """

    name: str
    grade: str
    needs: tuple[str, ...]
    cases: Cases
    holds: Callable[[Subject, str], str]


LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which they run."""


def _once(quick: bool) -> tuple[str, ...]:
    return ("",)


def law(name: str, grade: str, needs: str, over: Cases = _once) -> Callable[..., Any]:
    """Register a function of a :class:`Subject` and a case; ``needs`` lists ops, separated by spaces."""

    def add(holds: Callable[[Subject, str], str]) -> Callable[[Subject, str], str]:
        LAWS[name] = Law(name, grade, tuple(needs.split()), over, holds)
        return holds

    return add


def run(
    backend: str = "cpu", device: str = "cpu", quick: bool = False, laws: Sequence[str] | None = None
) -> list[Check]:
    """Every law that applies, on every case.

    Args:
        backend: a name of :func:`aqnsim.backends.names`.
        device: where tensors are put; the backend must serve its type.
        quick: fewer cases and smaller tensors, for a gate before a benchmark on a CPU.
        laws: names of :data:`LAWS`; None for all.

    Raises:
        UnknownNameError: no such backend or law.
        BackendError: the backend does not serve the device.
    """
    found = backends.get(backend)
    served = torch.device(device).type
    if served not in found.devices:
        raise BackendError(f"backend {backend!r} serves {', '.join(found.devices)}, not {device!r}")
    for name in laws or ():
        if name not in LAWS:
            raise unknown("law", name, LAWS)
    subject, offered = Subject(backend, device, quick), set(found.ops)
    checks = [_offers(offered)]
    for rule in LAWS.values() if laws is None else [LAWS[name] for name in laws]:
        if offered.issuperset(rule.needs):
            checks += [_checked(rule, case, subject) for case in rule.cases(quick)]
    return checks


def _offers(offered: set[str]) -> Check:
    """A backend is one from ``cast`` and ``perturb`` on; laws of ops that it lacks do not apply to it."""
    lacking = [op for op in backends.OPS if op not in offered]
    detail = f"no {', '.join(lacking)}" if lacking else "every op"
    return Check("offers", "bit", {"cast", "perturb"} <= offered, detail)


def _checked(rule: Law, case: str, subject: Subject) -> Check:
    name = f"{rule.name} {case}".strip()
    try:
        return Check(name, rule.grade, True, rule.holds(subject, case))
    except Violation as violation:
        return Check(name, rule.grade, False, str(violation))
    except Exception as error:  # whatever a backend raises is a law broken, and no reason to leave the others unchecked
        return Check(name, rule.grade, False, f"{type(error).__name__}: {error}")


# ---- comparison -----------------------------------------------------------------------------------------------------


def _words(t: Tensor) -> Tensor:
    """Bit patterns, of NaNs one: their payload has no meaning, everything else has."""
    if not t.is_floating_point():
        return t.contiguous()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()]
    words, nan = t.contiguous().view(integers), t.float().isnan()
    return words.masked_fill(nan, torch.iinfo(integers).max)


def same(got: Tensor, expected: Tensor, what: str, x: Tensor | None = None) -> None:
    """Hold two results together bit for bit.

    Raises:
        Violation: they differ; says how often, and where first, for which of ``x``.
    """
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise Violation(f"{what}: expected {_kind(expected)}, got {_kind(got)}")
    other = _words(got) != _words(expected)
    if bool(other.any()):
        at = int(other.flatten().nonzero()[0])
        of = f" of {_shown(x.reshape(-1)[at])}" if x is not None and x.shape == got.shape else ""
        raise Violation(
            f"{what}: {int(other.sum())} of {other.numel()} values differ, first at {at}{of}: "
            f"expected {_shown(expected.reshape(-1)[at])}, got {_shown(got.reshape(-1)[at])}"
        )


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _shown(value: Tensor) -> str:
    return float(value).hex() if value.is_floating_point() else str(int(value))


def same_stats(got: Tensor, expected: Tensor, what: str, sums: bool = True) -> None:
    """Hold two vectors of STATS together: counts exactly, sums, if asked for, to SUM_TOLERANCE.

    Raises:
        Violation: one of them differs.
    """
    for name, a, b in zip(STATS, got.tolist(), expected.tolist(), strict=True):
        right = a == b if name in COUNTS else not sums or math.isclose(a, b, rel_tol=SUM_TOLERANCE)
        if not right:
            raise Violation(f"{what}: {name} is {a!r}, expected {b!r}")


# ---- inputs ---------------------------------------------------------------------------------------------------------

SPECIAL = (0.0, 2.0**-149, 2.0**-127, 2.0**-126, 1.0, 3.4028234663852886e38, math.inf, math.nan)


def normal_values(*shape: int, seed: int = 0) -> Tensor:
    """fp32 standard normals of a seed."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def random_patterns(n: int, seed: int = 0) -> Tensor:
    """fp32 values of uniform bit patterns: all exponents, subnormals, Inf and NaN."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32))


@lru_cache(maxsize=1)
def every_bf16() -> Tensor:
    """Every bfloat16, as fp32."""
    return torch.from_numpy((np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32))


def edges(fmt: Format) -> Tensor:
    """Where a format's rounding decides: numbers and midpoints, one ulp around each, what lies beyond; both signs.

    Of a format of more than 8 bits a sample, with all that is special about it.
    """
    points = _grid(fmt) if fmt.bits <= 8 else _sampled_grid(fmt)
    with np.errstate(over="ignore"):
        exact = np.concatenate([points, SPECIAL]).astype(np.float32)
        around = [np.nextafter(exact, np.float32(s)) for s in (-np.inf, np.inf)]
    x = np.unique(np.abs(np.concatenate([exact, *around])))  # one NaN
    return torch.from_numpy(np.concatenate([x, -x]))


def _grid(fmt: Format) -> np.ndarray[Any, Any]:
    values = np.array(fmt.values())
    step = values[-1] - values[-2]
    grid = np.concatenate([[0.0] if values[0] else [], values, values[-1] + step * np.arange(1, 5)])
    return np.concatenate([grid, (grid[:-1] + grid[1:]) / 2])


def _sampled_grid(fmt: Format) -> np.ndarray[Any, Any]:
    step = 2.0**-fmt.mantissa_bits
    leading = 1 + step / 2 * np.arange(0, 2 << min(fmt.mantissa_bits, 10))
    binades = 2.0 ** np.linspace(fmt.min_exponent, fmt.max_exponent, 9).round()[:, None]
    subnormal = fmt.min_subnormal / 2 * np.arange(0, 1 << 10)
    beyond = fmt.max + fmt.max * step / 4 * np.arange(-8, 8)
    return np.concatenate([(leading * binades).ravel(), subnormal, beyond])


def every_magnitude() -> Tensor:
    """Rows from fp32's smallest values to its largest, with zeros, infinities and NaN in some of them."""
    exponents = torch.linspace(-148, 126, 140).round()[:, None]
    x = normal_values(140, 70, seed=1) * torch.exp2(exponents)
    x[7], x[9], x[11, 5], x[13, 40], x[15, 3] = 0.0, -0.0, torch.inf, torch.nan, -torch.inf
    return x


# ---- cases ----------------------------------------------------------------------------------------------------------


def _named(quick: bool) -> list[str]:
    return list(formats.ALL)


def _elements(quick: bool) -> list[str]:
    return [name for name, f in formats.ALL.items() if isinstance(f, Format)]


def _blocks(quick: bool) -> list[str]:
    return [name for name, f in formats.ALL.items() if isinstance(f, BlockFormat)]


def _roundings(quick: bool) -> list[str]:
    names = ("fp4_e2m1", "hif8") if quick else ("fp4_e2m1", "fp8_e4m3", "hif8", "int8", "bf16", "e8m0")
    roundings = [r for r in (*ROUNDINGS, "stochastic-8") if r != "stochastic"]
    found = [f"{name}(rounding={r})" for name in names for r in roundings if r != "hif8-hybrid" or name == "hif8"]
    return [*found, "mxfp4(rounding=nearest-away)", "nvfp4(rounding=toward-zero)"]


def _stochastic(quick: bool) -> list[str]:
    names = ("fp8_e4m3", "mxfp4") if quick else ("fp8_e4m3", "hif8", "int8", "bf16", "mxfp4", "nvfp4", "hif4")
    return [f"{name}(rounding=stochastic{bits})" for name in names for bits in ("", "-1")]


def _choices(quick: bool) -> list[str]:
    """What formats leave open: overflow, subnormals and NaN of elements; scale rules, tiles and specials of blocks."""
    rules = [f"mxfp4(scale={rule})" for rule in SCALE_RULES["e8m0"]]
    rules += [f"nvfp4(scale={rule})" for rule in SCALE_RULES["fp8_e4m3"]]
    rules += [f"fp8_e4m3_1x128(scale={rule})" for rule in SCALE_RULES["fp32"]]
    tiles = ["mxfp4(block=32x32)", "nvfp4(block=16x16)", "mxfp8_e4m3(block=7)"]
    special = ["mxfp4(special=element)", "mxfp4(zero_scale=one)", "nvfp4(scale=4over6-mae, scale_max=256)"]
    if quick:
        return rules + tiles + special
    elements = ["fp8_e5m2(overflow=inf)", "fp8_e4m3(overflow=nan)", "fp16(subnormals=flush)", "hif8(overflow=inf)"]
    elements += ["fp4_e2m1(nan=zero)", "int8(nan=max)", "e5m0", "e3m4", "e8m10", "e4m3fn", "e5m2fnuz"]
    blocks = ["mxfp4(element=fp4_e1m2)", "mxint8(scale=mse)", "mxfp4(block=32x32, scale=mse)", "int4_g128(amax_to=7.5)"]
    return rules + tiles + special + elements + blocks


CHAINS = (
    "relative-gaussian(sigma=0.05)",
    "relative-gaussian(sigma=0.05, draw=frozen)",
    "relative-gaussian(sigma=0.05, reference=absdot, draw=per_run)",
    "absolute-gaussian(sigma=0.3, draw=per_step)",
    "systematic-bias(gain=-2, offset=3)",
    "dead-zone(threshold=0.5)",
    "saturation(limit=1.5)",
    "spike(rate=0.01, size=100)",
    "stuck(rate=0.01, value=-7)",
    "stuck(rate=0.3, value=1, lanes=300)",
    "bit-flip(rate=0.3)",
    "bit-flip(rate=0.2, bit=15)",
    "relative-gaussian(sigma=0.05) + relative-gaussian(sigma=0.05)",
    "systematic-bias(gain=0.01) + absolute-gaussian(sigma=0.1) + saturation(limit=2)",
    "spike(rate=0.1, size=3) + spike(rate=0.1, size=3) + bit-flip(rate=0.1, bit=3)",
)
"""Every error model, and chains of several."""


def _chains(quick: bool) -> tuple[str, ...]:
    return CHAINS


def _axes(fmt: AnyFormat) -> tuple[int, ...]:
    return (-1, -2) if isinstance(fmt, BlockFormat) and fmt.block != "tensor" else (-1,)


# ---- casts ----------------------------------------------------------------------------------------------------------

STEP = torch.tensor(CLOCK)


def _cast_agrees(
    s: Subject, x: Tensor, text: str, axis: int = -1, rows: Tensor | None = None, what: str = "", sums: bool = False
) -> Tensor:
    """Hold a cast and what it counts to the reference's; the result."""
    arguments = (x, text, axis, KEY, STEP, rows, True)
    (got, stats), (expected, true_stats) = s("cast", *arguments), truth("cast", *arguments)
    what = f"{what} in {_kind(x)} along axis {axis}".strip()
    same(got, expected, what, x)
    same_stats(stats, true_stats, what, sums)
    return got


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.bfloat16(), x.half()


@law("edges", "bit", "cast", _named)
def _edges(s: Subject, text: str) -> str:
    """The numbers of a format, their midpoints and one ulp around each, alone and where a block's scale is fixed."""
    element = element_of(formats.get(text))
    x = edges(element)
    finite = x[x.isfinite()]
    inside = finite[finite.abs() <= element.max]
    with_largest = [torch.stack([v, torch.full_like(v, element.max)], 1) for v in (finite, inside)]
    tensors = [x, *with_largest] if text in _blocks(s.quick) else [x]
    for t in tensors:
        for half in _halves(t):
            _cast_agrees(s, half, text, what="edges")
    return f"{3 * sum(t.numel() for t in tensors)} values"


@law("every bf16", "bit", "cast", _named)
def _every_bf16(s: Subject, text: str) -> str:
    """All 65536 inputs of 16 bits: finite ones in order, then all shuffled, so that specials meet others in blocks."""
    x = every_bf16()
    order = torch.from_numpy(np.random.default_rng(1).permutation(1 << 16))
    tensors = (x[x.isfinite()], x[order]) if text in _blocks(s.quick) else (x,)
    held = (torch.bfloat16,) if s.quick else (torch.float32, torch.bfloat16)
    for t in tensors:
        for dtype in held:
            _cast_agrees(s, t.to(dtype), text, what="every bf16")
    return f"{len(held) * sum(t.numel() for t in tensors)} values"


@law("random bits", "bit", "cast", _named)
def _random_bits(s: Subject, text: str) -> str:
    """fp32 of all exponents; half without NaN and Inf, which would hide the rest of a block."""
    x = random_patterns(1 << (13 if s.quick else 16), seed=2).view(-1, 64)
    for t in (x, x.nan_to_num(0.0, 1.0, -1.0)):
        _cast_agrees(s, t, text, what="random bits")
    return f"{2 * x.numel()} values"


@law("blocks", "bit", "cast", _blocks)
def _block_magnitudes(s: Subject, text: str) -> str:
    """Blocks of every magnitude, of zeros, and with Inf and NaN in them, along both axes."""
    x = every_magnitude()
    for axis in _axes(formats.get(text)):
        for t in (x, x[20:], x[60:90].bfloat16()):  # the second has no NaN that would hide a whole tensor
            _cast_agrees(s, t, text, axis, what="blocks")
    return f"{x.numel()} values"


@law("shapes", "bit", "cast", _named)
def _shapes(s: Subject, text: str) -> str:
    """Odd sizes, more dimensions, scalars and nothing at all."""
    shapes = ((), (0,), (3, 0), (1,), (33,), (5, 7, 37), (129, 70))
    for shape in shapes:
        x = normal_values(*shape, seed=3).reshape(shape)
        for axis in _axes(formats.get(text)) if len(shape) > 1 else (-1,):
            _cast_agrees(s, x, text, axis, what="shapes")
    return f"{len(shapes)} shapes"


@law("choices", "bit", "cast", _choices)
def _choice(s: Subject, text: str) -> str:
    """Every choice that formats leave open."""
    return _three_inputs(s, text)


@law("roundings", "bit", "cast", _roundings)
def _rounding(s: Subject, text: str) -> str:
    """Every rounding."""
    return _three_inputs(s, text)


def _three_inputs(s: Subject, text: str, rows: Tensor | None = None) -> str:
    x = edges(element_of(formats.get(text)))
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(-1, 16)
    for t in (x, x.bfloat16()):
        _cast_agrees(s, t, text, what="edges")
    for axis in _axes(formats.get(text)):
        _cast_agrees(s, every_magnitude(), text, axis, what="blocks")
        _cast_agrees(s, normal_values(67, 70, seed=4), text, axis, what="normals")
    return f"{2 * x.numel()} values"


@law("stochastic", "bit", "cast", _stochastic)
def _stochastic_rows(s: Subject, text: str) -> str:
    """Random bits come from key, clock, logical row and column, and a row may begin anywhere."""
    for columns in (1, 127, 130):
        x = normal_values(17, columns, seed=5)
        for rows in (None, _some_rows(17, False), _some_rows(17, True)):
            for t in (x, x.bfloat16()):
                _cast_agrees(s, t, text, rows=rows, what="rows" if rows is not None else "no rows")
    _cast_agrees(s, every_magnitude(), text, what="blocks")
    return "17 rows of 1, 127 and 130 columns"


def _some_rows(n: int, pairs: bool) -> Tensor:
    """Logical rows of up to 63 bits; as pairs, with first columns of up to 33."""
    rng = np.random.default_rng(9)
    rows, first = torch.from_numpy(rng.integers(0, 1 << 63, n)), torch.from_numpy(rng.integers(0, 1 << 33, n))
    first[::3] = torch.arange(len(first[::3]))
    return torch.stack([rows, first], 1) if pairs else rows


# ---- quantize -------------------------------------------------------------------------------------------------------


@law("quantize", "bit", "quantize", _named)
def _quantize(s: Subject, text: str) -> str:
    """Every part of a quantized tensor, along every axis."""
    return _same_parts(s, "quantize", text)


@law("elements", "bit", "elements", _named)
def _elements_and_scales(s: Subject, text: str) -> str:
    """The values and scales that a quantized tensor's codes stand for."""
    return _same_parts(s, "elements", text)


def _same_parts(s: Subject, op: str, text: str) -> str:
    x = normal_values(35, 3, 50, seed=6)
    for axis in _axes(formats.get(text)):
        for t in (x, x.bfloat16()):
            arguments = (t, text, axis, KEY, STEP, None)
            for i, (got, expected) in enumerate(zip(s(op, *arguments), truth(op, *arguments), strict=True)):
                same(got, expected, f"part {i} of {_kind(t)} along axis {axis}")
    return f"{x.numel()} values"


@law("dequantize", "bit", "cast quantize dequantize", _named)
def _dequantize(s: Subject, text: str) -> str:
    """What comes back from codes and scales is the cast."""
    x = normal_values(35, 3, 50, seed=6)
    x = x if element_of(formats.get(text)).signed else x.abs()  # NaN has no code in all of them
    for axis in _axes(formats.get(text)):
        for t in (x, x.bfloat16()):
            parts = truth("quantize", t, text, axis, KEY, STEP, None)
            (got,) = s("dequantize", *parts, text, axis, list(t.shape), t.dtype)
            same(got, truth("cast", t, text, axis, KEY, STEP, None, False)[0], f"{_kind(t)} along axis {axis}", t)
    return f"{x.numel()} values"


@law("out", "bit", "cast cast_out perturb perturb_out")
def _out(s: Subject, case: str) -> str:
    """An op that writes to a given tensor writes what it would have returned, to the input itself, too."""
    x = normal_values(67, 130, seed=22).to(s.device)
    for t in (x, x.bfloat16()):
        for op, given in (("cast", ("mxfp4", -1, KEY, STEP, None)), ("perturb", (CHAINS[0], KEY, STEP, None, None))):
            rest = (False,) if op == "cast" else (None, False)
            expected = s(op, t, *given, *rest)[0]
            itself = t.clone()
            for source, into in ((t, torch.full_like(t, torch.nan)), (itself, itself)):
                backends.get(s.backend).ops[f"{op}_out"](source, *given, into)
                same(into.cpu(), expected, f"{op} of {_kind(t)}")
    return f"{x.numel()} values"


# ---- perturb --------------------------------------------------------------------------------------------------------


def _perturb_agrees(
    s: Subject, y: Tensor, text: str, rows: Tensor | None, dtype: torch.dtype | None, what: str
) -> None:
    arguments = (y, text, KEY, STEP, rows, _magnitude(text, y), dtype, True)
    (got, stats), (expected, true_stats) = s("perturb", *arguments), truth("perturb", *arguments)
    what = f"{what} in {_kind(y)}, result {str(got.dtype).removeprefix('torch.')}"
    same(got, expected, what, y)
    same_stats(stats, true_stats, what, sums=False)


def _magnitude(text: str, y: Tensor) -> Tensor | None:
    return 1 + normal_values(*y.shape, seed=7).reshape(y.shape).abs() if "absdot" in text else None


@law("perturb", "bit", "perturb", _chains)
def _perturb(s: Subject, text: str) -> str:
    """Every error model and chain, whatever the columns, the rows and where they begin, and the result's dtype."""
    widths = (1, 127, 130) if s.quick else (1, 3, 127, 128, 129, 260)
    for columns in widths:
        for y in (normal_values(17, columns, seed=8), normal_values(17, columns, seed=8).bfloat16()):
            for rows in (None, _some_rows(17, False), _some_rows(17, True)):
                for dtype in (None, torch.float32, torch.bfloat16):
                    _perturb_agrees(s, y, text, rows, dtype, "rows" if rows is not None else "no rows")
    return f"17 rows of {', '.join(map(str, widths))} columns"


@law("perturb random bits", "bit", "perturb", _chains)
def _perturb_random_bits(s: Subject, text: str) -> str:
    """fp32 of all exponents, Inf and NaN, which pass; odd shapes, float16."""
    y = random_patterns(1 << (13 if s.quick else 15), seed=10).view(-1, 256)
    _perturb_agrees(s, y, text, None, None, "random bits")
    _perturb_agrees(s, y, text, None, torch.bfloat16, "random bits")
    if "bit-flip" not in text:
        _perturb_agrees(s, normal_values(9, 70).half(), text, None, None, "float16")
    for shape in ((), (5,), (0,), (3, 0), (2, 3, 4)):
        _perturb_agrees(s, normal_values(*shape, seed=11).reshape(shape), text, None, None, "shapes")
    return f"{y.numel()} values"


# ---- layout, determinism, receipts ----------------------------------------------------------------------------------

DRAWN = (
    "cast fp8_e4m3(rounding=stochastic)",
    "cast mxfp4(rounding=stochastic-8)",
    "perturb relative-gaussian(sigma=0.05)",
    "perturb spike(rate=0.1, size=3) + absolute-gaussian(sigma=0.1)",
)


def _drawn(quick: bool) -> tuple[str, ...]:
    return DRAWN


def _op_on(s: Subject, case: str, x: Tensor, rows: Tensor | None, measure: bool = False) -> tuple[Tensor, ...]:
    op, text = case.split(" ", 1)
    if op == "cast":
        return s("cast", x, text, -1, KEY, STEP, rows, measure)
    return s("perturb", x, text, KEY, STEP, rows, None, None, measure)


@law("layout", "bit", "cast perturb", _drawn)
def _layout(s: Subject, case: str) -> str:
    """Split batches, permuted rows, other strides and dimensions: an element keeps its bits."""
    x, rng = normal_values(300, 320, seed=12).to(s.device), np.random.default_rng(13)
    rows = torch.from_numpy(rng.permutation(300)).to(s.device)
    order = torch.from_numpy(rng.permutation(300)).to(s.device)
    wide = torch.zeros(300, 640, device=s.device)
    wide[:, ::2] = x

    def of(t: Tensor, ids: Tensor) -> Tensor:
        return _op_on(s, case, t, ids)[0]

    whole = of(x, rows)
    same(torch.cat([of(x[i : i + 77], rows[i : i + 77]) for i in range(0, 300, 77)]), whole, "split batch")
    same(of(x[order], rows[order]), whole[order.cpu()], "permuted rows")
    same(of(x[:, :128], rows), whole[:, :128], "fewer columns")
    same(of(x.t().contiguous().t(), rows), whole, "transposed in memory")
    same(of(wide[:, ::2], rows), whole, "strided columns")
    same(of(x.view(20, 15, 320), rows).view(300, 320), whole, "more dimensions")
    pairs = torch.stack([rows, torch.full_like(rows, 64)], 1)
    same(of(x[:, 64:], pairs), whole[:, 64:], "rows that begin further on")
    return "7 layouts of 300 x 320"


@law("strides", "bit", "cast", _named)
def _strides(s: Subject, text: str) -> str:
    """A cast of a view is the cast of its copy."""
    base = normal_values(64, 96, seed=14)
    for dtype in (torch.float32, torch.bfloat16):
        x = base.to(s.device, dtype)
        for view in (x.t(), x[::2, 1::3], x[:, 5].expand(4, 64)):
            got, expected = (s("cast", t, text, -1, KEY, STEP, None, False)[0] for t in (view, view.cpu().contiguous()))
            same(got, expected, f"view of {_kind(x)}")
    return "3 views in 2 dtypes"


def _measured(quick: bool) -> tuple[str, ...]:
    return ("cast mxfp4", "cast nvfp4", "cast fp8_e4m3_128x128", *DRAWN)


@law("determinism", "bit", "cast perturb", _measured)
def _determinism(s: Subject, case: str) -> str:
    """The same call gives the same bits and receipts; on a CPU, with another number of threads, too."""
    x = normal_values(300, 701, seed=15)
    first = _op_on(s, case, x, None, True)
    for again in _again(s, lambda: _op_on(s, case, x, None, True)):
        same(again[0], first[0], "result of a second call", x)
        same(again[1], first[1], "receipt of a second call")
    return "2 calls more"


def _again(s: Subject, call: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            if torch.device(s.device).type == "cpu":
                torch.set_num_threads(count)
            yield call()
    finally:
        torch.set_num_threads(before)


@law(
    "receipts",
    "bit",
    "cast perturb",
    lambda quick: [f"cast {t}" for t in formats.ALL] + [f"perturb {t}" for t in CHAINS],
)
def _receipts(s: Subject, case: str) -> str:
    """What an op says of itself: counts exactly, sums to 1e-6; and unmeasured it gives the same bits and says 0."""
    op, text = case.split(" ", 1)
    x = normal_values(90, 130, seed=16)
    for t in (x, x.bfloat16()):
        rest = (-1, KEY, STEP, None) if op == "cast" else (KEY, STEP, None, _magnitude(text, t), None)
        (got, stats), (expected, true_stats) = (call(op, t, text, *rest, True) for call in (s, truth))
        quiet, zeros = s(op, t, text, *rest, False)
        same(got, expected, "measured", t)
        same(quiet, got, "unmeasured", t)
        same_stats(stats, true_stats, f"receipt of {_kind(t)}")
        same(zeros, torch.zeros(len(STATS), dtype=torch.float64), "receipt of an unmeasured call")
    return f"{x.numel()} values"


# ---- products -------------------------------------------------------------------------------------------------------

_ERROR = "relative-gaussian(sigma=0.05)"
SPECS = {
    "w4a4": OpSpec(forward=Forward(input="mxfp4", weight="mxfp4")),
    "w4a4 with errors": OpSpec(
        forward=Forward(input="mxfp4", weight="mxfp4", error=_ERROR),
        grad_input=GradInput(error=_ERROR),
        grad_weight=GradWeight(error="absolute-gaussian(sigma=0.1)"),
    ),
    "fp8 in every direction": OpSpec(
        forward=Forward(input="mxfp8_e4m3", weight="mxfp8_e4m3", error=_ERROR, output="bf16"),
        grad_input=GradInput(grad="mxfp8_e5m2(rounding=stochastic)", weight="mxfp8_e4m3", error=_ERROR),
        grad_weight=GradWeight(grad="mxfp8_e5m2(rounding=stochastic)", input="mxfp8_e4m3", hadamard=16, error=_ERROR),
    ),
}


def _specs(quick: bool) -> list[str]:
    return list(SPECS)


def _whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small integers: products of their casts add up exactly, in whatever order."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32))


@law("linear", "bit", "linear linear_backward", _specs)
def _linear(s: Subject, case: str) -> str:
    """Forward and backward equal the reference's where no order of addition can tell: on sums that are exact."""
    x, weight, grad = (_whole_numbers(*shape, seed=i) for i, shape in enumerate([(3, 11, 96), (40, 96), (3, 11, 40)]))
    rows = _some_rows(33, False)
    for dtype in (torch.float32, torch.bfloat16):
        results = (_linear_parts(run, case, x.to(dtype), weight.to(dtype), grad.to(dtype), rows) for run in (s, truth))
        for (name, got), (_, expected) in zip(*(r.items() for r in results), strict=True):
            if name.startswith("receipt"):
                for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                    same_stats(a, b, f"{name}, stream {i}, in {dtype}")
            else:
                same(got, expected, f"{name} in {dtype}")
    return "[3, 11, 96] by [40, 96], fp32 and bf16"


def _linear_parts(run: Any, case: str, x: Tensor, weight: Tensor, grad: Tensor, rows: Tensor) -> dict[str, Tensor]:
    keys = [key_of(0, "conformance", str(i)) for i in range(12)]
    text = SPECS[case].text
    y, forward = run("linear", x, weight, None, text, True, keys[:4], STEP, rows)
    gx, gw, backward = run("linear_backward", grad, x, weight, text, True, keys, STEP, rows, True, True)
    return {"y": y, "grad x": gx, "grad weight": gw, "receipt forward": forward, "receipt backward": backward}


@law("linear sums", "bound", "linear", _specs)
def _linear_sums(s: Subject, case: str) -> str:
    """On any data the forward is the reference's within the error that an order of addition in fp32 can make."""
    x, weight, k = normal_values(33, 96, seed=17), normal_values(40, 96, seed=18), 96
    keys = [key_of(0, "conformance", str(i)) for i in range(4)]
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (x.to(dtype), weight.to(dtype), None, SPECS[case].text, True, keys, STEP, None)
        got, expected = (run("linear", *arguments)[0].double() for run in (s, truth))
        added = x.abs().double() @ weight.abs().double().t()
        rounded = 2.0**-7 if dtype == torch.bfloat16 or SPECS[case].forward.output else 2.0**-22
        over = (got - expected).abs() - (8 * k * 2.0**-24 * added + rounded * expected.abs())
        if not bool((over <= 0).all()):
            raise Violation(
                f"{dtype}: {int((~(over <= 0)).sum())} of {over.numel()} sums are off by {float(over.max()):g} too much"
            )
    return "[33, 96] by [40, 96], fp32 and bf16"


@law("gemm", "bit", "gemm", lambda quick: list(MATRIX_UNITS))
def _gemm(s: Subject, unit: str) -> str:
    """Every matrix unit's accumulator: alignment, truncation, order of addition."""
    a, b = normal_values(2, 9, 70, seed=19), normal_values(2, 70, 11, seed=20)
    a = a * torch.exp2(normal_values(2, 9, 70, seed=21).mul(4).round())
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (a.to(dtype), b.to(dtype), unit)
        same(s("gemm", *arguments)[0], truth("gemm", *arguments)[0], f"product in {dtype}")
    return "[2, 9, 70] by [2, 70, 11]"


# ---- chance ---------------------------------------------------------------------------------------------------------

SPREAD = 4.5  # standard deviations that a statistic may be off: less than one in 10^5


@law("normal", "statistical", "perturb")
def _normal(s: Subject, case: str) -> str:
    """Noise has the moments of a standard normal and does not repeat itself along rows, columns, steps or keys."""
    size = (512, 512) if s.quick else (2048, 2048)

    def noise(key: int, at: int) -> Tensor:
        arguments = (torch.zeros(size), "absolute-gaussian(sigma=1)", key, torch.tensor(at), None, None, None, False)
        return s("perturb", *arguments)[0].double()

    z, n = noise(KEY, 1), math.prod(size)
    moments = {"mean": (z.mean(), 0, 1), "variance": (z.var(), 1, 2), "skew": ((z**3).mean(), 0, 15)}
    moments["kurtosis"] = ((z**4).mean(), 3, 96)
    for name, (got, expected, variance) in moments.items():
        _within_chance(name, float(got), expected, math.sqrt(variance / n))
    others = {"the next column": z.roll(1, 1), "the column after it": z.roll(2, 1), "the next row": z.roll(1, 0)}
    others |= {
        "the next step": noise(KEY, 2),
        "another phase": noise(KEY, clock(1, "eval")),
        "another key": noise(KEY + 1, 1),
    }
    for name, other in others.items():
        for power in (1, 2):  # squares too: pairs of normals share a radius
            r = torch.corrcoef(torch.stack([z.flatten() ** power, other.flatten() ** power]))[0, 1]
            _within_chance(f"correlation with {name}", float(r), 0, 1 / math.sqrt(n))
    return f"{n} normals"


def _within_chance(what: str, got: float, expected: float, deviation: float) -> None:
    if not abs(got - expected) <= SPREAD * deviation:
        raise Violation(f"{what} is {got:.6g}, expected {expected:g} +- {SPREAD * deviation:.2g}")


@law("stochastic mean", "statistical", "cast", lambda quick: ("fp4_e2m1", "fp8_e4m3", "hif8", "int8", "bf16"))
def _stochastic_mean(s: Subject, name: str) -> str:
    """A value between two numbers of a format becomes the upper as often as it is near to it."""
    fmt, n = element_of(formats.get(name)), 1 << 14
    for low in (0.0, 1.0, fmt.min_subnormal, 2.0):
        high = fmt.next_up(low)
        for share in (1 / 8, 1 / 2, 7 / 8):
            x = torch.full((64, n // 64), low + share * (high - low))
            y = s("cast", x, f"{name}(rounding=stochastic)", -1, KEY, STEP, None, False)[0]
            if not bool(((y == low) | (y == high)).all()):
                raise Violation(f"{low + share * (high - low)!r} became neither {low!r} nor {high!r}")
            ups = float((y == high).double().mean())
            _within_chance(f"share that went up from {low:g}", ups, share, math.sqrt(share * (1 - share) / n))
    return f"12 values, {n} times each"
