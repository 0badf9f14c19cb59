"""How far a device is off before it rounds, and how well a normal law says so.

A stored value ``y`` of a dtype stands for an interval: everything that rounds to it. The exact value plus the error lay
in there. So the likelihood of an error ``N(0, (sigma r)^2)``, with ``r`` the reference, is a difference of two normal
distribution functions for each value (an interval-censored likelihood, Turnbull 1976, JRSS B 38, 290-295), and an error
far below the rounding can be told apart from none by the few values that it pushes over a midpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_ndtr, ndtr
from scipy.stats import kstest
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.calibrate.samples import Sample

Reference = Literal["output", "absdot"]
REFERENCES: tuple[Reference, ...] = ("output", "absdot")
SMALLEST, LARGEST = 1e-13, 1.0
"""The sigmas that are looked at. The least one means: no value was pushed over a midpoint."""

MISFIT = 1e-3
"""Least p-value of a fit that is called good."""

FAR = 5.0
"""Standard deviations from which on an error is called an outlier: 6e-7 of a normal law's."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A normal law of the error before rounding, for the products of one dtype, and of one K or of all.

    Attributes:
        dtype: of the stored results.
        k: products that are added; None for all together.
        n: values.
        reference: what the error is relative to: ``|y|``, or ``|A| @ |B|``.
        sigma: in units of the reference.
        bias: mean of the error, in units of the reference.
        log_likelihood: of the values.
        p_value: of a Kolmogorov-Smirnov test that the law's probabilities of the values are uniform (randomised over
            each value's interval, seeded).
        outliers: share of values that are off by more than FAR sigma, and by more than their rounding.
        histogram: counts of those probabilities in 20 equal bins.
    """

    dtype: str
    k: int | None
    n: int
    reference: Reference
    sigma: float
    bias: float
    log_likelihood: float
    p_value: float
    outliers: float
    histogram: tuple[int, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing speaks against the law."""
        return self.p_value >= MISFIT

    @property
    def error(self) -> str | None:
        """The error model's text; None where no error was seen."""
        if self.sigma <= 2 * SMALLEST:
            return None
        reference = "" if self.reference == "output" else f", reference={self.reference}"
        return f"relative-gaussian(sigma={float(f'{self.sigma:.4g}')}{reference})"


@dataclass(frozen=True)
class Errors:
    """What is stored against what is exact, as users of precision standards count it.

    Attributes:
        mere, mare: mean and largest relative error of the stored values.
        rmse: root mean square of the error.
        rounded_right: share of values that are the exact one, rounded.
        dead: largest exact magnitude that was stored as 0, where the dtype can hold it; 0.0 for none.
    """

    mere: float
    mare: float
    rmse: float
    rounded_right: float
    dead: float


@dataclass(frozen=True)
class Calibration:
    """What was found for one dtype.

    Attributes:
        dtype: of the results.
        fit: of all products together, with the reference that explains them best.
        by_k: one a K, with the same reference.
        other: the fit with the other reference.
        errors: by K, as stored.
        warnings: where the law does not hold, in words.
        units: matrix units that give every value bit for bit, by name; of a small part of the products.
    """

    dtype: str
    fit: Fit
    by_k: tuple[Fit, ...]
    other: Fit
    errors: dict[int, Errors]
    warnings: tuple[str, ...]
    units: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "dtype": self.dtype,
            "error": self.fit.error,
            "fit": vars(self.fit),
            "by_k": [vars(f) for f in self.by_k],
            "other_reference": vars(self.other),
            "errors": {str(k): vars(e) for k, e in self.errors.items()},
            "warnings": list(self.warnings),
            "units": list(self.units),
        }


