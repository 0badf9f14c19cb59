"""Memory faults in stored tensors: a cast whose codes or scales are read back with a bit flipped."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aqnsim import (
    ops,  # noqa: F401  (defines torch.ops.aqnsim)
    reference,
)
from aqnsim._errors import ConfigError
from aqnsim.backends.checks import check_dtype, check_rows, shape_in_rows
from aqnsim.formats import BlockFormat, Format, element_of, get
from aqnsim.packing import scaled, stored_scales
from aqnsim.reference.faults import I64, bits_at, check_bit, code_width, scale_rows, sub_key, threshold

_FOLD = np.int64(-7046029254386353131)  # 2^64 over the golden ratio, odd


def faulty_cast(
    x: Tensor,
    format: str,
    axis: int,
    *,
    target: str,
    rate: float,
    bit: int | None,
    key: int,
    step: int,
    rows: Tensor | None = None,
) -> tuple[Tensor, int, float]:
    """Cast a tensor to a format, flip one bit in each code that a fault hits, and read it back.

    Only what is hit is encoded, so small rates cost little more than the cast. No gradient passes.

    Args:
        x: float32 or bfloat16, any shape and strides.
        format: the text of a format; its rounding, where stochastic, is that of ``cast`` with the same key and step.
        axis: the axis along which blocks run.
        target: ``codes``, each element's own; or ``scales``, where a hit changes a whole block.
        rate: the share of codes, or of scales, that are hit: 0, or 2^-32 to 1, in steps of 2^-32.
        bit: which one flips, 0 for the lowest; None for one of all of them at random, each hit for itself.
        key: the Philox key, such as ``NoiseKey.value``.
        step: 0 .. 2^32 - 1.
        rows: int64, one logical row for each row of ``x``, or pairs with a first column; default 0, 1, 2, ... An
            element's fault depends on the key, the step, its logical row and its column alone; a scale's on the logical
            row of its block's first element and the block's index along the last axis.

    Returns:
        The values, of the shape and dtype of ``x``; how many were hit; how many hits were to be expected.

    Raises:
        ConfigError: scales of a format without any or of a whole tensor; a rate, bit, step, dtype or rows that do not
            fit.
        UnknownNameError: no such format or target.

    Definition: docs/semantics.md and :mod:`aqnsim.reference.faults`.

    >>> x = torch.tensor([1.0, -2.0, 3.0])
    >>> faulty_cast(x, "fp8_e4m3", -1, target="codes", rate=1.0, bit=7, key=0, step=0)
    (tensor([-1.,  2., -3.]), 3, 3.0)
    >>> faulty_cast(x, "mxfp4", -1, target="scales", rate=1.0, bit=0, key=0, step=0)
    (tensor([ 2., -4.,  6.]), 1, 1.0)
    """
    check_dtype(x)
    fmt, below = get(format), threshold(rate)
    width = code_width(fmt, target)
    check_bit(bit, width)
    if not 0 <= step < 1 << 32:
        raise ConfigError(f"faulty_cast: step must be in 0..2^32-1, got {step!r}")
    at_step, key = torch.tensor(step), (key + (1 << 63)) % (1 << 64) - (1 << 63)
    elements, scales, tensor_scale = torch.ops.aqnsim.elements(x.detach(), str(fmt), axis, key, at_step, rows)
    count, columns = shape_in_rows(x)
    given = check_rows("faulty_cast", x, rows)
    ids = np.arange(count) if given is None else _one_each(given.cpu().numpy())
    if not isinstance(fmt, BlockFormat) or target == "codes":
        hits, bits = _flips(ids, columns, below, bit, width, key, step)
        _flip_elements(elements, hits, bits, element_of(fmt))
        total = x.numel()
    if isinstance(fmt, BlockFormat):
        stored = stored_scales(scales, fmt)
        if target == "scales":
            elements = _without_nan(elements, stored, tensor_scale, fmt, axis)
            ids = scale_rows(ids, fmt, tuple(x.shape), axis)
            hits, bits = _flips(ids, stored.shape[-1], below, bit, width, key, step)
            stored = _flipped_scales(stored, hits, bits)
            total = stored.numel()
        elements = scaled(elements, fmt, stored, tensor_scale, axis)
    return elements.to(x.dtype), len(hits), total * below / 2**32


def _one_each(rows: I64) -> I64:
    """Rows as one number each: a first column is folded in, with an odd factor."""
    return rows if rows.ndim == 1 else rows[:, 0] ^ (rows[:, 1] * _FOLD)


def _flips(rows: I64, columns: int, below: int, bit: int | None, width: int, key: int, step: int) -> tuple[I64, I64]:
    """Flat indices of what is hit among ``[len(rows), columns]``, and the bit that flips in each."""
    from aqnsim import _core  # here: a backend of another device needs no kernels of the CPU

    words = torch.empty(len(rows), columns, dtype=torch.int32)
    ids = torch.from_numpy(np.ascontiguousarray(rows))
    hit_key = sub_key(key, "hits") & 0xFFFFFFFFFFFFFFFF
    threads = torch.get_num_threads()
    _core.random_words(words.data_ptr(), ids.data_ptr(), False, len(rows), columns, hit_key, step, threads)
    hits = np.flatnonzero(words.numpy().view(np.uint32) < below)
    return hits, bits_at(rows[hits // max(columns, 1)], hits % max(columns, 1), bit, width, key, step)


def _flip_elements(elements: Tensor, hits: I64, bits: I64, element: Format) -> None:
    """Flip bits of hit codes in place; a NaN that the format has no code for is not stored, and stays."""
    flat, at = elements.view(-1), torch.from_numpy(hits).to(elements.device)
    before = flat[at].cpu().numpy()
    after = reference.decode(reference.encode(before, element) ^ (np.int64(1) << bits), element)
    if not element.has_nan:
        after = np.where(np.isnan(before), before, after)
    flat[at] = torch.from_numpy(after).to(elements.device)


def _without_nan(elements: Tensor, stored: Tensor, tensor_scale: Tensor, fmt: BlockFormat, axis: int) -> Tensor:
    """Elements as their codes hold them: 0 where the scale says NaN and the element format has no code for it."""
    if fmt.element.has_nan or not bool(elements.isnan().any()):
        return elements
    said = scaled(torch.zeros_like(elements), fmt, stored, tensor_scale, axis).isnan()
    return elements.masked_fill(elements.isnan() & said, 0.0)


def _flipped_scales(stored: Tensor, hits: I64, bits: I64) -> Tensor:
    """Codes of scales with bits flipped, on the device on which they were."""
    held = stored.cpu().contiguous()
    wide = held.element_size() == 4
    codes = held.view(torch.int32 if wide else torch.uint8).reshape(-1).numpy()
    flips = (np.int64(1) << bits).astype(np.uint32)
    codes[hits] ^= flips.view(np.int32) if wide else flips.astype(np.uint8)
    return held.to(stored.device)
