"""What the training tests stand on: a tiny model, a character tokenizer, sums to solve, a recording emulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from training.adapters import attach_lora
from training.arguments import grpo_config
from training.config import Algorithm, Lora
from training.dapo import DapoTrainer
from training.sharding import whole
from training.tasks import Problem

CHARACTERS = "0123456789+= "


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(*, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2 + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # so that greedy completions differ, and change under emulation
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def problems(count: int) -> list[Problem]:
    """Prompts of two lengths, so that there is padding."""
    return [Problem(f"p{i}", f"{i}+{i % 7}=", str(i % 5)) for i in range(count)]


def holds_answer(completion: str, answer: str) -> bool:
    """A score that a random model gets now and then."""
    return answer in completion


def algorithm(**changes: Any) -> Algorithm:
    settings = {
        "name": "dapo",
        "clip_low": 0.2,
        "clip_high": 0.25,
        "epochs": 1,
        "group_size": 4,
        "prompts_per_step": 4,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "max_new_tokens": 8,
        "overlong_buffer": 4,
        "overlong_penalty": 0.5,
        "dynamic_sampling": True,
        "max_generation_batches": 3,
        "steps": 4,
    }
    return Algorithm(**(settings | changes))


LORA = Lora(rank=4, alpha=8.0, dtype="float32")


@dataclass
class StubEmulation:
    """An emulation that records what it is told, and disturbs rollouts as a function of (seed, step).

    `seen` holds (phase, step, ids) of each forward of the model.
    """

    model: torch.nn.Module
    seed: int = 0
    noise: float = 0.3
    fingerprint: str = "0123456789abcdef"
    sites: list[Any] = field(default_factory=list)
    seen: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    on_forward: Callable[[str], None] = lambda phase: None

    def __post_init__(self) -> None:
        self.profile = SimpleNamespace(name="stub", fingerprint=self.fingerprint)
        self._phase, self._step, self._ids = "train", -1, ()
        self.model.register_forward_pre_hook(self._record)
        self._norm = self.model.model.norm

    def _record(self, module: torch.nn.Module, inputs: Any) -> None:
        self.seen.append((self._phase, self._step, self._ids))
        self.on_forward(self._phase)

    def begin_step(self, step: int, total_steps: int) -> None:
        self._step = step
        self.steps.append((step, total_steps))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self._phase = self._phase, name
        clean = self._norm.weight.data
        if name == "rollout":
            generator = torch.Generator().manual_seed(1000 * self.seed + self._step)
            self._norm.weight.data = clean + self.noise * torch.randn(clean.shape, generator=generator)
        try:
            yield
        finally:
            self._phase = outer
            self._norm.weight.data = clean

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.restored = state

    @contextmanager
    def off(self) -> Iterator[None]:
        with self.phase("off"):
            yield

    @contextmanager
    def sequences(self, ids: torch.Tensor) -> Iterator[None]:
        outer, self._ids = self._ids, tuple(ids.tolist())
        try:
            yield
        finally:
            self._ids = outer


class Run:
    """A trainer with what a test looks at: the emulation, the metrics, the micro-batches of the loss."""

    def __init__(
        self,
        path: Path,
        *,
        score: Any = holds_answer,
        callbacks: list[TrainerCallback] | None = None,
        save_every: int = 2,
        count: int = 40,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        fsdp: bool = False,
        engine: str = "model",
        emulate: Callable[[torch.nn.Module], Any] | None = None,
        on_first_rollout: Callable[[list[Any]], None] = lambda groups: None,
        **changes: Any,
    ) -> None:
        base = tiny_model()
        self.model = attach_lora(base, LORA.model_copy(update={"dtype": dtype}), seed=0)
        self.emulation: Any = emulate(self.model) if emulate else StubEmulation(base)
        self.metrics: list[dict[str, Any]] = []
        self.micro_batches: list[dict[str, torch.Tensor]] = []
        settings = algorithm(**changes)
        self.trainer = DapoTrainer(
            self.model,
            tokenizer=tiny_tokenizer(),
            algorithm=settings,
            args=grpo_config(
                settings,
                output_dir=path,
                seed=0,
                save_every=save_every,
                report_to=(),
                gradient_checkpointing=gradient_checkpointing,
                fsdp=fsdp,
                engine=engine,
            ),
            problems=problems(count),
            score=score,
            emulation=self.emulation,
            on_metrics=self.metrics.append,
            on_first_rollout=on_first_rollout,
            callbacks=callbacks or [],
        )
        compute_loss = self.trainer.compute_loss

        def recording(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            self.micro_batches.append(inputs)
            return compute_loss(model, inputs, *args, **kwargs)

        self.trainer.compute_loss = recording

    def train(self, **kwargs: Any) -> Run:
        self.trainer.train(**kwargs)
        return self

    @property
    def adapters(self) -> dict[str, torch.Tensor]:
        return {name: whole(p.detach()).clone() for name, p in self.model.named_parameters() if "lora_" in name}

    @property
    def results(self) -> list[dict[str, Any]]:
        """The metrics but for the time they took."""
        return [{k: v for k, v in row.items() if k != "seconds"} for row in self.metrics]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
