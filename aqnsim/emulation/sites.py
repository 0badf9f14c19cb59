"""Sites: the places in a model where an op runs, found by structure and behaviour rather than by class name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from aqnsim.profiles import OpSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Site:
    """One op of the model.

    Attributes:
        name: the module's path, the same before and after PEFT wraps the model; of an op that a module's own forward
            runs, the module's path and the op's kind.
        kind: of op, see :data:`aqnsim.profiles.KINDS`.
        role: what the op is in a transformer, such as ``q_proj``, ``norm`` or ``router``.
        rules: index of the profile's rule in each phase, or None where the op runs as torch makes it.
        specs: what the rule asks for, in each phase.
        module: the module that runs it.
        index: row of the emulation's totals.
        weight: name of the module's parameter that is the second operand; None where there is none.
        weight_axis: the axis of that parameter which the product sums over.
        ordinal: of an operation in the module's own forward; None for a module that is an op as a whole.
        attends: whether the op is a part of an attention: one operation, with the same ordinal as the others.
        takes_noise: whether AQN acts on the weight.
        native: phases in which the device itself makes the product, so that no error of it is emulated.
    """

    name: str
    kind: str
    role: str
    rules: Mapping[str, int | None]
    specs: Mapping[str, OpSpec]
    module: nn.Module
    index: int
    weight: str | None = None
    weight_axis: int = -1
    ordinal: int | None = None
    attends: bool = False
    takes_noise: bool = False
    native: frozenset[str] = frozenset()

    @property
    def parameter(self) -> nn.Parameter | None:
        """The weight, if the op has one."""
        return None if self.weight is None else self.module._parameters.get(self.weight)

    @property
    def trains(self) -> bool:
        """Whether the op has a weight that gets a gradient."""
        return self.parameter is not None and self.parameter.requires_grad

    @property
    def spec(self) -> OpSpec:
        """What is asked for in training."""
        return self.specs["train"]

    @property
    def rule(self) -> int | None:
        """The first rule that reaches the site, or None for a site that only AQN uses."""
        return next((r for r in self.rules.values() if r is not None), None)


def canonical(name: str) -> str:
    """A module's path without what PEFT, torch.compile and checkpoint wrappers put around it.

    >>> canonical("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    'model.layers.0.mlp.up_proj'
    """
    parts = [p for p in name.split(".") if p not in _WRAPPERS]
    return ".".join(parts).removeprefix("base_model.model.")


_WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel or of ``torch.compile(model)``, whose names and noise are its own."""
    while isinstance(model, DistributedDataParallel) or "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod" if "_orig_mod" in model._modules else "module")
    return model


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Run a block on whole parameters: what ``fully_shard`` shards is gathered, and sharded again after."""
    for m in _sharding(model):
        m.unshard()
    try:
        yield
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered."""
    for m in _sharding(model):
        m.reshard()


def _sharding(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]


