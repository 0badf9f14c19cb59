"""Checkpoint folders for other libraries: the weights of linear layers, packed as compressed-tensors or torchao do it.

:func:`export` reads a checkpoint folder of Hugging Face transformers and writes another one, which ``from_pretrained``
loads through the library that was asked for. Every exported weight then is, bit for bit, ``aqnsim.cast`` of what it
was, in the checkpoint's dtype: each is read back with that library's own code before it is written, and the export is
refused where one comes back otherwise. Activations are not described; they stay in the checkpoint's dtype.

What follows from how the libraries compute:

- NVFP4: each library multiplies the two scales in its own order, so that only its own rule comes back exactly. Where
  the format's text names no rule, it is ``compressed_tensors`` or ``torchao``; ``nvfp4(scale=modelopt)`` can go to
  torchao, too; any other rule is refused.
- compressed-tensors gives NVFP4 and MX weights back in bfloat16. MX values survive that; NVFP4 values do not, and a
  float32 checkpoint is refused.
- compressed-tensors keeps scales in the model's dtype unless the weights become dense while they are loaded. Where that
  would round a scale, or leave weights in bfloat16 beside float32 ones, ``quantization_config`` says ``dequantize``:
  transformers 5.23 and later obey it, and :attr:`Report.notes` says so.
- torchao has no MX for weights alone: it casts activations to the same format. Its kernels are ``EMULATED``, which run
  anywhere.
- Weights that transformers merges when it loads them, as those of experts, are copied. compressed-tensors loads them
  beside FP8 weights only; its other formats are refused for such a model.
- torchao's INT4 that loads on any device stores one integer a byte.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from aqnsim._errors import ConfigError, unknown
from aqnsim.api import cast, quantize
from aqnsim.export.checkpoint import INDEX, NOT_COPIED, Checkpoint, Plan, opened, read_json
from aqnsim.export.compressed_tensors import CompressedTensors
from aqnsim.export.library import Library, different
from aqnsim.export.torchao import TorchAO
from aqnsim.formats import ALL, AnyFormat, BlockFormat, get, random_bits

TARGETS: Mapping[str, type[Library]] = {cls.name: cls for cls in (CompressedTensors, TorchAO)}
"""The libraries that checkpoints can be written for."""

DEFAULT_EXCLUDE = ("lm_head", "embed_tokens", "router", "gate")
"""Layers that are left as they are, as the profiles leave them."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]
"""Given a label and a number of steps, a context whose value is called before each step."""


@contextmanager
def _silent(label: str, total: int) -> Iterator[Callable[[str], None]]:
    yield lambda _: None


@dataclass(frozen=True)
class Report:
    """What an export wrote.

    Attributes:
        out: the folder.
        to: the library.
        format: the text of the format, with the scale rule that was used.
        exported: names of the weights that were packed.
        skipped: every other tensor's name, and why it was copied unchanged.
        bytes_before, bytes_after: sizes of all safetensors files.
        notes: what to know when the checkpoint is loaded.
    """

    out: Path
    to: str
    format: str
    exported: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]


def export(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    to: str,
    format: str | AnyFormat,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    progress: Progress = _silent,
) -> Report:
    """Write a checkpoint whose linear layers have weights in a format, for another library to load.

    The folder appears whole or not at all. Tensors are read and written one file at a time; other files, such as the
    tokenizer's, are copied.

    Args:
        model_dir: a checkpoint folder: config.json and safetensors, in one file or several; float32 or bfloat16.
        out_dir: the folder to write; it must not exist.
        to: one of :data:`TARGETS`.
        format: one of :func:`supported`, or derived from one; blocks run along a weight's inputs.
        exclude: globs of layers to leave as they are; as in a profile, a glob matches a whole name or its last parts.
        progress: told of every weight.

    Raises:
        ConfigError: ``model_dir`` is no such checkpoint, ``out_dir`` exists or cannot be written, the library is not
            installed or cannot hold the format or a weight, or it would read a weight back as other values.
        UnknownNameError: no such library or format.
    """
    source, out = Path(model_dir), Path(out_dir)
    library = _library(to, format)
    _check_folders(source, out)
    checkpoint = Checkpoint.read(source)
    plan = Plan.of(checkpoint, library, exclude)
    with _whole_folder(out) as temporary, progress("exporting", len(plan.exported)) as step:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*NOT_COPIED))
        _write_files(checkpoint, plan, library, temporary, step)
        config = checkpoint.config | {"dtype": plan.dtype, "quantization_config": library.config(plan.ignored)}
        _write_json(temporary / "config.json", config)
    return Report(
        out,
        to,
        str(library.fmt),
        tuple(plan.exported),
        plan.skipped,
        _size(source, checkpoint.files),
        _size(out, checkpoint.files),
        library.notes(),
    )


