"""The ops of a model as the command ``sites`` shows them: a checkpoint, a configuration, or a family made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqnsim._errors import ConfigError, did_you_mean
from aqnsim.cli.output import Section
from aqnsim.profiles import Profile

if TYPE_CHECKING:
    from torch import nn

    from aqnsim.emulation.coverage import Coverage

_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "ffn_dim": 96,
    "n_inner": 96,
    "rotary_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes of a small model, by the names that configurations of transformers use."""


def small_model(family: str, **settings: Any) -> nn.Module:
    """A causal language model of a family with few and small layers, and random weights.

    Args:
        family: transformers' ``model_type``, such as ``llama``.
        settings: of the configuration, over the small sizes.

    Raises:
        ConfigError: transformers is not installed or knows no such family.
    """
    transformers = _transformers()
    try:
        plain = transformers.AutoConfig.for_model(family)
    except ValueError as error:
        meant = did_you_mean(family, list(transformers.CONFIG_MAPPING))
        raise ConfigError(
            f"{family!r} is neither a folder, a config.json nor a model_type of transformers such as llama{meant}"
        ) from error
    own = {**plain.to_dict(), **plain.attribute_map}
    sizes = {k: v for k, v in _SMALL.items() if k in own}
    if "qk_rope_head_dim" in own:  # latent attention: a head's width is the sum of its parts, and no head is shared
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return _from_config(transformers.AutoConfig.for_model(family, **{**sizes, **settings}))


def load_model(name: str) -> nn.Module:
    """A model by the folder of its checkpoint, by a configuration (random weights), or small by its family's name.

    Raises:
        ConfigError: transformers is not installed, or there is no such model.
    """
    path = Path(name)
    if path.is_dir():
        return _loaded(path)
    if path.suffix == ".json":
        return _configured(path)
    return small_model(name)


def page(coverage: Coverage, profile: Profile | None, every: bool) -> list[Section]:
    """The ops as a table, and what became of them in sum."""
    head = coverage.model if profile is None else f"{coverage.model}, profile {profile.name} ({profile.fingerprint})"
    sections = [Section(head, coverage.table(grouped=not every)), Section("summary", coverage.summary())]
    if coverage.uncovered:
        lines = [f"  {op.name} ({op.kind}: {op.role}), {coverage.share(op):.2%}" for op in coverage.uncovered]
        sections.append(Section("uncovered", "\n".join(lines)))
    return sections


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigError("sites needs transformers to build a model: pip install transformers") from error
    transformers.logging.set_verbosity_error()
    return transformers


def _from_config(config: Any) -> nn.Module:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = _transformers().AutoModelForCausalLM.from_config(config)
    return model.eval()


def _loaded(path: Path) -> nn.Module:
    try:
        model: nn.Module = _transformers().AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no causal language model of transformers: {error}") from error
    return model.eval()


def _configured(path: Path) -> nn.Module:
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no configuration of transformers: {error}") from error
    return _from_config(config)
