"""Endpoint declarations: one per address of `endpoint_table`, used by the router, validation and OpenAPI document."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from keyproxy.admin.endpoint_table import ADDRESSES
from keyproxy.admin.problems import FieldError, Problem, Refused
from keyproxy.admin.schemas.request_models import NoQuery, Paged, RequestModel
from keyproxy.admin.scopes import Scope
from keyproxy.config.route_review import scope_warnings
from keyproxy.config.schema import Settings
from keyproxy.store.directory.directory import Directory, Entity
from keyproxy.store.postgres.database import Database


class ApiConfig(NamedTuple):
    """The part of the configuration that the endpoints need."""

    age_days_max: int
    settings: Settings

    def lifetime(self, fields: Mapping[str, Any]) -> timedelta | None:
        """The lifetime of a new key; None: no expiry."""
        seconds = fields.get("expires_in_seconds", self.age_days_max * 86_400 or None)
        return None if seconds is None else timedelta(seconds=seconds)

    @property
    def labels(self) -> dict[str, str]:
        """The members of a response with amounts of money."""
        return {"money_unit": self.settings.money.unit}

    def warnings(self, *keys: Sequence[str], holder: str = "key") -> list[str]:
        """Warnings about the scopes of keys: one that no route requires, or none that any route accepts.

        `holder`: what has the scopes.
        """
        distinct = dict.fromkeys(map(tuple, keys))
        return list(dict.fromkeys(one for scopes in distinct for one in scope_warnings(self.settings, scopes, holder)))


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """An authorized and validated request. `database` is for data outside the directory: usage.

    `path`: the path parameters. `query` and `body`: instances of the endpoint's models. `if_match`: the expected version,
    None for any. `must_exist`: If-Match was `*`. `must_be_new`: If-None-Match was `*`.
    """

    directory: Directory
    database: Database
    config: ApiConfig
    token: Entity
    path: Mapping[str, str]
    query: Any
    body: Any
    if_match: str | None
    must_exist: bool = False
    must_be_new: bool = False

    @property
    def is_bound(self) -> bool:
        """Whether the token is restricted to one tenant."""
        return self.token["tenant"] is not None


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """A response. `is_version_of`: the object whose ETag is sent."""

    content: Entity
    status: int = 200
    location: str | None = None
    is_version_of: Entity | None = None


class ApiStream(NamedTuple):
    """A streamed response: lines of JSON."""

    lines: Any  # an asynchronous iterator of bytes


_COMMON_PROBLEMS: Final = frozenset(
    {
        Problem.REQUEST_MALFORMED,
        Problem.INVALID,
        Problem.TOKEN_MISSING,
        Problem.TOKEN_INVALID,
        Problem.TOKEN_EXPIRED,
        Problem.TOKEN_REVOKED,
        Problem.ACCOUNT_DISABLED,
        Problem.INSUFFICIENT_SCOPE,
        Problem.TOO_MANY_FAILURES,
        Problem.INTERNAL_ERROR,
        Problem.OVERLOADED,
        Problem.STORE_UNAVAILABLE,
    }
)

Handler = Callable[[ApiRequest], Awaitable[ApiResponse | ApiStream]]


class Filtered(NamedTuple):
    """Another scope that may read a list if the request filters it: tokens that change these objects may list them."""

    by: str
    scope: Scope


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint. `name`: its name in ADDRESSES. `responses`: the response model of each status.

    `refuses`: problems beyond those common to all endpoints. `is_global`: tokens restricted to a tenant are refused.
    `signs`: the handler needs the signing key of this process.
    """

    name: str
    description: str
    scope: Scope | None
    handler: Handler
    responses: Mapping[int, type[BaseModel]]
    query: type[RequestModel] = NoQuery
    body: type[RequestModel] | None = None
    may_be_empty: bool = False
    filtered: Filtered | None = None
    is_global: bool = False
    is_conditional: bool = False
    may_be_new_only: bool = False
    signs: bool = False
    refuses: frozenset[Problem] = field(default_factory=frozenset)

    @property
    def method(self) -> str:
        """The HTTP method."""
        return ADDRESSES[self.name].method

    @property
    def path(self) -> str:
        """The path, such as `/v1/keys/{id}`."""
        return ADDRESSES[self.name].path

    def scope_of_filter(self, query: Mapping[str, str]) -> Scope | None:
        """The scope that suffices instead of `scope` for this query, if there is one."""
        return self.filtered.scope if self.filtered is not None and query.get(self.filtered.by) else None

    @property
    def is_stream(self) -> bool:
        """Whether the response is lines of JSON."""
        return ADDRESSES[self.name].is_stream

    @property
    def accepts_idempotency_key(self) -> bool:
        """Whether the endpoint accepts an Idempotency-Key."""
        return self.method == "POST"

    @property
    def problems(self) -> frozenset[Problem]:
        """All problems that the endpoint can return."""
        every = set(_COMMON_PROBLEMS)
        if self.is_global:
            every.add(Problem.TENANT_BOUND)
        if self.body is not None:
            every |= {Problem.BODY_TOO_LARGE, Problem.MEDIA_TYPE, Problem.REQUEST_TIMEOUT, Problem.CONFLICT}
        if self.is_conditional:
            every.add(Problem.OUTDATED)
        if self.accepts_idempotency_key:
            every |= {Problem.IN_PROGRESS, Problem.KEY_REUSED}
        return frozenset(every | self.refuses)


def needs(scope: Scope) -> Refused:
    """The refusal of a token without this scope."""
    challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
    detail = f"The required scope is {scope}."
    return Refused(Problem.INSUFFICIENT_SCOPE, detail, headers={"WWW-Authenticate": challenge})


_POSITION_BYTES_MAX: Final = 600


def cursor(query: Paged, position: str | None) -> str | None:
    """An opaque cursor for the items after this position of the list that `query` selects."""
    if position is None:
        return None
    return base64.urlsafe_b64encode(json.dumps([_list_of(query), position]).encode()).decode().rstrip("=")


def position(query: Paged) -> str | None:
    """Decode the position from the query's cursor; None: the start of the list. Raises Refused."""
    if not query.cursor:
        return None
    padded = query.cursor + "=" * (-len(query.cursor) % 4)
    try:
        content = json.loads(base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True))
    except (ValueError, RecursionError):
        content = None
    is_one = isinstance(content, list) and len(content) == 2 and isinstance(content[1], str)
    if not is_one or "\0" in content[1] or len(content[1].encode("utf-8", "replace")) > _POSITION_BYTES_MAX:
        raise Refused(
            Problem.INVALID, "The cursor is invalid.", errors=[FieldError("query.cursor", "is not a valid cursor")]
        )
    if content[0] != _list_of(query):
        error = FieldError("query.cursor", "is from a list with other filters")
        raise Refused(Problem.INVALID, "The cursor belongs to another list.", errors=[error])
    found: str = content[1]
    return found


def _list_of(query: Paged) -> int:
    """Identify the list that a query selects, whatever the page. It detects mistakes; it is not a security check."""
    filters = query.model_dump_json(exclude={"cursor", "limit"})
    return zlib.crc32(f"{type(query).__name__} {filters}".encode())


async def page(query: Paged, listed: Callable[[str, int], Awaitable[list[Entity]]]) -> ApiResponse:
    """Return one page of a list ordered by id."""
    rows = await listed(position(query) or "", query.limit + 1)
    following = rows[query.limit - 1]["id"] if len(rows) > query.limit else None
    return ApiResponse({"items": rows[: query.limit], "next": cursor(query, following)})
