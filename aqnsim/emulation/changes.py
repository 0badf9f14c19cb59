"""What an emulation changes in a model, each with the way back: classes of modules, values of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim._errors import ConfigError
from aqnsim.emulation.sites import Site


@dataclass(frozen=True)
class FrozenWeight:
    """A frozen weight, what it was before the profile was attached, and cast(W), which it holds."""

    site: Site
    weight: nn.Parameter
    master: Tensor
    value: Tensor
    digest: int
    cast: Callable[[], Tensor]

    def check_place(self) -> None:
        """Refuse to write a weight that the model has no more."""
        if self.site.parameter is not self.weight:
            raise ConfigError(
                f"the frozen weight of {self.site.name!r} was replaced since the profile was attached (by "
                "fully_shard?): the clean weight cannot come back there; restore(keep_weights=True) keeps cast(W), and "
                "a second model that is not emulated can stand for the clean one"
            )

    def check(self) -> None:
        """Refuse to put the master back where it cannot go, or over something that was written since."""
        self.check_place()
        if digest_of(self.weight.data) != self.digest:
            raise ConfigError(
                f"the frozen weight of {self.site.name!r} was changed since the profile was attached (a merged "
                "adapter, a loaded state dict?): going back to the clean weight would lose that; "
                "restore(keep_weights=True) keeps what is there, refresh_weights() writes cast(W) again, as after "
                "unmerging"
            )


def digest_of(t: Tensor) -> int:
    """A sum over the bits, to notice that a tensor was written."""
    bits = t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)
    return int(bits.sum(dtype=torch.int64))


@dataclass(frozen=True)
class Swap:
    """A module that took on an emulated class, and the attributes that came with it."""

    module: nn.Module
    original: type[nn.Module]
    emulated: type[nn.Module]
    attributes: Mapping[str, Any]

    def do(self) -> None:
        self.module.__dict__.update(self.attributes)
        self.module.__class__ = _with_base(type(self.module), self.original, self.emulated)

    def undo(self) -> None:
        self.module.__class__ = _with_base(type(self.module), self.emulated, self.original)
        for name in self.attributes:
            del self.module.__dict__[name]


def _with_base(cls: type, old: type, new: type) -> type:
    """A class with one of its bases replaced: what was swapped in may have been derived from since, by fully_shard."""
    if cls is old:
        return new
    if old not in cls.__mro__:
        return cls
    bases = tuple(_with_base(base, old, new) for base in cls.__bases__)
    return type(cls.__name__, bases, {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")})
