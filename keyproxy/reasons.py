"""The closed set of refusal reasons: every outcome of a proxied request other than a relayed upstream response.

One row holds everything fixed about an outcome: the code for programs, the status, the party at fault, and the sentence
for the caller. A `Refusal` is one occurrence: it may add text for the caller, and a separate detail for the operator's
log only. Nothing else in the program maps a cause to a status. `admin.problems` lists those of the admin API, as rows
of the same type; `http.problem_json` renders both.

A new refusal is one row here, one entry in docs/failure-modes.md, and one line in tests/test_reasons.py.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Final

from keyproxy.limit_state import LimitState
from keyproxy.problem_spec import Blame, ProblemSpec


class Reason(enum.Enum):
    """Why a request was refused or got no upstream response. The values are unique; `code` is a public name."""

    KEY_MISSING = ProblemSpec(
        "api_key_missing",
        401,
        Blame.CALLER,
        "API key missing",
        "The request has no API key. Send one as 'Authorization: Api-Key <KEY>'.",
    )
    KEY_INVALID = ProblemSpec(
        "api_key_invalid", 401, Blame.CALLER, "API key invalid", "The API key is malformed or does not exist."
    )
    KEY_EXPIRED = ProblemSpec(
        "api_key_expired", 401, Blame.CALLER, "API key expired", "The API key has expired. Request a new one."
    )
    KEY_REVOKED = ProblemSpec(
        "api_key_revoked", 401, Blame.CALLER, "API key revoked", "The API key has been revoked. Request a new one."
    )
    KEY_SUSPENDED = ProblemSpec(
        "api_key_suspended",
        401,
        Blame.CALLER,
        "API key suspended",
        "The API key is suspended. An operator can resume it.",
    )
    ACCOUNT_DISABLED = ProblemSpec(
        "account_disabled",
        401,
        Blame.CALLER,
        "Account disabled",
        "A user, the tenant or an agent of the credential is disabled.",
    )
    CREDENTIALS_AMBIGUOUS = ProblemSpec(
        "credentials_ambiguous",
        400,
        Blame.CALLER,
        "Credentials ambiguous",
        "The request has more than one credential. Send exactly one API key.",
    )
    KEY_IN_URL = ProblemSpec(
        "key_in_url",
        400,
        Blame.CALLER,
        "API key in the URL",
        "The URL contains an API key. Send the key in a header instead, "
        "and replace this key: servers and proxies log URLs, so it may already have been recorded.",
    )
    REQUEST_MALFORMED = ProblemSpec(
        "request_malformed",
        400,
        Blame.CALLER,
        "Request malformed",
        "The request is not well-formed HTTP/1.1, or is ambiguous: two servers could parse it differently.",
    )
    METHOD_NOT_ALLOWED = ProblemSpec(
        "method_not_allowed",
        405,
        Blame.CALLER,
        "Method not allowed",
        "TRACE is not supported, because its response would echo the request headers.",
    )
    METHOD_NOT_IMPLEMENTED = ProblemSpec(
        "method_not_implemented",
        501,
        Blame.CALLER,
        "Method not implemented",
        "The request method is not a registered HTTP method, and no route of this proxy allows it.",
    )
    EXPECTATION_FAILED = ProblemSpec(
        "expectation_failed",
        417,
        Blame.CALLER,
        "Expectation failed",
        "The only supported value of the Expect header is 100-continue.",
    )
    SCOPE_INSUFFICIENT = ProblemSpec(
        "insufficient_scope",
        403,
        Blame.CALLER,
        "Insufficient scope",
        "The API key lacks a scope that the route requires.",
    )
    ROUTE_NOT_ALLOWED = ProblemSpec(
        "route_not_allowed",
        403,
        Blame.CALLER,
        "Route not allowed",
        "No route of this proxy matches the method and path.",
    )
    MODEL_NOT_ALLOWED = ProblemSpec(
        "model_not_allowed",
        403,
        Blame.CALLER,
        "Model not allowed",
        "The API key may not use a model that the request names.",
    )
    NAMESPACE_FORBIDDEN = ProblemSpec(
        "namespace_forbidden",
        403,
        Blame.CALLER,
        "Namespace forbidden",
        "The request names an id that does not belong to the caller.",
    )
    PROMPT_CATEGORY_NOT_ALLOWED = ProblemSpec(
        "prompt_category_not_allowed",
        403,
        Blame.CALLER,
        "Prompt category not allowed",
        "The API key may not send this kind of prompt on this route.",
    )
    DELEGATION_REFUSED = ProblemSpec(
        "delegation_refused",
        403,
        Blame.CALLER,
        "Delegation refused",
        "The credential may not act for this user.",
    )
    TOOL_NOT_ALLOWED = ProblemSpec(
        "tool_not_allowed", 403, Blame.CALLER, "Tool not allowed", "The credential may not call this tool."
    )
    APPROVAL_REQUIRED = ProblemSpec(
        "approval_required",
        403,
        Blame.CALLER,
        "Approval required",
        "This call needs an approval. Repeat the same request once it is approved.",
        5,
    )
    APPROVAL_DENIED = ProblemSpec(
        "approval_denied", 403, Blame.CALLER, "Approval denied", "The approval of this call was denied."
    )
    RATE_LIMITED = ProblemSpec(
        "rate_limited",
        429,
        Blame.CALLER,
        "Rate limited",
        "The request rate exceeds a limit of the API key, its user or its tenant. Slow down.",
        1,
    )
    CONCURRENCY_LIMITED = ProblemSpec(
        "concurrency_limited",
        429,
        Blame.CALLER,
        "Concurrency limited",
        "The API key, its user or its tenant has reached its limit of concurrent requests. "
        "Retry when one of them has finished.",
        1,
    )
    QUOTA_EXHAUSTED = ProblemSpec(
        "quota_exhausted",
        429,
        Blame.CALLER,
        "Quota exhausted",
        "The request quota of the current window is exhausted.",
        60,
    )
    TOKEN_BUDGET_EXHAUSTED = ProblemSpec(
        "token_budget_exhausted",
        429,
        Blame.CALLER,
        "Token budget exhausted",
        "The request may use more tokens than remain in the token budget of the current window.",
        60,
    )
    TOKEN_LIMIT_PER_REQUEST = ProblemSpec(
        "token_limit_per_request",
        403,
        Blame.CALLER,
        "Token limit per request",
        "The request may use more tokens than the plan allows per request. Lower its maximum or send a shorter prompt.",
    )
    SPEND_BUDGET_EXHAUSTED = ProblemSpec(
        "spend_budget_exhausted",
        429,
        Blame.CALLER,
        "Spend budget exhausted",
        "The request may cost more than remains in the spend budget of the current window.",
        60,
    )
    SPEND_LIMIT_PER_REQUEST = ProblemSpec(
        "spend_limit_per_request",
        403,
        Blame.CALLER,
        "Spend limit per request",
        "The request may cost more than the plan allows per request. Lower its maximum, send a shorter prompt, "
        "or use a cheaper model.",
    )
    MODEL_UNPRICED = ProblemSpec(
        "model_unpriced",
        403,
        Blame.CALLER,
        "Model without price",
        "The model has no price in this proxy, and the plan limits spend. Use a model with a price.",
    )
    OUTPUT_MAXIMUM_REQUIRED = ProblemSpec(
        "output_maximum_required",
        400,
        Blame.CALLER,
        "Output maximum required",
        "The request sets no maximum of output tokens, and this route requires one.",
    )
    BODY_TOO_LARGE = ProblemSpec(
        "body_too_large", 413, Blame.CALLER, "Body too large", "The request body exceeds the maximum size."
    )
    HEADERS_TOO_LARGE = ProblemSpec(
        "headers_too_large",
        431,
        Blame.CALLER,
        "Headers too large",
        "The request line and headers exceed the maximum size.",
    )
    REQUEST_TIMEOUT = ProblemSpec(
        "request_timeout", 408, Blame.CALLER, "Request timeout", "The request timed out before it arrived completely."
    )
    STORE_UNAVAILABLE = ProblemSpec(
        "store_unavailable",
        503,
        Blame.US,
        "Store unavailable",
        "API keys cannot be verified right now; yours may well be valid. Retry shortly.",
        2,
    )
    LEDGER_UNAVAILABLE = ProblemSpec(
        "ledger_unavailable",
        503,
        Blame.US,
        "Ledger unavailable",
        "Limits cannot be checked right now. Nothing was charged. Retry shortly.",
        2,
    )
    APPROVALS_UNAVAILABLE = ProblemSpec(
        "approvals_unavailable",
        503,
        Blame.US,
        "Approvals unavailable",
        "Approvals cannot be checked right now. Nothing was sent or charged. Retry shortly.",
        2,
    )
    UPSTREAM_CREDENTIAL_UNAVAILABLE = ProblemSpec(
        "upstream_credential_unavailable",
        503,
        Blame.US,
        "Upstream credential unavailable",
        "The proxy has no usable credential for the upstream of this route.",
        60,
    )
    OVERLOADED = ProblemSpec("overloaded", 503, Blame.US, "Overloaded", "The proxy is overloaded. Retry shortly.", 1)
    UPSTREAM_UNREACHABLE = ProblemSpec(
        "upstream_unreachable",
        502,
        Blame.UPSTREAM,
        "Upstream unreachable",
        "The compute server is unreachable, or closed the connection without sending a response.",
    )
    UPSTREAM_INVALID = ProblemSpec(
        "upstream_invalid",
        502,
        Blame.UPSTREAM,
        "Upstream response invalid",
        "The response of the compute server is not well-formed HTTP/1.1.",
    )
    UPSTREAM_TIMEOUT = ProblemSpec(
        "upstream_timeout", 504, Blame.UPSTREAM, "Upstream timeout", "The compute server did not respond in time."
    )
    INTERNAL_ERROR = ProblemSpec(
        "internal_error",
        500,
        Blame.US,
        "Internal error",
        "The proxy failed to handle the request. Its log has the details under the request id.",
    )

    # `_value_`, since `value` is looked up by a descriptor of Python code, in several places for each refusal.

    @property
    def code(self) -> str:
        """The public, stable name."""
        return self._value_.code

    @property
    def retry_after_seconds(self) -> int | None:
        """The default wait; None: an unchanged retry cannot succeed."""
        return self._value_.retry_after_seconds


class LimitReason(enum.Enum):
    """Why a limit refuses a request, as callers and logs see it.

    NEVER_FITS: the request needs more than the whole limit. SPENT: the window's rest is too small until its reset. HELD:
    requests in flight reserve the rest, and may release it at any time. PACE: a rate. NONE: nothing to distinguish.
    """

    NEVER_FITS = "never_fits"
    SPENT = "spent"
    HELD = "held"
    PACE = "pace"
    BODY_MEMORY = "body_memory"
    NONE = ""


#: An exhausted window. The operator may set the status of these reasons with `errors.spent_status`.
SPENT: Final = frozenset({Reason.QUOTA_EXHAUSTED, Reason.TOKEN_BUDGET_EXHAUSTED, Reason.SPEND_BUDGET_EXHAUSTED})


#: Reasons for which a request can never be admitted under its plan.
NEVER_FITS: Final = frozenset({Reason.TOKEN_LIMIT_PER_REQUEST, Reason.SPEND_LIMIT_PER_REQUEST})


class Refusal(Exception):
    """The refusal of one request. `caller_text` is appended to the reason's sentence; `detail` is only logged.

    `replaces_sentence`: `caller_text` replaces the reason's sentence. `field`: the member of the request's JSON at fault.
    `missing_scopes`: for the challenge of a 403. `allow`: the methods that a 405 names, by default those of all routes.
    `limit` is the limit that was exceeded, with its state at that time; `applied` is every limit that applies to the
    request, and is part of the response too. `retry_after_seconds` defaults to the limit's reset; a budget that is spent
    has none, since no retry succeeds. `limit_reason`: why it refuses the request. `members`: further members of the
    response, such as the id of an approval. `rpc_code`: the code of a JSON-RPC error; None: by the reason. Neither text
    may contain anything from the request that was not checked for secrets: see docs/threat-model.md.
    """

    def __init__(
        self,
        reason: Reason,
        detail: str = "",
        *,
        caller_text: str = "",
        replaces_sentence: bool = False,
        field: str | None = None,
        missing_scopes: Sequence[str] = (),
        allow: str = "",
        retry_after_seconds: int | None = None,
        limit: LimitState | None = None,
        applied: Sequence[LimitState] = (),
        limit_reason: LimitReason = LimitReason.NONE,
        members: Mapping[str, object] | None = None,
        rpc_code: int | None = None,
    ) -> None:
        super().__init__(reason.code, detail)
        self.reason = reason
        self.detail = detail
        self.caller_text = caller_text
        self.replaces_sentence = replaces_sentence
        self.field = field
        self.missing_scopes = missing_scopes
        self.allow = allow
        self.limit = limit
        self.applied = applied or (() if limit is None else (limit,))
        self.limit_reason = limit_reason
        self.members = members
        self.rpc_code = rpc_code
        self.retry_after_seconds = retry_after_seconds
        if retry_after_seconds is None and not (limit_reason is LimitReason.SPENT and _is_budget(limit)):
            self.retry_after_seconds = _wait(reason, limit)

    @property
    def is_held(self) -> bool:
        """Whether requests in flight reserve the rest of the window."""
        return self.limit_reason is LimitReason.HELD

    @property
    def is_futile(self) -> bool:
        """Whether an automatic retry is pointless: the window is exhausted, or the request can never fit."""
        return self.reason in NEVER_FITS or (self.reason in SPENT and not self.is_held)


def _is_budget(limit: LimitState | None) -> bool:
    """Whether a spent limit is never replenished: it has no window."""
    return limit is not None and limit.policy.window_seconds is None


def _wait(reason: Reason, limit: LimitState | None) -> int | None:
    usual = reason.retry_after_seconds
    if usual is None or limit is None or limit.reset_seconds is None:
        return usual
    # At least one second: "0" would invite an immediate retry.
    return max(1, math.ceil(limit.reset_seconds))
