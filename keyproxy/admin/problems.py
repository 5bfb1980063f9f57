"""All refusals of the admin API, one row each, sent as application/problem+json (RFC 9457)."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson
from aiohttp import web

from keyproxy.auth.api_key import masked

MEDIA_TYPE: Final = "application/problem+json"
_CHALLENGE: Final = 'Bearer realm="keyproxy admin"'


class Row(NamedTuple):
    """A code for programs, a status, and a sentence for the caller."""

    code: str
    status: int
    sentence: str


class Problem(enum.Enum):
    """The complete set of problems."""

    REQUEST_MALFORMED = Row("request_malformed", 400, "The request is malformed.")
    TOKEN_MISSING = Row("token_missing", 401, "Send an admin API token as Authorization: Bearer TOKEN.")
    TOKEN_INVALID = Row("token_invalid", 401, "The token is not valid.")
    TOKEN_EXPIRED = Row("token_expired", 401, "The token has expired.")
    TOKEN_REVOKED = Row("token_revoked", 401, "The token was revoked.")
    ACCOUNT_DISABLED = Row("account_disabled", 401, "The tenant that the token is bound to is disabled.")
    INSUFFICIENT_SCOPE = Row("insufficient_scope", 403, "The token lacks the required scope.")
    TENANT_BOUND = Row("tenant_bound", 403, "This operation covers all tenants, but the token is restricted to one.")
    NOT_FOUND = Row("not_found", 404, "The object does not exist.")
    METHOD_NOT_ALLOWED = Row("method_not_allowed", 405, "The method is not supported for this path.")
    REQUEST_TIMEOUT = Row("request_timeout", 408, "The request body did not arrive in time.")
    CONFLICT = Row("conflict", 409, "The object's state does not allow this operation.")
    IN_PROGRESS = Row(
        "idempotency_in_progress", 409, "A request with this Idempotency-Key is in progress; retry shortly."
    )
    OUTDATED = Row("outdated", 412, "The object has changed since it was read.")
    BODY_TOO_LARGE = Row("body_too_large", 413, "The body is too large.")
    MEDIA_TYPE = Row("media_type_not_supported", 415, "Send application/json.")
    INVALID = Row("invalid", 422, "The request is invalid.")
    KEY_REUSED = Row("idempotency_key_reused", 422, "This Idempotency-Key was used with a different request.")
    TOO_MANY_FAILURES = Row("too_many_failures", 429, "Too many requests without a valid token.")
    INTERNAL_ERROR = Row("internal_error", 500, "Internal error; see the log for this request's id.")
    OVERLOADED = Row("overloaded", 503, "Too many connections; retry shortly.")
    STORE_UNAVAILABLE = Row("store_unavailable", 503, "The database is unavailable; retry shortly.")

    @property
    def code(self) -> str:
        """For programs."""
        return self.value.code

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.value.status


class FieldError(NamedTuple):
    """One validation error: the field (`body.limits.rate`, `query.limit`) and the reason."""

    field: str
    detail: str


class Refused(Exception):
    """A refused request. `detail` is an additional sentence for the caller."""

    def __init__(
        self, problem: Problem, detail: str = "", *, errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"{problem.code}: {detail}")
        self.problem = problem
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})


def body(refused: Refused, request_id: str) -> bytes:
    """Build the response body for a refused request.

    Keys are masked: a client may send a key where an id belongs, and errors end up in logs.
    """
    row = refused.problem.value
    content: dict[str, Any] = {
        "type": f"urn:keyproxy:problem:{row.code}",
        "title": row.sentence.rstrip("."),
        "status": row.status,
        "detail": masked(refused.detail or row.sentence),
        "code": row.code,
        "request_id": request_id,
    }
    if refused.errors:
        content["errors"] = [{"field": masked(error.field), "detail": masked(error.detail)} for error in refused.errors]
    return orjson.dumps(content)


def rendered(refused: Refused, request_id: str) -> web.Response:
    """Build the response for a refused request."""
    row = refused.problem.value
    headers = dict(refused.headers)
    if row.status == 401:
        error = "" if refused.problem is Problem.TOKEN_MISSING else ', error="invalid_token"'
        headers["WWW-Authenticate"] = _CHALLENGE + error
    if row.status == 503:
        headers.setdefault("Retry-After", "2")
    return web.Response(status=row.status, body=body(refused, request_id), content_type=MEDIA_TYPE, headers=headers)
