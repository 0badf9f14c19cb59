"""The processes of a run: as many as were asked for, or none.

`accelerate launch --cpu --num_processes 2` starts one process and says nothing. A launcher's silence is no evidence, so
the number that was asked for is an argument of the run itself.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState  # type: ignore[import-untyped]

from aqnsim._errors import AqnsimError, ConfigError


class WorldError(AqnsimError, RuntimeError):
    """The processes that a launcher started are not those that were asked for."""


def join(processes: int | None = None) -> PartialState:
    """Join the other processes of the run, and check that they are all there.

    Args:
        processes: how many were asked for; None takes those of torchrun, or one where there is no launcher.

    Returns:
        accelerate's view of the world.

    Raises:
        WorldError: there are more or fewer processes, or a launcher leaves open how many there should be.
        ConfigError: a launcher asks for what would change the numbers: see `refuse_launcher_settings`.
    """
    refuse_launcher_settings()
    state = PartialState(cpu=not torch.cuda.is_available())
    found, announced = state.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    expected = announced if processes is None else processes
    if found != expected:
        raise WorldError(
            f"{expected} processes were asked for and {found} run: the launcher started another number, or did not "
            "connect them. On a CPU `accelerate launch --cpu --num_processes N` starts one process; take "
            f"`torchrun --nproc_per_node {expected} -m training run ...`"
        )
    if processes is None and found == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise WorldError(
            "`accelerate launch` started one process, which it also does when it was asked for several: "
            "say how many there should be with --processes N"
        )
    return state


def refuse_launcher_settings() -> None:
    """Refuse settings of `accelerate launch` that would compute something else than the experiment asks for.

    Raises:
        ConfigError: autocast, FSDP1, weights that only the first process loads, or an engine that is not supported.
    """
    for variable, allowed, instead in [
        ("ACCELERATE_MIXED_PRECISION", ("no",), "weights and activations keep the dtypes of the experiment"),
        ("ACCELERATE_USE_DEEPSPEED", ("false",), "take --fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", ("false",), "take --fsdp"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", ("false",), "every process casts the frozen weights, so each needs them"),
    ]:
        value = os.environ.get(variable, allowed[0])
        if value.lower() not in allowed:
            raise ConfigError(f"the launcher sets {variable}={value}, expected {allowed[0]}: {instead}")
    if asks_for_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "the launcher asks for FSDP1, which flattens weights out of their modules: set fsdp_version: 2, as in "
            "training/launch/fsdp2.yaml"
        )


def asks_for_fsdp() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
