"""Cast the tensors of a safetensors file, and measure what that changes."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from aqnsim import ops  # noqa: F401  (defines torch.ops.aqnsim)
from aqnsim._errors import ConfigError
from aqnsim.cli.output import Section, Table, progress, whole_file
from aqnsim.formats import AnyFormat, random_bits
from aqnsim.receipts import STATS, Receipt, from_stats
from aqnsim.rng import NoiseKey

_AS_THEY_ARE = ("F32", "BF16")
_WIDENED = ("F16", "F64", "F8_E4M3", "F8_E5M2")
_PIECE = 1 << 22  # values that are compared at a time


@dataclass(frozen=True)
class Measurement:
    """What a cast did to values; measurements of several tensors add up.

    Attributes:
        stats: sums by :data:`aqnsim.receipts.STATS`, as the op reports them.
        nonzero: inputs that were not zero.
        zeroed: those of them that became zero.
        max_absolute_error: the largest difference of a finite input and its finite result.
        max_relative_error: the largest such difference relative to an input that is not zero.
    """

    stats: tuple[float, ...] = (0.0,) * len(STATS)
    nonzero: int = 0
    zeroed: int = 0
    max_absolute_error: float = 0.0
    max_relative_error: float = 0.0

    def __add__(self, other: Measurement) -> Measurement:
        return Measurement(
            tuple(a + b for a, b in zip(self.stats, other.stats, strict=True)),
            self.nonzero + other.nonzero,
            self.zeroed + other.zeroed,
            max(self.max_absolute_error, other.max_absolute_error),
            max(self.max_relative_error, other.max_relative_error),
        )

    @property
    def receipt(self) -> Receipt:
        """The op's own account."""
        return from_stats(self.stats, site="", role="", phase="", stream="", requested="")

    def to_dict(self) -> dict[str, Any]:
        """What is reported, by column."""
        receipt = self.receipt
        return {
            "elements": receipt.elements,
            "sqnr_db": receipt.sqnr_db,
            "zeroed": self.zeroed / self.nonzero if self.nonzero else 0.0,
            "saturated": receipt.saturated,
            "max_absolute_error": self.max_absolute_error,
            "max_relative_error": self.max_relative_error,
            "changed": receipt.changed,
            "nonfinite": receipt.nonfinite,
        }


