"""torchao: tensor subclasses, taken apart as its safetensors support does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.api import quantize
from aqnsim.export.library import Library, imported
from aqnsim.formats import BlockFormat
from aqnsim.quantized import Quantized, swizzle, unpack


class TorchAO(Library):
    """Weights as torchao's tensors."""

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
        self.check_axis(name, shape, 0, self.tile[0])

    def entries(self, name: str, q: Quantized) -> dict[str, Tensor]:
        flat, _ = self._flat(name, q)
        return flat

    def _flat(self, name: str, q: Quantized) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, about = self._support.flatten_tensor_state_dict({name: self._tensor(q)})
        return tensors, about

    @cached_property
    def _support(self) -> Any:
        return imported("torchao.prototype.safetensors.safetensors_support")

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
        quantization = imported("torchao.quantization")
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
        nvfp4 = imported("torchao.prototype.mx_formats.nvfp4_tensor")
        return nvfp4.NVFP4Tensor(
            q.codes,
            _swizzled(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
            16,
            q.dtype,
            q.tensor_scale,
            is_swizzled_scales=True,
        )

    def _mx(self, q: Quantized, scales: Tensor) -> Any:
        mx = imported("torchao.prototype.mx_formats.mx_tensor")
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
        return imported("torchao.quantization.quantize_.common").KernelPreference.EMULATED

    @property
    def _scaling_mode(self) -> Any:
        """How torchao gives activations their scales: by the weights' rule, if it has it."""
        modes = imported("torchao.prototype.mx_formats.config").ScaleCalculationMode
        return modes(self.fmt.scale) if self.fmt.scale in {mode.value for mode in modes} else modes.FLOOR

    # ---- configurations

    def config(self, ignored: list[str]) -> dict[str, Any]:
        config = imported("transformers").TorchAoConfig(self._recipe(), modules_to_not_convert=ignored)
        found: dict[str, Any] = config.to_dict()
        return found

    def _recipe(self) -> Any:
        """The configuration by which torchao would make such weights itself."""
        mx = imported("torchao.prototype.mx_formats")
        quantization = imported("torchao.quantization")
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
        if self.tile == (128, 128):  # there is no configuration of weights alone
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
        quantization = imported("torchao.quantization")
        rows, columns = self.tile
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