def supported(to: str) -> list[str]:
    """The named formats that a library can hold, with the scale rule that is used.

    Raises:
        UnknownNameError: no such library.

    >>> supported("torchao")[:3]
    ['mxfp4', 'mxfp6_e2m3', 'mxfp6_e3m2']
    """
    cls = _class_of(to)
    formats = [_with_rule(name, cls) for name in ALL]
    return [str(f) for f in formats if isinstance(f, BlockFormat) and cls.holds(f)]


# ---- the library and the format ------------------------------------------------------------------------------------

_RULE_IS_SPELT = re.compile(r"[(,]\s*scale\s*=")


def _library(to: str, format: str | AnyFormat) -> Library:
    cls = _class_of(to)
    fmt = _with_rule(format, cls)
    if not isinstance(fmt, BlockFormat) or not cls.holds(fmt):
        spelt = format if isinstance(format, str) else fmt
        raise ConfigError(f"{to} cannot hold {spelt}; expected one of {', '.join(supported(to))}, or derived from one")
    if random_bits(fmt):
        raise ConfigError(f"the rounding of {fmt} draws random bits; export needs a deterministic one")
    return cls(fmt)


def _class_of(to: str) -> type[Library]:
    if to not in TARGETS:
        raise unknown("library", to, TARGETS)
    return TARGETS[to]


def _with_rule(format: str | AnyFormat, cls: type[Library]) -> AnyFormat:
    """The format; with NVFP4's scales by the library's own rule unless its text names another."""
    fmt = get(format)
    if not isinstance(fmt, BlockFormat) or fmt.scale_format != "fp8_e4m3" or _RULE_IS_SPELT.search(str(format)):
        return fmt
    return dataclasses.replace(fmt, scale=cls.nvfp4_rule)


# ---- the folder that is written ------------------------------------------------------------------------------------


def _check_folders(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder; expected a local checkpoint folder of transformers")
    if out.exists():
        raise ConfigError(f"{out} exists already; give a folder that does not")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no folder {out.parent}")
    if source.resolve() in out.resolve().parents:
        raise ConfigError(f"{out} lies inside {source}, which is copied; give another folder")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to make; it takes the name ``out`` unless the block raises, and is gone if it does."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.rename(temporary, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(checkpoint: Checkpoint, plan: Plan, library: Library, out: Path, step: Callable[[str], None]) -> None:
    """Every safetensors file again, under its name, and their index if there was one."""
    others = [name for name in checkpoint.headers if name not in plan.exported]
    about = library.metadata(plan.exported, others, getattr(torch, plan.dtype))
    places: dict[str, str] = {}
    total = 0
    for name in checkpoint.files:
        with opened(checkpoint.folder / name) as file:
            metadata = (file.metadata() or {}) | {"format": "pt"} | about
            entries = _converted(file, plan, library, step)
        save_file(entries, out / name, metadata=metadata)
        places |= dict.fromkeys(entries, name)
        total += sum(tensor.nbytes for tensor in entries.values())
    if (checkpoint.folder / INDEX).is_file():
        index = read_json(checkpoint.folder / INDEX)
        sizes = (index.get("metadata") or {}) | {"total_size": total}
        _write_json(out / INDEX, index | {"metadata": sizes, "weight_map": places})


def _converted(file: Any, plan: Plan, library: Library, step: Callable[[str], None]) -> dict[str, Tensor]:
    entries: dict[str, Tensor] = {}
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_tensor(name)
        if name in plan.exported:
            step(name)
            entries |= _packed(name, tensor, library)
        else:
            entries[name] = tensor
    return entries


def _packed(name: str, weight: Tensor, library: Library) -> dict[str, Tensor]:
    """A weight as the library stores it, once the library has read it back as it should."""
    expected = cast(weight, library.fmt)
    if lost := int((weight.isfinite() & ~expected.isfinite()).sum()):
        raise ConfigError(f"{name}: {library.fmt} turns {lost} finite values into NaN or Inf; exclude the layer")
    try:
        q = quantize(weight, library.fmt)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    entries = {key: tensor.contiguous() for key, tensor in library.entries(name, q).items()}
    changed = int(different(library.read(name, entries, expected), expected).sum())
    if changed:
        advice = library.hint(weight.dtype) or "exclude the layer"
        raise ConfigError(
            f"{name}: {library.name} would give back {changed} of {expected.numel()} values of {library.fmt} as "
            f"others; {advice}"
        )
    return entries


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _size(folder: Path, names: Mapping[str, Any]) -> int:
    return sum((folder / name).stat().st_size for name in names)
