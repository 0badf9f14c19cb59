"""Attach a profile to a model, and keep receipts."""

from aqnsim.emulation.attach import emulate
from aqnsim.emulation.core import Emulation, ReceiptTotals
from aqnsim.emulation.coverage import Coverage, survey
from aqnsim.emulation.sites import Site

__all__ = ["Coverage", "Emulation", "ReceiptTotals", "Site", "emulate", "survey"]
