"""Chains of error models that tests share: every model with every choice that it leaves open, and chains of several."""

from __future__ import annotations

from aqnsim import errors
from aqnsim.errors import MODELS, ErrorModel
from aqnsim.rng import DRAWS

# A bit flip draws its bit among all, and so makes NaNs and infinities; a fixed one does not.
USUAL = {
    "relative-gaussian": ["sigma=0.05", "sigma=0", "sigma=0.05, reference=absdot"],
    "absolute-gaussian": ["sigma=0.3"],
    "systematic-bias": ["gain=0.01", "offset=-0.5", "gain=-2, offset=3"],
    "dead-zone": ["threshold=0.5"],
    "saturation": ["limit=1.5"],
    "spike": ["rate=0.01, size=100", "rate=1, size=2"],
    "stuck": ["rate=0.01, value=-7", "rate=0.3, value=0, lanes=5", "rate=0.3, value=1, lanes=300"],
    "bit-flip": ["rate=0.01", "rate=1", "rate=0.3, bit=0", "rate=0.2, bit=15"],
}
"""Fields of every model that :func:`perturb` applies, by kind."""

LONGER = [
    "relative-gaussian(sigma=0.05) + relative-gaussian(sigma=0.05)",
    "systematic-bias(gain=0.01) + absolute-gaussian(sigma=0.1) + saturation(limit=2)",
    "spike(rate=0.1, size=3) + spike(rate=0.1, size=3) + bit-flip(rate=0.1, bit=3)",
    "relative-gaussian(sigma=0.1, reference=absdot) + dead-zone(threshold=0.2) + stuck(rate=0.1, value=9, lanes=7)",
]


def draws(model: ErrorModel) -> bool:
    """Whether a model is random."""
    return hasattr(model, "draw")


def singles() -> list[str]:
    """Every model of the registry, with every choice, as canonical text."""
    found = []
    for kind in MODELS:
        for fields in USUAL[kind]:
            model = errors.parse(f"{kind}({fields})")
            found += [f"{kind}({fields}, draw={draw})" for draw in DRAWS] if draws(model) else [str(model)]
    return [str(errors.parse(text)) for text in found]


def all_chains() -> list[str]:
    """Every single model, and chains of two and three, in canonical spelling."""
    return [*singles(), *(errors.chain_text(errors.chain(text)) for text in LONGER)]
