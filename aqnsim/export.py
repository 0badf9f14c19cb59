"""Checkpoint folders for other libraries: the weights of linear layers, packed as compressed-tensors or torchao do it.

:func:`export` reads a checkpoint folder of Hugging Face transformers and writes another one, which ``from_pretrained``
loads through the library that was asked for. Every exported weight then is, bit for bit, ``aqnsim.cast(weight, format)``
in the checkpoint's dtype: each is read back with that library's own code before it is written, and the export is
refused where one comes back otherwise.

What the libraries ask for:

* NVFP4: each library multiplies the two scales in its own order, so that only its own rule comes back exactly. Where
  the format's text names no rule, it is ``compressed_tensors`` or ``torchao``; ``nvfp4(scale=modelopt)`` can be
  exported to torchao, too; any other rule is refused.
- compressed-tensors gives NVFP4 and MX weights back in bfloat16. MX values stay what they are; NVFP4 values do not,
  and a float32 checkpoint is refused.
- compressed-tensors keeps scales in the model's dtype unless the weights become dense while they are loaded. Where that
  would round a scale, or leave weights in bfloat16 beside float32 ones, ``quantization_config`` says ``dequantize``:
  transformers 5.23 and later obey it, and :attr:`Report.notes` says so.
- torchao has no MX for weights alone: the activations are cast to the same format on the fly. Its kernels are
  ``EMULATED``, which run anywhere.
- torchao stores the integers of INT4, which must load on any device, one a byte.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aqnsim._errors import ConfigError, unknown
from aqnsim.api import cast, quantize
from aqnsim.formats import ALL, AnyFormat, BlockFormat, get, random_bits
from aqnsim.quantized import Quantized, pack, swizzle, unpack

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
        format: one of :func:`supported`, or derived from one.
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
    checkpoint = _Checkpoint.read(source)
    plan = _Plan.of(checkpoint, library, exclude)
    with _whole_folder(out) as temporary, progress("exporting", len(plan.exported)) as step:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*_NOT_COPIED))
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
    cls = _library_class(to)
    formats = [_with_rule(name, cls) for name in ALL]
    return [str(f) for f in formats if isinstance(f, BlockFormat) and cls.holds(f)]


# ---- which format --------------------------------------------------------------------------------------------------

_RULE_IS_SPELT = re.compile(r"[(,]\s*scale\s*=")


def _library(to: str, format: str | AnyFormat) -> _Library:
    cls = _library_class(to)
    fmt = _with_rule(format, cls)
    if not isinstance(fmt, BlockFormat) or not cls.holds(fmt):
        raise ConfigError(f"{to} cannot hold {fmt}; expected one of {', '.join(supported(to))}, or derived from one")
    if random_bits(fmt):
        raise ConfigError(f"the rounding of {fmt} draws random bits; export needs a deterministic one")
    return cls(fmt)


def _library_class(to: str) -> type[_Library]:
    if to not in TARGETS:
        raise unknown("library", to, TARGETS)
    return TARGETS[to]


def _with_rule(format: str | AnyFormat, cls: type[_Library]) -> AnyFormat:
    """The format; with NVFP4's scales by the library's own rule unless its text names another."""
    fmt = get(format)
    two_levels = isinstance(fmt, BlockFormat) and fmt.scale_format == "fp8_e4m3"
    if two_levels and not _RULE_IS_SPELT.search(str(format)):
        return dataclasses.replace(fmt, scale=cls.nvfp4_rule)
    return fmt


# ---- the checkpoint that is read -----------------------------------------------------------------------------------

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_FILES = ("safetensors", "bin", "pt", "pth", "h5", "msgpack", "gguf", "onnx")
_NOT_COPIED = (".*", "config.json", "*.index.json", *(f"*.{suffix}" for suffix in _WEIGHT_FILES))
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _Header:
    shape: torch.Size
    dtype: str  # as safetensors spells it


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint folder: its config, and the tensors of each file."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, dict[str, _Header]]

    @staticmethod
    def read(folder: Path) -> _Checkpoint:
        config = _read_json(folder / "config.json")
        if "quantization_config" in config:
            raise ConfigError(f"{folder} is quantized already: config.json has a quantization_config")
        names = [_SINGLE]
        if (folder / _INDEX).is_file():
            names = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
        files = {}
        for name in names:
            with _opened(folder / name) as file:
                files[name] = {key: _header(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
        return _Checkpoint(folder, config, files)

    @property
    def headers(self) -> dict[str, _Header]:
        """Of all tensors."""
        return {name: header for headers in self.files.values() for name, header in headers.items()}


def _header(part: Any) -> _Header:
    return _Header(torch.Size(part.get_shape()), part.get_dtype())


def _read_json(path: Path) -> dict[str, Any]:
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
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected weights in {_SINGLE}, or in the files of {_INDEX}")
    try:
        handle = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a safetensors file: {error}") from error
    with handle as file:
        yield file


def _linear_weights(checkpoint: _Checkpoint) -> dict[str, str]:
    """The weights of the model's linear layers by name; with each, the parameter that it is tied to, or nothing."""
    transformers = _import("transformers")
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
    owners: dict[int, list[str]] = {}
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(owner)
    weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: next((o for o in owners[id(w)] if o != n), "") for n, w in weights.items()}


