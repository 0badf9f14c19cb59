"""Laws of ``quantize``, ``dequantize`` and ``elements``, and of results in given tensors."""

from __future__ import annotations

import torch

from aqnsim import backends, formats
from aqnsim.conformance.compare import kind, same
from aqnsim.conformance.inputs import CHAINS, axes, named, normal_values
from aqnsim.conformance.registry import KEY, STEP, Subject, law, truth
from aqnsim.formats import element_of


@law("quantize", "bit", "quantize", named)
def _quantize(s: Subject, text: str) -> str:
    """Every part of a quantized tensor, along every axis."""
    return _same_parts(s, "quantize", text)


@law("elements", "bit", "elements", named)
def _elements_and_scales(s: Subject, text: str) -> str:
    """The values and scales that a quantized tensor's codes stand for."""
    return _same_parts(s, "elements", text)


def _same_parts(s: Subject, op: str, text: str) -> str:
    x = normal_values(35, 3, 50, seed=6)
    for axis in axes(formats.get(text)):
        for t in (x, x.bfloat16()):
            arguments = (t, text, axis, KEY, STEP, None)
            for i, (got, expected) in enumerate(zip(s(op, *arguments), truth(op, *arguments), strict=True)):
                same(got, expected, f"part {i} of {kind(t)} along axis {axis}")
    return f"{x.numel()} values"


@law("dequantize", "bit", "cast quantize dequantize", named)
def _dequantize(s: Subject, text: str) -> str:
    """What comes back from codes and scales is the cast."""
    x = normal_values(35, 3, 50, seed=6)
    x = x if element_of(formats.get(text)).signed else x.abs()  # NaN has no code in all of them
    for axis in axes(formats.get(text)):
        for t in (x, x.bfloat16()):
            parts = truth("quantize", t, text, axis, KEY, STEP, None)
            (got,) = s("dequantize", *parts, text, axis, list(t.shape), t.dtype)
            same(got, truth("cast", t, text, axis, KEY, STEP, None, False)[0], f"{kind(t)} along axis {axis}", t)
    return f"{x.numel()} values"


@law("out", "bit", "cast cast_out perturb perturb_out")
def _out(s: Subject, case: str) -> str:
    """An op that writes to a given tensor writes what it would have returned, to the input itself, too."""
    x = normal_values(67, 130, seed=22).to(s.device)
    for t in (x, x.bfloat16()):
        for op, given in (("cast", ("mxfp4", -1, KEY, STEP, None)), ("perturb", (CHAINS[0], KEY, STEP, None, None))):
            rest = (False,) if op == "cast" else (None, False)
            expected = s(op, t, *given, *rest)[0]
            itself = t.clone()
            for source, into in ((t, torch.full_like(t, torch.nan)), (itself, itself)):
                backends.get(s.backend).ops[f"{op}_out"](source, *given, into)
                same(into.cpu(), expected, f"{op} of {kind(t)}")
    return f"{x.numel()} values"
