"""One rank, or the one process, of the runs that test_sharding compares; rank 0 writes <directory>/<ranks>.pt."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mixed import BY_TOKEN
from models import llama, tokens, with_lora
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import aqnsim
from aqnsim import ConfigError

NAMES = torch.tensor([5, 17, 3, 1 << 40, 0, 8])
HALVES = (slice(0, 3), slice(3, 6))
CASES = [
    (wrapper, what, when)
    for wrapper, what, when in itertools.product(("ddp", "fsdp"), ("full", "recomputed", "lora"), ("before", "after"))
    if (wrapper, what, when) != ("fsdp", "lora", "after")  # frozen weights that are sharded already are refused
]


def made(what: str) -> nn.Module:
    model = with_lora(llama(frozen=True)) if what == "lora" else llama()
    if what == "recomputed":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in host.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def emulate(model: nn.Module) -> aqnsim.Emulation:
    emu = aqnsim.emulate(model, BY_TOKEN, seed=3)
    emu.begin_step(2, 9)
    return emu


def run(model: nn.Module, emu: aqnsim.Emulation, halves: Any) -> dict[str, Any]:
    """Forward and backward of some of the batch's halves, as accumulated micro-batches."""
    ids, outputs = tokens(batch=6, length=8), []
    for half in halves:
        with emu.sequences(NAMES[half]):
            out = model(input_ids=ids[half]).logits
            out.square().mean().backward()
        outputs.append(out.detach())
    # the mean over halves, taken at the end, as wrappers do: a gradient's format may not scale exactly
    gradients = {n: whole(p.grad) / len(halves) for n, p in emu.model.named_parameters() if p.grad is not None}
    receipts = emu.receipts(until=emu.snapshot(reduce=True))
    with emu.off(), torch.no_grad():
        clean = torch.cat([model(input_ids=ids[half]).logits for half in HALVES])
    with torch.no_grad(), emu.sequences(NAMES):
        emulated = model(input_ids=ids).logits  # after off(): cast(W) is back
    return {
        "outputs": torch.cat(outputs),
        "clean": clean,
        "emulated": emulated,
        "gradients": gradients,
        "receipts": [r.to_dict() for r in receipts],
        "sites": [s.name for s in emu.sites],
    }


def single() -> dict[Any, Any]:
    results = {}
    for what in ("full", "recomputed", "lora"):
        model = made(what)
        masters = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        results[what] = run(model, emulate(model), HALVES) | {"masters": masters}
    return results


def distributed() -> dict[Any, Any]:
    rank, results = dist.get_rank(), {}
    for wrapper, what, when in CASES:
        model = made(what)
        if when == "before":
            emu = emulate(model)
            model = wrapped(model, wrapper)
        else:
            model = wrapped(model, wrapper)
            emu = emulate(model)
        found = run(model, emu, [HALVES[rank]])
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found["outputs"])
        found["outputs"] = torch.cat(gathered)
        emu.restore()
        found["masters"] = {n: whole(p.detach()) for n, p in emu.model.named_parameters() if not p.requires_grad}
        found["restored"] = not any(k.startswith("aqnsim") for m in model.modules() for k in m.__dict__)
        found["classes"] = sorted({type(m).__name__ for m in model.modules()})
        results[wrapper, what, when] = found
    results["refused"] = refused()
    return results


def refused() -> dict[str, str]:
    """The messages of what cannot work."""
    found = {}
    model = wrapped(made("lora"), "fsdp")
    found["attach"] = message(lambda: emulate(model))
    model = made("lora")
    emu = emulate(model)
    wrapped(model, "fsdp")
    with emu.off():
        pass
    found["refresh"] = message(emu.refresh_weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(1)
    found["off"] = message(lambda: emu.off().__enter__())
    found["restore"] = message(emu.restore)
    return found


def message(act: Any) -> str:
    try:
        act()
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    if not dist.is_torchelastic_launched():
        torch.save(single(), directory / "1.pt")
        return
    dist.init_process_group("gloo")
    results = distributed()
    if dist.get_rank() == 0:
        torch.save(results, directory / "2.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
