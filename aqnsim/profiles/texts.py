"""Profiles as text: TOML that reads back as the same profile, plain data, and what each field means.

>>> from aqnsim.profiles import from_toml, load
>>> from_toml(to_toml(load("nvfp4-training"))) == load("nvfp4-training")
True
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from aqnsim import accumulator, approximation, errors, formats
from aqnsim.profiles import Profile, Rule
from aqnsim.profiles.spec import KINDS, OpSpec, fields_of, plain
from aqnsim.rng import PHASES

KIND_MEANINGS: Mapping[str, str] = {
    "linear": "y = x W^T: linear layers, experts, a product with a parameter in a module's own forward",
    "matmul": "a product of two activations in a module's own forward, outside of transformers' attention functions",
    "qk": "queries times keys; `weight` is the keys",
    "pv": "attention weights times values; `weight` is the values",
    "embedding": "a row of a table for each token or position",
    "norm": "RMSNorm and LayerNorm",
    "rope": "rotary embeddings, applied to queries and keys",
    "kv_cache": "keys and values as the cache holds them",
    "softmax": "of attention scores, and of a router",
    "activation": "SiLU, GELU and others",
    "multiply": "elementwise products, such as gate times up, or an expert's weight",
    "add": "residual connections and other sums",
    "conv": "convolutions",
    "loss": "the loss that a model computes itself",
}
"""What an op of each kind is."""

FIELD_MEANINGS: Mapping[str, str] = {
    "kind": "one kind of op, or a list of kinds",
    "sites": "globs of names (layers.3.mlp.up_proj), their last parts (*_proj), or roles; all by default",
    "phases": "where the rule holds: rollout, train, eval, reference; all by default",
    "forward.input": "format of the first operand; of every operand of an op that is no product",
    "forward.weight": "format of the second operand: the weight, the keys of qk, the values of pv",
    "forward.accumulator": "how products are added: a matrix unit or accumulator(...); the host's fp32 where absent",
    "forward.approximation": "tables for softmax (exp, reciprocal), norms (rsqrt), activations (exp, erf, tanh)",
    "forward.error": "error model, or a chain of them: how the result misses, in fp32",
    "forward.output": "format of the result, after the error and the bias",
    "forward.bias": "exact adds a linear layer's bias after the error, missed before it",
    "grad_input.grad": "format of the incoming gradient, in the product that makes the input's gradient",
    "grad_input.weight": "format of the weight in that product, from the original; where absent, the forward's cast",
    "grad_input.accumulator": "as in the forward",
    "grad_input.error": "as in the forward, on the input's gradient",
    "grad_input.output": "format of the input's gradient",
    "grad_input.hadamard": "size of a random Hadamard transform of both operands along the sum: 16, 32, 64 or 128",
    "grad_weight.grad": "format of the incoming gradient, in the product that makes the weight's gradient",
    "grad_weight.input": "format of the input in that product, from the original; where absent, the forward's cast",
    "grad_weight.accumulator": "as in the forward",
    "grad_weight.error": "as in the forward, on the weight's gradient",
    "grad_weight.output": "format of the weight's gradient",
    "grad_weight.hadamard": "as for grad_input",
}
"""What each field of a rule says."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")


# ---- plain data -----------------------------------------------------------------------------------------------------


def flat(spec: OpSpec) -> dict[str, Any]:
    """What a spec asks for, by field.

    >>> from aqnsim.profiles import Forward
    >>> flat(OpSpec(forward=Forward(weight="mxfp4")))
    {'forward.weight': 'mxfp4'}
    """
    return {f"{name}.{field}": value for name, part in spec.parts for field, value in part.asked.items()}


def to_dict(profile: Profile) -> dict[str, Any]:
    """A profile as plain values that JSON can hold, with its fingerprint."""
    return {
        "name": profile.name,
        "description": profile.description,
        "fingerprint": profile.fingerprint,
        "source": dict(profile.source),
        "exclude": list(profile.exclude),
        "rules": [
            {"kinds": list(r.kinds), "sites": list(r.sites), "phases": list(r.phases), **plain(r.spec)}
            for r in profile.rules
        ],
    }


