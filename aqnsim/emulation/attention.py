"""Attention as an accelerator runs it: cached keys and values, scores, softmax, weighted values, each op a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqnsim import functions
from aqnsim._errors import ConfigError
from aqnsim.emulation.binding import Binding, autocasted

PARTS = ("kv_cache", "qk", "softmax", "pv")
"""The ops of one attention, which are kinds of site."""

_UNSUPPORTED = ("position_bias", "cache")


def is_attention(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is of a function of transformers' AttentionInterface: ``(module, query, key, value, ...)``."""
    if not getattr(function, "__name__", "").endswith("attention_forward") or len(args) < 4:
        return False
    return isinstance(args[0], nn.Module) and all(isinstance(t, Tensor) and t.dim() == 4 for t in args[1:4])


@dataclass(frozen=True)
class Attention:
    """One attention's ops. Where none of scores, softmax and values is emulated, the model's own function runs."""

    parts: dict[str, Binding]
    kind = "attention"

    @property
    def acts(self) -> bool:
        return any(self._acts(part) for part in PARTS)

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(args[0], nn.Module):
            return self._sdpa(function, args, kwargs)
        module, *operands = args[:4]
        query, key, value = autocasted(*operands)
        rest = args[4:]
        key, value = self._cached(key, 0), self._cached(value, 1)
        if not any(self._acts(part) for part in ("qk", "softmax", "pv")):
            return function(module, query, key, value, *rest, **kwargs)
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise ConfigError(f"attention with {name} is not emulated: exclude qk, softmax and pv in the profile")
        mask = rest[0] if rest else kwargs.get("attention_mask")
        scaling = kwargs.get("scaling")
        causal = kwargs.get("is_causal")
        result, weights = self._explicit(
            query,
            key,
            value,
            mask,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            getattr(module, "is_causal", True) if causal is None else causal,
            kwargs.get("dropout", 0.0),
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
        )
        return result.transpose(1, 2).contiguous(), weights

    def _sdpa(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A direct call of scaled_dot_product_attention."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = autocasted(given["query"], given["key"], given["value"])
        key, value = self._cached(key, 0), self._cached(value, 1)
        if not any(self._acts(part) for part in ("qk", "softmax", "pv")):
            result: Tensor = function(**{**given, "query": query, "key": key, "value": value})
            return result
        scale = given.get("scale")
        return self._explicit(
            query,
            key,
            value,
            given.get("attn_mask"),
            query.shape[-1] ** -0.5 if scale is None else scale,
            given.get("is_causal", False),
            given.get("dropout_p", 0.0),
        )[0]

    def _acts(self, part: str) -> bool:
        return part in self.parts and self.parts[part].acts

    def _cached(self, x: Tensor, operand: int) -> Tensor:
        """Keys or values as the cache holds them. A cast and noise depend on the token alone, so doing it at each use
        is what doing it once, when the token came, would give."""
        if not self._acts("kv_cache"):
            return x
        b = self.parts["kv_cache"]
        rows = b.emulation.cached_rows(x) if b.draws else None
        return b.leave(b.enter(x, operand, rows), x.dtype, operand, rows)

    def _explicit(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        causal: bool,
        dropout: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        heads = query.shape[1]
        key, value = _repeated(key, heads), _repeated(value, heads)
        emulation = next(iter(self.parts.values())).emulation
        draws = any(b.acts and b.draws for b in self.parts.values())
        query_rows = emulation.rows_of(query, "bhsd") if draws else None
        key_rows = emulation.cached_rows(key) if draws else None
        score_rows = emulation.score_rows(query) if draws else None
        scores = self._product("qk", query, key, True, score_rows, key_rows, query_rows) * scaling
        mask = _additive(mask, scores, causal)
        weights = self._softmax(scores, mask, softcap, sinks, score_rows).to(value.dtype)
        weights = torch.dropout(weights, dropout, True) if dropout else weights
        return self._product("pv", weights, value, False, query_rows, key_rows, score_rows).to(value.dtype), weights

    def _product(
        self,
        part: str,
        a: Tensor,
        b: Tensor,
        transposed: bool,
        rows: Tensor | None,
        other_rows: Tensor | None,
        operand_rows: Tensor | None,
    ) -> Tensor:
        if not self._acts(part):
            return (a @ (b.mT if transposed else b)).float()
        return self.parts[part].matmul(a, b, transposed, torch.float32, rows, other_rows, operand_rows)

    def _softmax(
        self, scores: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """The softmax, with what is part of it: the cap of its scores, the mask, and a score of each head that takes
        weight from all keys (a sink)."""
        b = self.parts["softmax"] if self._acts("softmax") else None
        entered = scores if b is None else b.enter(scores, 0, rows)
        if softcap is not None:
            entered = torch.tanh(entered / softcap) * softcap
        masked = entered if mask is None else entered + mask
        if sinks is not None:
            masked = torch.cat([masked, sinks.float().reshape(1, -1, 1, 1).expand(*masked.shape[:-1], 1)], -1)
        tables = "" if b is None else b.plan.approximation
        weights = functions.softmax(masked, -1, tables) if tables else torch.softmax(masked, -1)
        weights = weights[..., : scores.shape[-1]]
        if b is None:
            return weights
        weights = b.leave(weights, torch.float32, 0, rows)
        if mask is None:
            return weights
        return weights.masked_fill(mask <= torch.finfo(torch.float32).min / 2, 0.0)  # masked scores are not computed


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values for each query head: those of its group."""
    groups = heads // x.shape[1]
    if groups == 1:
        return x
    batch, own, length, width = x.shape
    return x[:, :, None].expand(batch, own, groups, length, width).reshape(batch, heads, length, width)


def _additive(mask: Tensor | None, scores: Tensor, causal: bool) -> Tensor | None:
    """A mask to add to scores: 0 where a query sees a key, else the least fp32 number."""
    least = torch.finfo(torch.float32).min
    queries, keys = scores.shape[-2:]
    if mask is None:
        if not causal or queries == 1:
            return None
        seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
        return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, least)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, least)
    return mask.float().clamp(min=least)
