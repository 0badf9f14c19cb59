"""How far the loss's policy is from the one that sampled, and what is done about it.

A rollout decodes with a cache, under the noise of its own phase; the loss runs whole sequences, under that of
"train". Of one token, `log p(train) - log p(rollout)` is its log-ratio. A policy gradient that ignores it is biased
where it is not 0; weighing each token by the ratio, cut off at a limit, corrects that (truncated importance sampling).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.tables import Mismatch

COUNT, SUM, SQUARES, K3, BEYOND, CLIPPED, ENTROPY, KL = range(8)
"""What `TokenTally` adds up over tokens."""


def importance_weights(mode: Mismatch, limit: float, train: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    """A factor on the advantage of each token, as TRL's correction for vLLM has it on the loss: the same but for KL.

    Args:
        mode: "report" weighs nothing; "token-..." goes by each token's ratio, "sequence-..." by their product over the
            sequence; "...-truncate" cuts a ratio down to the limit, "...-mask" drops what exceeds it.
        limit: largest ratio, above 0.
        train, rollout: log-probabilities, [sequences, tokens].
        mask: 1 where there is a token, same shape.

    Returns:
        [sequences, tokens], or [sequences, 1] where the mode goes by sequences.

    >>> train, rollout = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -2.0]])
    >>> importance_weights("token-truncate", 3.0, train, rollout, torch.ones(1, 2))
    tensor([[1., 3.]])
    >>> importance_weights("sequence-mask", 3.0, train, rollout, torch.ones(1, 2))
    tensor([[0.]])
    """
    log_ratio = (train - rollout) * mask
    if mode == "report":
        return torch.ones_like(log_ratio)
    level, _, treatment = mode.partition("-")
    ratio = (log_ratio.sum(1, keepdim=True) if level == "sequence" else log_ratio).exp()
    return ratio.clamp(max=limit) if treatment == "truncate" else ratio.masked_fill(ratio > limit, 0.0)


class TokenTally:
    """Sums over the tokens of a step's loss, in fp64 on the loss's device; nothing waits for it until `result`."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(KL + 1, dtype=torch.float64, device=device)
        self.largest = torch.zeros((), dtype=torch.float64, device=device)

    def add(
        self,
        *,
        mask: Tensor,
        rollout: Tensor,
        old: Tensor,
        new: Tensor,
        reference: Tensor | None,
        entropy: Tensor,
        advantages: Tensor,
        clip: tuple[float, float],
        limit: float,
    ) -> None:
        """Add the tokens of a micro-batch; all but advantages are [sequences, tokens], log-probabilities but for two.

        Args:
            mask: 1 where a token counts.
            rollout, old, new, reference: of the sampling, of the policy before the step's first update, of the policy
                now, of the reference; all but the first in the phases of the loss.
            entropy: of the policy now, in nats.
            advantages: [sequences, 1] or [sequences, tokens]; only the sign counts.
            clip: of the ratio: its distances below and above 1.
            limit: of the importance ratio.
        """
        mask = mask.double()
        log_ratio = (old - rollout).double() * mask
        moved = (new - old).exp()
        clipped = ((moved < 1 - clip[0]) & (advantages < 0)) | ((moved > 1 + clip[1]) & (advantages > 0))
        away = None if reference is None else (reference - new).double() * mask
        terms = [
            mask,
            log_ratio,
            log_ratio**2,
            log_ratio.expm1() - log_ratio,
            (log_ratio.exp() > limit) * mask,
            clipped * mask,
            entropy * mask,
            torch.zeros_like(mask) if away is None else away.expm1() - away,
        ]
        self.sums += torch.stack([term.sum() for term in terms])
        self.largest = torch.maximum(self.largest, log_ratio.abs().max())

    def result(self) -> dict[str, Any]:
        """Means over the tokens of all ranks (a collective call): fields of `records.StepMetrics`.

        `mismatch.k1` and `.k3` estimate KL(rollout || train) from the rollout's samples: the mean of -log r, and of
        r - 1 - log r, which is never negative (Schulman, "Approximating KL divergence"); `kl` is the k3 against the
        reference, as in the loss. All but the count are None where no token counted.
        """
        sums, largest = self.sums.clone(), self.largest.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        tokens = int(sums[COUNT])
        if not tokens:
            return {"tokens": 0}
        means = (sums / tokens).tolist()
        return {
            "tokens": tokens,
            "entropy": means[ENTROPY],
            "clipped": means[CLIPPED],
            "kl": means[KL],
            "mismatch": {
                "mean": means[SUM],
                "std": max(0.0, means[SQUARES] - means[SUM] ** 2) ** 0.5,
                "max": largest.item(),
                "k1": 0.0 - means[SUM],
                "k3": means[K3],
                "beyond": means[BEYOND],
            },
        }
