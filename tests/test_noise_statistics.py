"""Noise in a model: as large as asked for at every site and dtype, and without memory between sites, steps, ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import SOURCE, inputs, llama, profile, tokens
from torch import Tensor, nn

import aqnsim
from aqnsim import Emulation
from aqnsim.profiles import Forward, OpSpec, Profile, Rule

FIVE = "relative-gaussian(sigma=0.05)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("seed", range(3))
def test_every_site_misses_by_what_was_asked_forward_and_backward(dtype: torch.dtype, seed: int) -> None:
    model, ids = llama(dtype), tokens(batch=8, length=40)
    with aqnsim.emulate(model, "noise-5pct-all-ops", seed=seed) as emu:
        model(input_ids=ids, labels=ids).loss.float().backward()
        emu.check(backward=True)
        report = emu.report()
    assert {r.stream for r in report.receipts} == {"output", "grad-input", "grad-weight"}
    assert report.violations(false_alarm=1e-3) == []


class Twins(nn.Module):
    """Two linear layers of equal weights, each applied to the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(32, 512, bias=False) for _ in range(2))
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def noise_of(emu: Emulation, x: Tensor, clean: Tensor, which: int = 0) -> Tensor:
    return ((emu.model(x)[which] - clean) / clean.abs()).flatten().double()


def at_step(emu: Emulation, step: int) -> Emulation:
    emu.begin_step(step, 10)
    return emu


OTHER: dict[str, Callable[[Emulation, Tensor, Tensor], Tensor]] = {
    "site": lambda emu, x, clean: noise_of(emu, x, clean, which=1),
    "step": lambda emu, x, clean: noise_of(at_step(emu, 5), x, clean),
    "phase": lambda emu, x, clean: _in_phase(emu, x, clean),
    "row": lambda emu, x, clean: noise_of(emu, x, clean).reshape(64, -1).roll(1, 0).flatten(),
    "column": lambda emu, x, clean: noise_of(emu, x, clean).reshape(64, -1).roll(1, 1).flatten(),
}


def _in_phase(emu: Emulation, x: Tensor, clean: Tensor) -> Tensor:
    with emu.phase("rollout"):
        return noise_of(emu, x, clean)


@pytest.mark.parametrize("what", OTHER)
@torch.no_grad()
def test_noise_is_uncorrelated_between(what: str) -> None:
    model, x = Twins(), inputs(64, 32)
    clean = model(x)[0]
    emu = aqnsim.emulate(model, profile(error=FIVE), seed=4)
    one, other = noise_of(emu, x, clean), OTHER[what](emu, x, clean)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 4 / one.numel() ** 0.5


@torch.no_grad()
def test_noise_of_two_ranks_is_uncorrelated_as_their_sequences_are_others() -> None:
    """What two ranks of one run see: the same weights and tokens, and sequences of their own."""
    model, ids = llama(), tokens(batch=4, length=60)
    spec = OpSpec(forward=Forward(error=FIVE))
    rule = Rule(kind="linear", sites=("layers.0.mlp.up_proj",), spec=spec)
    one_site = Profile(name="test", description="for a test", source=SOURCE, rules=(rule,))
    seen: list[Tensor] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, args, out: seen.append(out))
    model(input_ids=ids)
    emu = aqnsim.emulate(model, one_site)
    for rank in range(2):
        with emu.sequences(torch.arange(4) + 4 * rank):
            model(input_ids=ids)
    clean, *noisy = seen
    first, second = (((y - clean) / clean.abs()).flatten().double() for y in noisy)
    assert float(first.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / first.numel() ** 0.5
