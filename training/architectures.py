"""The shapes of the models of the presets, so that a run can be planned without its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from aqnsim._errors import ConfigError

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
"""Configurations of transformers by the models' names; all of them tie the lm_head to the embeddings."""

_NARROW = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def architecture(name: str) -> PreTrainedConfig:
    """The configuration of a model: of `ARCHITECTURES`, or read from a folder.

    Raises:
        ConfigError: the name is neither.
    """
    if name in ARCHITECTURES:
        return AutoConfig.for_model(**ARCHITECTURES[name], tie_word_embeddings=True)  # type: ignore[no-any-return]
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name, local_files_only=True)  # type: ignore[no-any-return,no-untyped-call]
    raise ConfigError(
        f"model.name = {name!r}: its shapes are not known here: expected one of {', '.join(ARCHITECTURES)}, or a "
        "folder with a config.json"
    )


def without_weights(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """The model on the meta device: shapes and dtypes, and nothing in memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-any-return,no-untyped-call]


def narrowed(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with the same layers and ops, each of them small: its sites are those of the real one."""
    small = copy.deepcopy(config)
    for key, value in _NARROW.items():
        if hasattr(small, key):
            setattr(small, key, value)
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32)  # type: ignore[no-any-return,no-untyped-call]


def saved_bytes(model: nn.Module, sequences: int, tokens: int) -> int:
    """Bytes that autograd keeps for the backward of one forward up to the last norm, weights left out.

    Counted on the meta device, storage by storage, without an emulation and without recomputation.

    Args:
        model: of `without_weights`, with or without adapters.
        sequences, tokens: the shape of the batch.
    """
    owned = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(sequences, tokens, dtype=torch.long, device="meta")
    mask = torch.ones(sequences, 1, tokens, tokens, dtype=torch.bool, device="meta")
    base: Any = getattr(model, "get_base_model", lambda: model)()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
