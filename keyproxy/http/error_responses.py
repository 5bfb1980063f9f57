"""Build the HTTP response for a Refusal: the only place that does.

The default format is `application/problem+json` (RFC 9457) with a stable `code`. A route may select the error format of
the API that its callers' SDKs expect, so that the SDK raises its own exception; the code is the same.
"""

from __future__ import annotations

import http
import json
from collections.abc import Collection, Mapping
from typing import Final

from keyproxy import limit_state
from keyproxy.http import error_shapes, problem_json
from keyproxy.http.discovery.challenges import Challenges
from keyproxy.http.error_shapes import ErrorFacts
from keyproxy.http.own_response import OwnResponse
from keyproxy.reasons import SPENT, LimitReason, Reason, Refusal

#: Reasons with a status that `errors.invalid_key_status` sets: the request has a key, and it is not accepted.
KEY_REFUSALS: Final = frozenset(
    {Reason.KEY_INVALID, Reason.KEY_EXPIRED, Reason.KEY_REVOKED, Reason.ACCOUNT_DISABLED, Reason.KEY_SUSPENDED}
)

#: What the Allow field of a 405 names, unless the refusal does. RFC 9110 section 15.5.6.
_ALLOW: Final = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

_PROBLEM: Final = "problem"

#: Stands for the request id in a response that is kept. No text of ours contains it, and JSON does not change it.
_ANY_ID: Final = "0-any-request-id-0"

ERROR_SHAPES: Final = (_PROBLEM, *error_shapes.SHAPES, error_shapes.MCP)

_NO_OAUTH: Final = Challenges()


class _KeptResponse:
    """The response for all refusals that state their reason only. Its body is split at the request id."""

    __slots__ = ("after", "before", "fields", "has_id", "reason_phrase", "status")

    def __init__(self, rendered: OwnResponse) -> None:
        self.status = rendered.status
        self.reason_phrase = rendered.reason_phrase
        self.fields = rendered.fields
        self.before, marker, self.after = rendered.body.partition(_ANY_ID.encode("ascii"))
        self.has_id = bool(marker)

    def response(self, request_id: bytes) -> OwnResponse:
        """The response to one request."""
        body = b"%b%b%b" % (self.before, request_id, self.after) if self.has_id else self.before
        return OwnResponse(self.status, self.reason_phrase, self.fields, body)


