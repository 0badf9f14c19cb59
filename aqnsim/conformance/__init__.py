"""The laws as a suite that any backend must pass, ours or not; numpy and torch only, nothing is fetched.

A law is a small function of the backend under test and of one case, such as a format. It returns what it compared, and
raises :class:`Violation` where the backend breaks it. The truth is :mod:`aqnsim.reference`. A new law is one function
under :func:`law`; new formats and error models are found in their registries.

>>> checks = run("reference", laws=["normal"])
>>> [(c.name, c.grade, c.passed) for c in checks]
[('offers', 'bit', True), ('normal', 'statistical', True)]
"""

from aqnsim.conformance import casts, chance, codes, layout, noise, products, stages  # laws register themselves
from aqnsim.conformance.inputs import CHAINS, edges
from aqnsim.conformance.registry import GRADES, LAWS, Check, Law, Subject, Violation, law, run, truth

__all__ = [
    "CHAINS",
    "GRADES",
    "LAWS",
    "Check",
    "Law",
    "Subject",
    "Violation",
    "casts",
    "chance",
    "codes",
    "edges",
    "law",
    "layout",
    "noise",
    "products",
    "run",
    "stages",
    "truth",
]
