"""What a caller hears of a Refusal: one place that turns a reason into an HTTP answer.

The usual shape is `application/problem+json` (RFC 9457) with a stable `code`. A route may ask for the error shape of
the API that its callers' SDKs speak, so that the SDK raises its own exception; the code is the same.
"""

from __future__ import annotations

import http
import json
from collections.abc import Mapping
from typing import Final, NamedTuple

from keyproxy.reasons import Reason, Refusal

#: Reasons whose status the operator may set with `errors.invalid_key_status`: a key was shown and is not accepted.
KEY_REFUSALS: Final = frozenset({Reason.KEY_INVALID, Reason.KEY_EXPIRED, Reason.KEY_REVOKED, Reason.ACCOUNT_DISABLED})

ERROR_SHAPES: Final = ("problem", "openai", "anthropic")

_CHALLENGE: Final = 'Api-Key realm="keyproxy"'
_OPENAI_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
}  # fmt: skip
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 408: "timeout_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class Answer(NamedTuple):
    """A complete answer of our own. `fields` are header lines, without framing and X-Request-Id."""

    status: int
    reason_phrase: bytes
    fields: bytes
    body: bytes


class Problems:
    """Renders refusals, with the statuses that the operator chose."""

    def __init__(self, *, invalid_key_status: int = 401) -> None:
        self._statuses: Mapping[Reason, int] = dict.fromkeys(KEY_REFUSALS, invalid_key_status)

    def status(self, reason: Reason) -> int:
        """The HTTP status that this reason is answered with."""
        return self._statuses.get(reason, reason.value.status)

    def answer(self, refusal: Refusal, request_id: str, error_shape: str = "problem") -> Answer:
        """The answer for one refusal in the route's error shape."""
        row = refusal.reason.value
        status = self.status(refusal.reason)
        sentence = f"{row.sentence} {refusal.said}".rstrip()
        match error_shape:
            case "openai":
                content: dict[str, object] = {
                    "error": {
                        "message": sentence,
                        "type": _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
                        "param": None,
                        "code": row.code,
                    }
                }
            case "anthropic":
                kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
                content = {
                    "type": "error",
                    "error": {"type": kind, "message": sentence, "code": row.code},
                    "request_id": request_id,
                }
            case _:
                content = {
                    "type": f"urn:keyproxy:problem:{row.code}",
                    "title": row.title,
                    "status": status,
                    "detail": sentence,
                    "code": row.code,
                    "request_id": request_id,
                }
        media_type = "application/problem+json" if error_shape == "problem" else "application/json"
        fields = [f"Content-Type: {media_type}", "Cache-Control: no-store"]
        if status == http.HTTPStatus.UNAUTHORIZED:
            fields.append(f"WWW-Authenticate: {_CHALLENGE}")
        elif refusal.missing_scope is not None:
            fields.append(
                f'WWW-Authenticate: {_CHALLENGE}, error="insufficient_scope", scope="{refusal.missing_scope}"'
            )
        if refusal.retry_after_seconds is not None:
            fields.append(f"Retry-After: {refusal.retry_after_seconds}")
        return Answer(
            status,
            http.HTTPStatus(status).phrase.encode("ascii"),
            "".join(f"{line}\r\n" for line in fields).encode("ascii"),
            json.dumps(content).encode("utf-8"),
        )