class ErrorRenderer:
    """Renders refusals with the configured statuses."""

    def __init__(
        self, *, invalid_key_status: int = 401, spent_status: int = 429, challenges: Challenges = _NO_OAUTH
    ) -> None:
        self._challenges = challenges
        #: By reason and error format: no more than there are.
        self._kept: dict[tuple[Reason, str], _KeptResponse] = {}
        self._statuses: Mapping[Reason, int] = {
            **dict.fromkeys(KEY_REFUSALS, invalid_key_status),
            **dict.fromkeys(SPENT, spent_status),
        }

    def status(self, reason: Reason) -> int:
        """The HTTP status for a reason."""
        return self._statuses.get(reason, reason.value.status)

    def status_of(self, refusal: Refusal) -> int:
        """The HTTP status of one refusal. A window that is only reserved by requests in flight is always 429."""
        return refusal.reason.value.status if refusal.is_held else self.status(refusal.reason)

    def render(
        self,
        refusal: Refusal,
        request_id: str,
        error_shape: str = "problem",
        *,
        rpc_id: bytes = b"",
        route_scopes: Collection[str] = (),
    ) -> OwnResponse:
        """The response for one refusal in the route's error format.

        `rpc_id`: of a JSON-RPC request, empty: unknown. `route_scopes`: that every request on the route needs.
        """
        if rpc_id or error_shape == error_shapes.MCP or not _states_its_reason_only(refusal):
            return self._rendered(refusal, request_id, error_shape, rpc_id=rpc_id, route_scopes=route_scopes)
        key = refusal.reason, error_shape
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _KeptResponse(self._rendered(refusal, _ANY_ID, error_shape))
        return kept.response(request_id.encode("ascii"))

    def _rendered(
        self,
        refusal: Refusal,
        request_id: str,
        error_shape: str,
        *,
        rpc_id: bytes = b"",
        route_scopes: Collection[str] = (),
    ) -> OwnResponse:
        status = self.status_of(refusal)
        media_type = problem_json.MEDIA_TYPE if error_shape == "problem" else "application/json"
        fields = [f"Content-Type: {media_type}", "Cache-Control: no-store"]
        challenges = self._challenges.of(refusal, status, error_shape, route_scopes=route_scopes)
        fields += [f"WWW-Authenticate: {one}" for one in challenges]
        if status == http.HTTPStatus.METHOD_NOT_ALLOWED:
            fields.append(f"Allow: {refusal.allow or _ALLOW}")
        type_field = error_shapes.error_type_field(error_shape, status)
        if type_field is not None:
            fields.append(type_field)
        if refusal.retry_after_seconds is not None:
            fields.append(f"Retry-After: {refusal.retry_after_seconds}")
            retry_field = error_shapes.retry_field(error_shape, refusal.retry_after_seconds)
            if retry_field is not None and not refusal.is_futile:
                fields.append(retry_field)
        if refusal.is_futile:
            # The SDKs of OpenAI and Anthropic honour this and raise immediately. Without it they sleep and retry;
            # Anthropic's sleeps for all of Retry-After, even if that is a day.
            fields.append("x-should-retry: false")
        block = "".join(f"{line}\r\n" for line in fields).encode("ascii")
        return OwnResponse(
            status,
            http.HTTPStatus(status).phrase.encode("ascii"),
            block + limit_state.lines(refusal.applied),
            self._body(refusal, request_id, error_shape, rpc_id),
        )

    def last_event(
        self, refusal: Refusal, request_id: str, error_shape: str = "problem", *, rpc_id: bytes = b""
    ) -> bytes:
        """The server-sent event that ends a refused stream, in the route's error format.

        Must be sent at the start of an event. OpenAI's SDK raises on any data with an `error`, Anthropic's on an event
        named `error`. No `[DONE]` follows, because the stream is incomplete. MCP's messages have no name.
        """
        body = self._body(refusal, request_id, error_shape, rpc_id)
        is_unnamed = error_shape in ("openai", error_shapes.MCP)
        return (b"data: %b\n\n" if is_unnamed else b"event: error\ndata: %b\n\n") % body

    def last_document(self, refusal: Refusal, request_id: str, error_shape: str = "problem") -> bytes:
        """The JSON document that ends a refused stream of another format, which frames it."""
        return self._body(refusal, request_id, error_shape)

    def _body(self, refusal: Refusal, request_id: str, error_shape: str, rpc_id: bytes = b"") -> bytes:
        spec = refusal.reason.value
        status = self.status_of(refusal)
        detail = refusal.caller_text if refusal.replaces_sentence else f"{spec.sentence} {refusal.caller_text}".rstrip()
        members = _members(refusal)
        if error_shape == _PROBLEM:
            return problem_json.problem_json(spec, request_id, status=status, detail=detail, members=members)
        if error_shape == error_shapes.MCP:
            problem = problem_json.problem_content(spec, request_id, status=status, detail=detail, members=members)
            is_malformed = refusal.reason is Reason.REQUEST_MALFORMED
            return error_shapes.rpc_error(problem, rpc_id=rpc_id, code=refusal.rpc_code, is_malformed=is_malformed)
        error = ErrorFacts(status, spec.code, detail, request_id, refusal.field, members)
        return json.dumps(error_shapes.error_content(error_shape, error)).encode("utf-8")


def _states_its_reason_only(refusal: Refusal) -> bool:
    """Whether the responses to all such refusals are equal but for the request id."""
    return (
        not refusal.applied
        and refusal.members is None
        and not refusal.caller_text
        and not refusal.missing_scopes
        and not refusal.allow
        and refusal.field is None
        and refusal.limit is None
        and refusal.limit_reason is LimitReason.NONE
        and not refusal.replaces_sentence
        and refusal.retry_after_seconds == refusal.reason.retry_after_seconds
    )


def _members(refusal: Refusal) -> dict[str, object]:
    """The members of this refusal, such as those that describe the exceeded limit.

    `retryable`: the same request can be admitted later.
    """
    limit, reason = refusal.limit, refusal.limit_reason.value
    members: dict[str, object] = {}
    if limit is not None:
        members["policy"] = limit.policy.name
        members["limit"] = limit.policy.quota
        members["remaining"] = limit.remaining_shown
        members["reset_seconds"] = limit.reset_seconds_shown
    if limit is not None or reason:
        members["retryable"] = refusal.retry_after_seconds is not None
    if reason:
        members["reason"] = reason
    if refusal.members is not None:
        members.update(refusal.members)
    return members
