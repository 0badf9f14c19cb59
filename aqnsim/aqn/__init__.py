"""Adaptive quantization noise (AQN): Gaussian noise on weights, with a sigma that a schedule decays.

After QeRL (arXiv 2510.11696). In a forward the weight ``w`` is ``w + sigma z``, in fp32, with ``z`` a standard normal
of (seed, site, step, channel): the parameter itself is never written. This package only describes it: schedules are
pure functions of the step, :class:`AQN` says where they act. The standard library only.

>>> KStage(sigma_start=0.05, sigma_end=0.0005, stages=10).sigma(3, 29)
0.05
"""

from aqnsim.aqn.description import AQN, KINDS, PHASES, PRESETS, SOURCES, moe_admits, preset
from aqnsim.aqn.layers import Factors, Zone, ceiling, inverse, layer_of, targeted, variable
from aqnsim.aqn.schedules import (
    SCHEDULES,
    Constant,
    Custom,
    EpochAware,
    Interval,
    KStage,
    KStagePaper,
    Scaled,
    Schedule,
    parse,
)
from aqnsim.aqn.survival import DTYPES, survives

__all__ = [
    "AQN",
    "DTYPES",
    "KINDS",
    "PHASES",
    "PRESETS",
    "SCHEDULES",
    "SOURCES",
    "Constant",
    "Custom",
    "EpochAware",
    "Factors",
    "Interval",
    "KStage",
    "KStagePaper",
    "Scaled",
    "Schedule",
    "Zone",
    "ceiling",
    "inverse",
    "layer_of",
    "moe_admits",
    "parse",
    "preset",
    "survives",
    "targeted",
    "variable",
]
