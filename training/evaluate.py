"""Greedy evaluation, problem by problem, on clean and on emulated hardware.

An emulated score is only given out together with the proof that the evaluation was emulated: models trained in 4 bits
have been scored in 16 before, and nothing showed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import nn
from transformers import PreTrainedTokenizerBase

from aqnsim._errors import ConfigError, RealisationError
from training.generation import generate
from training.records import MODES
from training.sharding import gathered as whole_weights
from training.tasks import Problem

if TYPE_CHECKING:
    from aqnsim import Emulation, Receipt, ReceiptTotals


@dataclass(frozen=True)
class ProblemResult:
    """What the model made of one problem."""

    problem_id: str
    correct: bool
    completion: str
    answer: str


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    score: Callable[[str, str], bool],
    *,
    emulation: Emulation,
    batch_size: int,
    max_new_tokens: int,
) -> list[ProblemResult]:
    """Answer each problem by greedy decoding, in the phase "eval".

    The batches are the same whatever the number of ranks: each rank takes its own and all get the results.

    Args:
        model: with or without adapters.
        tokenizer: of the model.
        problems: their order is the order of the results; a problem's index is its sequence id.
        score: score(completion, answer).
        emulation: attached to the model.
        batch_size: problems decoded at once; padding, hence the last bits, depend on it.
        max_new_tokens: longest completion.

    Raises:
        ConfigError: there are no problems.
    """
    if not problems:
        raise ConfigError("no problems to evaluate on: raise task.eval_problems")
    ranks, rank = _world()
    starts = range(0, len(problems), batch_size)
    results: list[tuple[int, ProblemResult]] = []
    with whole_weights(model):
        for start in starts[rank::ranks]:
            batch = problems[start : start + batch_size]
            ids = torch.arange(start, start + len(batch))
            prompts = tokenizer([problem.prompt for problem in batch])["input_ids"]
            with emulation.phase("eval"), emulation.sequences(ids):
                tokens = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
            completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for index, problem, completion in zip(ids.tolist(), batch, completions, strict=True):
                correct = bool(score(completion, problem.answer))
                result = ProblemResult(problem.problem_id, correct, completion, problem.answer)
                results.append((index, result))
    gathered: list[tuple[int, ProblemResult]] = gather_object(results)
    return [result for _, result in sorted(gathered, key=lambda item: item[0])]


def evaluate_modes(
    emulation: Emulation,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    score: Callable[[str, str], bool],
    *,
    batch_size: int,
    max_new_tokens: int,
    fingerprint: str | None = None,
    other_profile: bool = False,
) -> dict[str, list[ProblemResult]]:
    """Evaluate twice, without the emulation ("clean") and with it ("emulated").

    Args:
        fingerprint: of the profile that the model was trained under; None where it was not trained.
        other_profile: allow an evaluation under another profile than that.
        emulation, model, tokenizer, problems, score, batch_size, max_new_tokens: as in `evaluate`.

    Raises:
        ConfigError: the model was trained under another profile.
        RealisationError: the emulated evaluation was not emulated, or the clean one was.
    """
    own = emulation.profile.fingerprint
    if fingerprint not in (None, own) and not other_profile:
        raise ConfigError(
            f"the model was trained under the profile {fingerprint}, this evaluation would be under "
            f"{own} ({emulation.profile.name!r}): such a score needs to be asked for (other_profile=True)"
        )

    def run() -> list[ProblemResult]:
        return evaluate(
            model,
            tokenizer,
            problems,
            score,
            emulation=emulation,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )

    start = emulation.snapshot()
    with emulation.off():
        clean = run()
    attest_clean(emulation, start)
    start = emulation.snapshot()
    emulated = run()
    if _world()[1] * batch_size < len(problems):  # else this rank had no batch to show for it
        attest_emulated(emulation, start)
    return dict(zip(MODES, (clean, emulated), strict=True))


def attest_clean(emulation: Emulation, since: ReceiptTotals) -> None:
    """Check that nothing was emulated in the phase "eval" since a snapshot.

    Raises:
        RealisationError: something was; the message names the site.
    """
    for receipt in _in_evaluation(emulation, since):
        raise RealisationError(
            f"the clean evaluation was emulated: site {receipt.site!r} has {receipt.calls} calls "
            f"with {receipt.requested} on its {receipt.stream}"
        )


def attest_emulated(emulation: Emulation, since: ReceiptTotals) -> None:
    """Check that every emulated linear took part in the phase "eval" since a snapshot.

    A profile that asks for nothing, such as "ideal", has no sites, hence nothing to prove.

    Raises:
        RealisationError: a site did not; the message names it.
    """
    reached = {receipt.site for receipt in _in_evaluation(emulation, since)}
    for site in emulation.sites:
        if site.kind == "linear" and site.name not in reached:
            raise RealisationError(
                f"the emulated evaluation never reached site {site.name!r}, for which profile "
                f"{emulation.profile.name!r} has a rule: was another model evaluated, or the "
                "emulation taken off this one?"
            )


def _in_evaluation(emulation: Emulation, since: ReceiptTotals) -> list[Receipt]:
    return [receipt for receipt in emulation.receipts(since=since) if receipt.phase == "eval"]


def _world() -> tuple[int, int]:
    """Ranks, and this one's number."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
