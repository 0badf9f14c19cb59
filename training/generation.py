"""Decoding, for rollouts and for evaluation alike.

A rollout draws each token with a uniform that belongs to (seed, step, sequence, position), never to a global
generator: the completion of a sequence depends neither on who shares its batch, nor on the number of ranks, nor on
what was drawn before. Runs that differ in one setting therefore see common random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aqnsim._errors import RealisationError

TokenIds = list[int]

SAMPLING = 3
"""The random stream of the rollouts; `dapo` has those of the problems' order."""


def keyed_uniforms(seed: int, step: int, sequence_ids: Iterable[int], length: int) -> torch.Tensor:
    """Uniforms in [0, 1), a pure function of the seed, the step, the sequence id and the position.

    Returns:
        float64, shape [sequences, length].
    """
    rows = [np.random.default_rng([seed, SAMPLING, step, row]).random(length) for row in sequence_ids]
    return torch.from_numpy(np.stack(rows))


class KeyedSampling(LogitsProcessor):
    """Chooses the token where the cumulative softmax passes the uniform of its sequence and position.

    Greedy decoding then picks the chosen token: it is the only one with a finite score.

    Args:
        uniforms: [sequences, max_new_tokens] in [0, 1).
        temperature: divides the scores.
        prompt_width: number of columns of the padded prompts, which is where position 0 is.

    Attributes:
        log_probs: of the tokens chosen so far, under the softmax they were drawn from: fp32 [sequences] a position.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float, prompt_width: int) -> None:
        self.uniforms = uniforms
        self.temperature = temperature
        self.prompt_width = prompt_width
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.prompt_width
        probabilities = (scores / self.temperature).softmax(-1)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        if cumulative[:, -1].isnan().any():
            raise RealisationError(
                f"the logits of new token {position} are NaN or infinite: the emulated forward overflowed; "
                "look for `nonfinite` in the receipts, and lower the noise or widen the format there"
            )
        threshold = self.uniforms[:, position, None].to(scores.device) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True)
        self.log_probs.append(probabilities.gather(1, chosen)[:, 0].log())
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@dataclass(frozen=True)
class Sample:
    """A sampled completion, with the log-probability of each token under the softmax that it was drawn from."""

    tokens: TokenIds
    log_probs: list[float]


def generate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[TokenIds], *, max_new_tokens: int
) -> list[TokenIds]:
    """Complete the prompts greedily, each up to and including its end-of-sequence token.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.
        tokenizer: gives the padding and the end-of-sequence token.
        prompts: token ids of each prompt; they are padded on the left.
        max_new_tokens: longest completion.

    Returns:
        The token ids of each completion, in the order of the prompts.
    """
    return _complete(model, tokenizer, prompts, max_new_tokens, LogitsProcessorList())


def sample(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    *,
    uniforms: torch.Tensor,
    temperature: float,
) -> list[Sample]:
    """Draw a completion of each prompt, up to and including its end-of-sequence token.

    Args:
        model, tokenizer, prompts: as in `generate`.
        uniforms: [prompts, longest completion] from `keyed_uniforms`.
        temperature: divides the logits.

    Returns:
        The completions in the order of the prompts.

    Raises:
        RealisationError: logits are NaN or infinite.
    """
    width = max(map(len, prompts))
    sampling = KeyedSampling(uniforms, temperature, width)
    completions = _complete(model, tokenizer, prompts, uniforms.shape[1], LogitsProcessorList([sampling]))
    log_probs = torch.stack(sampling.log_probs, 1).tolist()
    return [Sample(c, row[: len(c)]) for c, row in zip(completions, log_probs, strict=True)]


def _complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    processors: LogitsProcessorList,
) -> list[TokenIds]:
    target: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    ends = end_of_sequence_ids(target, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids, mask = pad_left(prompts, padding)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=padding,
        eos_token_id=ends,
        disable_compile=True,
    )
    with torch.no_grad(), evaluating(target), _generation_config(target, config):
        output = target.generate(
            input_ids=ids.to(target.device),
            attention_mask=mask.to(target.device),
            generation_config=config,
            logits_processor=processors,
            synced_gpus=False,  # else, with FSDP2, ranks wait for each other at each token, and some have no batch
        )
    return [_until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]


def pad_left(rows: Sequence[TokenIds], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one int64 tensor [rows, longest], padded on the left, and the mask of its real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, then those that the model declares."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    several = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *several] if i is not None))


def _until_end(tokens: TokenIds, ends: Sequence[int]) -> TokenIds:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a block with a model in eval mode: no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own defaults, which transformers merges into any config it is given.

    A repetition penalty that a model ships with would otherwise act in the rollout and not in the loss.
    """
    shipped = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = shipped
