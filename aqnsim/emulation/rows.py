"""Logical rows: which token of which sequence each row of a tensor belongs to, whatever the batch's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.rng import POSITION_BITS

_HEAD_BITS = POSITION_BITS + 1  # of a score's column: key positions, with room for padding before the first
_LAST = (1 << POSITION_BITS) - 1


@dataclass(frozen=True)
class Rows:
    """The tokens of one forward.

    Attributes:
        tokens: int64 ``[batch, length]``, sequence id << 20 | position, of the tokens that this forward computes.
        starts: int64 ``[batch, length]``, the index among the keys of the first token of each token's sequence.
    """

    tokens: Tensor
    starts: Tensor

    def of(self, x: Tensor, heads: str = "") -> Tensor:
        """The logical rows of ``x``, whose last axis is the column.

        Args:
            heads: ``bhsd`` for ``[batch, heads, length, width]``, ``bshd`` for a tensor that may have heads after the
                length: head h then has the columns from h times the width.

        A tensor of one batch row where there are several, such as position embeddings, has rows by position alone; one
        of fewer tokens has the last ones, as the output of a model that computes the last logits only.
        """
        batch, length = self.tokens.shape
        if x.dim() == 4 and heads == "bhsd" and (x.shape[0], x.shape[2]) == (batch, length):
            return _by_head(self.tokens, x.shape[1], x.shape[3])
        if x.dim() == 4 and heads == "bshd" and x.shape[:2] == (batch, length):
            first = torch.arange(x.shape[2], device=x.device) * x.shape[3]
            return _pairs(self.tokens[:, :, None], first)
        count = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if x.dim() == 3 and x.shape[0] == batch and x.shape[1] < length:
            return self.tokens[:, length - x.shape[1] :].reshape(-1)
        if x.dim() == 3 and x.shape[:2] == (1, length) and count != self.tokens.numel():
            return (self.tokens[:1] & _LAST).reshape(-1)
        return self.tokens.reshape(-1)  # an op checks that they are as many as its rows

    def cached(self, x: Tensor) -> Tensor:
        """The logical rows of keys or values ``[batch, heads, keys, width]``: of this forward's tokens, or of all that
        came before the last one, which are of its sequence."""
        if x.shape[2] == self.tokens.shape[1]:
            return _by_head(self.tokens, x.shape[1], x.shape[3])
        positions = torch.arange(x.shape[2], device=self.tokens.device)[None] - self.starts[:, -1:]
        ids = self.tokens[:, -1:] >> POSITION_BITS
        return _by_head(ids << POSITION_BITS | positions.clamp(min=0), x.shape[1], x.shape[3])

    def scores(self, query: Tensor) -> Tensor:
        """The logical rows of scores ``[batch, heads, length, keys]``: the query's token, and columns by head and the
        key's position."""
        heads = torch.arange(query.shape[1], device=query.device) << _HEAD_BITS
        first = heads[None, :, None] + (1 << POSITION_BITS) - self.starts[:, None]
        return _pairs(self.tokens[:, None], first)


def _by_head(rows: Tensor, heads: int, width: int) -> Tensor:
    """Rows ``[batch, length]`` for ``[batch, heads, length, width]``."""
    return _pairs(rows[:, None], (torch.arange(heads, device=rows.device) * width)[:, None])


def _pairs(rows: Tensor, first: Tensor) -> Tensor:
    """Flat ``[n, 2]`` of (logical row, first column)."""
    rows, first = torch.broadcast_tensors(rows, first)
    return torch.stack([rows, first], -1).reshape(-1, 2)


def rows_of_forward(kwargs: Mapping[str, Any], tokens: Tensor, sequences: Tensor | None) -> Rows:
    """The rows of a decoder's forward: padding does not count, cached tokens do.

    Args:
        kwargs: what the decoder is called with.
        tokens: ``[batch, length, ...]``, its tokens or their embeddings.
        sequences: ids by sequence ``[batch]`` or by token ``[batch, length]``; None for 0, 1, 2, ...

    Raises:
        ConfigError: more tokens than a logical row has positions, or as many ids as there are no rows.
    """
    batch, length = tokens.shape[:2]
    device = tokens.device
    mask, cache, given = (kwargs.get(k) for k in ("attention_mask", "past_key_values", "position_ids"))
    past = cache.get_seq_length() if cache is not None else 0
    indices = torch.arange(length, device=device).expand(batch, -1) + past
    positions, starts = indices, torch.zeros_like(indices)
    by_mask = isinstance(mask, Tensor) and mask.dim() == 2  # a static cache has a mask of four dimensions
    if isinstance(mask, Tensor) and by_mask:
        counted = mask.long().cumsum(-1) - 1
        starts = (counted < 0).sum(-1, keepdim=True).expand(-1, length)
        positions = counted[:, -length:]
    if isinstance(given, Tensor) and given.shape == (batch, length):
        positions = given.long()
        if not by_mask or (sequences is not None and sequences.dim() == 2):
            starts = indices - positions
    if length > 1 << POSITION_BITS:
        raise ConfigError(f"noise is keyed by positions below 2^{POSITION_BITS}, but a sequence has {length} tokens")
    if sequences is None:
        ids = torch.arange(batch, device=device)[:, None]
    elif sequences.shape[0] != batch or (sequences.dim() == 2 and sequences.shape[1] != length):
        raise ConfigError(
            f"sequences: ids of shape {tuple(sequences.shape)} are set but the batch has {batch} rows "
            f"of {length} tokens"
        )
    else:
        ids = sequences.to(device) if sequences.dim() == 2 else sequences.to(device)[:, None]
    return Rows(ids << POSITION_BITS | positions.clamp(min=0), starts)
