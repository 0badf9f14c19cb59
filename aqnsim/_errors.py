"""The errors that aqnsim raises: each names the value, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AqnsimError(Exception):
    """Base of every error that aqnsim raises on purpose."""


class ConfigError(AqnsimError, ValueError):
    """A value that cannot be used: out of range, inconsistent or unsupported."""


class UnknownNameError(AqnsimError, LookupError):
    """A name that no registry holds."""


class RealisationError(AqnsimError, RuntimeError):
    """Something was requested and did not happen: noise, quantisation, a call, a schedule."""


class BackendError(AqnsimError, RuntimeError):
    """A backend that is missing, not built, or lacks an op."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest candidate, or ``""``.

    >>> did_you_mean("mxfp5", ["mxfp4", "bf16"])
    " (did you mean 'mxfp4'?)"
    """
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(what: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Build the error for an unknown ``name`` of a kind of thing ``what``."""
    names = sorted(known)
    return UnknownNameError(f"unknown {what} {name!r}{did_you_mean(str(name), names)}; known: {', '.join(names)}")
