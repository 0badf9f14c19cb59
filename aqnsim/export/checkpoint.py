"""A checkpoint folder of transformers: what is in it, and which of its tensors are packed."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from aqnsim._errors import ConfigError
from aqnsim.export.library import Library, imported, layer_of

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHTS = ("safetensors", "bin", "pt", "pth", "h5", "msgpack", "gguf", "onnx")
NOT_COPIED = (".*", "config.json", "*.index.json", *(f"*.{suffix}" for suffix in _WEIGHTS))
"""Files that are written anew or hold the weights in another format."""

_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Header:
    """A tensor's shape, and its dtype as safetensors spells it."""

    shape: torch.Size
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its config, and the tensors of each file."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, dict[str, Header]]

    @staticmethod
    def read(folder: Path) -> Checkpoint:
        """The checkpoint of a folder.

        Raises:
            ConfigError: a file is missing or cannot be read, or the checkpoint is quantized already.
        """
        config = read_json(folder / "config.json")
        if "quantization_config" in config:
            raise ConfigError(f"{folder} is quantized already: config.json has a quantization_config")
        names = [_SINGLE]
        if (folder / INDEX).is_file():
            names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        files = {}
        for name in names:
            with opened(folder / name) as file:
                files[name] = {key: _header(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
        return Checkpoint(folder, config, files)

    @property
    def headers(self) -> dict[str, Header]:
        """Of all tensors."""
        return {name: header for headers in self.files.values() for name, header in headers.items()}


def _header(part: Any) -> Header:
    return Header(torch.Size(part.get_shape()), part.get_dtype())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        ConfigError: no such file, or something else is in it.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; expected a checkpoint folder of transformers") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return data


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file of a checkpoint.

    Raises:
        ConfigError: no such file, or no safetensors file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected weights in {_SINGLE}, or in the files of {INDEX}")
    try:
        handle = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a safetensors file: {error}") from error
    with handle as file:
        yield file


@dataclass(frozen=True)
class Names:
    """What a model calls its tensors.

    Attributes:
        linear: the weights of its linear layers; with each, the parameter that it is tied to, or nothing.
        all: every parameter and buffer.
    """

    linear: dict[str, str]
    all: frozenset[str]

    @staticmethod
    def of(checkpoint: Checkpoint) -> Names:
        """The names of the model that config.json describes.

        Raises:
            ConfigError: transformers knows no such model.
        """
        model = _skeleton(checkpoint)
        owners: dict[int, list[str]] = {}
        for owner, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(owner)
        weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        linear = {n: next((o for o in owners[id(w)] if o != n), "") for n, w in weights.items()}
        return Names(linear, frozenset(model.state_dict()))


def _skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model without values."""
    transformers = imported("transformers")
    name = next(iter(checkpoint.config.get("architectures") or ()), None)
    model_class = getattr(transformers, str(name), None)
    if model_class is None:
        raise ConfigError(f"{checkpoint.folder}: transformers has no model class {name!r} (architectures, config.json)")
    try:
        with torch.device("meta"):
            model = model_class(transformers.AutoConfig.from_pretrained(checkpoint.folder))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{checkpoint.folder}: config.json makes no {name}: {error}") from error
    model.tie_weights()
    found: nn.Module = model
    return found


# ---- what is done with each tensor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which tensors are packed.

    Attributes:
        exported: the weights to pack.
        skipped: all other tensors, and why.
        ignored: the linear layers, weights in the checkpoint or not, that stay as they are.
        dtype: of the exported weights.
    """

    exported: dict[str, torch.Size]
    skipped: dict[str, str]
    ignored: list[str]
    dtype: str

    @staticmethod
    def of(checkpoint: Checkpoint, library: Library, exclude: Sequence[str]) -> Plan:
        """What to pack: weights of the model's linear layers that are neither excluded nor tied.

        Raises:
            ConfigError: nothing is left, the weights' dtype is none that can be exported, or a shape does not fit,
                or the library could not load the rest.
        """
        headers, names = checkpoint.headers, Names.of(checkpoint)
        reasons = {name: _reason(name, names, exclude) for name in headers}
        exported = {name: headers[name].shape for name, reason in reasons.items() if not reason}
        if not exported:
            raise ConfigError(f"{checkpoint.folder}: no weight is left to export; see the globs of exclude")
        dtype = _common_dtype(checkpoint.config, {name: headers[name] for name in exported})
        for name, shape in exported.items():
            library.check(name, shape)
        converted = [n for n, reason in reasons.items() if reason == _CONVERTED and n.endswith(".weight")]
        if converted and not library.loads_converted():
            raise ConfigError(
                f"{converted[0]} is no parameter of the model: transformers merges or renames it when it is loaded, "
                f"which fails beside weights of {library.fmt} in {library.name}; choose an FP8 format, or torchao"
            )
        return Plan(
            exported,
            {name: reason for name, reason in reasons.items() if reason},
            sorted(layer_of(name) for name in names.linear if name not in exported),
            dtype,
        )


_CONVERTED = "no parameter of the model: merged or renamed when it is loaded"


def _reason(name: str, names: Names, exclude: Sequence[str]) -> str:
    """Why a tensor is not packed; nothing where it is."""
    if name not in names.linear:
        return "not the weight of a linear layer" if name in names.all else _CONVERTED
    for glob in exclude:
        if fnmatch.fnmatchcase(layer_of(name), glob) or fnmatch.fnmatchcase(layer_of(name), f"*.{glob}"):
            return f"excluded by {glob!r}"
    return f"tied to {names.linear[name]}" if names.linear[name] else ""


def _common_dtype(config: Mapping[str, Any], weights: Mapping[str, Header]) -> str:
    """The dtype of all weights, which must be the one that the model is loaded in."""
    found = {header.dtype: name for name, header in weights.items()}
    for dtype, name in found.items():
        if dtype not in _DTYPES:
            raise ConfigError(f"{name} is {dtype}; expected float32 or bfloat16: convert the checkpoint, or exclude it")
    if len(found) > 1:
        some = ", ".join(f"{name} is {_DTYPES[dtype]}" for dtype, name in found.items())
        raise ConfigError(f"the weights have several dtypes ({some}); convert the checkpoint to one")
    dtype = _DTYPES[next(iter(found))]
    stated = config.get("dtype") or config.get("torch_dtype") or dtype
    if stated != dtype:
        raise ConfigError(
            f"the weights are {dtype}, but would be loaded as {stated} (dtype of config.json), which changes them; "
            "convert the checkpoint to one of them"
        )
    return dtype
