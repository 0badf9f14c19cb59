"""aqnsim: number formats and op errors of accelerators, emulated in PyTorch, with receipts.

Importing this package is cheap: torch is imported at the first use of something that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aqnsim._errors import (
    AqnsimError,
    BackendError,
    ConfigError,
    RealisationError,
    UnknownNameError,
    did_you_mean,
)
from aqnsim.errors import AbsoluteGaussian, ErrorModel, RelativeGaussian
from aqnsim.receipts import Receipt
from aqnsim.rng import NoiseKey

if TYPE_CHECKING:
    from aqnsim import aqn, backends, formats, profiles
    from aqnsim.api import cast, perturb, quantize
    from aqnsim.aqn import AQN
    from aqnsim.backends import use as use_backend
    from aqnsim.emulation import Coverage, Emulation, ReceiptTotals, emulate, survey
    from aqnsim.quantized import Quantized
    from aqnsim.rotation import hadamard

__version__ = "0.1.0"

_LAZY = {
    "AQN": ("aqnsim.aqn", "AQN"),
    "Coverage": ("aqnsim.emulation", "Coverage"),
    "Emulation": ("aqnsim.emulation", "Emulation"),
    "Quantized": ("aqnsim.quantized", "Quantized"),
    "ReceiptTotals": ("aqnsim.emulation", "ReceiptTotals"),
    "cast": ("aqnsim.api", "cast"),
    "emulate": ("aqnsim.emulation", "emulate"),
    "hadamard": ("aqnsim.rotation", "hadamard"),
    "survey": ("aqnsim.emulation", "survey"),
    "perturb": ("aqnsim.api", "perturb"),
    "quantize": ("aqnsim.api", "quantize"),
    "use_backend": ("aqnsim.backends", "use"),
    "aqn": ("aqnsim.aqn", None),
    "backends": ("aqnsim.backends", None),
    "formats": ("aqnsim.formats", None),
    "profiles": ("aqnsim.profiles", None),
}

__all__ = [
    "AQN",
    "AbsoluteGaussian",
    "AqnsimError",
    "BackendError",
    "ConfigError",
    "Coverage",
    "Emulation",
    "ErrorModel",
    "NoiseKey",
    "Quantized",
    "RealisationError",
    "Receipt",
    "ReceiptTotals",
    "RelativeGaussian",
    "UnknownNameError",
    "aqn",
    "backends",
    "cast",
    "did_you_mean",
    "emulate",
    "formats",
    "hadamard",
    "perturb",
    "profiles",
    "quantize",
    "survey",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'aqnsim' has no attribute {name!r}{did_you_mean(name, __all__)}")
    module, attribute = _LAZY[name]
    value = import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
