"""The report: one set of receipts as a table, as JSON and as a picture, and what breaks its promise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import SOURCE, inputs, llama, tokens
from scipy import stats
from torch import nn

import aqnsim
from aqnsim import ConfigError, RealisationError
from aqnsim.profiles import Forward, OpSpec, Profile, Rule
from aqnsim.receipts import from_stats
from aqnsim.report import Report, rate_interval, sigma_interval


@pytest.fixture(scope="module")
def report() -> Report:
    model, ids = llama(), tokens()
    with aqnsim.emulate(model, "noise-5pct-matmul", seed=2) as emu:
        model(input_ids=ids).logits.square().mean().backward()
        return emu.report()


def test_json_holds_every_receipt(report: Report) -> None:
    read = json.loads(report.to_json())
    assert read == report.to_dict()
    assert read["fingerprint"] == aqnsim.profiles.load("noise-5pct-matmul").fingerprint
    assert len(read["receipts"]) == 3 * 14
    assert all(r["requested_sigma"] == pytest.approx(0.05) for r in read["receipts"])


def test_the_heat_map_has_a_cell_for_each_layer_and_role(report: Report, tmp_path: Path) -> None:
    cells = report._cells("realised_sigma", "grad-input", "train")
    roles = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(cells) == {(layer, role) for layer in "01" for role in roles}
    assert all(0.04 < v < 0.06 for v in cells.values())
    out = tmp_path / "map.png"
    report.heatmap(out, "realised_sigma", "grad-input")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [out]  # nothing half-written is left


def test_a_heat_map_of_nothing_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a value of realised_sigma, .*got 'sigma'"):
        report.heatmap(tmp_path / "a.png", "sigma")
    with pytest.raises(ConfigError, match="no receipt of weight in eval; there are: grad-input in train"):
        report.heatmap(tmp_path / "a.png", stream="weight", phase="eval")


def test_a_sigma_as_asked_is_no_violation_and_another_is_named(report: Report) -> None:
    assert report.violations() == []
    first, *rest = report.receipts
    wrong = dataclasses.replace(first, realised_sigma=0.07)
    (text,) = dataclasses.replace(report, receipts=(wrong, *rest)).violations()
    assert text.startswith(f"site {first.site!r}, output in phase train: asked for sigma 0.05, injected 0.07, outside")


@pytest.mark.parametrize("n", [50, 1000, 10**6])
@pytest.mark.parametrize("false_alarm", [1e-2, 1e-6])
def test_the_interval_is_that_of_chi_square(n: int, false_alarm: float) -> None:
    low, high = sigma_interval(2.0, n, false_alarm)
    exact = [2.0 * (q / n) ** 0.5 for q in stats.chi2.ppf([false_alarm / 2, 1 - false_alarm / 2], n)]
    assert [low, high] == pytest.approx(exact, rel=1e-2)  # Wilson and Hilferty's error at 50


def test_zeros_that_a_relative_error_leaves_alone_are_no_violation() -> None:
    model, x = nn.Sequential(nn.ReLU()), inputs(64, 512)
    spec = OpSpec(forward=Forward(error="relative-gaussian(sigma=0.1)"))
    rule = Rule(kind="activation", spec=spec)
    profile = Profile(name="test", description="for a test", source=SOURCE, rules=(rule,))
    with aqnsim.emulate(model, profile, example={"input": x}) as emu:
        model(x - 2)  # most are 0
        (receipt,) = emu.receipts()
        assert 0.01 < receipt.measurable / receipt.elements < 0.04
        assert emu.report().violations() == []


def test_a_rate_that_was_not_asked_for_is_named() -> None:
    receipt = from_stats(
        [1.0, 10_000.0, 300.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 300.0, 0.0, 100.0],
        site="a",
        role="b",
        phase="train",
        stream="output",
        requested="spike(rate=0.01, size=1.0)",
    )
    (text,) = Report("test", "0", 0, 1, (receipt,)).violations()
    assert text.startswith("site 'a', output in phase train: asked for rate 0.01, injected 0.03, outside")


@pytest.mark.parametrize("rate", [1e-4, 0.02, 0.5])
def test_the_interval_of_a_rate_holds_what_is_binomial(rate: float) -> None:
    low, high = rate_interval(rate, 5000, 1e-3)
    assert stats.binom.cdf(low * 5000 - 1e-9, 5000, rate) + stats.binom.sf(high * 5000, 5000, rate) < 1e-3


def test_an_emulation_whose_noise_was_tampered_with_fails_its_check() -> None:
    model, ids = llama(), tokens()
    emu = aqnsim.emulate(model, "noise-5pct-matmul")
    with torch.no_grad():
        model(input_ids=ids)
    emu.check()
    emu.totals[3, :, :, aqnsim.receipts.STATS.index("injected2")] *= 1.5
    with pytest.raises(RealisationError, match=rf"site {emu.sites[3].name!r}, output in phase train"):
        emu.check()
