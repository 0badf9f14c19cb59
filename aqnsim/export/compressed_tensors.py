"""compressed-tensors: packed codes and scales beside each other, described by ``quantization_config``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim.export.library import Library, different, imported, layer_of
from aqnsim.formats import BlockFormat
from aqnsim.quantized import Quantized, pack, unpack


class CompressedTensors(Library):
    """Weights as compressed-tensors stores them.

    Attributes:
        dequantize: whether weights must become dense while they are loaded, to be what they should.
    """

    name = "compressed-tensors"
    nvfp4_rule = "compressed_tensors"

    def __init__(self, fmt: BlockFormat) -> None:
        super().__init__(fmt)
        self.dequantize = False

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
        if self.tile[0] <= 1:  # tiles may be cut short
            super().check(name, shape)

    def loads_converted(self) -> bool:
        return self.fmt.element.bits == 8 and not self.fmt.element.is_integer  # of others it expects packed ones

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
        quantization = imported("compressed_tensors.quantization")
        element, (rows, columns) = self.fmt.element, self.tile
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
        return imported("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(self._compression)

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
        return {f"{layer_of(name)}.{key}": tensor for key, tensor in found.items()}

    def read(self, name: str, entries: Mapping[str, Tensor], expected: Tensor) -> Tensor:
        stored = {key.removeprefix(f"{layer_of(name)}."): tensor for key, tensor in entries.items()}
        dense: Tensor = self._compressor.decompress(stored, self._scheme)["weight"].to(expected.dtype)
        if not self.dequantize:
            self.dequantize = not self._comes_back_later(stored, expected)
        return dense

    def _comes_back_later(self, stored: Mapping[str, Tensor], expected: Tensor) -> bool:
        """Whether the weight is right, too, if it is loaded as it is: scales in the model's dtype, made dense later."""
        scale = stored["weight_scale"]
        loaded = dict(stored) | {"weight_scale": scale.to(expected.dtype) if scale.dtype == torch.float32 else scale}
        dense = self._compressor.decompress(loaded, self._scheme)["weight"]
        return dense.dtype == expected.dtype and not bool(different(dense, expected).any())

    def config(self, ignored: list[str]) -> dict[str, Any]:
        config = imported("compressed_tensors.quantization").QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format=self._compression,
            quantization_status="compressed",
            ignore=ignored,
        )
        found: dict[str, Any] = config.model_dump(mode="json")
        found["version"] = imported("compressed_tensors").__version__
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
            return "it gives NVFP4 back in bfloat16: convert the checkpoint to bfloat16 first"
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
