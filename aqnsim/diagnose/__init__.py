"""Find where a model is fragile: how much each site's emulation changes what the model says, and what to do about it.

:func:`scan` emulates one site at a time, and all but one; :func:`plan` keeps the worst sites as they are within a
budget, and measures what that is worth.
"""

from aqnsim.diagnose.plan import Plan, multipliers, plan
from aqnsim.diagnose.scan import METRICS, Scan, SiteScan, scan
from aqnsim.diagnose.text import Effect, Text

__all__ = ["METRICS", "Effect", "Plan", "Scan", "SiteScan", "Text", "multipliers", "plan", "scan"]