# ---- what is done with each tensor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
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
    def of(checkpoint: _Checkpoint, library: _Library, exclude: Sequence[str]) -> _Plan:
        headers, linear = checkpoint.headers, _linear_weights(checkpoint)
        reasons = {name: _reason(name, linear, exclude) for name in headers}
        exported = {name: headers[name].shape for name, reason in reasons.items() if not reason}
        if not exported:
            raise ConfigError(f"{checkpoint.folder}: no weight is left to export; see the globs of exclude")
        dtype = _common_dtype(checkpoint.config, {name: headers[name] for name in exported})
        for name, shape in exported.items():
            library.check(name, shape)
        return _Plan(
            exported,
            {name: reason for name, reason in reasons.items() if reason},
            sorted(_layer(name) for name in linear if name not in exported),
            dtype,
        )


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")


def _reason(name: str, linear: Mapping[str, str], exclude: Sequence[str]) -> str:
    """Why a tensor is not packed; nothing where it is."""
    if name not in linear:
        return "not the weight of a linear layer"
    for glob in exclude:
        if fnmatch.fnmatchcase(_layer(name), glob) or fnmatch.fnmatchcase(_layer(name), f"*.{glob}"):
            return f"excluded by {glob!r}"
    return f"tied to {linear[name]}" if linear[name] else ""


def _common_dtype(config: Mapping[str, Any], weights: Mapping[str, _Header]) -> str:
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


def _write_files(
    checkpoint: _Checkpoint, plan: _Plan, library: _Library, out: Path, step: Callable[[str], None]
) -> None:
    """Every safetensors file again, under its name, and their index if there was one."""
    others = [name for name in checkpoint.headers if name not in plan.exported]
    about = library.metadata(plan.exported, others, getattr(torch, plan.dtype))
    places: dict[str, str] = {}
    total = 0
    for name in checkpoint.files:
        with _opened(checkpoint.folder / name) as file:
            metadata = (file.metadata() or {}) | {"format": "pt"} | about
            entries = _converted(file, plan, library, step)
        save_file(entries, out / name, metadata=metadata)
        places |= dict.fromkeys(entries, name)
        total += sum(tensor.nbytes for tensor in entries.values())
    if (checkpoint.folder / _INDEX).is_file():
        index = _read_json(checkpoint.folder / _INDEX)
        kept = index.get("metadata") or {}
        _write_json(out / _INDEX, index | {"metadata": kept | {"total_size": total}, "weight_map": places})


def _converted(file: Any, plan: _Plan, library: _Library, step: Callable[[str], None]) -> dict[str, Tensor]:
    entries: dict[str, Tensor] = {}
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_tensor(name)
        if name in plan.exported:
            step(name)
            entries |= _packed(name, tensor, library)
        else:
            entries[name] = tensor
    return entries


def _packed(name: str, weight: Tensor, library: _Library) -> dict[str, Tensor]:
    """A weight as the library stores it, once the library has read it back as it should."""
    try:
        expected, q = cast(weight, library.fmt), quantize(weight, library.fmt)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if lost := int((weight.isfinite() & ~expected.isfinite()).sum()):
        raise ConfigError(f"{name}: {library.fmt} turns {lost} finite values into NaN or Inf; exclude the layer")
    entries = {key: tensor.contiguous() for key, tensor in library.entries(name, q).items()}
    wrong = _different(library.read(name, entries, expected), expected)
    if changed := int(wrong.sum()):
        raise ConfigError(
            f"{name}: {library.name} would read {changed} of {wrong.numel()} values of {library.fmt} back as others"
            + library.hint(weight.dtype)
        )
    return entries


