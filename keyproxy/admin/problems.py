"""The closed set of refusals of the admin API, sent as application/problem+json (RFC 9457).

A new refusal is one row here and one line in the table of docs/admin-api.md; an endpoint that may respond with it lists
it in `refuses`, for the OpenAPI document.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from aiohttp import web

from keyproxy.auth.api_key import masked
from keyproxy.http.problem_json import MEDIA_TYPE, problem_json
from keyproxy.problem_spec import Blame, ProblemSpec

_CHALLENGE: Final = 'Bearer realm="keyproxy admin"'


def _spec(code: str, status: int, sentence: str, retry_after_seconds: int | None = None) -> ProblemSpec:
    """A row of the table. The title is the sentence, which a detail may replace."""
    blame = Blame.CALLER if status < 500 else Blame.US
    return ProblemSpec(code, status, blame, sentence.rstrip("."), sentence, retry_after_seconds)


class Problem(enum.Enum):
    """Why the admin API refused a request. The values are unique; `code` is a public name."""

    REQUEST_MALFORMED = _spec("request_malformed", 400, "The request is malformed.")
    TOKEN_MISSING = _spec("token_missing", 401, "Send an admin API token as Authorization: Bearer TOKEN.")
    TOKEN_INVALID = _spec("token_invalid", 401, "The token is not valid.")
    TOKEN_EXPIRED = _spec("token_expired", 401, "The token has expired.")
    TOKEN_REVOKED = _spec("token_revoked", 401, "The token was revoked.")
    ACCOUNT_DISABLED = _spec("account_disabled", 401, "The tenant that the token is bound to is disabled.")
    INSUFFICIENT_SCOPE = _spec("insufficient_scope", 403, "The token lacks the required scope.")
    TENANT_BOUND = _spec("tenant_bound", 403, "This operation covers all tenants, but the token is restricted to one.")
    DELEGATION_REFUSED = _spec(
        "delegation_refused", 403, "The agent token would exceed the authority of the key or user that it is for."
    )
    NOT_FOUND = _spec("not_found", 404, "The object does not exist.")
    METHOD_NOT_ALLOWED = _spec("method_not_allowed", 405, "The method is not supported for this path.")
    REQUEST_TIMEOUT = _spec("request_timeout", 408, "The request body did not arrive in time.")
    CONFLICT = _spec("conflict", 409, "The object's state does not allow this operation.")
    IN_PROGRESS = _spec(
        "idempotency_in_progress", 409, "A request with this Idempotency-Key is in progress; retry shortly.", 1
    )
    OUTDATED = _spec("outdated", 412, "The object has changed since it was read.")
    BODY_TOO_LARGE = _spec("body_too_large", 413, "The body is too large.")
    MEDIA_TYPE = _spec("media_type_not_supported", 415, "Send application/json.")
    INVALID = _spec("invalid", 422, "The request is invalid.")
    KEY_REUSED = _spec("idempotency_key_reused", 422, "This Idempotency-Key was used with a different request.")
    QUOTA_EXHAUSTED = _spec("quota_exhausted", 429, "The key has as many live agent tokens as it may have.")
    TOO_MANY_FAILURES = _spec("too_many_failures", 429, "Too many requests without a valid token.")
    INTERNAL_ERROR = _spec("internal_error", 500, "Internal error; see the log for this request's id.")
    OVERLOADED = _spec("overloaded", 503, "Too many connections; retry shortly.", 2)
    STORE_UNAVAILABLE = _spec("store_unavailable", 503, "The database is unavailable; retry shortly.", 2)

    @property
    def code(self) -> str:
        """The error code in the response."""
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
    """A refused request. `detail`: the sentence for the caller, instead of the problem's own."""

    def __init__(
        self,
        problem: Problem,
        detail: str = "",
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(f"{problem.code}: {detail}")
        self.problem = problem
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})
        self.retry_after_seconds = (
            problem.value.retry_after_seconds if retry_after_seconds is None else retry_after_seconds
        )


def problem_body(refused: Refused, request_id: str) -> bytes:
    """Build the response body for a refused request.

    Keys are masked: a client may send a key where an id belongs, and errors end up in logs.
    """
    spec = refused.problem.value
    members: dict[str, object] = {}
    if refused.errors:
        members["errors"] = [{"field": masked(error.field), "detail": masked(error.detail)} for error in refused.errors]
    detail = masked(refused.detail or spec.sentence)
    return problem_json(spec, request_id, status=spec.status, detail=detail, members=members)


def problem_response(refused: Refused, request_id: str) -> web.Response:
    """Build the response for a refused request."""
    status = refused.problem.status
    headers = dict(refused.headers)
    if status == 401:
        error = "" if refused.problem is Problem.TOKEN_MISSING else ', error="invalid_token"'
        headers["WWW-Authenticate"] = _CHALLENGE + error
    if refused.retry_after_seconds is not None:
        headers["Retry-After"] = str(refused.retry_after_seconds)
    return web.Response(status=status, body=problem_body(refused, request_id), content_type=MEDIA_TYPE, headers=headers)
