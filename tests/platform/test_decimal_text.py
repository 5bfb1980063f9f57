"""Numbers as decimal text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.platform.decimal_text import decimal, decimal_seconds


@pytest.mark.parametrize("number", [0, 1, 9, 10, 999, 1_000, 1_001, 10_010, 999_999, 1_000_000, 10**18, -1, -1_000])
def test_a_number_is_formatted_as_by_the_language_on_both_sides_of_each_bound(number: int) -> None:
    assert decimal(number) == b"%d" % number


@given(st.integers())
def test_any_number_is_formatted_as_by_the_language(number: int) -> None:
    assert decimal(number) == b"%d" % number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, b"0.000000"), (0.0000004, b"0.000000"), (0.000001, b"0.000001"), (0.001, b"0.001000"),
        (0.0123, b"0.012300"), (0.9999994, b"0.999999"), (0.9999996, b"1.000000"), (1.0, b"1.000000"),
        (61.25, b"61.250000"), (-0.5, b"-0.500000"), (1e9, b"1000000000.000000"),
    ],
)  # fmt: skip
def test_seconds_have_six_decimals(seconds: float, text: bytes) -> None:
    assert decimal_seconds(seconds) == text


@given(st.floats(min_value=0.0, max_value=1e6))
def test_seconds_are_right_to_the_microsecond(seconds: float) -> None:
    text = decimal_seconds(seconds)
    assert len(text.partition(b".")[2]) == 6
    assert abs(float(text) - seconds) <= 0.5e-6 + seconds * 1e-15