def _different(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype differ in a bit, NaN payloads apart."""
    bits = {2: torch.int16, 4: torch.int32}[b.element_size()]
    return (a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _size(folder: Path, names: Mapping[str, Any]) -> int:
    return sum((folder / name).stat().st_size for name in names)


# ---- libraries -----------------------------------------------------------------------------------------------------


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise ConfigError(f"export needs {error.name}: pip install 'aqnsim[export]'") from error


class _Library(ABC):
    """How a library stores weights of one format."""

    name: ClassVar[str]
    nvfp4_rule: ClassVar[str]

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
        """What a model has, once loaded, for a weight of which this is in the file, in the dtype of ``expected``."""

    @abstractmethod
    def config(self, ignored: list[str]) -> dict[str, Any]:
        """``quantization_config`` of config.json; ``ignored`` are the linear layers that are not exported."""

    def metadata(self, weights: Mapping[str, torch.Size], others: list[str], dtype: torch.dtype) -> dict[str, str]:
        """What stands in the header of every file."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What users should know; complete when all weights are written."""
        return ()

    def hint(self, dtype: torch.dtype) -> str:
        """What to do where values do not come back."""
        return ""

    @property
    def _tile(self) -> tuple[int, int]:
        """Rows and columns that share a scale; (0, 0) for the tensor, (1, 0) for a row."""
        return self.fmt.tile or ((0, 0) if self.fmt.block == "tensor" else (1, 0))

    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse a weight that cannot be divided into blocks.

        Raises:
            ConfigError: its inputs are no multiple of the block.
        """
        self._check_axis(name, shape, -1, self._tile[1])

    def _check_axis(self, name: str, shape: torch.Size, axis: int, size: int) -> None:
        if size and shape[axis] % size:
            raise ConfigError(
                f"{name}: {self.name} divides axis {axis} of {list(shape)} into blocks of {size} of {self.fmt}, which "
                "does not fit; exclude the layer"
            )


class _CompressedTensors(_Library):
    name = "compressed-tensors"
    nvfp4_rule = "compressed_tensors"

    def __init__(self, fmt: BlockFormat) -> None:
        super().__init__(fmt)
        self.dequantize = False  # whether weights must become dense while they are loaded

    @staticmethod
    def holds(fmt: BlockFormat) -> bool:
        if fmt.scale_format == "fp8_e4m3":
            return fmt.tile == (1, 16) and fmt.scale == "compressed_tensors"
        if fmt.scale_format == "e8m0":
            return fmt.tile == (1, 32) and fmt.element.name in _MX_OF_COMPRESSED_TENSORS
        if fmt.element.name in ("int4", "int2"):
            return fmt.block == "axis" or (fmt.tile is not None and fmt.tile[0] == 1)
        return fmt.scale_format == "fp32" and fmt.element.name in ("fp8_e4m3", "int8")

    def check(self, name: str, shape: torch.Size) -> None:
        if self._tile[0] <= 1:  # tiles may be cut short
            super().check(name, shape)

    @cached_property
    def _compression(self) -> str:
        """Its name for the layout."""
        if self.fmt.scale_format == "fp8_e4m3":
            return "nvfp4-pack-quantized"
        if self.fmt.scale_format == "e8m0":
            return _MX_OF_COMPRESSED_TENSORS[self.fmt.element.name]
        names = {"fp8_e4m3": "float-quantized", "int8": "int-quantized"}
        return names.get(self.fmt.element.name, "pack-quantized")

    @cached_property
    def _scheme(self) -> Any:
        quantization = _import("compressed_tensors.quantization")
        element, (rows, columns) = self.fmt.element, self._tile
        fields: dict[str, Any] = {"num_bits": element.bits, "type": "int" if element.is_integer else "float"}
        if self.fmt.scale_format == "fp8_e4m3":
            fields |= {"strategy": "tensor_group", "group_size": columns, "scale_dtype": torch.float8_e4m3fn}
        elif rows > 1:
            fields |= {"strategy": "block", "block_structure": [rows, columns]}
        elif columns:
            fields |= {"strategy": "group", "group_size": columns}
        else:
            fields |= {"strategy": "channel" if rows else "tensor"}
        if self.fmt.scale_format == "e8m0":
            fields["scale_dtype"] = torch.uint8
        weights = quantization.QuantizationArgs(**fields, symmetric=True, dynamic=False)
        return quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=self._compression)

    @cached_property
    def _compressor(self) -> Any:
        return _import("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(self._compression)

    def entries(self, name: str, q: Quantized) -> dict[str, Tensor]:
        assert q.scales is not None
        found = {"weight_scale": q.scales.reshape(1) if self.fmt.block == "tensor" else q.scales}
        if self._compression == "pack-quantized":
            found |= {"weight_packed": _in_words(q, self.fmt.element.bits), "weight_shape": torch.tensor(q.shape)}
        elif self.fmt.element.bits == 8:
            found["weight"] = q.codes.view(torch.int8 if self.fmt.element.is_integer else torch.float8_e4m3fn)
        else:
            found["weight_packed"] = q.codes
        if self.fmt.scale_format == "fp8_e4m3":
            found["weight_global_scale"] = q.tensor_scale.reshape(1)
        return {f"{_layer(name)}.{key}": tensor for key, tensor in found.items()}

    def read(self, name: str, entries: Mapping[str, Tensor], expected: Tensor) -> Tensor:
        stored = {key.removeprefix(f"{_layer(name)}."): tensor for key, tensor in entries.items()}
        dense: Tensor = self._compressor.decompress(stored, self._scheme)["weight"].to(expected.dtype)
        if not self.dequantize:
            self.dequantize = not self._comes_back_later(stored, expected)
        return dense

    def _comes_back_later(self, stored: Mapping[str, Tensor], expected: Tensor) -> bool:
        """Whether the weight is right, too, if it is loaded as it is: scales in the model's dtype, made dense later."""
        scale = stored["weight_scale"]
        loaded = dict(stored) | {"weight_scale": scale.to(expected.dtype) if scale.dtype == torch.float32 else scale}
        dense = self._compressor.decompress(loaded, self._scheme)["weight"]
        return dense.dtype == expected.dtype and not bool(_different(dense, expected).any())

    def config(self, ignored: list[str]) -> dict[str, Any]:
        config = _import("compressed_tensors.quantization").QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format=self._compression,
            quantization_status="compressed",
            ignore=ignored,
        )
        found: dict[str, Any] = config.model_dump(mode="json")
        found["version"] = _import("compressed_tensors").__version__
        return found | ({"dequantize": True} if self.dequantize else {})

    def notes(self) -> tuple[str, ...]:
        if not self.dequantize:
            return ()
        return (
            "the weights become dense while they are loaded (dequantize in config.json; transformers 5.23 and later): "
            "left packed, they would come back rounded or in another dtype",
        )

    def hint(self, dtype: torch.dtype) -> str:
        if dtype == torch.float32 and self.fmt.scale_format == "fp8_e4m3":
            return ": it gives them back in bfloat16; convert the checkpoint to bfloat16 first"
        return ""


