"""Exported checkpoints: the library that loads them has the values of the cast, bit for bit, or nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from values import same_bits

import aqnsim
from aqnsim import ConfigError, UnknownNameError, cli
from aqnsim.export import DEFAULT_EXCLUDE, TARGETS, Report, export, supported
from aqnsim.export.compressed_tensors import CompressedTensors

pytest.importorskip("compressed_tensors")
pytest.importorskip("torchao")
transformers = pytest.importorskip("transformers")

CT, AO = "compressed-tensors", "torchao"
DTYPES = (torch.bfloat16, torch.float32)
DERIVED = {
    CT: (
        "mxfp4(scale=even)",
        "mxfp8_e4m3(scale=rceil, special=element)",
        "nvfp4(rounding=toward-zero)",
        "int4_g128(amax_to=7.5)",
        "int4_g128(element=int2, block=32)",
        "int8_channel(block=64)",
        "fp8_e4m3_1x128(scale=te-pow2)",
        "fp8_e4m3_128x128(block=48x80)",
    ),
    AO: (
        "mxfp4(scale=even)",
        "mxfp8_e4m3(scale=rceil, special=element)",
        "nvfp4(scale=modelopt)",
        "int4_g128(element=int2, block=axis)",
        "int8_channel(block=64)",
        "int8_channel(block=tensor)",
    ),
}
PAIRS = [(to, fmt) for to in TARGETS for fmt in (*supported(to), *DERIVED[to])]
NVFP4_IN_BF16 = "it gives NVFP4 back in bfloat16: convert the checkpoint to bfloat16 first"


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Two layers with biases, whose weights have small, large and empty blocks, too."""
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "attention_bias": True,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields | changes)).eval()
    for weight in (w for name, w in model.named_parameters() if name.endswith("proj.weight")):
        weight.data[0] = 0
        weight.data[1, :48] *= 2.0**-20
        weight.data[2, 5] = -7.3
    return model.to(dtype)


