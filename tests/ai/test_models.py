"""Money is exact: integer products, divided once, rounded up once per request."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai.models import Candidates, Model, ModelTable, price_of, recorded_name
from keyproxy.ai.responses.token_use import TokenUse

GPT = price_of(2_500_000, 10_000_000, cached_input=1_250_000)
MODEL = Model("gpt-4o", ("gpt-4o-2024-11-20",), price=GPT)


@pytest.mark.parametrize(
    ("use", "cost"),
    [
        (TokenUse(13, 9), 123),
        (TokenUse(1_000, 200, cached=600), 3_750),
        (TokenUse(0, 0), 0),
        (TokenUse(1, 0), 3),
        (TokenUse(2, 0), 5),
    ],
)
def test_a_request_costs_the_figures_of_the_design(use: TokenUse, cost: int) -> None:
    assert Candidates(MODEL).cost(use) == cost


@pytest.mark.parametrize(("tokens_out", "micros"), [(50, 545), (4_096, 41_005)])
def test_a_reservation_costs_the_figures_of_the_design(tokens_out: int, micros: int) -> None:
    assert Candidates(MODEL).reservation(18, tokens_out) == micros


def test_prices_default_to_those_of_input_and_output() -> None:
    price = price_of(3, 7)
    assert price is not None
    assert (price.cached_input, price.cache_write, price.reasoning) == (3, 3, 7)
    assert price_of(None, None) is None


amounts = st.integers(0, 10**6)
prices = st.integers(0, 10**12)


@given(prices, prices, prices, prices, prices, amounts, amounts, amounts, amounts, amounts)
def test_a_cost_is_the_exact_sum_rounded_up_once_and_within_its_reservation(
    p_in: int, p_out: int, p_cached: int, p_write: int, p_reason: int,
    plain: int, cached: int, written: int, shown: int, reasoned: int,
) -> None:  # fmt: skip
    price = price_of(p_in, p_out, cached_input=p_cached, cache_write=p_write, reasoning=p_reason)
    assert price is not None
    use = TokenUse(plain + cached + written, shown + reasoned, cached=cached, cache_write=written, reasoning=reasoned)
    exact = Fraction(plain * p_in + cached * p_cached + written * p_write + shown * p_out + reasoned * p_reason, 10**6)
    assert price.cost(use) == -(-exact.numerator // exact.denominator)
    if p_cached <= max(p_in, p_write):
        assert price.cost(use) <= price.reservation(use.tokens_in, use.tokens_out)


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**9))
def test_affordable_output_is_the_most_that_fits(p_in: int, p_out: int, tokens_in: int, micros: int) -> None:
    price = price_of(p_in, p_out)
    assert price is not None
    output = price.affordable_output(tokens_in, micros)
    if output is None:
        assert p_out == 0
        assert price.reservation(tokens_in, 10**9) <= micros
    else:
        assert output == 0 or price.reservation(tokens_in, output) <= micros
        assert p_out == 0 or price.reservation(tokens_in, output + 1) > micros


@pytest.mark.parametrize(
    ("name", "found"),
    [("gpt-4o", True), ("gpt-4o-2024-11-20", True), ("GPT-4o", False), ("gpt-4o ", False), ("gpt", False),
     (None, False), ("", False)],
)  # fmt: skip
def test_a_model_is_found_by_its_exact_name_or_alias(name: str | None, found: bool) -> None:
    assert (ModelTable([MODEL]).find(name) is MODEL) is found


@pytest.mark.parametrize(
    ("model", "sent", "name"),
    [
        (MODEL, "gpt-4o-2024-11-20", "gpt-4o"), (None, "meta/llama:8b@1", "meta/llama:8b@1"), (None, "a b", "other"),
        (None, "", "other"), (None, "x" * 128, "x" * 128), (None, "x" * 129, "other"), (None, "a\n", "other"),
        (None, None, ""),
    ],
)  # fmt: skip
def test_records_name_a_model_by_its_row_or_harmlessly(model: Model | None, sent: str | None, name: str) -> None:
    assert recorded_name(model, sent) == name


CHEAP = Model("cheap", price=price_of(1, 1), output_tokens_max=10)
DEAR = Model("dear", ("d",), price=price_of(5_000_000, 1_000_000), output_tokens_max=20, context_tokens_max=9)


def test_alternatives_reserve_at_the_dearest_price() -> None:
    candidates = Candidates(CHEAP, (DEAR, MODEL))
    assert candidates.reservation(100, 10) == 510
    assert candidates.reservation(1, 100) == 1_003
    assert candidates.is_priced
    assert candidates.affordable_output(0, 10) == 1


@pytest.mark.parametrize(
    ("response_model", "cost"),
    [("cheap", 1), ("dear", 500), ("d", 500), ("gpt-4o", 250), ("unknown", 500), (None, 500)],
)
def test_a_response_is_charged_at_the_price_of_the_model_it_names_or_of_the_dearest(
    response_model: str | None, cost: int
) -> None:
    assert Candidates(CHEAP, (DEAR, MODEL)).cost(TokenUse(100, 0), response_model) == cost


def test_the_response_s_name_changes_nothing_without_alternatives() -> None:
    assert Candidates(DEAR).cost(TokenUse(100, 0), "cheap") == 500


@pytest.mark.parametrize(
    ("models", "output_max", "is_priced"),
    [((CHEAP, DEAR), 20, True), ((CHEAP, MODEL), 0, True), ((CHEAP, None), 0, False), ((None, DEAR), 0, False)],
)
def test_numbers_of_several_models_are_the_largest_unless_one_is_unknown(
    models: tuple[Model | None, Model | None], output_max: int, is_priced: bool
) -> None:
    candidates = Candidates(models[0], models[1:])
    assert (candidates.output_tokens_max, candidates.is_priced) == (output_max, is_priced)


def test_a_model_without_price_costs_nothing() -> None:
    candidates = Candidates(Model("free"))
    assert not candidates.is_priced
    assert (candidates.cost(TokenUse(9, 9)), candidates.reservation(9, 9)) == (0, 0)
    assert candidates.affordable_output(9, 0) is None
