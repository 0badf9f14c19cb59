"""Checkpoints that say under which profile their weights were made."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from aqnsim._errors import ConfigError
from aqnsim.profiles import SEMANTICS

if TYPE_CHECKING:
    from aqnsim.emulation.core import Emulation

RECORD = "aqnsim.json"
"""The file beside the weights."""

FROZEN = ("master", "cast")
"""What the frozen weights of a checkpoint are."""


def save(emulation: Emulation, model: nn.Module, path: Path, frozen: str, kwargs: dict[str, Any]) -> None:
    """See :meth:`Emulation.save_pretrained`."""
    if frozen not in FROZEN:
        raise ConfigError(f"save_pretrained: expected frozen to be one of {', '.join(FROZEN)}, got {frozen!r}")
    with emulation.off() if frozen == "master" else nullcontext():
        model.save_pretrained(str(path), **kwargs)  # type: ignore[operator]
    record = {
        "profile": emulation.profile.name,
        "fingerprint": emulation.profile.fingerprint,
        "semantics": SEMANTICS,
        "seed": emulation.seed,
        "frozen": frozen,
    }
    (path / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check(emulation: Emulation, path: Path, other_profile: bool) -> None:
    """See :meth:`Emulation.check_checkpoint`."""
    file, profile = path / RECORD, emulation.profile
    if not file.is_file():
        raise ConfigError(f"{path} has no {RECORD}: it was not saved with emulation.save_pretrained()")
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["fingerprint"] != profile.fingerprint and not other_profile:
        raise ConfigError(
            f"{path} was saved under profile {record['profile']!r} ({record['fingerprint']}), not under "
            f"{profile.name!r} ({profile.fingerprint}): emulate that profile, or pass other_profile=True"
        )
    if record["frozen"] == "cast" and emulation.recast and not other_profile:
        raise ConfigError(
            f"{path} holds frozen weights as cast(W), and casting them again changed {emulation.recast[0]!r}: an "
            "adapter was merged, or the format is not idempotent; save with frozen='master', or pass other_profile=True"
        )
