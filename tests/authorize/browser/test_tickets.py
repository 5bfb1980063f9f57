"""Tickets: the cookie they are bound to, their lifetime, and altered ones."""

from __future__ import annotations

import pytest

from keyproxy.authorize.browser.tickets import Purpose, Tickets
from keyproxy.authorize.endpoint import PageError

SECRET, OTHER = b"s" * 32, b"o" * 32
COOKIE = "c" * 43
CONTENT = {"client_id": "acme", "state": "\N{SNOWMAN}", "scopes": ["a", "b"], "nothing": None}


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(tickets: Tickets, ticket: str, cookie: str | None, purpose: Purpose = Purpose.LOGIN) -> tuple[int, str]:
    with pytest.raises(PageError) as caught:
        tickets.open(ticket, cookie, purpose=purpose)
    return caught.value.status, caught.value.message


def test_ticket_lives_for_600_seconds(clock: Clock) -> None:
    tickets = Tickets([SECRET], clock)
    ticket = tickets.seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    clock.seconds += 599.999
    assert tickets.open(ticket, COOKIE, purpose=Purpose.LOGIN) == CONTENT
    clock.seconds += 0.001
    assert refusal(tickets, ticket, COOKIE) == (400, "ticket_expired")


def test_ticket_opens_only_with_the_cookie_that_it_is_bound_to(clock: Clock) -> None:
    tickets = Tickets([SECRET], clock)
    ticket = tickets.seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    assert refusal(tickets, ticket, None) == (403, "cookie_missing")
    assert refusal(tickets, ticket, "d" * 43) == (403, "cookie_foreign")
    assert COOKIE not in ticket


@pytest.mark.parametrize("purpose", [Purpose.CONSENT, Purpose.USER_PAGE])
def test_ticket_of_a_login_is_not_one_of_what_follows(clock: Clock, purpose: Purpose) -> None:
    tickets = Tickets([SECRET], clock)
    ticket = tickets.seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    assert refusal(tickets, ticket, COOKIE, purpose) == (400, "ticket_invalid")


def test_no_altered_ticket_opens(clock: Clock) -> None:
    tickets = Tickets([SECRET], clock)
    ticket = tickets.seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    altered = [ticket[:at] + ("A" if ticket[at] != "A" else "B") + ticket[at + 1 :] for at in range(len(ticket))]
    foreign = Tickets([OTHER], clock).seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    for one in [
        *altered,
        ticket + "A",
        ticket + "=",
        ticket[:-1],
        ticket.partition(".")[0],
        foreign,
        "",
        ".",
        "\N{SNOWMAN}",
    ]:
        assert refusal(tickets, one, COOKIE) == (400, "ticket_invalid"), one
        with pytest.raises(PageError):
            tickets.derived(one, "nonce")


def test_rotation_of_the_secret_does_not_end_logins_in_progress(clock: Clock) -> None:
    ticket = Tickets([OTHER], clock).seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    nonce = Tickets([OTHER], clock).derived(ticket, "nonce")
    rotated = Tickets([SECRET, OTHER], clock)
    assert rotated.open(ticket, COOKIE, purpose=Purpose.LOGIN) == CONTENT
    assert rotated.derived(ticket, "nonce") == nonce
    fresh = rotated.seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    assert Tickets([SECRET], clock).open(fresh, COOKIE, purpose=Purpose.LOGIN) == CONTENT


def test_derived_values_differ_by_ticket_and_name(clock: Clock) -> None:
    tickets = Tickets([SECRET], clock)
    first = tickets.seal(CONTENT, COOKIE, purpose=Purpose.LOGIN)
    second = tickets.seal(CONTENT, "d" * 43, purpose=Purpose.LOGIN)
    values = {tickets.derived(ticket, name) for ticket in (first, second) for name in ("nonce", "verifier")}
    assert len(values) == 4
    assert all(len(value) == 43 and value not in first for value in values)
