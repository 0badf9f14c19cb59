"""LoRA adapters: attached in the dtype that the experiment names, and checked to learn."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from aqnsim._errors import ConfigError, RealisationError, did_you_mean
from training.config import Lora
from training.sharding import whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def attach_lora(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """Put adapters on linear layers and freeze everything else.

    The update is `alpha / rank * B @ A` with B = 0 at the start (arXiv 2106.09685), so the model's output does not
    change. A is a pure function of the seed: arms of an experiment start from the same adapters.

    Args:
        model: the model to adapt, emulated or not.
        lora: rank, alpha, dropout, dtype and targets; "all-linear" is every linear but the lm_head.
        seed: of the initialisation of A.

    Raises:
        ConfigError: a target names no linear layer, or the lm_head, whose forward TRL's loss goes round.
    """
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linears = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    targets = sorted(linears) if lora.targets == "all-linear" else list(lora.targets)
    for target in targets:
        if target not in linears:
            raise ConfigError(
                f"lora.targets: {target!r} is no linear layer that can be adapted"
                f"{did_you_mean(target, linears)}; expected some of: {', '.join(sorted(linears))}"
            )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Left to itself PEFT makes the adapters of a 16-bit base float32, whatever was asked for.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    for _, parameter in trainable(adapted):
        parameter.data = parameter.data.to(DTYPES[lora.dtype])
    return adapted


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def check_gradient_flow(model: nn.Module) -> None:
    """Check, after the first backward, that every adapter can learn.

    While B = 0 the gradient of A is zero, so it is dL/dB that tells.

    Raises:
        RealisationError: a gradient of a `lora_B` is missing or zero; the message names the parameter.
    """
    for name, parameter in trainable(model):
        if re.search(r"\blora_B\b", name) and (parameter.grad is None or not whole(parameter.grad).count_nonzero()):
            raise RealisationError(
                f"no gradient reaches {name}: it is {'missing' if parameter.grad is None else 'zero'} after a "
                "backward, so this adapter would never learn; something between it and the loss does not propagate"
            )


def check_finite_gradients(model: nn.Module) -> None:
    """Check that no gradient is NaN or infinite: one such update destroys the adapters for good.

    Raises:
        RealisationError: naming the first such parameter; clipping by the norm spreads it to the others.
    """
    for name, parameter in trainable(model):
        if parameter.grad is not None and not whole(parameter.grad).isfinite().all():
            raise RealisationError(
                f"the gradients are NaN or infinite ({name} first); the update was not made. Look for `nonfinite` in "
                "the receipts, and lower the noise or widen the format there"
            )