def host_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model itself with their canonical names; a module reached twice comes once.

    Adapters are told by structure: whatever hangs on a module that has a ``base_layer``, other than the base layer.
    """
    adapters: set[nn.Module] = set()
    for module in model.modules():
        base = module._modules.get("base_layer")
        if base is not None:
            own = {module, *base.modules()}
            adapters.update(m for m in module.modules() if m not in own)
    for name, module in model.named_modules():
        wraps = "base_layer" in module._modules
        if module not in adapters and not wraps:
            yield canonical(name), module


def owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's id."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                found.setdefault(id(p), []).append(canonical(name))
    return found


# ---- kinds of module, by what they do -------------------------------------------------------------------------------


def module_kind(module: nn.Module) -> str | None:
    """The kind of op that a module as a whole is: ``linear``, ``experts``, ``norm``, ``activation``, ``embedding``.

    None for a container, whose own arithmetic, if any, its forward spells out.
    """
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return "linear"
    if experts_of(module) is not None:
        return "experts"
    if norm_of(module) is not None:
        return "norm"
    return "activation" if _is_activation(module) else None


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x W + b`` with a weight ``[inputs, outputs]``, as GPT-2's Conv1D does."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or isinstance(module, nn.Embedding | nn.Linear):
        return False
    if set(module._parameters) != {"weight", "bias"} or bias is None or module._modules or module._buffers:
        return False
    x = _probe(2, weight.shape[0]).to(weight)
    y = _called(module, x)
    return bias.shape == weight.shape[1:] and _same(y, x @ weight + bias)


EXPERTS = ("gate_up_proj", "down_proj")
"""Names of the parameters that hold the experts of a mixture."""


@dataclass(frozen=True)
class Experts:
    """What the experts of a mixture compute: ``W_down gate(W_up x + b_up) + b_down``, biases where there are any.

    Attributes:
        transposed: whether the parameters are ``[experts, inputs, outputs]``, not ``[experts, outputs, inputs]``.
        plain: whether the gate is ``act(first half) * second half``, rather than a function of the module's own.
    """

    transposed: bool
    plain: bool

    def weight(self, module: nn.Module, name: str, expert: int) -> Tensor:
        """``[outputs, inputs]`` of one expert."""
        weight: Tensor = getattr(module, name)[expert]
        return weight.mT if self.transposed else weight

    def bias(self, module: nn.Module, name: str, expert: int) -> Tensor | None:
        """``[outputs]`` of one expert."""
        bias: Tensor | None = getattr(module, f"{name}_bias", None)
        return None if bias is None else bias[expert]

    def gate(self, module: Any, x: Tensor) -> Tensor:
        """The gate of ``[..., 2 width]``."""
        if not self.plain:
            return module._apply_gate(x)  # type: ignore[no-any-return]
        gate, up = x.chunk(2, -1)
        return module.act_fn(gate) * up  # type: ignore[no-any-return]


def holds_experts(module: nn.Module) -> bool:
    """Whether a module's parameters are the experts of a mixture, by their names and shapes."""
    return _transposed(module) is not None


def _transposed(module: nn.Module) -> bool | None:
    up, down = (module._parameters.get(n) for n in EXPERTS)
    own = {n.removesuffix("_bias") for n in module._parameters}
    if up is None or down is None or own != set(EXPERTS) or up.dim() != 3 or down.dim() != 3:
        return None
    if (up.shape[1], up.shape[2]) == (2 * down.shape[2], down.shape[1]):
        return False
    return True if (up.shape[1], up.shape[2]) == (down.shape[2], 2 * down.shape[1]) else None


def experts_of(module: nn.Module) -> Experts | None:
    """What experts a module holds, by what it does to a probe; None if it holds none, or does something else."""
    transposed = _transposed(module)
    if transposed is None:
        return None
    up = module.get_parameter(EXPERTS[0])
    width = up.shape[1] if transposed else up.shape[2]
    is_possible = {True: isinstance(getattr(module, "act_fn", None), nn.Module), False: hasattr(module, "_apply_gate")}
    for candidate in (Experts(transposed, plain) for plain in (True, False) if is_possible[plain]):
        if all(_is_expert(module, candidate, _probe(2, width).to(up), largest) for largest in (1.0, 64.0)):
            return candidate
    return None


@torch.no_grad()
def _is_expert(module: nn.Module, experts: Experts, x: Tensor, largest: float) -> bool:
    """Whether the first expert does to a probe what is expected, with gates up to ``largest``: some are clamped."""
    product = nn.functional.linear(x, experts.weight(module, EXPERTS[0], 0))
    x = x * (largest / product.abs().max().clamp(min=1e-6))
    first, weights = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device), torch.ones(len(x), 1).to(x)
    expected = x
    for name in EXPERTS:
        weight, bias = experts.weight(module, name, 0), experts.bias(module, name, 0)
        expected = nn.functional.linear(expected, weight, bias)
        expected = experts.gate(module, expected) if name == EXPERTS[0] else expected
    y = _called(module, x, first, weights)
    return y is not None and y.shape == expected.shape and bool((y - expected).norm() <= 0.02 * expected.norm())


