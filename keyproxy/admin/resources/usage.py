"""Usage, how limits stand, and what would become of a request: the models and the endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import Field, StringConstraints

from keyproxy.admin.endpoints import Answer, Call, Endpoint, Stream
from keyproxy.admin.problems import FieldError, Problem, Refused
from keyproxy.admin.schemas.request_models import Accepted, Id, Instant, QueryBoolean, QuerySum, QueryTokens
from keyproxy.admin.schemas.response_models import Answered
from keyproxy.admin.scopes import Scope
from keyproxy.platform import clock
from keyproxy.store.ledger.explain import Question
from keyproxy.store.usage.usage_queries import DIMENSIONS, NoSuchEventError, UsageFilter
from keyproxy.store.usage.usage_service import UsageService

_USUAL_DAYS: Final = 30
_LINES: Final = 500
_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})
_BY: Final = rf"^({'|'.join(DIMENSIONS)})(,({'|'.join(DIMENSIONS)})){{0,5}}$"


class UsageQuery(Accepted):
    """Whose usage, and of which time."""

    tenant: Id | None = None
    user: Id | None = None
    key: Id | None = None
    since: Annotated[Instant | None, Field(description="From then on. Neither this nor `until`: the last 30 days.")] = (
        None
    )
    until: Annotated[Instant | None, Field(description="Before that.")] = None


class SumsQuery(UsageQuery):
    """Whose usage, of which time, summed by what."""

    by: Annotated[str, StringConstraints(pattern=_BY), Field(description="Separated by commas.")] = ",".join(DIMENSIONS)
    limit: Annotated[QuerySum, Field(description="At most so many rows.")] = 1000


class EventsQuery(UsageQuery):
    """Whose requests, and of which time."""

    after: Annotated[
        str, StringConstraints(pattern=r"^[0-9a-f]{16}:[0-9]{1,18}:[0-9]{1,9}$"), Field(description="Only later ones.")
    ] = ""  # fmt: skip


class WindowsQuery(Accepted):
    """Of which traffic."""

    is_test: QueryBoolean = False


class ExplainQuery(Accepted):
    """The request that is asked about."""

    method: Annotated[str, StringConstraints(pattern=r"^[A-Z]{1,20}$")] = "POST"
    path: Annotated[str, StringConstraints(pattern=r"^/[!-~]{0,999}$")]
    tokens: Annotated[QueryTokens | None, Field(description="What it may use: prompt and answer.")] = None


class Sum(Answered):
    """What was used, summed by what was asked for."""

    day: str | None = None
    tenant: str | None = None
    user: str | None = None
    key: str | None = None
    mode: str | None = None
    route: str | None = None
    requests: int
    refusals: int
    tokens_in: int
    tokens_out: int
    tokens_estimated: int


class Sums(Answered):
    """Sums. `is_complete` is false if there are more: ask for less time, or fewer dimensions."""

    items: list[Sum]
    is_complete: bool


class Event(Answered):
    """One request."""

    id: str
    time: str
    request_id: str
    tenant: str
    user: str
    key: str
    mode: str
    route: str
    method: str
    status: int
    code: str
    policy: str | None
    tokens_in: int | None
    tokens_out: int | None
    estimated: bool
    request_bytes: int
    response_bytes: int
    duration_seconds: float


class Limit(Answered):
    """How a limit stands. What means nothing for it is not there."""

    owner: str
    policy: str
    limit: int
    per_second: float | None = None
    spent: int | None = None
    held: int | None = None
    forfeited: int | None = None
    remaining: int
    reset_seconds: float | None = None
    refuses: bool | None = None


class Windows(Answered):
    """How the limits of a user and of its tenant stand."""

    items: list[Limit]


class Explained(Answered):
    """What would become of the request. Nothing was charged or sent."""

    key: str
    user: str
    tenant: str
    mode: Literal["live", "test"]
    route: str | None
    allowed: bool
    code: str | None
    status: int | None
    policy: str | None
    detail: str | None
    retry_after_seconds: int | None
    limits: list[Limit]


async def _sums(call: Call) -> Answer:
    query: SumsQuery = call.query
    wanted, by = _wanted(call), [name for name in DIMENSIONS if name in query.by.split(",")]
    rows = [] if wanted is None else await _desk(call).sums(wanted, by, query.limit + 1)
    return Answer({"items": rows[: query.limit], "is_complete": len(rows) <= query.limit})


async def _all_sums(call: Call) -> Stream:
    wanted = _wanted(call)
    return Stream(_lines(None if wanted is None else _desk(call).all_sums(wanted)))


async def _events(call: Call) -> Stream:
    query: EventsQuery = call.query
    wanted = _wanted(call)
    return Stream(_lines(None if wanted is None else _desk(call).events(wanted, query.after or None)))


async def _lines(found: AsyncIterator[dict[str, Any]] | None) -> AsyncIterator[bytes]:
    """Lines of JSON, many at a time; none if nothing may be found."""
    if found is None:
        return
    part: list[bytes] = []
    try:
        async for row in found:
            part.append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            if len(part) == _LINES:
                yield b"".join(part)
                part.clear()
    except NoSuchEventError as error:
        raise Refused(Problem.INVALID, errors=[FieldError("query.after", str(error))]) from error
    yield b"".join(part)


def _desk(call: Call) -> UsageService:
    return UsageService(call.database, call.terms.settings, clock.now)


def _wanted(call: Call) -> UsageFilter | None:
    """Which usage; None: another tenant's, of which there is none for this token."""
    query: UsageQuery = call.query
    wanted = UsageFilter(query.tenant, query.user, query.key, query.since, query.until)
    if query.since is None and query.until is None and not getattr(query, "after", ""):
        wanted = replace(wanted, since=datetime.now(UTC) - timedelta(days=_USUAL_DAYS))
    if not call.is_bound:
        return wanted
    bound = call.token["tenant"]
    return replace(wanted, tenant=bound) if query.tenant in (None, bound) else None


