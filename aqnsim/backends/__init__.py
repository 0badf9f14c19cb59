"""Backends: sets of op implementations for a device, ours and third parties' alike.

Another package brings one by the entry-point group ``aqnsim.backends``: the entry point's name is the backend's, and it
loads a :class:`Backend`. Which backend serves a device is a table, changed only by :func:`use`. There is no fallback: a
backend that lacks an op raises and names those that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from aqnsim import formats
from aqnsim._errors import BackendError, unknown

OPS = (
    "cast",
    "cast_out",
    "elements",
    "quantize",
    "quantize_out",
    "dequantize",
    "dequantize_out",
    "perturb",
    "perturb_out",
    "gemm",
    "linear",
    "linear_backward",
    "matmul",
    "matmul_backward",
    "stage",
    "native_linear",
)
"""What a backend may implement; each name's meaning is its op's in :mod:`aqnsim.ops`."""


@dataclass(frozen=True)
class Backend:
    """Op implementations for devices of some types.

    Attributes:
        name: what :func:`use` takes.
        devices: torch device types that the implementations accept.
        ops: implementation by op name, a subset of :data:`OPS`.
        native: pairs of formats, of the input and of the weight (an input's may be None: not cast), of which the device
            itself makes the product. Such a linear layer runs ``native_linear``, and no error is emulated in it.
    """

    name: str
    devices: tuple[str, ...]
    ops: Mapping[str, Callable[..., Any]]
    native: tuple[tuple[str | None, str], ...] = ()


# Built-in backends are imported on first use: a name here costs nothing.
_MODULES = {name: f"aqnsim.backends.{name}" for name in ("cpu", "cuda", "npu", "reference", "triton")}
_MODULES["npu-host"] = _MODULES["npu"]
_NEEDS = {"cuda": "cupy", "npu": "torch_npu", "npu-host": "torch_npu", "triton": "triton"}
_REGISTERED: dict[str, Backend] = {}
_CHOSEN = {"cpu": "cpu", "cuda": "cuda"}
GROUP = "aqnsim.backends"
"""The entry-point group of backends in other packages."""


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def register(backend: Backend) -> Backend:
    """Make a backend known under its name.

    Raises:
        BackendError: the name is taken, or native formats have no ``native_linear``.
        UnknownNameError: an op is not one of :data:`OPS`, or a native format is none.
    """
    if backend.name in _REGISTERED:
        raise BackendError(f"backend {backend.name!r} is already registered")
    for op in backend.ops:
        if op not in OPS:
            raise unknown("op", op, OPS)
    if backend.native and "native_linear" not in backend.ops:
        raise BackendError(f"backend {backend.name!r} declares native formats but has no op 'native_linear' for them")
    for fmt in (f for pair in backend.native for f in pair if f is not None):
        formats.get(fmt)
    _REGISTERED[backend.name] = backend
    return backend


@contextmanager
def registered(backend: Backend) -> Iterator[str]:
    """Make a backend known for the duration of a block, which gets its name; what serves a device is then as before.

    Raises:
        BackendError: see :func:`register`.
    """
    before = chosen()
    register(backend)
    try:
        yield backend.name
    finally:
        del _REGISTERED[backend.name]
        _CHOSEN.clear()
        _CHOSEN.update(before)


def names() -> list[str]:
    """All known backends."""
    return sorted({*_MODULES, *_REGISTERED, *_plugins()})


def lacks(name: str) -> str | None:
    """The package that a backend needs and that is not installed; None where nothing is missing."""
    package = _NEEDS.get(name)
    return package if package and name not in _REGISTERED and find_spec(package) is None else None


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UnknownNameError: no such backend.
        BackendError: an entry point of that name does not load a backend of that name.
    """
    if name not in _REGISTERED:
        if name in _MODULES:
            import_module(_MODULES[name])
        elif name in _plugins():
            _register_plugin(_plugins()[name])
        else:
            raise unknown("backend", name, names())
    return _REGISTERED[name]


def _register_plugin(point: EntryPoint) -> None:
    loaded = point.load()
    if not isinstance(loaded, Backend) or loaded.name != point.name:
        shown = f"backend {loaded.name!r}" if isinstance(loaded, Backend) else f"a {type(loaded).__name__}"
        raise BackendError(
            f"the entry point {point.name!r} of group {GROUP!r} ({point.value}) loads {shown}: "
            f"expected an aqnsim.backends.Backend named {point.name!r}"
        )
    if point.name not in _REGISTERED:  # importing the package may have registered it
        register(loaded)


def multiplies_natively(device: str, input: str | None, weight: str | None) -> bool:
    """Whether the backend that serves a device type lets the device itself multiply two formats."""
    if weight is None or device not in _CHOSEN:
        return False
    pairs = {(a and str(formats.get(a)), str(formats.get(w))) for a, w in get(_CHOSEN[device]).native}
    return (input, weight) in pairs


def use(name: str, device: str | None = None) -> None:
    """Let backend ``name`` serve ``device`` (default: every device type that it declares).

    Raises:
        UnknownNameError: no such backend.
        BackendError: the backend does not serve that device.
    """
    backend = get(name)
    if device is not None and device not in backend.devices:
        raise BackendError(f"backend {name!r} serves {', '.join(backend.devices)}, not {device!r}")
    for d in backend.devices if device is None else (device,):
        _CHOSEN[d] = name


def chosen() -> dict[str, str]:
    """Device type -> name of the backend that serves it."""
    return dict(_CHOSEN)


def resolve(op: str, device: str) -> Callable[..., Any]:
    """The implementation of ``op`` on tensors of a device type.

    Raises:
        BackendError: no backend serves the device, or the one that does lacks the op.
    """
    if device not in _CHOSEN:
        raise BackendError(
            f"no backend serves device {device!r}; served: {', '.join(_CHOSEN)}; "
            "choose one with aqnsim.use_backend(name)"
        )
    backend = get(_CHOSEN[device])
    if op not in backend.ops:
        installed = [n for n in sorted({*_MODULES, *_REGISTERED}) if not lacks(n)]
        having = [n for n in installed if op in get(n).ops and device in get(n).devices]
        raise BackendError(
            f"backend {backend.name!r} lacks {op!r} for {device}; available: {', '.join(having) or 'none'}"
        )
    return backend.ops[op]
