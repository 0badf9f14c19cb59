"""What an emulation changes in a model, each with the way back: classes of modules, values of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim._errors import ConfigError
from aqnsim.emulation.sites import Site


@dataclass
class FrozenWeight:
    """A frozen weight, what it was before the profile was attached, and cast(W), which it holds.

    Once ``fully_shard`` has put a DTensor in the weight's place, master and value are this rank's shards.
    """

    site: Site
    weight: nn.Parameter
    master: Tensor
    value: Tensor
    digest: int
    cast: Callable[[], Tensor] | None
    _recast: bool | None = None

    @property
    def recast(self) -> bool:
        """Whether the cast changed a value of the whole weight."""
        return digest_of(self.master) != self.digest if self._recast is None else self._recast

    def hold(self, masters: bool) -> None:
        """Put the master or cast(W) in place."""
        held = self.master if masters else self.value
        if self.cast is None:
            _local(self.weight).copy_(held)  # in place: FSDP2 gathers from this storage
        else:
            self.weight.data = held.to(self.weight.device)  # the model may have moved since

    def refresh(self) -> None:
        """Cast the master again, over whatever was written to cast(W)."""
        self.check_place()
        if self.cast is None:
            raise ConfigError(
                f"the frozen weight of {self.site.name!r} is sharded, and a shard cannot be cast on its own: "
                "refresh_weights() before fully_shard"
            )
        self.value.copy_(self.cast())  # a merge adds in place, to this tensor

    def check_place(self) -> None:
        """Refuse to write a weight that the model has no more; follow one that was sharded."""
        place = self.site.parameter
        if place is self.weight:
            return
        if not hasattr(place, "placements"):
            raise ConfigError(
                f"the frozen weight of {self.site.name!r} was replaced since the profile was attached: the clean "
                "weight cannot come back there; restore(keep_weights=True) keeps what is there, and a second model "
                "that is not emulated can stand for the clean one"
            )
        self._recast = self.recast
        self.master, self.value = (_shard(t, place) for t in (self.master, self.value))
        self.weight, self.cast, self.digest = place, None, digest_of(self.value)  # type: ignore[assignment]

    def check(self) -> None:
        """Refuse to put the master back where it cannot go, or over something that was written since."""
        self.check_place()
        if digest_of(_local(self.weight)) != self.digest:
            raise ConfigError(
                f"the frozen weight of {self.site.name!r} was changed since the profile was attached (a merged "
                "adapter, a loaded state dict?): going back to the clean weight would lose that; "
                "restore(keep_weights=True) keeps what is there, refresh_weights() writes cast(W) again, as after "
                "unmerging"
            )


def _local(weight: Tensor) -> Tensor:
    """What this rank holds of a weight."""
    data = weight.detach()
    return data.to_local() if hasattr(data, "to_local") else data


def _shard(whole: Tensor, like: Any) -> Tensor:
    """This rank's shard of a tensor that every rank has, as a DTensor is sharded; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    sharded = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return sharded.to_local().clone()  # else the whole tensor would stay in memory


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
