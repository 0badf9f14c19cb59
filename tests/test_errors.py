"""Error models: their texts, and what they refuse."""

from __future__ import annotations

import math

import pytest

from aqnsim import errors
from aqnsim.errors import AbsoluteGaussian, ConfigError, RelativeGaussian, UnknownNameError, did_you_mean


@pytest.mark.parametrize("kind", errors.MODELS)
@pytest.mark.parametrize("sigma", [0.0, 0.05, 1e-4, 123.0, 1 / 3])
def test_text_round_trip(kind: str, sigma: float) -> None:
    model = errors.MODELS[kind](sigma)  # type: ignore[call-arg]
    assert errors.parse(str(model)) == model
    assert str(model) == f"{kind}(sigma={sigma!r})"


@pytest.mark.parametrize("cls", [RelativeGaussian, AbsoluteGaussian])
@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf, -math.inf, "0.1", None])
def test_a_sigma_that_is_no_size_is_refused(cls: type, sigma: object) -> None:
    with pytest.raises(ConfigError, match="sigma must be a finite number >= 0"):
        cls(sigma)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "relative-gaussian",
        "relative-gaussian(sigma=0.1",
        "relative-gaussian()",
        "relative-gaussian(0.1)",
        "relative-gaussian(sigma=0.1, bias=1)",
        "relative-gaussian(sgima=0.1)",
        "relative-gaussian(sigma=open)",
        "relative-gaussian(sigma=0.1); x",
    ],
)
def test_a_text_that_is_no_error_model_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected kind\(field=number"):
        errors.parse(text)


def test_an_unknown_kind_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'relative-gaussian'"):
        errors.parse("relative-gausian(sigma=0.1)")
    with pytest.raises(ConfigError, match="sigma must be a finite number"):
        errors.parse("relative-gaussian(sigma=-0.1)")


def test_did_you_mean() -> None:
    assert did_you_mean("mxfp5", ["mxfp4", "bf16"]) == " (did you mean 'mxfp4'?)"
    assert did_you_mean("zzz", ["mxfp4", "bf16"]) == ""


def test_one_base_for_all_errors() -> None:
    for cls in (errors.ConfigError, errors.UnknownNameError, errors.RealisationError, errors.BackendError):
        assert issubclass(cls, errors.AqnsimError)