def saved(model: nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """By dtype."""
    return {dtype: saved(llama(dtype), tmp_path_factory.mktemp("model")) for dtype in DTYPES}


@pytest.fixture
def bf16(checkpoints: dict[torch.dtype, Path]) -> Path:
    return checkpoints[torch.bfloat16]


@pytest.fixture(autouse=True)
def _nothing_half_done(tmp_path: Path) -> Iterator[None]:
    yield
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def loaded(folder: Path, **options: Any) -> nn.Module:
    """The model, once it has run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    return model


def dense(model: nn.Module, name: str) -> Tensor:
    weight = model.get_parameter(name).data
    return weight.dequantize() if hasattr(weight, "qdata") else weight


def check(source: Path, report: Report, model: nn.Module) -> None:
    """Exported weights are those of the cast, and all other parameters what they were."""
    before = tensors(source)
    assert set(report.exported) | set(report.skipped) == set(before)
    assert set(report.exported) & set(report.skipped) == set()
    for name in report.exported:
        assert same_bits(dense(model, name), aqnsim.cast(before[name], report.format)), name
    for name in report.skipped:
        assert same_bits(dense(model, name), before[name]), name


# ---- what is loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize(("to", "fmt"), PAIRS)
def test_the_library_loads_the_values_of_the_cast(
    to: str, fmt: str, dtype: torch.dtype, checkpoints: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    run = partial(export, checkpoints[dtype], tmp_path / "out", to=to, format=fmt)
    if to == CT and fmt.startswith("nvfp4") and dtype == torch.float32:
        with pytest.raises(ConfigError, match=NVFP4_IN_BF16):
            run()
        return
    report = run()
    assert len(report.exported) == 14
    check(checkpoints[dtype], report, loaded(report.out))
    if to == CT:
        config = transformers.CompressedTensorsConfig(dequantize=True)
        check(checkpoints[dtype], report, loaded(report.out, quantization_config=config))


def test_every_named_block_format_that_a_library_has_a_type_for_is_supported() -> None:
    scaled = ["fp8_e4m3_tensor", "fp8_e4m3_token", "fp8_e4m3_channel", "fp8_e4m3_1x128", "fp8_e4m3_128x128"]
    integers = ["int4_g128", "int8_channel", "int8_token"]
    assert set(supported(CT)) >= {
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp8_e4m3",
        "nvfp4(scale=compressed_tensors)",
        *scaled,
        *integers,
    }
    mx = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"]
    assert set(supported(AO)) >= {*mx, "nvfp4(scale=torchao)", "fp8_e5m2_tensor", *scaled, *integers}


def test_weights_that_come_back_as_they_are_stay_packed_until_the_first_run(bf16: Path, tmp_path: Path) -> None:
    for number, fmt in enumerate(("nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "fp8_e4m3_channel(scale=te-pow2)")):
        report = export(bf16, tmp_path / str(number), to=CT, format=fmt)
        assert "dequantize" not in quantization(report.out)
        assert report.notes == ()
        model = transformers.AutoModelForCausalLM.from_pretrained(report.out)
        entry = "weight" if "fp8" in fmt else "weight_packed"
        assert entry in dict(model.model.layers[0].mlp.up_proj.named_parameters())


def test_without_dequantize_the_scales_would_be_rounded(bf16: Path, tmp_path: Path) -> None:
    report = export(bf16, tmp_path / "out", to=CT, format="int4_g128")
    assert quantization(report.out)["dequantize"] is True
    assert "transformers 5.23" in report.notes[0]
    with pytest.raises(AssertionError):
        check(bf16, report, loaded(report.out, quantization_config=transformers.CompressedTensorsConfig()))


def test_the_model_computes_with_the_cast_weights(bf16: Path, tmp_path: Path) -> None:
    tokens = torch.arange(12).reshape(2, 6)
    plain = transformers.AutoModelForCausalLM.from_pretrained(bf16)
    report = export(bf16, tmp_path / "out", to=CT, format="nvfp4")
    for name in report.exported:
        plain.get_parameter(name).data = aqnsim.cast(plain.get_parameter(name).data, report.format)
    with torch.no_grad():
        assert torch.equal(loaded(report.out)(tokens).logits, plain(tokens).logits)


# ---- what is in the files -------------------------------------------------------------------------------------------


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(
    ("fmt", "compression", "strategy", "entries"),
    [
        ("nvfp4", "nvfp4-pack-quantized", "tensor_group", {"weight_packed", "weight_scale", "weight_global_scale"}),
        ("mxfp4", "mxfp4-pack-quantized", "group", {"weight_packed", "weight_scale"}),
        ("mxfp6_e2m3", "mxfp6-pack-quantized", "group", {"weight_packed", "weight_scale"}),
        ("mxfp8_e4m3", "mxfp8-quantized", "group", {"weight", "weight_scale"}),
        ("fp8_e4m3_tensor", "float-quantized", "tensor", {"weight", "weight_scale"}),
        ("fp8_e4m3_channel", "float-quantized", "channel", {"weight", "weight_scale"}),
        ("fp8_e4m3_128x128", "float-quantized", "block", {"weight", "weight_scale"}),
        ("int8_channel", "int-quantized", "channel", {"weight", "weight_scale"}),
        ("int4_g128", "pack-quantized", "group", {"weight_packed", "weight_scale", "weight_shape"}),
    ],
)
def test_a_checkpoint_of_compressed_tensors_is_described_in_its_words(
    fmt: str, compression: str, strategy: str, entries: set[str], bf16: Path, tmp_path: Path
) -> None:
    report = export(bf16, tmp_path / "out", to=CT, format=fmt)
    config = quantization(report.out)
    group = config["config_groups"]["group_0"]
    assert (config["quant_method"], config["quantization_status"], config["ignore"]) == (CT, "compressed", ["lm_head"])
    assert (config["format"], group["format"]) == (compression, compression)
    assert (group["targets"], group["weights"]["strategy"]) == (["Linear"], strategy)
    assert group["input_activations"] is None
    layer = "model.layers.1.mlp.down_proj."
    assert {n.removeprefix(layer) for n in tensors(report.out) if n.startswith(layer)} == entries


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "mxfp6_e2m3", "fp8_e4m3_channel", "int8_channel", "int4_g128"])
def test_the_codes_are_those_that_compressed_tensors_packs_itself(fmt: str, checkpoints: Any, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if fmt == "nvfp4" else torch.float32
    name = "model.layers.0.mlp.gate_proj."
    report = export(checkpoints[dtype], tmp_path / "out", to=CT, format=fmt)
    found = {n.removeprefix(name): t for n, t in tensors(report.out).items() if n.startswith(name)}
    library = CompressedTensors(aqnsim.formats.get(report.format))
    scale = library._compressor.decompress(found, library._scheme)["weight_scale"]  # as a number
    given = {"weight": tensors(checkpoints[dtype])[f"{name}weight"].float(), "weight_scale": scale.float()}
    given |= {n: t for n, t in found.items() if n == "weight_global_scale"}
    packed = library._compressor.compress(given, library._scheme)
    entry = "weight_packed" if "weight_packed" in found else "weight"
    assert packed[entry].dtype == found[entry].dtype
    assert torch.equal(packed[entry].view(torch.uint8), found[entry].view(torch.uint8))


def own_files(model: nn.Module, recipe: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What torchao writes for a model that it quantizes itself."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    quantize_(model, recipe, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("inv_freq")}
    found: tuple[dict[str, Tensor], dict[str, str]] = flatten_tensor_state_dict(state)
    return found


@pytest.mark.parametrize(
    ("fmt", "same_values"),
    [
        ("mxfp4(scale=floor)", True),
        ("mxfp8_e4m3(scale=even)", True),
        ("mxfp6_e2m3", True),
        ("nvfp4", True),
        ("fp8_e4m3_tensor", False),
        ("fp8_e4m3_channel", False),
        ("fp8_e4m3_1x128", False),
        ("int8_channel", False),
        ("int4_g128", False),
    ],
)
def test_a_checkpoint_of_torchao_has_the_layout_that_torchao_writes(
    fmt: str, same_values: bool, bf16: Path, tmp_path: Path
) -> None:
    report = export(bf16, tmp_path / "out", to=AO, format=fmt)
    recipe = transformers.TorchAoConfig.from_dict(quantization(report.out)).quant_type
    theirs, metadata = own_files(llama(torch.bfloat16), recipe)
    ours = tensors(report.out)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        if not (fmt == "int4_g128" and name.endswith("scale")):  # torchao rounds them to the weight's dtype
            assert ours[name].dtype == tensor.dtype, name
        if same_values:
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours[name], tensor))), name
    with safe_open(str(report.out / "model.safetensors"), framework="pt") as file:
        written = file.metadata()
    assert {k: json.loads(v) for k, v in written.items() if "." in k} == {
        k: json.loads(v) for k, v in metadata.items() if "." in k
    }
    assert set(json.loads(written["tensor_names"])) == set(json.loads(metadata["tensor_names"]))


# ---- checkpoints of other kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "fmt"), [(CT, "nvfp4"), (CT, "int4_g128"), (AO, "nvfp4"), (AO, "int8_channel")])
def test_a_sharded_checkpoint_stays_sharded(to: str, fmt: str, tmp_path: Path) -> None:
    source = saved(llama(torch.bfloat16), tmp_path / "model", max_shard_size="300KB")
    files = sorted(p.name for p in source.glob("*.safetensors"))
    assert len(files) > 2
    report = export(source, tmp_path / "out", to=to, format=fmt)
    assert sorted(p.name for p in report.out.glob("*.safetensors")) == files
    index = json.loads((report.out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {n: f for f in files for n in load_file(report.out / f)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(report.out).values())
    check(source, report, loaded(report.out))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("exclude", [DEFAULT_EXCLUDE, ()], ids=["default", "nothing excluded"])
def test_tied_embeddings_stay_tied(to: str, exclude: tuple[str, ...], tmp_path: Path) -> None:
    source = saved(llama(torch.bfloat16, tie_word_embeddings=True), tmp_path / "model")
    assert "lm_head.weight" not in tensors(source)
    report = export(source, tmp_path / "out", to=to, format="nvfp4", exclude=exclude)
    model = loaded(report.out)
    check(source, report, model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_head_that_is_stored_though_tied_is_not_packed(tmp_path: Path) -> None:
    source = saved(llama(torch.bfloat16, tie_word_embeddings=True), tmp_path / "model")
    entries = tensors(source)
    entries["lm_head.weight"] = entries["model.embed_tokens.weight"].clone()
    save_file(entries, source / "model.safetensors", metadata={"format": "pt"})
    report = export(source, tmp_path / "out", to=CT, format="nvfp4", exclude=())
    assert report.skipped["lm_head.weight"] == "tied to model.embed_tokens.weight"


@pytest.mark.parametrize("to", TARGETS)
def test_an_untied_head_is_packed_where_nothing_is_excluded(to: str, bf16: Path, tmp_path: Path) -> None:
    report = export(bf16, tmp_path / "out", to=to, format="nvfp4", exclude=())
    assert "lm_head.weight" in report.exported
    assert report.skipped["model.embed_tokens.weight"] == "not the weight of a linear layer"
    check(bf16, report, loaded(report.out))


@pytest.mark.parametrize("to", TARGETS)
def test_excluded_layers_are_loaded_as_they_were(to: str, bf16: Path, tmp_path: Path) -> None:
    exclude = ("lm_head", "model.layers.0.*", "mlp.down_proj", "matches_nothing")
    report = export(bf16, tmp_path / "out", to=to, format="mxfp4", exclude=exclude)
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    assert set(report.exported) == {f"model.layers.1.{n}.weight" for n in (*layers, "mlp.up_proj")}
    assert report.skipped["model.layers.0.mlp.up_proj.weight"] == "excluded by 'model.layers.0.*'"
    assert report.skipped["model.layers.1.mlp.down_proj.weight"] == "excluded by 'mlp.down_proj'"
    assert report.skipped["model.norm.weight"] == "not the weight of a linear layer"
    check(bf16, report, loaded(report.out))


def mixture(folder: Path) -> Path:
    """A checkpoint of a mixture of experts, whose weights transformers merges when it loads them."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return saved(transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval(), folder)


@pytest.mark.parametrize(
    ("to", "fmt"), [(CT, "fp8_e4m3_channel"), (CT, "fp8_e4m3_128x128"), (CT, "mxfp8_e4m3"), (AO, "mxfp4")]
)
def test_merged_experts_and_routers_are_copied(to: str, fmt: str, tmp_path: Path) -> None:
    source = mixture(tmp_path / "model")
    report = export(source, tmp_path / "out", to=to, format=fmt)
    assert {n.split(".")[-2] for n in report.exported} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reason = report.skipped["model.layers.0.mlp.experts.0.up_proj.weight"]
    assert reason == "no parameter of the model: merged or renamed when it is loaded"
    model, plain = loaded(report.out), loaded(source)
    for name, parameter in plain.named_parameters():
        expected = aqnsim.cast(parameter.data, report.format) if name in report.exported else parameter.data
        assert same_bits(dense(model, name), expected), name


@pytest.mark.parametrize("fmt", ["nvfp4", "int4_g128(block=64)", "int8_channel"])
def test_merged_experts_that_would_not_be_loaded_are_refused(fmt: str, tmp_path: Path) -> None:
    message = r"experts\.0\.\w+\.weight is no parameter of the model.*choose an FP8 format, or torchao"
    refused(message, mixture(tmp_path / "model"), tmp_path, CT, fmt)


def test_blocks_that_are_cut_short_fit_where_the_library_cuts_them(tmp_path: Path) -> None:
    source = saved(llama(torch.bfloat16, num_key_value_heads=2, intermediate_size=200), tmp_path / "model")
    report = export(source, tmp_path / "out", to=CT, format="fp8_e4m3_128x128")
    check(source, report, loaded(report.out))


def test_a_checkpoint_that_does_not_say_its_dtype_gets_it(bf16: Path, tmp_path: Path) -> None:
    source = copied(bf16, tmp_path, dtype=None)
    report = export(source, tmp_path / "out", to=AO, format="nvfp4")
    assert json.loads((report.out / "config.json").read_text())["dtype"] == "bfloat16"


def test_other_files_are_copied_and_weights_in_other_formats_are_not(bf16: Path, tmp_path: Path) -> None:
    source = copied(bf16, tmp_path)
    for name in ("tokenizer.json", "chat_templates/tool.jinja", ".cache/x", "pytorch_model.bin", "original/a.pth"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    report = export(source, tmp_path / "out", to=CT, format="mxfp4")
    files = {str(p.relative_to(report.out)) for p in report.out.rglob("*") if p.is_file()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files == expected | {"chat_templates/tool.jinja"}
    assert (report.out / "tokenizer.json").read_text() == "tokenizer.json"


def test_the_report_says_how_large_the_weights_were_and_are(bf16: Path, tmp_path: Path) -> None:
    report = export(bf16, tmp_path / "out", to=CT, format="nvfp4")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (bf16, report.out)]
    assert [report.bytes_before, report.bytes_after] == sizes
    assert (report.to, report.format, report.out) == (CT, "nvfp4(scale=compressed_tensors)", tmp_path / "out")
    values = sum(tensors(bf16)[name].numel() for name in report.exported)
    saved_bytes = values * 2 - values * 4.5 / 8
    assert report.bytes_before - report.bytes_after == pytest.approx(saved_bytes, rel=0.05)


# ---- what is refused ------------------------------------------------------------------------------------------------


def copied(source: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other fields in its config; None removes one."""
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


def with_weights(source: Path, tmp_path: Path, **changed: Tensor) -> Path:
    """A copy with other weights in the first layer's MLP."""
    folder = copied(source, tmp_path)
    entries = tensors(folder) | {f"model.layers.0.mlp.{name}.weight": t for name, t in changed.items()}
    save_file(entries, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(message: str, source: Path, tmp_path: Path, to: str = CT, fmt: str = "mxfp4", **options: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        export(source, tmp_path / "out", to=to, format=fmt, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "fmt"),
    [
        (CT, "hif8"),
        (CT, "fp8_e4m3"),
        (CT, "hif4"),
        (CT, "mxint8"),
        (CT, "mxfp8_e5m2"),
        (CT, "mxfp4(block=16)"),
        (CT, "nvfp4(scale=te)"),
        (CT, "nvfp4( scale = torchao )"),
        (CT, "nvfp4(block=16x16)"),
        (CT, "int4_g128(block=tensor)"),
        (AO, "nvfp4(scale=compressed_tensors)"),
        (AO, "nvfp4(rounding=up, scale=4over6-mse)"),
        (AO, "mxint8"),
        (AO, "fp8_e4m3_128x128(block=64x64)"),
        (AO, "int8_channel(block=32x32)"),
        (AO, "bf16"),
    ],
)
def test_a_format_without_a_place_in_the_files_is_refused(to: str, fmt: str, bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        export(bf16, tmp_path / "out", to=to, format=fmt)
    assert (
        str(error.value) == f"{to} cannot hold {fmt}; expected one of {', '.join(supported(to))}, or derived from one"
    )


def test_unknown_names_come_with_the_closest(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown library 'torch-ao'.*did you mean 'torchao'"):
        export(bf16, tmp_path / "out", to="torch-ao", format="mxfp4")
    with pytest.raises(UnknownNameError, match=r"unknown format 'mxpf4'.*did you mean 'mxfp4'"):
        export(bf16, tmp_path / "out", to=AO, format="mxpf4")


def test_a_random_rounding_is_refused(bf16: Path, tmp_path: Path) -> None:
    refused("draws random bits; export needs a deterministic one", bf16, tmp_path, fmt="mxfp4(rounding=stochastic)")


@pytest.mark.parametrize(
    ("to", "fmt", "size", "message"),
    [
        (CT, "mxfp4", 208, r"down_proj.weight: compressed-tensors divides axis -1 of \[128, 208\] into blocks of 32"),
        (CT, "int4_g128", 208, r"down_proj.weight: compressed-tensors divides axis -1 .* blocks of 128 of int4_g128"),
        (AO, "nvfp4", 200, r"down_proj.weight: torchao divides axis -1 of \[128, 200\] into blocks of 16"),
        (AO, "fp8_e4m3_128x128", 384, r"k_proj.weight: torchao divides axis 0 of \[64, 128\] into blocks of 128"),
    ],
)
def test_a_weight_that_blocks_do_not_fit_is_refused(to: str, fmt: str, size: int, message: str, tmp_path: Path) -> None:
    model = llama(torch.bfloat16, intermediate_size=size, num_key_value_heads=2, num_hidden_layers=1)
    source = saved(model, tmp_path / "model")
    refused(message + ".*does not fit; exclude the layer", source, tmp_path, to, fmt)
    exclude = (*DEFAULT_EXCLUDE, "down_proj", "k_proj", "v_proj")
    check(source, report := export(source, tmp_path / "out", to=to, format=fmt, exclude=exclude), loaded(report.out))


def test_a_folder_that_exists_is_left_alone(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(ConfigError, match="out exists already; give a folder that does not"):
        export(bf16, tmp_path / "out", to=CT, format="mxfp4")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_is_refused(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written: there is no folder .*/none"):
        export(bf16, tmp_path / "none/out", to=CT, format="mxfp4")
    source = copied(bf16, tmp_path)
    with pytest.raises(ConfigError, match="lies inside"):
        export(source, source / "out", to=CT, format="mxfp4")


def test_a_folder_that_is_no_checkpoint_is_refused(bf16: Path, tmp_path: Path) -> None:
    refused("none: no such folder; expected a local checkpoint folder", tmp_path / "none", tmp_path)
    (tmp_path / "empty").mkdir()
    refused("config.json: no such file; expected a checkpoint folder", tmp_path / "empty", tmp_path)
    source = copied(bf16, tmp_path)
    (source / "model.safetensors").write_bytes(b"no header at all")
    refused("model.safetensors cannot be read as a safetensors file", source, tmp_path)
    (source / "model.safetensors").unlink()
    refused("model.safetensors: no such file; expected weights in model.safetensors", source, tmp_path)
    (source / "config.json").write_text("{")
    refused("config.json cannot be read", source, tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    source = saved(llama(torch.bfloat16), tmp_path / "model", max_shard_size="300KB")
    missing = sorted(source.glob("*.safetensors"))[-1]
    missing.unlink()
    refused(f"{missing.name}: no such file", source, tmp_path)


def test_a_model_that_transformers_does_not_know_is_refused(bf16: Path, tmp_path: Path) -> None:
    source = copied(bf16, tmp_path, architectures=["NoSuchModel"])
    refused("transformers has no model class 'NoSuchModel'", source, tmp_path)


def test_an_exported_checkpoint_is_not_exported_again(bf16: Path, tmp_path: Path) -> None:
    export(bf16, tmp_path / "first", to=CT, format="mxfp4")
    refused("is quantized already", tmp_path / "first", tmp_path)


def test_weights_of_other_dtypes_are_refused(bf16: Path, tmp_path: Path) -> None:
    source = saved(llama(torch.float16), tmp_path / "half")
    refused("is F16; expected float32 or bfloat16: convert the checkpoint", source, tmp_path)
    source = with_weights(bf16, tmp_path, up_proj=torch.ones(256, 128))
    refused(r"the weights have several dtypes \(.* is (float32|bfloat16)", source, tmp_path)


def test_weights_that_would_be_loaded_in_another_dtype_are_refused(bf16: Path, tmp_path: Path) -> None:
    source = copied(bf16, tmp_path, dtype="float32")
    refused("the weights are bfloat16, but would be loaded as float32", source, tmp_path)


def test_a_model_of_which_all_is_excluded_is_refused(bf16: Path, tmp_path: Path) -> None:
    refused("no weight is left to export", bf16, tmp_path, exclude=("*",))


def test_values_that_cannot_be_stored_are_refused(bf16: Path, tmp_path: Path) -> None:
    weight = torch.ones(256, 128, dtype=torch.bfloat16)
    weight[3, 7] = torch.nan
    source = with_weights(bf16, tmp_path, gate_proj=weight)
    fmt = "mxfp4(special=element)"
    refused(r"model.layers.0.mlp.gate_proj.weight: .*cannot store the NaN", source, tmp_path, fmt=fmt)


def test_a_weight_that_a_scale_rule_turns_into_nan_is_refused(bf16: Path, tmp_path: Path) -> None:
    source = with_weights(bf16, tmp_path, up_proj=torch.zeros(256, 128, dtype=torch.bfloat16))
    refused(r"up_proj.weight: nvfp4\(scale=torchao\) turns 32768 finite values into NaN", source, tmp_path, AO, "nvfp4")
    one_inf = torch.ones(256, 128, dtype=torch.bfloat16)
    one_inf[0, 0] = torch.inf
    shutil.rmtree(source)
    refused(
        r"turns 31 finite values into NaN or Inf", with_weights(bf16, tmp_path, up_proj=one_inf), tmp_path, AO, "mxfp4"
    )


@pytest.mark.parametrize("power", [-30, 0, 30, 120])
@pytest.mark.parametrize(("to", "fmt"), [(CT, "nvfp4"), (CT, "mxfp4"), (CT, "int4_g128"), (AO, "nvfp4"), (AO, "mxfp4")])
def test_weights_of_any_magnitude_come_back(to: str, fmt: str, power: int, bf16: Path, tmp_path: Path) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(power)).clamp(-3, 3) * 2.0**power
    weight[3], weight[4] = -0.0, weight[4] * 2.0**-13
    source = with_weights(bf16, tmp_path, up_proj=weight.bfloat16())
    report = export(source, tmp_path / "out", to=to, format=fmt)
    model = transformers.AutoModelForCausalLM.from_pretrained(report.out)
    with torch.no_grad():
        model(torch.arange(4)[None])  # until then some are packed
    check(source, report, model)


def test_what_the_library_would_read_otherwise_is_refused(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CompressedTensors.read

    def wrong(self: CompressedTensors, *args: Any) -> Tensor:
        found = read(self, *args).clone()
        found[0, 0] = -found[0, 0]  # a zero, whose sign alone is wrong
        return found

    monkeypatch.setattr(CompressedTensors, "read", wrong)
    refused(r"compressed-tensors would give back 1 of \d+ values of mxfp4 as others; exclude the layer", bf16, tmp_path)


def test_nothing_is_left_of_an_export_that_fails(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", failing)
    refused("out cannot be written: .*No space left on device", bf16, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(CompressedTensors, "config", failing)
    refused("out cannot be written", bf16, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["transformers", "torchao"])
def test_a_missing_library_is_named(package: str, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    refused(rf"export needs {package}: pip install 'aqnsim\[export\]'", bf16, tmp_path, AO, "mxfp4")


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_writes_a_checkpoint_and_says_what_it_did(
    bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(bf16), "--to", CT, "--format", "int4_g128", "--out"]
    assert cli.main([*arguments, str(tmp_path / "a")]) == 0
    page = capsys.readouterr().out
    assert "14       packed as int4_g128 for compressed-tensors" in page
    assert "1        copied: excluded by 'lm_head'" in page
    assert "note: the weights become dense while they are loaded" in page
    assert page.rstrip().endswith(f"written: {tmp_path / 'a'}")
    assert cli.main([*arguments, str(tmp_path / "b"), "--exclude", "mlp.*", "--exclude", "lm_head", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["exported"]) == 8
    assert data["skipped"]["model.layers.0.mlp.up_proj.weight"] == "excluded by 'mlp.*'"
    assert set(data) == set(Report.__dataclass_fields__)


def test_the_command_names_what_is_wrong(bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["export", str(bf16), "--to", CT, "--format", "hif8", "--out", out]) == 2
    assert capsys.readouterr().err.startswith(
        "aqnsim: error: compressed-tensors cannot hold hif8; expected one of mxfp4"
    )
    assert cli.main(["export", str(bf16), "--to", CT, "--format", "mxfp4"]) == 2
    assert "--out" in capsys.readouterr().err
