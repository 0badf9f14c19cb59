"""Attach a profile to a model, and keep receipts."""

from aqnsim.emulation.attach import emulate
from aqnsim.emulation.core import Emulation, ReceiptTotals
from aqnsim.emulation.sites import Site

__all__ = ["Emulation", "ReceiptTotals", "Site", "emulate"]