@dataclass(frozen=True)
class TensorReport:
    """One tensor: its shape, its dtype as safetensors spells it, and what the cast did; None where it was skipped."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    measured: Measurement | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        head = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}
        return head | (self.measured.to_dict() if self.measured else {}) | {"note": self.note}


@dataclass(frozen=True)
class FileReport:
    """What the casts of a file did."""

    file: Path
    format: str
    axis: int
    out: Path | None
    tensors: list[TensorReport]
    not_included: int

    @property
    def total(self) -> Measurement:
        """Of all values that were cast."""
        return sum((t.measured for t in self.tensors if t.measured), Measurement())

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "file": str(self.file),
            "format": self.format,
            "axis": self.axis,
            "out": str(self.out) if self.out else None,
            "tensors": [t.to_dict() for t in self.tensors if t.measured],
            "skipped": [t.to_dict() for t in self.tensors if not t.measured],
            "not_included": self.not_included,
            "total": self.total.to_dict(),
        }

    def page(self) -> list[Section]:
        """One line a tensor, and one for all."""
        columns = tuple(self.total.to_dict())
        header = ("name", "shape", "dtype", *(_HEADINGS.get(c, c.replace("_", " ")) for c in columns), "note")
        rows: Table = [header]
        for t in self.tensors:
            cells = _cells(t.measured) if t.measured else ("-",) * len(columns)
            rows.append((t.name, "x".join(map(str, t.shape)) or "scalar", t.dtype, *cells, t.note or "-"))
        rows.append(("total", "-", "-", *_cells(self.total), "-"))
        sections = [Section("", rows)]
        if self.not_included:
            sections.append(Section("", f"not included: {self.not_included} other tensors"))
        return sections + ([Section("", f"written: {self.out}")] if self.out else [])


_HEADINGS = {"sqnr_db": "SQNR dB", "max_absolute_error": "max abs error", "max_relative_error": "max rel error"}
_SHARES = ("zeroed", "saturated", "changed")


def _cells(measured: Measurement) -> tuple[str, ...]:
    def text(column: str, value: Any) -> str:
        if value is None:
            return "-"
        if column == "sqnr_db":
            return f"{value:.2f}"
        return f"{value:.3%}" if column in _SHARES else f"{value:.4g}" if isinstance(value, float) else str(value)

    return tuple(text(*item) for item in measured.to_dict().items())


def cast_file(
    file: Path,
    fmt: AnyFormat,
    axis: int = -1,
    include: Sequence[str] = ("*",),
    out: Path | None = None,
    seed: int | None = None,
) -> FileReport:
    """Cast the float tensors of a file whose names match a glob of ``include``.

    Args:
        out: where the file is written again, with the values of those tensors replaced: the dtypes, the other tensors
            and the metadata are those of ``file``.
        seed: of a stochastic rounding, 0 by default; each tensor's name makes noise of its own.

    Raises:
        ConfigError: no safetensors file, a glob that matches no tensor, no float tensor that matches, an axis that a
            tensor has not, a seed that nothing uses, values that the dtype of a tensor cannot hold, or ``out`` cannot
            be written.
    """
    if seed is not None and not random_bits(fmt):
        raise ConfigError(f"the rounding of {fmt} draws no random bits: --seed changes nothing, leave it out")
    with _opened(file) as tensors:
        headers = {name: _Header.of(tensors, name) for name in sorted(tensors.keys())}
        chosen = {name: headers[name] for name in _matching(list(headers), include)}
        _check(file, chosen, axis)
        with _copied(file, out) as copy, progress("casting", len(chosen)) as step:
            reports = []
            for name, header in chosen.items():
                step(name)
                reports.append(_one(tensors, name, header, fmt, axis, seed or 0, copy))
    return FileReport(file, str(fmt), axis, out, reports, len(headers) - len(chosen))


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(tensors: Any, name: str) -> _Header:
        part = tensors.get_slice(name)
        return _Header(part.get_dtype(), tuple(part.get_shape()))

    @property
    def is_float(self) -> bool:
        return self.dtype in _AS_THEY_ARE + _WIDENED


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise ConfigError(f"{file}: {'not a file' if file.exists() else 'no such file'}; expected a .safetensors file")
    try:
        handle = safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as a safetensors file: {error}") from error
    with handle as tensors:
        yield tensors


def _matching(names: list[str], globs: Sequence[str]) -> list[str]:
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise ConfigError(f"--include {glob!r} matches none of {len(names)} tensors: {_some(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check(file: Path, chosen: dict[str, _Header], axis: int) -> None:
    floats = {name: header for name, header in chosen.items() if header.is_float}
    if not floats:
        raise ConfigError(f"{file}: no float tensor to cast; these are none: {_some(list(chosen)) or 'no tensors'}")
    for name, header in floats.items():
        dims = max(len(header.shape), 1)
        if not -dims <= axis < dims:
            raise ConfigError(f"{name}: axis {axis} is out of range for {dims} dimensions; choose with --include")


@dataclass(frozen=True)
class _Copy:
    """A copy of a safetensors file whose tensors can be overwritten, by their places in it."""

    file: BinaryIO
    places: dict[str, int]

    def overwrite(self, name: str, tensor: Tensor) -> None:
        self.file.seek(self.places[name])
        self.file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@contextmanager
def _copied(file: Path, out: Path | None) -> Iterator[_Copy | None]:
    """A copy that becomes ``out`` once all went well."""
    if out is None:
        yield None
        return
    with whole_file(out) as temporary:
        shutil.copyfile(file, temporary)
        with temporary.open("r+b") as copy:
            size = int.from_bytes(copy.read(8), "little")
            header = json.loads(copy.read(size))
            header.pop("__metadata__", None)
            yield _Copy(copy, {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()})
            copy.flush()
            os.fsync(copy.fileno())


# ---- tensors --------------------------------------------------------------------------------------------------------


def _one(
    tensors: Any, name: str, header: _Header, fmt: AnyFormat, axis: int, seed: int, copy: _Copy | None
) -> TensorReport:
    if not header.is_float:
        return TensorReport(name, header.shape, header.dtype, None, "skipped: not float")
    stored = tensors.get_tensor(name)
    x = stored if header.dtype in _AS_THEY_ARE else stored.float()
    try:
        y, measured = measure(x, fmt, axis, NoiseKey(seed=seed, site=name))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    note = "" if x is stored else "cast as float32"
    if copy is not None:
        again = _narrowed(name, y, stored.dtype)
        copy.overwrite(name, again)
        if rounded := int((again.float() != y.float()).sum() - y.isnan().sum()):
            note += f", {rounded} results rounded to {header.dtype}"
    return TensorReport(name, header.shape, header.dtype, measured, note)


def _narrowed(name: str, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The result in the dtype that the file has for it."""
    narrow = y.to(dtype)
    lost = int((y.isfinite() & ~narrow.float().isfinite()).sum())
    if lost:
        raise ConfigError(f"{name}: {lost} results are beyond the range of {dtype}; convert the file to float32 first")
    return narrow


def measure(x: Tensor, fmt: AnyFormat, axis: int = -1, key: NoiseKey | None = None) -> tuple[Tensor, Measurement]:
    """Cast a float32 or bfloat16 tensor, and measure what that changed.

    Args:
        key: of a stochastic rounding; not used by others.
    """
    key = key or NoiseKey()
    noise = (key.value, torch.tensor(key.clock)) if random_bits(fmt) else (0, None)
    y, stats = torch.ops.aqnsim.cast(x, str(fmt), axis % max(x.dim(), 1), *noise, None, True)
    found = Measurement(tuple(stats.tolist()))
    for before, after in zip(x.flatten().split(_PIECE), y.flatten().split(_PIECE), strict=True):
        found += _differences(before.float(), after.float())
    return y, found


def _differences(before: Tensor, after: Tensor) -> Measurement:
    nonzero = before != 0
    error = (after - before).abs()
    error = torch.where(error.isfinite(), error, 0)
    relative = torch.where(nonzero, error / before.abs(), 0)
    largest = [float(e.max()) if e.numel() else 0.0 for e in (error, relative)]
    return Measurement(
        nonzero=int(nonzero.sum()),
        zeroed=int((nonzero & (after == 0)).sum()),
        max_absolute_error=largest[0],
        max_relative_error=largest[1],
    )