async def _windows(call: Call) -> Answer:
    user = call.path["id"]
    await call.directory.user(user)  # not there for who may not see it
    return Answer({"items": await _desk(call).windows(user, is_test=call.query.is_test)})


async def _explain(call: Call) -> Answer:
    query: ExplainQuery = call.query
    key = call.path["id"]
    await call.directory.key(key)  # not there for who may not see it
    return Answer(await _desk(call).explained(key, Question(query.method, query.path, query.tokens)))


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/usage", "show_usage",
             "Requests, refusals and tokens, summed. Days are UTC; the days that hold any of the time count.",
             Scope.USAGE_READ, _sums, {200: Sums}, query=SumsQuery),
    Endpoint("GET", "/v1/usage/export", "export_usage_sums",
             "The sums by day, tenant, user, key, mode and route as lines of JSON, all of them. An answer that ends "
             "without its last chunk is not complete.",
             Scope.USAGE_READ, _all_sums, {200: Sum}, query=UsageQuery, is_stream=True),
    Endpoint("GET", "/v1/usage/events", "export_usage",
             "Every request as lines of JSON, in the order of writing, complete up to now. Go on with `after` set to the "
             "last one's id. An answer that ends without its last chunk is not complete.",
             Scope.USAGE_READ, _events, {200: Event}, query=EventsQuery, is_stream=True),
    Endpoint("GET", "/v1/users/{id}/limits", "show_limits", "How the limits of a user and of its tenant stand.",
             Scope.USAGE_READ, _windows, {200: Windows}, query=WindowsQuery, refuses=_NOT_THERE),
    Endpoint("GET", "/v1/keys/{id}/explain", "explain_key",
             "What would become of a request with this key, and how each limit stands. Nothing is charged or sent.",
             Scope.USAGE_READ, _explain, {200: Explained}, query=ExplainQuery, refuses=_NOT_THERE),
)  # fmt: skip
