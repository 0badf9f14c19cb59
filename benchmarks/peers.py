"""Casts of other libraries beside ours, on the same tensor in the same rounds: by name and version, as is and compiled.

A library that is not installed is left out and named. microxcaling is on no package index: install its checkout
(github.com/microsoft/microxcaling, ``pip install --no-deps .``) or put it on PYTHONPATH.
"""

from __future__ import annotations

import fnmatch
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.kernels import Setting, cast_call
from benchmarks.records import Row, version_of
from benchmarks.timing import Call, alternate

Cast = Callable[[Tensor], Tensor]
GOAL = 50.0  # times faster, for MX casts
AGREEING = 0.9  # of the values, or it is another cast


@dataclass(frozen=True)
class Peer:
    """A cast of another library.

    Attributes:
        name: of the library.
        package: its name as installed, which has a version.
        module: that it is imported by.
        text: our format for the same cast.
        make: imports the library and gives its cast.
        compiles: whether it may be given to ``torch.compile``.
        exponent: it is timed on 2^exponent elements: what takes minutes on a whole buffer gets less, and so do we.
    """

    name: str
    package: str
    module: str
    text: str
    make: Callable[[], Cast]
    compiles: bool = True
    exponent: int = 24


def _microxcaling(element: str) -> Callable[[], Cast]:
    def make() -> Cast:
        from mx.mx_ops import _quantize_mx

        return lambda x: _quantize_mx(x, 8, element, axes=[-1], block_size=32, round="even")  # type: ignore[no-any-return]

    return make


def _torchao_mx(element: str) -> Callable[[], Cast]:
    def make() -> Cast:
        from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

        dtype = getattr(torch, element, element)

        def cast(x: Tensor) -> Tensor:
            scale, data = to_mx(x, dtype, 32)
            y: Tensor = to_dtype(data, scale, dtype, 32, x.dtype)
            return y

        return cast

    return make


def _torchao_nvfp4() -> Cast:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def cast(x: Tensor) -> Tensor:
        of_tensor = per_tensor_amax_to_scale(x.abs().amax())
        y: Tensor = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=of_tensor).dequantize(x.dtype)
        return y

    return cast


def _compressed_tensors(bits: int, kind: str, group: int) -> Callable[[], Cast]:
    def make() -> Cast:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

        mx = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8} if kind == "float" else {}
        args = QuantizationArgs(
            num_bits=bits, type=kind, strategy="group", group_size=group, symmetric=True, dynamic=True, **mx
        )
        module = torch.nn.Identity()

        def cast(x: Tensor) -> Tensor:
            y: Tensor = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, module), args)
            return y

        return cast

    return make


def _qtorch() -> Cast:
    from qtorch.quant import float_quantize

    return lambda x: float_quantize(x, exp=4, man=3, rounding="nearest")  # type: ignore[no-any-return]


def _ml_dtypes(name: str) -> Callable[[], Cast]:
    def make() -> Cast:
        import ml_dtypes

        dtype = getattr(ml_dtypes, name)
        return lambda x: torch.from_numpy(x.numpy().astype(dtype).astype("float32"))

    return make


def _gfloat_element() -> Cast:
    from gfloat import round_ndarray
    from gfloat.formats import format_info_ocp_e4m3

    return lambda x: torch.from_numpy(round_ndarray(format_info_ocp_e4m3, x.numpy(), sat=True))


