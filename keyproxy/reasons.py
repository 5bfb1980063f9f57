"""The closed vocabulary of refusal: every way in which a request is not answered by the upstream.

One row says all that is fixed about an outcome: the code for machines, the status, whose fault it is, and what the
caller hears. A `Refusal` is one occurrence: it may add words for the caller and, apart from them, a detail that only our
own log sees. Nothing else in the program maps a cause to a status.

A new outcome is one row here, one entry in docs/failure-modes.md, one test.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from keyproxy.limit_state import LimitState


class Blame(enum.Enum):
    """Who has to act for the next request to succeed."""

    CALLER = "caller"
    US = "us"
    UPSTREAM = "upstream"


class Row(NamedTuple):
    """What is fixed about an outcome. `retry_after_seconds` is the usual wait; None: retrying as it is won't help."""

    code: str
    status: int
    blame: Blame
    title: str
    sentence: str
    retry_after_seconds: int | None = None


class Reason(enum.Enum):
    """Why a request was refused, or its answer could not be had. The values are unique; `code` is a public name."""

    KEY_MISSING = Row(
        "api_key_missing",
        401,
        Blame.CALLER,
        "API key missing",
        "No API key was presented. Send it as 'Authorization: Api-Key <KEY>'.",
    )
    KEY_INVALID = Row(
        "api_key_invalid",
        401,
        Blame.CALLER,
        "API key invalid",
        "This API key is malformed or unknown.",
    )
    KEY_EXPIRED = Row(
        "api_key_expired",
        401,
        Blame.CALLER,
        "API key expired",
        "This API key has expired. Ask for a new one.",
    )
    KEY_REVOKED = Row(
        "api_key_revoked",
        401,
        Blame.CALLER,
        "API key revoked",
        "This API key has been revoked. Ask for a new one.",
    )
    ACCOUNT_DISABLED = Row(
        "account_disabled",
        401,
        Blame.CALLER,
        "Account disabled",
        "The user or tenant this API key belongs to is disabled.",
    )
    CREDENTIALS_AMBIGUOUS = Row(
        "credentials_ambiguous",
        400,
        Blame.CALLER,
        "Credentials ambiguous",
        "The request carries more than one credential. Send exactly one API key.",
    )
    KEY_IN_URL = Row(
        "key_in_url",
        400,
        Blame.CALLER,
        "API key in the URL",
        "An API key must not be part of the URL: URLs are logged by everything they pass. Send it as a header, "
        "and replace this key: it may have been recorded already.",
    )
    REQUEST_MALFORMED = Row(
        "request_malformed",
        400,
        Blame.CALLER,
        "Request malformed",
        "The request is not well-formed HTTP/1.1, or two servers could read it differently.",
    )
    METHOD_NOT_ALLOWED = Row(
        "method_not_allowed",
        405,
        Blame.CALLER,
        "Method not allowed",
        "This proxy does not serve TRACE: its response would repeat the request's headers.",
    )
    METHOD_NOT_IMPLEMENTED = Row(
        "method_not_implemented",
        501,
        Blame.CALLER,
        "Method not implemented",
        "The request method is not registered for HTTP, and no route of this proxy names it.",
    )
    EXPECTATION_FAILED = Row(
        "expectation_failed",
        417,
        Blame.CALLER,
        "Expectation failed",
        "The Expect header names something other than 100-continue.",
    )
    SCOPE_INSUFFICIENT = Row(
        "insufficient_scope",
        403,
        Blame.CALLER,
        "Insufficient scope",
        "This API key lacks a scope that the route asks for.",
    )
    ROUTE_NOT_ALLOWED = Row(
        "route_not_allowed",
        403,
        Blame.CALLER,
        "Route not allowed",
        "No route of this proxy matches the method and path.",
    )
    RATE_LIMITED = Row(
        "rate_limited",
        429,
        Blame.CALLER,
        "Rate limited",
        "Requests come faster than a limit on this API key, its user or its tenant allows. Slow down.",
        1,
    )
    CONCURRENCY_LIMITED = Row(
        "concurrency_limited",
        429,
        Blame.CALLER,
        "Concurrency limited",
        "As many requests are under way at once as a limit on this API key, its user or its tenant allows.",
        1,
    )
    QUOTA_EXHAUSTED = Row(
        "quota_exhausted",
        429,
        Blame.CALLER,
        "Quota exhausted",
        "The requests of this window are used up.",
        60,
    )
    TOKEN_BUDGET_EXHAUSTED = Row(
        "token_budget_exhausted",
        429,
        Blame.CALLER,
        "Token budget exhausted",
        "What is left of this window's token budget does not cover the tokens that the request may use.",
        60,
    )
    TOKEN_LIMIT_PER_REQUEST = Row(
        "token_limit_per_request",
        403,
        Blame.CALLER,
        "Token limit per request",
        "The request may use more tokens than one request is allowed. Ask for fewer, or send a shorter prompt.",
    )
    BODY_TOO_LARGE = Row(
        "body_too_large",
        413,
        Blame.CALLER,
        "Body too large",
        "The request body is larger than this proxy accepts.",
    )
    HEADERS_TOO_LARGE = Row(
        "headers_too_large",
        431,
        Blame.CALLER,
        "Headers too large",
        "The request line and headers are larger than this proxy accepts.",
    )
    REQUEST_TIMEOUT = Row(
        "request_timeout",
        408,
        Blame.CALLER,
        "Request timeout",
        "The request did not arrive in time.",
    )
    STORE_UNAVAILABLE = Row(
        "store_unavailable",
        503,
        Blame.US,
        "Store unavailable",
        "API keys cannot be checked right now. This says nothing about yours; retry shortly.",
        2,
    )
    LEDGER_UNAVAILABLE = Row(
        "ledger_unavailable",
        503,
        Blame.US,
        "Ledger unavailable",
        "What is left of your limits cannot be found out right now. Nothing was charged; retry shortly.",
        2,
    )
    OVERLOADED = Row(
        "overloaded",
        503,
        Blame.US,
        "Overloaded",
        "This proxy is at one of its bounds. Retry shortly.",
        1,
    )
    DRAINING = Row(
        "draining",
        503,
        Blame.US,
        "Draining",
        "This proxy is shutting down. Retry on a new connection.",
        1,
    )
    UPSTREAM_UNREACHABLE = Row(
        "upstream_unreachable",
        502,
        Blame.UPSTREAM,
        "Upstream unreachable",
        "The compute server could not be reached, or closed the connection without an answer.",
    )
    UPSTREAM_INVALID = Row(
        "upstream_invalid",
        502,
        Blame.UPSTREAM,
        "Upstream answer invalid",
        "The compute server's answer is not well-formed HTTP/1.1.",
    )
    UPSTREAM_TIMEOUT = Row(
        "upstream_timeout",
        504,
        Blame.UPSTREAM,
        "Upstream timeout",
        "The compute server did not answer in time.",
    )
    INTERNAL_ERROR = Row(
        "internal_error",
        500,
        Blame.US,
        "Internal error",
        "A defect of this proxy. Its log names the request id.",
    )

    @property
    def code(self) -> str:
        """The public, stable name."""
        return self.value.code


