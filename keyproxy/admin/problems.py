"""Every way in which the admin API refuses: one row each, told as application/problem+json (RFC 9457)."""

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
    """What is told: a code for programs, a status, a sentence for people."""

    code: str
    status: int
    sentence: str


class Problem(enum.Enum):
    """The closed vocabulary."""

    REQUEST_MALFORMED = Row("request_malformed", 400, "The request cannot be read.")
    TOKEN_MISSING = Row("token_missing", 401, "Send Authorization: Bearer with a token of the admin API.")
    TOKEN_INVALID = Row("token_invalid", 401, "There is no such token.")
    TOKEN_EXPIRED = Row("token_expired", 401, "The token has expired.")
    TOKEN_REVOKED = Row("token_revoked", 401, "The token was revoked.")
    ACCOUNT_DISABLED = Row("account_disabled", 401, "The tenant that the token is bound to is disabled.")
    INSUFFICIENT_SCOPE = Row("insufficient_scope", 403, "The token may not do this.")
    TENANT_BOUND = Row("tenant_bound", 403, "This is about all tenants; the token is bound to one.")
    NOT_FOUND = Row("not_found", 404, "There is no such thing.")
    METHOD_NOT_ALLOWED = Row("method_not_allowed", 405, "This cannot be done to that.")
    REQUEST_TIMEOUT = Row("request_timeout", 408, "The body took too long to arrive.")
    CONFLICT = Row("conflict", 409, "It is not in the state for that.")
    IN_PROGRESS = Row("idempotency_in_progress", 409, "The same request is being dealt with: retry shortly.")
    OUTDATED = Row("outdated", 412, "It has changed since it was read.")
    BODY_TOO_LARGE = Row("body_too_large", 413, "The body is too large.")
    MEDIA_TYPE = Row("media_type_not_supported", 415, "Send application/json.")
    INVALID = Row("invalid", 422, "The request means nothing.")
    KEY_REUSED = Row("idempotency_key_reused", 422, "This Idempotency-Key came with another request before.")
    TOO_MANY_FAILURES = Row("too_many_failures", 429, "Too many requests without a valid token.")
    INTERNAL_ERROR = Row("internal_error", 500, "A defect; the log has it under this request's id.")
    OVERLOADED = Row("overloaded", 503, "There are too many connections; retry shortly.")
    STORE_UNAVAILABLE = Row("store_unavailable", 503, "The database cannot be asked right now; retry shortly.")

    @property
    def code(self) -> str:
        """For programs."""
        return self.value.code

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.value.status


class FieldError(NamedTuple):
    """One thing that is wrong: where (`body.limits.rate`, `query.limit`), and what."""

    field: str
    detail: str


class Refused(Exception):
    """A request is refused. `detail` is one more sentence for the caller."""

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
    """The body of the answer to a refused request.

    Masked: a client may have given a key where its id belongs, and errors end up in logs.
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
    """The answer to a refused request."""
    row = refused.problem.value
    headers = dict(refused.headers)
    if row.status == 401:
        error = "" if refused.problem is Problem.TOKEN_MISSING else ', error="invalid_token"'
        headers["WWW-Authenticate"] = _CHALLENGE + error
    if row.status == 503:
        headers.setdefault("Retry-After", "2")
    return web.Response(status=row.status, body=body(refused, request_id), content_type=MEDIA_TYPE, headers=headers)
