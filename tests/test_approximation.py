"""Approximations as data: their texts, their tables, and what they refuse."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct

import pytest

from aqnsim import ConfigError, UnknownNameError
from aqnsim.approximation import FUNCTIONS, Approximation, Table, entries, parse

EXP, RECIPROCAL = Table("exp", 6), Table("reciprocal", 7, newton=1)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("order", "spelt"), [(1, ""), (0, ", order=0")])
def test_a_table_s_text_leaves_out_what_is_usual(function: str, order: int, spelt: str) -> None:
    table = Table(function, 5, order)
    assert str(table) == f"table(function={function!r}, index_bits=5{spelt})"
    assert parse(str(table)) == Approximation((table,))
    assert parse(f" table( index_bits=5,newton=0, order={order}, function='{function}' )\n").tables == (table,)


def test_an_approximation_s_text_joins_those_of_its_tables() -> None:
    both = Approximation((EXP, RECIPROCAL))
    assert str(both) == f"{EXP} + {RECIPROCAL}"
    assert parse(str(both)) == both
    assert both.of("reciprocal") == RECIPROCAL
    assert both.of("rsqrt") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "table",
        "table(function='exp', index_bits=6",
        "table('exp', 6)",
        "table(function='exp')",
        "table(index_bits=6)",
        "table(function=exp, index_bits=6)",
        "table(function='exp', index_bits=6, bits=6)",
        "table(function='exp', index_bits=6, **{})",
        "tabel(function='exp', index_bits=6)",
        f"{EXP} - {RECIPROCAL}",
        f"{EXP} +",
        f"{EXP}; {RECIPROCAL}",
        None,
    ],
    ids=str,
)
def test_a_text_that_is_no_approximation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected table\(field=value, \.\.\.\), such as table\(function='exp'"):
        parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("function='exp', index_bits=0", "index_bits must be an integer in 1..16, got 0"),
        ("function='exp', index_bits=17", "index_bits must be an integer in 1..16, got 17"),
        ("function='exp', index_bits=6.0", "index_bits must be an integer in 1..16, got 6.0"),
        ("function='exp', index_bits=True", "index_bits must be an integer in 1..16, got True"),
        ("function='exp', index_bits=6, order=2", "order must be an integer in 0..1, got 2"),
        ("function='rsqrt', index_bits=6, newton=4", "newton must be an integer in 0..3, got 4"),
        ("function='exp', index_bits=6, newton=1", "Newton steps are defined for reciprocal and rsqrt; set newton=0"),
    ],
)
def test_a_field_out_of_its_range_is_refused(fields: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(f"table({fields})")


def test_an_unknown_function_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rsqrt'"):
        parse("table(function='rsqr', index_bits=6)")


def test_one_table_for_each_function() -> None:
    for tables in ((), (EXP, EXP), (EXP, Table("exp", 7))):
        with pytest.raises(ConfigError, match="one table for each function, at least one"):
            Approximation(tables)


def test_a_missing_table_and_one_without_effect_are_refused() -> None:
    both = Approximation((EXP, RECIPROCAL))
    assert both.check("softmax", "exp", "reciprocal") is both
    with pytest.raises(ConfigError, match="norm needs a table of 'rsqrt', got table"):
        both.check("norm", "rsqrt")
    with pytest.raises(ConfigError, match=r"norm computes no 'reciprocal', so .* would have no effect: leave it out"):
        both.check("norm", "exp")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bits", range(1, 13))
def test_neighbouring_entries_differ_exactly_and_keep_their_order(function: str, bits: int) -> None:
    found = entries(function, bits)
    assert len(found) == 2**bits + 1
    falling = function in ("reciprocal", "rsqrt")
    pairs = list(itertools.pairwise(found))
    assert all(a > b if falling else a < b or a == b > 0.999 for a, b in pairs)
    for difference in (b - a for a, b in pairs):  # exact in fp64
        assert struct.unpack("<f", struct.pack("<f", difference))[0] == difference


def test_coarser_tables_hold_some_of_the_entries_of_finer_ones() -> None:
    for function in FUNCTIONS:
        assert entries(function, 4) == entries(function, 8)[::16]


def test_entries_are_those_of_every_library() -> None:
    """A mathematical library whose fp64 misses enough to change an fp32 would change every result."""
    held = struct.pack(f"<{5 * 4097}f", *(v for function in FUNCTIONS for v in entries(function, 12)))
    assert hashlib.blake2b(held, digest_size=8).hexdigest() == "cdee205983d45a58"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bounds_shrink_with_the_order_that_is_theirs(function: str) -> None:
    limit = {"tanh": 1 - math.tanh(8), "erf": math.erfc(4)}.get(function, 0.0) + 2.0**-22
    for order in (0, 1):
        coarse, fine = (Table(function, bits, order).max_error - limit for bits in (5, 6))
        assert coarse / fine == pytest.approx(2 ** (order + 1), rel=0.05)


def test_a_newton_step_squares_the_error() -> None:
    for function, factor in (("reciprocal", 1.0), ("rsqrt", 1.5)):
        plain, stepped = Table(function, 5).max_error, Table(function, 5, newton=1).max_error
        assert stepped == pytest.approx(factor * plain**2 + 2**-22, rel=0.01)