# ---- TOML -----------------------------------------------------------------------------------------------------------


def to_toml(profile: Profile) -> str:
    """A profile as TOML, without what is a default: ``from_toml(to_toml(p)) == p``."""
    head = [f"name = {_toml(profile.name)}", f"description = {_toml(profile.description)}"]
    if profile.exclude:
        head.append(f"exclude = {_toml(profile.exclude)}")
    source = ["[source]", *(f"{_key(key)} = {_toml(value)}" for key, value in profile.source.items())]
    return "\n\n".join("\n".join(lines) for lines in [head, source, *map(_rule, profile.rules)]) + "\n"


def _rule(rule: Rule) -> list[str]:
    own = {f.name: getattr(rule, f.name) for f in dataclasses.fields(Rule) if f.name != "spec"}
    given = {k: v for k, v in own.items() if k == "kind" or v != Rule.__dataclass_fields__[k].default}
    return ["[[rule]]", *(f"{key} = {_toml(value)}" for key, value in (given | flat(rule.spec)).items())]


def _key(key: str) -> str:
    return key if _BARE_KEY.match(key) else _toml(key)


def _toml(value: str | int | tuple[str, ...]) -> str:
    """A value as TOML writes it: JSON's strings, lists and integers, and DEL escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")


def fields_by_kind() -> list[tuple[str, str]]:
    """Kinds of op that have the same fields, and those fields, as words."""
    shared: dict[str, list[str]] = {}
    for kind in KINDS:
        names = [f"{part}.{field}" for part, fields in fields_of(kind).items() for field in fields]
        shared.setdefault(", ".join(names), []).append(kind)
    return [(", ".join(kinds), fields) for fields, kinds in shared.items()]


# ---- a file to start from -------------------------------------------------------------------------------------------


def commented(profile: Profile) -> str:
    """A profile as TOML below comments that explain every kind and field."""
    lines = [f"# {line}".rstrip() for line in _explanation()]
    return "\n".join(lines) + "\n\n" + to_toml(profile)


def _explanation() -> Iterator[str]:
    yield "A profile: which ops of a model run in which formats and with which errors."
    yield ""
    yield from _wrapped(
        "exclude lists globs of site names or roles that no rule reaches. [source] says where the choices come from: "
        "it must not be empty, its keys are yours. Then come [[rule]] tables. The first whose kind, sites and phases "
        "match an op says what it does, and each must match some op: `aqnsim sites MODEL` lists the ops of a model."
    )
    yield ""
    yield "Fields of a rule; all but kind may be left out:"
    yield from _columns(FIELD_MEANINGS)
    yield ""
    yield "Kinds:"
    yield from _columns(KIND_MEANINGS)
    yield ""
    yield "Which kinds have which fields:"
    for kinds, fields in fields_by_kind():
        yield from textwrap.wrap(f"{kinds}: {fields}", 116, initial_indent="  ", subsequent_indent="    ")
    yield ""
    yield from _wrapped(
        "Roles, for sites and exclude: a linear layer's part in the transformer, such as q_proj, down_proj or lm_head; "
        "router for all ops of a router; the kind for most others, such as embedding or norm."
    )
    yield ""
    for what, names, example in (
        ("Phases", PHASES, ""),
        ("Formats", formats.ALL, "other choices stand in brackets, such as mxfp4(scale=rceil)"),
        ("Faults, behind a format", ["bit-flip"], "such as mxfp4 + bit-flip(rate=1e-6, target=codes)"),
        ("Error models", errors.MODELS, "such as relative-gaussian(sigma=0.05), and chains of them, joined by ' + '"),
        ("Matrix units", accumulator.MATRIX_UNITS, "or one spelt out, such as accumulator(fraction_bits=13, chunk=32)"),
        ("Tables", approximation.FUNCTIONS, "such as table(function='exp', index_bits=6)"),
    ):
        yield from _wrapped(f"{what}: {', '.join(names)}{'; ' if example else ''}{example}.")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 116, break_on_hyphens=False)


def _columns(meanings: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, meanings))
    return (f"  {name.ljust(width)}  {meaning}" for name, meaning in meanings.items())