def calibrate(samples: Sequence[Sample]) -> list[Calibration]:
    """Fit the error of a device's products, a dtype at a time.

    Raises:
        ConfigError: there are no samples.

    >>> from aqnsim.calibrate import measure
    >>> (found,) = calibrate(measure(shapes=[(64, 128, 64)]))
    >>> found.fit.sigma < 1e-6, found.errors[128].rounded_right > 0.99
    (True, True)
    """
    if not samples:
        raise ConfigError("no products to calibrate from")
    return [_of_dtype([s for s in samples if s.dtype == d]) for d in dict.fromkeys(s.dtype for s in samples)]


def _of_dtype(samples: Sequence[Sample]) -> Calibration:
    parts = {k: _joined([_Data.of(s) for s in samples if s.k == k]) for k in sorted({s.k for s in samples})}
    whole, dtype = _joined(list(parts.values())), samples[0].dtype
    fits = sorted((_fit(whole, dtype, None, r) for r in REFERENCES), key=lambda f: -f.log_likelihood)
    best, other = fits
    by_k = tuple(_fit(data, dtype, k, best.reference) for k, data in parts.items())
    errors = {k: _errors(data) for k, data in parts.items()}
    return Calibration(dtype, best, by_k, other, errors, tuple(_warnings(best, by_k, errors)), _units(samples))


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """Values of products, flat: exact, stored, the ends of what rounds to the stored, and ``|A| @ |B|``."""

    exact: Array
    stored: Array
    low: Array
    high: Array
    absdot: Array

    @classmethod
    def of(cls, sample: Sample) -> _Data:
        low, high = rounds_to(sample.y.flatten())
        exact, absdot = sample.exact().flatten().numpy(), sample.absdot().flatten().numpy()
        return cls(exact, sample.y.double().flatten().numpy(), low, high, absdot)

    def reference(self, name: Reference) -> Array:
        smallest = np.finfo(np.float64).tiny
        return np.maximum(np.abs(self.exact) if name == "output" else self.absdot, smallest)


def _joined(parts: Sequence[_Data]) -> _Data:
    return _Data(*(np.concatenate([getattr(p, f) for p in parts]) for f in _Data.__dataclass_fields__))


def rounds_to(y: Tensor) -> tuple[Array, Array]:
    """The ends of the interval of real numbers that round to each value of a floating dtype, to nearest.

    >>> rounds_to(torch.tensor([1.0], dtype=torch.bfloat16))
    (array([0.99804688]), array([1.00390625]))
    """
    integers = torch.int32 if y.dtype == torch.float32 else torch.int16
    magnitude = y.abs().contiguous()
    words = magnitude.view(integers)
    above = (words + 1).view(y.dtype).double()
    below = (words - 1).clamp(min=0).view(y.dtype).double()
    m = magnitude.double()
    near, far = (m + below) / 2, (m + above) / 2
    near = torch.where(m == 0, -far, near)
    negative = y.double() < 0
    return torch.where(negative, -far, near).numpy(), torch.where(negative, -near, far).numpy()


# ---- fits -----------------------------------------------------------------------------------------------------------


def _fit(data: _Data, dtype: str, k: int | None, name: Reference) -> Fit:
    r = data.reference(name)
    low, high = (data.low - data.exact) / r, (data.high - data.exact) / r

    def cost(log_sigma: float) -> float:
        sigma = np.exp(log_sigma)
        return -float(_log_mass(low / sigma, high / sigma).sum())

    found = minimize_scalar(cost, bounds=(np.log(SMALLEST), np.log(LARGEST)), method="bounded", options={"xatol": 1e-4})
    least = cost(np.log(SMALLEST))
    sigma, likelihood = (SMALLEST, -least) if least <= found.fun else (float(np.exp(found.x)), -float(found.fun))
    start, end = ndtr(low / sigma), ndtr(high / sigma)
    uniform = start + (end - start) * np.random.default_rng(0).random(len(start))
    missed = (low > 0) | (high < 0)  # values that are not the exact one, rounded
    far = missed & (np.minimum(np.abs(low), np.abs(high)) > FAR * sigma)
    return Fit(
        dtype=dtype,
        k=k,
        n=len(r),
        reference=name,
        sigma=sigma,
        bias=float(np.mean((data.stored - data.exact) / r)),
        log_likelihood=likelihood,
        p_value=float(kstest(uniform, "uniform").pvalue),
        outliers=float(far.mean()),
        histogram=tuple(np.histogram(uniform, 20, (0, 1))[0].tolist()),
    )


