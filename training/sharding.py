"""FSDP2: weights in shards while training, whole while sampling.

Each decoder layer is gathered for its own forward and backward. Rollouts and evaluations gather all of them once:
ranks decode different numbers of tokens, so that a gather within a forward would wait for a rank that has finished.
Noise and casts see whole weights in either case: what runs is a module's own forward, on what FSDP2 gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from aqnsim._errors import RealisationError

FSDP_CONFIG = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": False,  # else only the first process would have weights to cast
    "state_dict_type": "FULL_STATE_DICT",
}
"""For transformers' `fsdp_config`. One layer of the decoder is gathered at a time."""


def admit_cpus(accelerator: Accelerator, plugin_arguments: dict[str, Any]) -> None:
    """Shard on CPUs too: accelerate takes DDP there without a word, and torch has FSDP2.

    Args:
        accelerator: that was asked for FSDP.
        plugin_arguments: of accelerate's plugin.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def attest_sharding(model: nn.Module, asked: bool) -> None:
    """Check that weights are in shards where that was asked for, and nowhere else.

    Raises:
        RealisationError: they are not; the message names a parameter.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) != asked:
            found = "is whole" if asked else "is a shard"
            raise RealisationError(
                f"{name} {found}, but --fsdp was {'' if asked else 'not '}asked for: the launcher and the run disagree"
            )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Run forwards of any number on whole weights; nothing changes where the model is not sharded."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        yield
        return
    _make_root(sharded[0])
    for module in sharded[1:]:
        module.set_reshard_after_forward(False, recurse=False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded[1:]:
            module.set_reshard_after_forward(True, recurse=False)
        for module in sharded:
            module.reshard()


def _make_root(model: FSDPModule) -> None:
    """Let FSDP2 know its root, which it takes the first module to be that runs: decoding runs one inside of it."""
    if not hasattr(model, "aqnsim_begin"):
        model.aqnsim_begin = _nothing  # type: ignore[attr-defined]
        register_fsdp_forward_method(model, "aqnsim_begin")  # type: ignore[arg-type]
    model.aqnsim_begin()  # type: ignore[attr-defined]


def _nothing() -> None:
    """A forward that runs nothing."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered where it is sharded (a collective call then)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_state(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Whole trained parameters on the CPU, for a checkpoint (a collective call); None where nothing is sharded."""
    if not isinstance(model, FSDPModule):
        return None
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: whole(parameter.detach()).cpu() for name, parameter in trained}
