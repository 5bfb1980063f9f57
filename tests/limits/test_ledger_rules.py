"""The rules of the ledger: credits, selectors, holders of a window, what is granted beyond a share, returned units."""

from __future__ import annotations

import pytest

from keyproxy.limits.ledger.rules import LedgerRules
from keyproxy.limits.ledger_protocol import TOKEN_RATE, LeaseGrant, LeaseReport, Window
from tests import contracts
from tests.contracts import window

NOW = 1_706_700_000.0


@pytest.fixture
def rules() -> LedgerRules:
    return LedgerRules(lease_seconds=1_000.0)


def reply(rules: LedgerRules, holder: str, line: LeaseReport, now: float = NOW) -> LeaseGrant:
    """The reply to one line of a holder."""
    serial = rules.holders[holder].serial + 1 if holder in rules.holders else 1
    replies = rules.sync(holder, serial, [line], now)
    assert replies is not None
    return replies[0]


@pytest.mark.parametrize(("credited", "granted"), [(0, 10), (5, 15), (-4, 6), (-10, 0)])
def test_a_credit_is_added_to_the_limit_of_its_window_only(rules: LedgerRules, credited: int, granted: int) -> None:
    rules.credit(window(), credited, NOW)
    answer = reply(rules, "a", contracts.line(want=99))
    assert (answer.granted, answer.credited, answer.held) == (granted, credited, granted)
    other = reply(rules, "a", contracts.line(2, window(owner="u_43"), want=99))
    assert (other.granted, other.credited) == (10, 0)
    assert reply(rules, "a", contracts.line(3, want=99), NOW + 86_400.0).granted == 10


def test_selectors_of_one_measure_count_apart(rules: LedgerRules) -> None:
    for number, selector in enumerate(("", "model:a", "model:a,route:r"), 1):
        assert reply(rules, "a", contracts.line(number, window(selector=selector), want=99)).granted == 10


def test_a_reply_has_the_number_of_holders_that_have_a_lease_of_the_window(rules: LedgerRules) -> None:
    lines = {name: contracts.line(1, want=1) for name in "abc"}
    assert [reply(rules, name, line).holders for name, line in lines.items()] == [1, 2, 3]
    rules.end("b")
    assert reply(rules, "c", contracts.line(1, granted=1)).holders == 2
    assert reply(rules, "c", contracts.line(1, granted=1, used=1, is_closing=True)).holders == 1


def test_what_waiting_requests_need_is_granted_in_full_and_only_the_rest_is_shared(rules: LedgerRules) -> None:
    reply(rules, "other", contracts.line(want=1, limit=1_000))
    answer = reply(rules, "a", contracts.line(limit=1_000, want=900, at_least=10, most=600))
    assert answer.granted == 600
    answer = reply(rules, "b", contracts.line(limit=1_000, want=900, at_least=10, most=600))
    assert answer.granted == 399
    assert reply(rules, "c", contracts.line(limit=1_000, want=900, at_least=10, most=600)).granted == 0


def rate_line(want: int, *, at_least: int = 1, returned: int = 0, granted_at: float = 0.0) -> LeaseReport:
    """A line of a token rate of 10 per second with a burst of 100."""
    of: Window = window(TOKEN_RATE)
    return LeaseReport(1, of, 0, 100, 0.1, 0, 0, returned, want, min(at_least, want), 0, False, granted_at)


@pytest.mark.parametrize(
    ("elapsed", "returned", "granted"),
    [(0.0, 80, 80), (1.0, 80, 80), (3.0, 80, 80), (8.0, 80, 80), (9.0, 80, 90), (0.0, 100, 100), (0.0, -5, 0)],
)
def test_a_token_rate_takes_back_unused_units_less_what_has_been_refilled(
    rules: LedgerRules, elapsed: float, returned: int, granted: int
) -> None:
    # After `elapsed` seconds 10 * elapsed are refilled; so many of the returned units count no more.
    granted_at = reply(rules, "a", rate_line(100)).granted_at
    assert granted_at == NOW
    line = rate_line(100, returned=returned, granted_at=granted_at)
    assert reply(rules, "a", line, NOW + elapsed).granted == granted


def test_use_beyond_what_a_token_rate_granted_delays_later_requests(rules: LedgerRules) -> None:
    reply(rules, "a", rate_line(60))
    assert reply(rules, "a", rate_line(0, returned=-30)).held == 90
    assert reply(rules, "a", rate_line(0, returned=-500)).held == 100
    assert reply(rules, "a", rate_line(10, at_least=10)).wait_seconds == pytest.approx(1.0)
