"""The tables of docs/coverage.md: which ops small models of many families run, and what profiles emulate of them."""

from __future__ import annotations

from functools import cache

from aqnsim.cli.output import Table
from aqnsim.cli.sites import small_model
from aqnsim.emulation.coverage import Coverage, survey
from aqnsim.profiles import ELEMENTWISE, GEMMS, KINDS, Forward, OpSpec, Profile, Rule, load

FAMILIES = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "gemma", "gemma2", "gemma3_text", "mistral", "mixtral"),
    *("gpt_oss", "deepseek_v3", "phi", "phi3", "gpt2", "gpt_neox", "bloom", "olmo2", "smollm3", "granite", "opt"),
)
LENGTH = 128

ALL_KINDS = Profile(
    name="all kinds",
    description="Every op in bf16",
    source={"definition": "for these tables"},
    rules=(
        Rule(kind=GEMMS, spec=OpSpec(forward=Forward(input="bf16", weight="bf16"))),
        Rule(kind=ELEMENTWISE, spec=OpSpec(forward=Forward(input="bf16", output="bf16"))),
    ),
)
PROFILES = (load("mxfp4-w4a4"), load("noise-5pct-matmul"), ALL_KINDS)


@cache
def _surveys(family: str) -> tuple[Coverage, ...]:
    model = small_model(family)
    return tuple(survey(model, profile, length=LENGTH) for profile in PROFILES)


def coverage_table() -> Table:
    """Every family: how many ops it has, which part of its FLOPs each profile emulates, and what no rule can reach."""
    rows: Table = [("family", "ops", *(p.name for p in PROFILES), "no rule can reach", "arithmetic of no kind")]
    for family in FAMILIES:
        surveys = _surveys(family)
        every = surveys[-1]
        shares = (f"{c.emulated_share:.1%}" for c in surveys)
        uncovered = ", ".join(op.name for op in every.uncovered) or "-"
        rows.append((family, str(len(every.of_status("emulated"))), *shares, uncovered, ", ".join(every.other) or "-"))
    return rows


def kind_table() -> Table:
    """Every family: how many ops of each kind two layers have, with embedding and head."""
    kinds = [k for k in KINDS if any(op.kind == k for f in FAMILIES for op in _surveys(f)[-1].of_status("emulated"))]
    rows: Table = [("family", *kinds)]
    for family in FAMILIES:
        ops = _surveys(family)[-1].of_status("emulated")
        rows.append((family, *(str(sum(op.kind == kind for op in ops)) for kind in kinds)))
    return rows
