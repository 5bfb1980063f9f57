"""Usage and the state of limits: the models and the endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import orjson
from pydantic import Field, StringConstraints

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, ApiStream, Endpoint
from keyproxy.admin.problems import FieldError, Problem, Refused
from keyproxy.admin.schemas.field_types import (
    Id,
    Instant,
    MoneyUnit,
    QueryBoolean,
    QuerySum,
)
from keyproxy.admin.schemas.request_models import RequestModel
from keyproxy.admin.schemas.response_models import ResponseModel
from keyproxy.admin.scopes import Scope
from keyproxy.platform import clock
from keyproxy.store.usage.usage_queries import DIMENSIONS, NoSuchEventError, UsageFilter
from keyproxy.store.usage.usage_service import UsageService

_USUAL_DAYS: Final = 30
_ORIGIN_DAYS: Final = 7
_LINES: Final = 500
_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})
_BY: Final = rf"^({'|'.join(DIMENSIONS)})(,({'|'.join(DIMENSIONS)})){{0,{len(DIMENSIONS) - 1}}}$"


class UsageQuery(RequestModel):
    """Selects usage by owner and time."""

    tenant: Id | None = None
    user: Id | None = None
    key: Id | None = None
    since: Annotated[
        Instant | None, Field(description="Start, inclusive. Without `since` and `until`: the last 30 days.")
    ] = None
    until: Annotated[Instant | None, Field(description="Before that.")] = None


class SumsQuery(UsageQuery):
    """Selects usage by owner and time, and the dimensions to group by."""

    by: Annotated[str, StringConstraints(pattern=_BY), Field(description="Separated by commas.")] = ",".join(DIMENSIONS)
    limit: Annotated[QuerySum, Field(description="Maximum number of rows.")] = 1000


class EventsQuery(UsageQuery):
    """Selects requests by owner and time."""

    after: Annotated[
        str,
        StringConstraints(pattern=r"^[0-9a-f]{16}:[0-9]{1,18}:[0-9]{1,9}$"),
        Field(description="Only later events."),
    ] = ""


class WindowsQuery(RequestModel):
    """Selects live or test traffic."""

    is_test: QueryBoolean = False


class Sum(ResponseModel):
    """Usage, grouped by the requested dimensions."""

    day: str | None = None
    tenant: str | None = None
    user: str | None = None
    key: str | None = None
    mode: str | None = None
    route: str | None = None
    model: str | None = None
    requests: int
    refusals: int
    tokens_in: int
    tokens_out: int
    tokens_estimated: int
    tokens_cached: int
    tokens_cache_write: int
    tokens_reasoning: int
    cost_micros: int


class Sums(ResponseModel):
    """Totals. `is_complete` is false if there are more: request less time, or fewer dimensions."""

    items: list[Sum]
    is_complete: bool
    money_unit: MoneyUnit


class Event(ResponseModel):
    """One request. `user` is its principal; `actor_user_id` the owner of the key, if the key acts for that user.

    `client`: the address of the client, or its network, as far as it is recorded.
    """

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
    model: str | None
    tokens_in: int | None
    tokens_out: int | None
    tokens_cached: int | None
    tokens_cache_write: int | None
    tokens_reasoning: int | None
    cost_micros: int | None
    actor_user_id: str | None
    agent_id: str | None
    agent_token_id: str | None
    client: str | None = None
    estimated: bool
    request_bytes: int
    response_bytes: int
    duration_seconds: float


class OriginsQuery(RequestModel):
    """Selects the time of requests."""

    since: Annotated[Instant | None, Field(description="Start, inclusive. Without it: the last 7 days.")] = None


class KeyOrigin(ResponseModel):
    """What a client has used a key for. `client`: an address, or a network; null: it was not recorded."""

    client: str | None
    requests: int
    refusals: int
    tokens_in: int
    tokens_out: int
    first: str
    last: str


class KeyOrigins(ResponseModel):
    """The clients of a key, the latest first."""

    items: list[KeyOrigin]


class Limit(ResponseModel):
    """The state of a limit. Members that do not apply are omitted. `spend` is in micro-units.

    `policy` is its name in refusals, which ends with the `selector`. Its window may use `limit` + `credited`.
    """

    owner: str
    policy: str
    selector: str
    limit: int
    credited: int | None = None
    per_second: float | None = None
    spent: int | None = None
    held: int | None = None
    forfeited: int | None = None
    remaining: int
    reset_seconds: float | None = None
    refuses: bool | None = None


class Windows(ResponseModel):
    """The state of the limits of a user, its tenant, its agents and their live tokens."""

    items: list[Limit]
    money_unit: MoneyUnit


async def _sums(request: ApiRequest) -> ApiResponse:
    query: SumsQuery = request.query
    wanted, by = _wanted(request), [name for name in DIMENSIONS if name in query.by.split(",")]
    rows = [] if wanted is None else await usage_service(request).sums(wanted, by, query.limit + 1)
    content = {"items": rows[: query.limit], "is_complete": len(rows) <= query.limit}
    return ApiResponse(content | request.config.labels)


async def _all_sums(request: ApiRequest) -> ApiStream:
    wanted = _wanted(request)
    return ApiStream(_lines(None if wanted is None else usage_service(request).all_sums(wanted)))


async def _events(request: ApiRequest) -> ApiStream:
    query: EventsQuery = request.query
    wanted = _wanted(request)
    return ApiStream(_lines(None if wanted is None else usage_service(request).events(wanted, query.after or None)))


async def _lines(found: AsyncIterator[dict[str, Any]] | None) -> AsyncIterator[bytes]:
    """Yield lines of JSON in batches; none if the token may not see any."""
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


def usage_service(request: ApiRequest) -> UsageService:
    """The queries of usage under this process's configuration."""
    return UsageService(request.database, request.config.settings, clock.now)