_MX_OF_COMPRESSED_TENSORS = {
    "fp4_e2m1": "mxfp4-pack-quantized",
    "fp6_e2m3": "mxfp6-pack-quantized",
    "fp8_e4m3": "mxfp8-quantized",
}


def _in_words(q: Quantized, bits: int) -> Tensor:
    """Integers, shifted to start at 0, in words of 32 bits; the first in the lowest bits."""
    shifted = unpack(q.codes, bits, q.shape) ^ (1 << (bits - 1))
    packed = pack(shifted, bits)
    return nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).view(torch.int32)


class _TorchAO(_Library):
    name = "torchao"
    nvfp4_rule = "torchao"

    @staticmethod
    def holds(fmt: BlockFormat) -> bool:
        rows = 1 if fmt.tile is None else fmt.tile[0]
        if fmt.scale_format == "fp8_e4m3":
            return fmt.tile == (1, 16) and fmt.scale in ("torchao", "modelopt")
        if fmt.scale_format == "e8m0":
            return fmt.tile == (1, 32) and fmt.element.name in _MX_OF_TORCHAO
        if fmt.element.name in ("int4", "int2"):
            return rows == 1 and fmt.block != "tensor"
        if fmt.element.name == "int8":
            return rows == 1
        is_float = fmt.scale_format == "fp32" and fmt.element.name in ("fp8_e4m3", "fp8_e5m2")
        return is_float and (rows == 1 or fmt.tile == (128, 128))

    def check(self, name: str, shape: torch.Size) -> None:
        super().check(name, shape)
        self._check_axis(name, shape, 0, self._tile[0])

    def entries(self, name: str, q: Quantized) -> dict[str, Tensor]:
        flat, _ = self._flat(name, q)
        return flat

    def _flat(self, name: str, q: Quantized) -> tuple[dict[str, Tensor], dict[str, str]]:
        found: tuple[dict[str, Tensor], dict[str, str]] = self._support.flatten_tensor_state_dict(
            {name: self._tensor(q)}
        )
        return found

    @cached_property
    def _support(self) -> Any:
        return _import("torchao.prototype.safetensors.safetensors_support")

    def read(self, name: str, entries: Mapping[str, Tensor], expected: Tensor) -> Tensor:
        about = self._metadata_of(name, expected.shape, expected.dtype)
        tensors, _ = self._support.unflatten_tensor_state_dict(dict(entries), about)
        dense: Tensor = tensors[name].dequantize()
        if dense.dtype != expected.dtype:
            raise ConfigError(f"{name}: torchao gives it back as {dense.dtype}, expected {expected.dtype}")
        return dense

    def metadata(self, weights: Mapping[str, torch.Size], others: list[str], dtype: torch.dtype) -> dict[str, str]:
        found = {name: json.dumps({"_type": "Tensor"}) for name in others if "." in name}  # it asks for two parts
        for name, shape in weights.items():
            found[name] = self._metadata_of(name, shape, dtype)[name]
        return found | {"tensor_names": json.dumps(list(found))}

    def _metadata_of(self, name: str, shape: torch.Size, dtype: torch.dtype) -> dict[str, str]:
        """How torchao describes a weight: by its shape and dtype."""
        if (shape, dtype) not in self._descriptions:
            q = quantize(torch.ones(shape, dtype=dtype), self.fmt)
            self._descriptions[shape, dtype] = self._flat("layer.weight", q)[1]["layer.weight"]
        return {name: self._descriptions[shape, dtype], "tensor_names": json.dumps([name])}

    @cached_property
    def _descriptions(self) -> dict[tuple[torch.Size, torch.dtype], str]:
        return {}

    # ---- tensors

    def _tensor(self, q: Quantized) -> Any:
        assert q.scales is not None
        if self.fmt.scale_format == "fp8_e4m3":
            return self._nvfp4(q, q.scales)
        if self.fmt.scale_format == "e8m0":
            return self._mx(q, q.scales)
        scales = q.scales.reshape(1, 1) if self.fmt.block == "tensor" else q.scales
        block = [size // count for size, count in zip(q.shape, scales.shape, strict=True)]
        quantization = _import("torchao.quantization")
        if not self.fmt.element.is_integer:
            codes = q.codes.view(_FLOATS[self.fmt.element.name])
            return quantization.Float8Tensor(codes, scales, block_size=block, dtype=q.dtype)
        zero = torch.zeros_like(scales, dtype=torch.int8)
        if self.fmt.element.bits == 8:
            return quantization.Int8Tensor(q.codes.view(torch.int8), scales, block, q.dtype, zero_point=zero)
        half = 1 << (self.fmt.element.bits - 1)
        codes = ((unpack(q.codes, self.fmt.element.bits, q.shape) ^ half) - half).to(torch.int8)
        return quantization.IntxUnpackedToInt8Tensor(codes, scales, zero, self._integer, block, q.dtype, None)

    @property
    def _integer(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.fmt.element.name)
        return found

    def _nvfp4(self, q: Quantized, scales: Tensor) -> Any:
        nvfp4 = _import("torchao.prototype.mx_formats.nvfp4_tensor")
        return nvfp4.NVFP4Tensor(
            q.codes,
            _swizzled(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
            16,
            q.dtype,
            q.tensor_scale,
            is_swizzled_scales=True,
        )

    def _mx(self, q: Quantized, scales: Tensor) -> Any:
        mx = _import("torchao.prototype.mx_formats.mx_tensor")
        element, bits = _MX_OF_TORCHAO[self.fmt.element.name], self.fmt.element.bits
        activations = mx.QuantizeTensorToMXKwargs(
            elem_dtype=element,
            block_size=32,
            scaling_mode=self._scaling_mode,
            kernel_preference=self._emulated,
            is_swizzled_scales=True,
        )
        codes = unpack(q.codes, bits, q.shape).to(torch.uint8) if bits == 6 else q.codes
        return mx.MXTensor(
            codes.view(element) if bits == 8 else codes,
            _swizzled(scales).view(torch.float8_e8m0fnu),
            element,
            32,
            q.dtype,
            self._emulated,
            activations,
            True,
        )

    @property
    def _emulated(self) -> Any:
        return _import("torchao.quantization.quantize_.common").KernelPreference.EMULATED

    @property
    def _scaling_mode(self) -> Any:
        """How torchao gives activations their scales: by the weights' rule, if it has it."""
        modes = _import("torchao.prototype.mx_formats.config").ScaleCalculationMode
        return modes(self.fmt.scale) if self.fmt.scale in {mode.value for mode in modes} else modes.FLOOR

    # ---- configurations

    def config(self, ignored: list[str]) -> dict[str, Any]:
        config = _import("transformers").TorchAoConfig(self._recipe(), modules_to_not_convert=ignored)
        found: dict[str, Any] = config.to_dict()
        return found

    def _recipe(self) -> Any:
        """The configuration by which torchao would make such weights itself."""
        mx = _import("torchao.prototype.mx_formats")
        quantization = _import("torchao.quantization")
        if self.fmt.scale_format == "fp8_e4m3":
            return mx.NVFP4WeightOnlyConfig()
        if self.fmt.scale_format == "e8m0":
            element = _MX_OF_TORCHAO[self.fmt.element.name]
            return mx.MXDynamicActivationMXWeightConfig(
                activation_dtype=element,
                weight_dtype=element,
                kernel_preference=self._emulated,
                scaling_mode=self._scaling_mode,
            )
        if self._tile == (128, 128):  # there is no configuration of weights alone
            blocks = [quantization.granularity.PerBlock(size) for size in ([1, 128], [128, 128])]
            return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=blocks)
        if not self.fmt.element.is_integer:
            dtype = _FLOATS[self.fmt.element.name]
            return quantization.Float8WeightOnlyConfig(weight_dtype=dtype, granularity=self._granularity())
        if self.fmt.element.bits == 8:
            return quantization.Int8WeightOnlyConfig(granularity=self._granularity())
        by_row = quantization.PerAxis(0) if self.fmt.block == "axis" else self._granularity()
        return quantization.IntxWeightOnlyConfig(weight_dtype=self._integer, granularity=by_row)

    def _granularity(self) -> Any:
        quantization = _import("torchao.quantization")
        rows, columns = self._tile
        if columns:
            return quantization.PerGroup(columns)
        return quantization.PerRow() if rows else quantization.PerTensor()

    def notes(self) -> tuple[str, ...]:
        if self.fmt.scale_format == "e8m0":
            return (
                "torchao has no MX for weights alone: it casts activations to the same format, with emulated kernels",
            )
        if self.fmt.element.name in ("int4", "int2"):
            return ("torchao stores these integers one a byte",)
        return ()


_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_MX_OF_TORCHAO: dict[str, Any] = _FLOATS | {
    "fp4_e2m1": torch.float4_e2m1fn_x2,
    "fp6_e2m3": "fp6_e2m3",
    "fp6_e3m2": "fp6_e3m2",
}


def _swizzled(scales: Tensor) -> Tensor:
    """Scales ``[rows, blocks]`` as torchao has them: tiles of 128 x 4, each of them 32 rows of 16."""
    rows, blocks = scales.shape
    return swizzle(scales).reshape(-(-rows // 128) * 32, -(-blocks // 4) * 16)


TARGETS: Mapping[str, type[_Library]] = {cls.name: cls for cls in (_CompressedTensors, _TorchAO)}
"""The libraries that checkpoints can be written for."""