#: A window is used up. The operator may set their status with `errors.spent_status`.
SPENT: Final = frozenset({Reason.QUOTA_EXHAUSTED, Reason.TOKEN_BUDGET_EXHAUSTED})


#: Reasons for which a request can never be admitted under its plan.
NEVER_FITS: Final = frozenset({Reason.TOKEN_LIMIT_PER_REQUEST})


class Refusal(Exception):
    """One request's refusal. `said` is added to what the caller hears, `detail` goes to our log alone.

    `is_said_alone`: `said` replaces the reason's sentence. `field`: the member of the request's JSON at fault.
    `missing_scopes` is set for SCOPE_INSUFFICIENT. `limit` is the limit that refused, in the state it was found in;
    `applied` all limits that the request was held against, which the caller is told of as well. Unless said otherwise
    the wait is until the limit's reset. `is_held`: a window is not spent; requests in flight reserve what is left of it,
    and may give it back at any moment. Neither text may hold anything that came with the request unless it was
    checked for secrets: see docs/threat-model.md.
    """

    def __init__(
        self,
        reason: Reason,
        detail: str = "",
        *,
        said: str = "",
        is_said_alone: bool = False,
        field: str | None = None,
        missing_scopes: Sequence[str] = (),
        retry_after_seconds: int | None = None,
        limit: LimitState | None = None,
        applied: Sequence[LimitState] = (),
        is_held: bool = False,
    ) -> None:
        super().__init__(reason.code, detail)
        self.reason = reason
        self.detail = detail
        self.said = said
        self.is_said_alone = is_said_alone
        self.field = field
        self.missing_scopes = missing_scopes
        self.limit = limit
        self.applied = applied or (() if limit is None else (limit,))
        self.is_held = is_held
        self.retry_after_seconds = _wait(reason, limit) if retry_after_seconds is None else retry_after_seconds

    @property
    def is_futile(self) -> bool:
        """Whether a client should not retry on its own: its window is spent, or the request can never fit."""
        return self.reason in NEVER_FITS or (self.reason in SPENT and not self.is_held)


def _wait(reason: Reason, limit: LimitState | None) -> int | None:
    usual = reason.value.retry_after_seconds
    if usual is None or limit is None or limit.reset_seconds is None:
        return usual
    # A whole second at least: "0" would be an invitation to come back at once.
    return max(1, math.ceil(limit.reset_seconds))
