"""The Triton kernels in Triton's interpreter, beside the reference: run by test_triton.py with TRITON_INTERPRET=1.

An argument names a check; what differs is printed, a line each.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch
from chains import all_chains
from texts import axes_of
from torch import Tensor
from values import all_bf16, critical, random_bits, same_bits

from aqnsim import backends, formats
from aqnsim.backends import reference as slow
from aqnsim.backends.triton import cast, gemm, launch, perturb
from aqnsim.formats import element_of
from aqnsim.profiles import Forward, OpSpec
from aqnsim.receipts import STATS
from aqnsim.rng import clock

KEY, STEP = -0x123456789ABCDEF, torch.tensor(clock(5, "eval", run=3))
COUNTS = [STATS.index(n) for n in ("calls", "count", "changed", "injected_n", "saturated", "nonfinite", "hits")]
RULES = [
    *(f"mxfp4(scale={rule})" for rule in ("ceil", "rceil", "even", "amct", "mse")),
    *(f"nvfp4(scale={rule})" for rule in ("modelopt", "compressed_tensors", "torchao", "qutlass")),
    *(f"nvfp4(scale=4over6-{norm})" for norm in ("mae", "mse")),
    *("fp8_e4m3_1x128(scale=te-pow2)", "fp8_e4m3_token(scale=te)", "int4_g128(amax_to=7.5)"),
    *("mxfp8_e4m3(block=7)", "mxfp8_e4m3(block=32x16)", "mxfp4(block=16x16, scale=mse)", "mxfp6_e2m3(special=element)"),
    *("mxfp4(rounding=stochastic)", "nvfp4(rounding=stochastic)", "mxint8(zero_scale=one)"),
]
ROUNDINGS = [
    f"{name}(rounding={rounding})"
    for name in ("fp8_e4m3", "hif8", "e8m0", "fp8_e5m2", "int8")
    for rounding in (
        "nearest-even",
        "nearest-away",
        "nearest-down",
        "toward-zero",
        "up",
        "down",
        "stochastic",
        "stochastic-8",
    )
]
ELEMENTS = [
    *ROUNDINGS,
    *("hif8(rounding=hif8-hybrid)", "fp8_e4m3(overflow=nan)", "fp8_e5m2(overflow=inf)", "fp8_e4m3(subnormals=flush)"),
    *("fp4_e2m1(nan=zero)", "fp4_e2m1(nan=max)", "fp8_e5m2(overflow=inf, rounding=up)", "e8m22", "e5m0"),
]


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def same_stats(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got[..., COUNTS], expected[..., COUNTS]) and torch.allclose(got, expected, rtol=1e-4, atol=0)


def check_cast(x: Tensor, text: str, axis: int = -1, rows: Tensor | None = None) -> None:
    got, stats = cast.cast(x, text, axis, KEY, STEP, rows, True)
    expected, expected_stats = slow.cast(x, text, axis, KEY, STEP, rows, True)
    if not (same_bits(got, expected) and same_stats(stats, expected_stats)):
        print(f"cast of {list(x.shape)} {x.dtype} to {text} along {axis}", stats.tolist(), expected_stats.tolist())


def check_quantize(x: Tensor, text: str, axis: int = -1) -> None:
    got, expected = (q(x, text, axis, KEY, STEP, None) for q in (cast.elements, slow.elements))
    if not all(same_bits(a.float(), b.float()) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True)):
        print(f"quantize of {list(x.shape)} to {text} along {axis}")


def every_format() -> None:
    """Every named format: its critical values, random bits, odd sizes along every axis."""
    bits = torch.from_numpy(random_bits(2048, seed=2).copy()).view(32, -1)
    for text in formats.ALL:
        fmt = formats.get(text)
        if element_of(fmt).bits <= 8:
            values = torch.from_numpy(critical(element_of(fmt)))
            check_cast(values[values.isfinite()], text)
        check_cast(bits, text)
        for axis in axes_of(text, 3):
            x = normal(5, 7, 37)
            check_cast(x if axis else x.bfloat16(), text, axis)
        check_quantize(normal(3, 70), text)


def every_bf16() -> None:
    """All bfloat16 values, fp32 and bfloat16, through a format of each kind."""
    bf16 = torch.from_numpy(all_bf16()[np.random.default_rng(1).permutation(1 << 16)])
    for text in ("fp8_e4m3", "hif8", "int8", "bf16", "e8m0", "mxfp4", "mxfp8_e5m2", "nvfp4", "hif4", "fp8_e4m3_1x128"):
        check_cast(bf16[bf16.isfinite()], text)
        check_cast(bf16.bfloat16(), text)


def every_choice() -> None:
    """Roundings, overflows and scale rules; blocks of every magnitude."""
    edges = torch.cat([torch.from_numpy(critical(element_of(formats.get("fp8_e4m3")))), normal(512)])
    for text in ELEMENTS:
        check_cast(edges, text)
    exponents = np.linspace(-148, 126, 120).round()[:, None]
    x = (np.random.default_rng(20).standard_normal((120, 70)) * np.exp2(exponents)).astype(np.float32)
    x[7], x[9], x[11, 5], x[13, 40], x[15, 3] = 0.0, -0.0, np.inf, np.nan, -np.inf
    for text in RULES:
        for axis in axes_of(text, 2):
            check_cast(torch.from_numpy(x[20:]), text, axis)
        check_cast(torch.from_numpy(x), text)
        check_quantize(torch.from_numpy(x[20:60]), text)
    for text in ("nvfp4", "fp8_e4m3_tensor", "mxfp4", "int8_token"):
        check_quantize(torch.empty(0, 5), text)
        check_cast(torch.empty(0, 5), text)
        check_cast(torch.tensor(2.5), text)


def logical_rows(n: int) -> list[Tensor | None]:
    ids = torch.arange(n) * (1 << 33) + 7
    return [None, ids, torch.stack([ids, torch.arange(n) * 3 + (1 << 32)], dim=1)]


def random_words() -> None:
    """Stochastic rounding takes a word of the logical row and column, however blocks lie."""
    for text in ("fp8_e4m3(rounding=stochastic)", "mxfp4(rounding=stochastic)", "hif4(rounding=stochastic-4)"):
        for rows in logical_rows(35):
            for columns, axis in ((36, -1), (37, -1), (36, 1)):
                check_cast(normal(5, 7, columns), text, axis if "mx" in text else -1, rows)


def every_error() -> None:
    """Every model and chain, for every kind of logical rows and both dtypes."""
    for i, text in enumerate(all_chains()):
        shape = (33, 128) if i % 2 else (5, 7, 37)
        y, n = normal(*shape), 33 if i % 2 else 35
        y.view(-1)[:3] = torch.tensor([np.nan, np.inf, -0.0])
        magnitude = y.abs() * 3 + 1 if "absdot" in text else None
        for j, rows in enumerate(logical_rows(n)):
            given, dtype = (y.bfloat16() if j == 1 else y), (torch.float32 if j == 2 else torch.bfloat16)
            got, stats = perturb.perturb(given, text, KEY, STEP, rows, magnitude, dtype, True)
            expected, expected_stats = slow.perturb(given, text, KEY, STEP, rows, magnitude, dtype, True)
            if not (same_bits(got, expected) and same_stats(stats, expected_stats)):
                print(f"{text} on {list(shape)} rows {j}", stats.tolist(), expected_stats.tolist())


def tile_sizes() -> None:
    """No tile changes a bit of a result or a count of what is measured."""
    x = normal(12, 68)
    calls: list[Callable[[], tuple[Tensor, Tensor]]] = [
        lambda: cast.cast(x, "mxfp4", -1, KEY, None, None, True),
        lambda: cast.cast(x, "mxfp4(scale=mse)", 0, KEY, None, None, True),
        lambda: cast.cast(x, "nvfp4(rounding=stochastic)", -1, KEY, STEP, None, True),
        lambda: perturb.perturb(x, "relative-gaussian(sigma=0.1)", KEY, STEP, None, None, None, True),
    ]
    wide = [call() for call in calls]
    cast.TILE = perturb.TILE = 256
    for i, (call, (out, stats)) in enumerate(zip(calls, wide, strict=True)):
        again, again_stats = call()
        if not (same_bits(out, again) and same_stats(again_stats, stats)):
            print(f"call {i} depends on its tiles")
    cast.TILE = perturb.TILE = launch.TILE


LAYERS = [
    Forward(error="relative-gaussian(sigma=0.05)"),
    Forward(input="mxfp4", weight="mxfp8_e4m3", error="relative-gaussian(sigma=0.05) + saturation(limit=448)"),
    Forward(input="fp8_e4m3", weight="fp8_e4m3_1x128", output="bf16", error="spike(rate=0.01, size=100)"),
    Forward(input="mxint8", weight="int4", output="fp8_e5m2"),
    Forward(input="mxfp4", error="absolute-gaussian(sigma=0.1) + bit-flip(rate=0.05)", bias="missed"),
    Forward(input="nvfp4", error="relative-gaussian(sigma=0.05)"),  # composed: a scale of the whole tensor
]


def linear_layers() -> None:
    """On small integers, whose sums are exact, a layer equals the composition bit for bit, whatever its tiles."""
    generator = torch.Generator().manual_seed(0)
    run, fused = gemm.run_linear, []

    def noted(*args: object) -> tuple[Tensor, Tensor]:
        fused.append(args)
        return run(*args)  # type: ignore[arg-type]

    gemm.run_linear = noted  # type: ignore[assignment]
    mine, theirs = (backends.get(name).ops["linear"] for name in ("triton", "reference"))
    for i, forward in enumerate(LAYERS):
        dtype = torch.bfloat16 if i % 2 else torch.float32
        x, w, b = (torch.randint(-4, 5, s, generator=generator).to(dtype) for s in ((2, 35, 70), (50, 70), (50,)))
        args = (
            x,
            w,
            b if forward.bias == "missed" else None,
            OpSpec(forward=forward).text,
            True,
            [KEY + j for j in range(12)],
        )
        for rows in logical_rows(70)[:2]:
            y, stats = mine(*args, STEP, rows)
            expected, expected_stats = theirs(*args, STEP, rows)
            tiles = gemm.tiles_of
            gemm.tiles_of = lambda _: gemm.Tiles(32, 64, 128)
            other, _ = mine(*args, STEP, rows)
            gemm.tiles_of = tiles
            if not (same_bits(y, expected) and same_bits(y, other) and same_stats(stats, expected_stats)):
                print(f"{forward} {dtype}", stats.tolist(), expected_stats.tolist())
    if len(fused) != 4 * (len(LAYERS) - 1):
        print(f"{len(fused)} calls ran in one kernel")


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of divisions by 0 and the like
    globals()[sys.argv[1]]()
    print("done")
