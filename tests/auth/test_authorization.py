"""Authorization: expiry, standing, routes and scopes."""

from __future__ import annotations

import pytest

from keyproxy.auth.authorization import admit
from keyproxy.model import NEVER, Moment, Route
from keyproxy.reasons import Reason, Refusal
from tests import fakes

NOW = Moment(wall_seconds=1_800_000_000.0, mono_seconds=5.0)
OPEN = Route("GET /a")


@pytest.mark.parametrize(
    ("expires_wall_seconds", "is_admitted"),
    [
        (NEVER, True),
        (NOW.wall_seconds + 0.001, True),
        (NOW.wall_seconds, False),
        (NOW.wall_seconds - 0.001, False),
        (0.0, False),
    ],
)
def test_key_stops_working_at_its_expiry(expires_wall_seconds: float, is_admitted: bool) -> None:
    who = fakes.identity(expires_wall_seconds=expires_wall_seconds)
    if is_admitted:
        grant = admit(who, OPEN, NOW)
        assert (grant.identity, grant.route) == (who, OPEN)
        return
    with pytest.raises(Refusal) as error:
        admit(who, OPEN, NOW)
    assert error.value.reason is Reason.KEY_EXPIRED


@pytest.mark.parametrize(
    ("needed", "held", "missing"),
    [
        ([], [], None),
        ([], ["a"], None),
        (["a"], ["a"], None),
        (["a"], ["a", "b"], None),
        (["a", "b"], ["a", "b"], None),
        (["a"], [], ["a"]),
        (["a"], ["A"], ["a"]),
        (["jobs"], ["jobs:write"], ["jobs"]),
        (["jobs:write"], ["jobs"], ["jobs:write"]),
        (["jobs:write"], ["*", "jobs:*"], ["jobs:write"]),
        (["a", "b"], ["a"], ["b"]),
        (["c", "b", "a"], ["a"], ["b", "c"]),
    ],
)
def test_all_scopes_of_a_route_are_required_exactly(
    needed: list[str], held: list[str], missing: list[str] | None
) -> None:
    who, route = fakes.identity(scopes=frozenset(held)), Route("GET /a", frozenset(needed))
    if missing is None:
        grant = admit(who, route, NOW)
        assert (grant.identity, grant.route) == (who, route)
        return
    with pytest.raises(Refusal) as error:
        admit(who, route, NOW)
    assert (error.value.reason, error.value.missing_scopes) == (Reason.SCOPE_INSUFFICIENT, missing)
    assert all(f"'{scope}'" in error.value.caller_text for scope in missing)


EXPIRED, STRIPPED = NOW.wall_seconds - 1, frozenset[str]()


@pytest.mark.parametrize(
    ("standing", "expires_wall_seconds", "route", "reason"),
    [
        (Reason.KEY_REVOKED, EXPIRED, None, Reason.KEY_REVOKED),
        (Reason.KEY_INVALID, EXPIRED, None, Reason.KEY_INVALID),
        (Reason.ACCOUNT_DISABLED, EXPIRED, None, Reason.KEY_EXPIRED),
        (Reason.KEY_SUSPENDED, EXPIRED, None, Reason.KEY_EXPIRED),
        (Reason.ACCOUNT_DISABLED, NEVER, None, Reason.ACCOUNT_DISABLED),
        (Reason.KEY_SUSPENDED, NEVER, None, Reason.KEY_SUSPENDED),
        (None, EXPIRED, None, Reason.KEY_EXPIRED),
        (None, NEVER, None, Reason.ROUTE_NOT_ALLOWED),
        (None, NEVER, Route("GET /a", frozenset({"x"})), Reason.SCOPE_INSUFFICIENT),
    ],
)
def test_reason_about_the_key_takes_precedence(
    standing: Reason | None, expires_wall_seconds: float, route: Route | None, reason: Reason
) -> None:
    who = fakes.identity(standing=standing, expires_wall_seconds=expires_wall_seconds, scopes=STRIPPED)
    with pytest.raises(Refusal) as error:
        admit(who, route, NOW)
    assert error.value.reason is reason