@dataclass(frozen=True)
class Norm:
    """What a norm computes: ``(offset + w) x / rms(x)``, or ``w (x - mean(x)) / std(x) + b``.

    Attributes:
        centred: whether the mean is taken off, as LayerNorm does.
        offset: what is added to the weight; 1 in Gemma's.
        eps: added to the mean square.
    """

    centred: bool
    offset: float
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm over the last axis, in fp32."""
        x = x.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        if weight is not None:
            unit = (self.offset + weight.float()) * unit
        return unit if bias is None else unit + bias.float()


def norm_of(module: nn.Module) -> Norm | None:
    """What norm a module is, by what it does to a probe; None if it is none."""
    eps, weight = _eps(module), getattr(module, "weight", None)
    size = _norm_size(module)
    if eps is None or size is None or any(True for _ in module.children()):
        return None
    bias = getattr(module, "bias", None)
    like = weight if isinstance(weight, nn.Parameter) else torch.zeros(())
    x = (_probe(2, size) * 3 + 0.5).to(like)
    y = _called(module, x)
    for centred, offset in ((False, 0.0), (False, 1.0), (True, 0.0)):
        norm = Norm(centred, offset, eps)
        if _same(y, norm(x, weight, bias)):
            return norm
    return None


def _norm_size(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        return weight.numel() if weight.dim() == 1 else None
    shape = getattr(module, "normalized_shape", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


def _eps(module: nn.Module) -> float | None:
    """The epsilon of a norm, under whichever of the usual names it has."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    if isinstance(module, nn.RMSNorm) and isinstance(module.weight, nn.Parameter):
        return torch.finfo(module.weight.dtype).eps  # its default
    return None


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is a non-linear function of each element alone."""
    if any(True for _ in module.parameters()) or module._modules or module._buffers:
        return False
    x = torch.tensor([[-3.0, -1.0, -0.5, 0.25], [1.0, 2.5, 4.0, 0.0]])
    y = _called(module, x)
    if y is None or y.shape != x.shape:
        return False
    moved = _called(module, x.flip(0, 1))
    linear = _same(_called(module, -2 * x), -2 * y)
    return moved is not None and _same(moved.flip(0, 1), y) and not linear


def activation_of(module: nn.Module) -> str | None:
    """Which activation a module is, by what it does: ``silu``, ``gelu-erf`` or ``gelu-tanh``; else None."""
    x = torch.linspace(-6.0, 6.0, 481)
    y = _called(module, x)
    known = {"silu": F.silu(x), "gelu-erf": F.gelu(x), "gelu-tanh": F.gelu(x, approximate="tanh")}
    close = (name for name, z in known.items() if y is not None and torch.allclose(y, z, rtol=1e-5, atol=1e-6))
    return next(close, None)


def _probe(*shape: int) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.cos(torch.arange(count).float() * 1.7).reshape(shape)


def _called(module: nn.Module, *args: Tensor) -> Tensor | None:
    """What a module's forward gives, without its hooks: this is no forward of the model. None if it takes no
    such arguments."""
    was_training = module.training
    module.training = False
    try:
        with torch.no_grad():
            y = module.forward(*args)
    except (TypeError, RuntimeError, ValueError, IndexError, NotImplementedError, AttributeError, KeyError):
        return None  # it wants other arguments: so it is another kind of module
    finally:
        module.training = was_training
    return y if isinstance(y, Tensor) else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    return torch.allclose(a.float(), b.float(), rtol=0.02, atol=1e-3)


# ---- roles ----------------------------------------------------------------------------------------------------------

_ROLES = {
    "c_attn": "qkv_proj",
    "query_key_value": "qkv_proj",
    "Wqkv": "qkv_proj",
    "c_fc": "up_proj",
    "dense_h_to_4h": "up_proj",
    "dense_4h_to_h": "down_proj",
    "fc_in": "up_proj",
    "fc_out": "down_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    "embed_out": "lm_head",
}


def role_of(name: str, kind: str, routers: set[str]) -> str:
    """What an op is in a transformer: the name's last part where it says so, the same word across families."""
    parts = name.split(".")
    last = parts[-1]
    if name in routers or name.rpartition(".")[0] in routers:
        return "router"
    if kind != "linear":
        return kind
    if last in ("c_proj", "dense", "out_proj"):  # the same name in attention and in the MLP
        return "down_proj" if any("mlp" in p for p in parts[:-1]) else "o_proj"
    return _ROLES.get(last, last)


def routers_of(model: nn.Module) -> set[str]:
    """Names of what chooses experts: in a block that has ``experts``, the ``gate`` or ``router`` beside them."""
    found: set[str] = set()
    for name, module in host_modules(model):
        if "experts" in module._modules:
            prefix = f"{name}." if name else ""
            found.update(prefix + n for n in module._modules if n in ("gate", "router", "wg"))
    return found
