"""What every library does with weights of one format: a place in its files, and its way back from there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.formats import BlockFormat
from aqnsim.quantized import Quantized


def imported(name: str) -> Any:
    """A module of an optional package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ConfigError(f"export needs {package}: pip install 'aqnsim[export]'") from error


def layer_of(weight: str) -> str:
    """The name of the layer whose weight that is."""
    return weight.removesuffix(".weight")


def different(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype, float32 or bfloat16, differ in a bit; all NaNs are the same."""
    bits = {2: torch.int16, 4: torch.int32}[b.element_size()]
    return (a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())


class Library(ABC):
    """How a library stores weights of one format."""

    name: ClassVar[str]
    nvfp4_rule: ClassVar[str]
    """The scale rule of NVFP4 whose values come back exactly."""

    def __init__(self, fmt: BlockFormat) -> None:
        self.fmt = fmt

    @staticmethod
    @abstractmethod
    def holds(fmt: BlockFormat) -> bool:
        """Whether its files have a place for weights of a format."""

    @abstractmethod
    def entries(self, name: str, q: Quantized) -> dict[str, Tensor]:
        """What its files have for a weight, by the names in the file."""

    @abstractmethod
    def read(self, name: str, entries: Mapping[str, Tensor], expected: Tensor) -> Tensor:
        """The weight that a loaded model has where the file has these entries, of the shape and dtype of ``expected``.

        By the library's own code; ``expected`` is what it should be.
        """

    @abstractmethod
    def config(self, ignored: list[str]) -> dict[str, Any]:
        """``quantization_config`` of config.json, when all weights were read; ``ignored`` are other linear layers."""

    def metadata(self, weights: Mapping[str, torch.Size], others: list[str], dtype: torch.dtype) -> dict[str, str]:
        """What stands in the header of every file, for weights by name and for the other tensors."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What users should know, when all weights were read."""
        return ()

    def hint(self, dtype: torch.dtype) -> str:
        """What to do where values of a weight do not come back."""
        return ""

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that share a scale; (1, 0) for a row, (0, 0) for the whole weight."""
        return self.fmt.tile or ((0, 0) if self.fmt.block == "tensor" else (1, 0))

    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse a weight that cannot be divided into blocks.

        Raises:
            ConfigError: its inputs are no multiple of the block.
        """
        self.check_axis(name, shape, -1, self.tile[1])

    def loads_converted(self) -> bool:
        """Whether it lets transformers merge or rename other weights while they are loaded."""
        return True

    def check_axis(self, name: str, shape: torch.Size, axis: int, size: int) -> None:
        """Refuse a weight with an axis that is no multiple of a size; 0 is the whole axis."""
        if size and shape[axis] % size:
            raise ConfigError(
                f"{name}: {self.name} divides axis {axis} of {list(shape)} into blocks of {size} of {self.fmt}, which "
                "does not fit; exclude the layer"
            )