def _log_mass(low: Array, high: Array) -> Array:
    """``log(Phi(high) - Phi(low))`` without cancellation: both ends are turned to the lower tail."""
    upper = low > 0
    a, b = np.where(upper, -high, low), np.where(upper, -low, high)
    log_a, log_b = log_ndtr(a), log_ndtr(b)
    return np.asarray(log_b + np.log1p(-np.exp(np.minimum(log_a - log_b, -1e-16))))


def _errors(data: _Data) -> Errors:
    e = data.stored - data.exact
    relative = np.abs(e) / np.maximum(np.abs(data.exact), np.finfo(np.float64).tiny)
    right = (data.low <= data.exact) & (data.exact <= data.high)
    lost = (data.stored == 0) & ~right
    dead = float(np.abs(data.exact[lost]).max()) if lost.any() else 0.0
    return Errors(
        mere=float(relative.mean()),
        mare=float(relative.max()),
        rmse=float(np.sqrt(np.mean(e**2))),
        rounded_right=float(right.mean()),
        dead=dead,
    )


def _warnings(fit: Fit, by_k: Sequence[Fit], errors: dict[int, Errors]) -> list[str]:
    found = [
        f"K = {f.k}: the errors are not normal in units of {f.reference} (p = {f.p_value:.2g})"
        for f in by_k
        if not f.is_good
    ]
    sigmas = {f.k: f.sigma for f in by_k if f.sigma > 2 * SMALLEST}
    if len(sigmas) > 1 and max(sigmas.values()) > 2 * min(sigmas.values()):
        spelt = ", ".join(f"{s:.3g} at K = {k}" for k, s in sigmas.items())
        found.append(f"one sigma does not serve every K: {spelt}; use one profile for each K, or the largest")
    if fit.outliers > 1e-5:
        found.append(f"{fit.outliers:.2g} of the values are off by more than {FAR:g} sigma: add a spike(rate, size)")
    if abs(fit.bias) > 4 * _bias_error(fit):
        found.append(
            f"the errors have a mean of {fit.bias:.2g} of {fit.reference}: add systematic-bias(gain={fit.bias:.2g})"
        )
    dead = max(e.dead for e in errors.values())
    if dead:
        found.append(f"values of up to {dead:.3g} were stored as 0: add dead-zone(threshold={dead:.3g})")
    return found


def _bias_error(fit: Fit) -> float:
    """Standard error of the mean error: of the law, and of a rounding that is uniform over an interval."""
    digits = {"bfloat16": 8, "float16": 11, "float32": 24}[fit.dtype]
    return float(np.sqrt(fit.sigma**2 + 4.0**-digits / 3) / np.sqrt(fit.n))


def _units(samples: Sequence[Sample], rows: int = 16) -> tuple[str, ...]:
    """The matrix units whose sums, rounded, are what the device stored, in a corner of each product.

    None where the exact sums, rounded, are it: that tells no unit from another.
    """
    from aqnsim import backends
    from aqnsim.accumulator import MATRIX_UNITS

    gemm, found = backends.get("cpu").ops["gemm"], []
    if all(torch.equal(s.exact()[:rows, :rows].to(s.y.dtype), s.y[:rows, :rows]) for s in samples):
        return ()
    corners = [(s.a[:rows], s.b[:, :rows], s.y[:rows, :rows]) for s in samples]
    for name in MATRIX_UNITS:
        if all(torch.equal(gemm(a.float(), b.float().contiguous(), name).to(y.dtype), y) for a, b, y in corners):
            found.append(name)
    return tuple(found)
