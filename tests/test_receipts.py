"""Receipts: from counters to shares, sigmas and decibels."""

from __future__ import annotations

import json
import math

import pytest

from aqnsim import Receipt
from aqnsim.receipts import STATS, from_stats, merge, table


def receipt(site: str = "a.q_proj", stream: str = "output", requested: str = "mxfp4", **stats: float) -> Receipt:
    values = {"calls": 1, "count": 100, **stats}
    return from_stats(
        [values.get(k, 0.0) for k in STATS],
        site=site,
        role=site.rpartition(".")[2],
        phase="train",
        stream=stream,
        requested=requested,
    )


def test_counters_become_shares_sigmas_and_decibels() -> None:
    r = receipt(
        changed=50, error2=1, reference2=100, injected2=0.36, requested2=0.25, injected_n=100, saturated=5, nonfinite=2
    )
    assert (r.calls, r.elements, r.changed, r.saturated, r.nonfinite) == (1, 100, 0.5, 0.05, 2)
    assert r.realised_sigma == pytest.approx(0.06)
    assert r.requested_sigma == pytest.approx(0.05)
    assert r.sqnr_db == pytest.approx(20)


def test_a_format_has_no_sigma_and_an_uncounted_call_has_no_sqnr() -> None:
    r = receipt(error2=1, reference2=10)
    assert r.realised_sigma is None
    assert r.requested_sigma is None
    assert receipt(count=0).sqnr_db is None
    assert receipt(count=0).changed == 0


@pytest.mark.parametrize(
    ("error2", "reference2", "expected"),
    [(0, 4, math.inf), (0, 0, math.inf), (4, 0, -math.inf), (math.inf, 4, -math.inf), (4, 4, 0)],
)
def test_sqnr_at_its_limits(error2: float, reference2: float, expected: float) -> None:
    r = receipt(error2=error2, reference2=reference2)
    assert r.sqnr_db == expected
    as_json = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert as_json["sqnr_db"] == (0 if expected == 0 else None)


def test_merging_weighs_by_elements_and_keeps_the_worst_sqnr() -> None:
    a = receipt(
        "a.q_proj",
        count=300,
        changed=300,
        error2=1,
        reference2=100,
        injected2=300 * 0.01,
        requested2=300 * 0.01,
        injected_n=300,
    )
    b = receipt("b.k_proj", count=100, changed=0, error2=1, reference2=10, injected2=0.0, injected_n=100)
    m = merge([a, b])
    assert (m.site, m.role, m.calls, m.elements) == ("*", "*", 2, 400)
    assert m.changed == 0.75
    assert m.realised_sigma == pytest.approx(math.sqrt(0.01 * 0.75))
    assert m.sqnr_db == pytest.approx(10)
    assert merge([a]) == a


def test_hits_become_rates() -> None:
    r = receipt(hits=3, expected_hits=2.5)
    assert (r.requested_rate, r.realised_rate) == (0.025, 0.03)
    assert receipt(hits=0, expected_hits=2.5).realised_rate == 0
    assert (receipt().requested_rate, receipt().realised_rate) == (None, None)


def test_merged_rates_are_weighted_by_elements() -> None:
    m = merge(
        [receipt(hits=3, expected_hits=2, count=100), receipt("b", hits=9, expected_hits=12, count=300), receipt()]
    )
    assert m.requested_rate == pytest.approx(14 / 400)
    assert m.realised_rate == pytest.approx(12 / 400)


def test_the_table_shows_rates_where_there_are_any() -> None:
    rated = receipt(requested="stuck(rate=0.025, value=0.0)", hits=3, expected_hits=2.5)
    header, _, line, other = table([rated, receipt()]).splitlines()
    assert line[header.index("rate asked") :].startswith("0.025 ")
    assert line[header.index("rate realised") :].startswith("0.03 ")
    assert other[header.index("rate asked") :].startswith("-")
    assert "rate asked" not in table([receipt()])
    assert table([]).startswith("phase")


def test_the_table_has_a_line_for_each_request() -> None:
    text = table([receipt("a.q_proj"), receipt("b.q_proj"), receipt("a.q_proj", stream="input", requested="nvfp4")])
    lines = text.splitlines()
    assert len(lines) == 2 + 2
    assert "mxfp4" in lines[2]
    assert lines[2].split()[3] == "2"  # two sites
    assert "nvfp4" in lines[3]
