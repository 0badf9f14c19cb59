"""Fit error models to what a real device computes: sigma with its reference, bias, tails, dead zone, accumulator.

Products run on a device and, exactly, in fp64 (:func:`measure`), or are read from a dump (:func:`read`).
:func:`calibrate` fits how far the device is off *before* it rounds its result, and says how well that fits;
:func:`to_profile` makes a profile of it.

Needs scipy: ``pip install 'aqnsim[calibrate]'``.
"""

from aqnsim.calibrate.fitting import Calibration, Fit, calibrate
from aqnsim.calibrate.profile import to_profile
from aqnsim.calibrate.samples import Sample, measure, read, write

__all__ = ["Calibration", "Fit", "Sample", "calibrate", "measure", "read", "to_profile", "write"]
