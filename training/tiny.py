"""Models that are made on the spot, in seconds, for tests and rehearsals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitOn
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from training.recipe import Recipe, save
from training.tasks import Arithmetic


@dataclass(frozen=True)
class TinyLlama(Recipe):
    """A character-level Llama, trained for seconds on the train split of small sums.

    It is stopped where it knows about half of them: sampled answers then differ in reward, which is all it is for.
    """

    layers: int = 3
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    steps: int = 700
    batch: int = 64
    learning_rate: float = 3e-3
    families: tuple[tuple[str, float], ...] = (("add-1x1", 1.0), ("add-2x1", 3.0))
    examples: int = 0
    held_out: float = 0.25
    seed: int = 0

    def make(self, directory: Path, root: Path) -> None:
        tokenizer = character_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self._initial(tokenizer)
            self._train(model, tokenizer)
        save(model, tokenizer, directory)

    def _initial(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=2 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            **ends,
        )
        model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(**ends)  # type: ignore[no-untyped-call]
        return model

    def _train(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Minimise the cross entropy of the answers and their end."""
        task = Arithmetic(dict(self.families), self.examples, self.held_out)
        problems = task.problems("train", self.steps * self.batch, self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
        for start in range(0, len(problems), self.batch):
            batch = problems[start : start + self.batch]
            texts = [f"{p.prompt} {p.answer}{task.end}" for p in batch]
            encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
            ids, labels = encoded["input_ids"], encoded["input_ids"].clone()
            labels[encoded["attention_mask"] == 0] = -100
            for row, problem in zip(labels, batch, strict=True):
                row[: len(problem.prompt)] = -100  # a character is a token
            logits = model(input_ids=ids, attention_mask=encoded["attention_mask"]).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@dataclass(frozen=True)
class TinyQwen2(TinyLlama):
    """The same with the architecture of Qwen2: biases on queries, keys and values, weights tied."""

    layers: int = 2
    steps: int = 600

    def _initial(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=2 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            **ends,
        )
        model = Qwen2ForCausalLM(config)
        model.generation_config = GenerationConfig(**ends)  # type: ignore[no-untyped-call]
        return model


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of which each printable ASCII character, and the line feed, is a token."""
    characters = ["\n", *map(chr, range(32, 127))]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = SplitOn(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)  # type: ignore[no-untyped-call]