def _wanted(request: ApiRequest) -> UsageFilter | None:
    """The filter; None: another tenant's usage, which this token cannot see."""
    query: UsageQuery = request.query
    wanted = UsageFilter(query.tenant, query.user, query.key, query.since, query.until)
    if query.since is None and query.until is None and not getattr(query, "after", ""):
        wanted = replace(wanted, since=datetime.now(UTC) - timedelta(days=_USUAL_DAYS))
    if not request.is_bound:
        return wanted
    bound = request.token["tenant"]
    return replace(wanted, tenant=bound) if query.tenant in (None, bound) else None


async def _origins(request: ApiRequest) -> ApiResponse:
    key = request.path["id"]
    await request.directory.keys.get(key)  # 404 for tokens that may not see it
    since = request.query.since or datetime.now(UTC) - timedelta(days=_ORIGIN_DAYS)
    return ApiResponse({"items": await usage_service(request).origins(key, since)})


async def _windows(request: ApiRequest) -> ApiResponse:
    user = request.path["id"]
    await request.directory.users.get(user)  # 404 for tokens that may not see it
    items = await usage_service(request).windows(user, is_test=request.query.is_test)
    return ApiResponse({"items": items} | request.config.labels)


ENDPOINTS: Final = (
    Endpoint("show_usage",
             "Sum requests, refusals, tokens and cost, in micro-units. Days are UTC; every day that overlaps the time "
             "range counts.",
             Scope.USAGE_READ, _sums, {200: Sums}, query=SumsQuery),
    Endpoint("export_usage_sums",
             "Stream all totals by day, tenant, user, key, mode, route and model as lines of JSON. A response that ends "
             "without its last chunk is incomplete.",
             Scope.USAGE_READ, _all_sums, {200: Sum}, query=UsageQuery),
    Endpoint("export_usage",
             "Stream every request as lines of JSON, in the order of writing, up to now. To resume, set `after` to "
             "the last event's id. A response that ends without its last chunk is incomplete.",
             Scope.USAGE_READ, _events, {200: Event}, query=EventsQuery),
    Endpoint("show_origins",
             "Where a key was used: its requests, refusals and tokens by client, from the events that are kept.",
             Scope.USAGE_READ, _origins, {200: KeyOrigins}, query=OriginsQuery, refuses=_NOT_THERE),
    Endpoint("show_limits", "The state of a user's and its tenant's limits.",
             Scope.USAGE_READ, _windows, {200: Windows}, query=WindowsQuery, refuses=_NOT_THERE),
)  # fmt: skip
