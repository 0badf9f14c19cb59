"""A calibration text, and what an emulation does to a model's answer to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim._errors import ConfigError


@dataclass(frozen=True)
class Effect:
    """How far a model's answers are from those that it gave as it is.

    Attributes:
        kl: mean over tokens of KL(as it is || now), in nats.
        loss: mean negative log-likelihood of the next token now, in nats.
        loss_change: the same, minus what it was.
    """

    kl: float
    loss: float
    loss_change: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)


class Text:
    """Tokens in windows, and the log-probabilities that a model as it is gives for them.

    Args:
        tokens: ``[windows, length]``, or one row that is cut into windows.
        length: of a window, where there is one row; what is left at its end is not used.
        batch: windows in a forward.

    Raises:
        ConfigError: fewer than two tokens in a window, or not one whole window.
    """

    def __init__(self, tokens: Tensor, length: int = 128, batch: int = 8) -> None:
        if tokens.dim() == 1:
            tokens = tokens[: len(tokens) // length * length].view(-1, length)
        if tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
            raise ConfigError(
                f"a text of shape {list(tokens.shape)} with windows of {length}: expected at least one window of two "
                "tokens; give a longer text or shorter windows"
            )
        self.tokens, self.batch = tokens, batch
        self.clean: list[Tensor] = []
        self.clean_loss = 0.0

    def batches(self) -> Iterator[Tensor]:
        """The windows, a few at a time."""
        yield from self.tokens.split(self.batch)

    def record(self, model: nn.Module) -> None:
        """Keep what the model says as it is; everything else is compared with that."""
        losses = []
        self.clean = []
        for tokens, log_p in self._answers(model):
            self.clean.append(log_p)
            losses.append(_loss(log_p, tokens))
        self.clean_loss = float(torch.stack(losses).mean())

    def effect(self, model: nn.Module) -> Effect:
        """How far the model is from what was recorded."""
        divergences, losses = [], []
        for (tokens, log_p), clean in zip(self._answers(model), self.clean, strict=True):
            divergences.append(
                torch.nn.functional.kl_div(log_p, clean, log_target=True, reduction="none").sum(-1).mean()
            )
            losses.append(_loss(log_p, tokens))
        loss = float(torch.stack(losses).mean())
        return Effect(float(torch.stack(divergences).mean()), loss, loss - self.clean_loss)

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens in self.batches():
            yield tokens, logits_of(model, tokens).float().log_softmax(-1)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits ``[windows, length, vocabulary]`` of a causal language model of transformers, or of a plain module."""
    output: Any = model(input_ids=tokens) if hasattr(model, "config") else model(tokens)
    return output if isinstance(output, Tensor) else output.logits


def _loss(log_p: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.nll_loss(log_p[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