def _gfloat_mx() -> Cast:
    import numpy as np
    from gfloat import compute_scale_amax, quantize_block
    from gfloat.formats import format_info_mxfp8_e4m3

    def block(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return quantize_block(format_info_mxfp8_e4m3, values, compute_scale_amax)  # type: ignore[no-any-return]

    return lambda x: torch.from_numpy(np.concatenate([block(b) for b in x.numpy().reshape(-1, 32)])).view(x.shape)


def _torch_fp8() -> Cast:
    return lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


PEERS = [
    *(
        Peer("microxcaling", "mx", "mx.mx_ops", text, _microxcaling(element))
        for text, element in (
            ("mxfp4", "fp4_e2m1"),
            ("mxfp6_e2m3", "fp6_e2m3"),
            ("mxfp8_e4m3", "fp8_e4m3"),
            ("mxint8", "int8"),
        )
    ),
    *(
        Peer("torchao", "torchao", "torchao", text, _torchao_mx(element))
        for text, element in (
            ("mxfp4", "float4_e2m1fn_x2"),
            ("mxfp6_e2m3", "fp6_e2m3"),
            ("mxfp8_e4m3", "float8_e4m3fn"),
        )
    ),
    Peer("torchao", "torchao", "torchao", "nvfp4(scale=torchao)", _torchao_nvfp4),
    Peer(
        "compressed-tensors",
        "compressed-tensors",
        "compressed_tensors",
        "mxfp4(scale=even)",
        _compressed_tensors(4, "float", 32),
    ),
    Peer(
        "compressed-tensors",
        "compressed-tensors",
        "compressed_tensors",
        "int4_g128(amax_to=7.5)",
        _compressed_tensors(4, "int", 128),
    ),
    Peer("qtorch", "qtorch", "qtorch", "e4m3", _qtorch, compiles=False),
    Peer("ml_dtypes", "ml_dtypes", "ml_dtypes", "fp8_e4m3", _ml_dtypes("float8_e4m3fn"), compiles=False),
    Peer("ml_dtypes", "ml_dtypes", "ml_dtypes", "fp4_e2m1", _ml_dtypes("float4_e2m1fn"), compiles=False),
    Peer("gfloat", "gfloat", "gfloat", "fp8_e4m3", _gfloat_element, compiles=False, exponent=20),
    Peer("gfloat", "gfloat", "gfloat", "mxfp8_e4m3", _gfloat_mx, compiles=False, exponent=13),
    Peer("torch", "torch", "torch", "fp8_e4m3", _torch_fp8),
]


def rows(s: Setting) -> Iterator[Row]:
    """Our cast beside each peer's, in fp32, which all of them take."""
    for peer in PEERS:
        if not fnmatch.fnmatch(f"cast {peer.text}", s.only):
            continue
        if find_spec(peer.module.partition(".")[0]) is None:
            print(f"peer {peer.name} is not installed: {peer.text} is not compared with it", file=sys.stderr)
            continue
        yield from _beside(s, peer)


def _beside(s: Setting, peer: Peer) -> Iterator[Row]:
    x = s.values(1 << (13 if s.quick else peer.exponent), torch.float32).view(-1, 512)
    ours, theirs = cast_call(s, x, peer.text), peer.make()
    _check(peer, ours()[0], theirs(x))  # type: ignore[index]
    name = f"{peer.name} {version_of(peer.package) or 'of a checkout'}"
    calls: dict[str, Call] = {name: lambda: theirs(x)}
    if peer.compiles and not s.quick:
        calls |= _compiled(name, theirs, x)
    seconds = alternate({"ours": ours, **calls}, s.repeats, s.clock)
    for beside in calls:
        yield Row(
            suite="peers",
            kernel=f"cast {peer.text}",
            dtype="float32",
            elements=x.numel(),
            threads=s.threads,
            seconds=seconds["ours"],
            beside=beside,
            beside_seconds=seconds[beside],
            metric="times",
            target=GOAL if peer.text.startswith("mx") and not s.quick else None,
        )


def _check(peer: Peer, ours: Tensor, theirs: Tensor) -> None:
    agreeing = float((ours == theirs).double().mean())
    if agreeing < AGREEING:
        raise SystemExit(f"peer {peer.name}: {agreeing:.1%} of its {peer.text} equal ours; it is another cast")


def _compiled(name: str, cast: Cast, x: Tensor) -> dict[str, Call]:
    """The cast under ``torch.compile``, where that works; where not, the reason is printed."""
    torch._dynamo.reset()
    run = torch.compile(cast)
    logging.disable(logging.CRITICAL)  # the compiler prints what it failed on, which is pages
    try:
        run(x)
    except Exception as error:  # whatever another library's code does to the compiler
        print(f"peer {name} does not compile: {type(error).__name__}", file=sys.stderr)
        return {}
    finally:
        logging.disable(logging.NOTSET)
    return {f"{name}, compiled": lambda: run(x)}
