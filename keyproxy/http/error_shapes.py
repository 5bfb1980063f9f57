"""The JSON of a refusal in the format of each API, so that its SDKs raise their own exceptions. Pure values.

The members of `limit` describe the exceeded limit; each format has a place for them, or leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, NamedTuple

#: The formats that a route can select, besides `problem`.
SHAPES: Final = ("openai", "anthropic", "gemini", "ollama", "bedrock")

#: The domain of an ErrorInfo: who defines the reasons.
_DOMAIN: Final = "keyproxy"

_SERVER_ERROR: Final = 500

#: The format of routes with this protocol: an error response of JSON-RPC, with the problem as its data.
MCP: Final = "mcp"

#: The codes of JSON-RPC errors are this minus the status, outside of the range that JSON-RPC and MCP reserve.
_RPC_BASE: Final = -31_000
#: Of a malformed request. JSON-RPC 2.0 section 5.1.
_RPC_INVALID: Final = -32_600

_OPENAI_TYPES: Final = {
    401: "authentication_error", 402: "insufficient_quota", 403: "permission_error", 429: "rate_limit_error",
    500: "server_error",
}  # fmt: skip
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error",
}  # fmt: skip
#: google.rpc.Code, by the HTTP statuses that Google maps them to.
_GEMINI_STATUSES: Final = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 402: "RESOURCE_EXHAUSTED", 403: "PERMISSION_DENIED",
    404: "NOT_FOUND", 405: "UNIMPLEMENTED", 408: "DEADLINE_EXCEEDED", 409: "ABORTED", 413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 501: "UNIMPLEMENTED", 502: "UNAVAILABLE", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip
#: The exceptions of Bedrock's runtime API.
_BEDROCK_TYPES: Final = {
    400: "ValidationException", 401: "AccessDeniedException", 402: "ServiceQuotaExceededException",
    403: "AccessDeniedException", 404: "ResourceNotFoundException", 408: "ModelTimeoutException",
    413: "ValidationException", 429: "ThrottlingException", 500: "InternalServerException",
    502: "ServiceUnavailableException", 503: "ServiceUnavailableException", 504: "ModelTimeoutException",
}  # fmt: skip

#: The exceptions that end its event streams: members of the stream, so an SDK knows no others.
_BEDROCK_STREAM_TYPES: Final = {
    402: "throttlingException", 429: "throttlingException", 502: "serviceUnavailableException",
    503: "serviceUnavailableException", 504: "serviceUnavailableException",
}  # fmt: skip


class ErrorFacts(NamedTuple):
    """What every format of a refusal contains. `field`: the member of the request's JSON at fault."""

    status: int
    code: str
    message: str
    request_id: str
    field: str | None = None
    limit: Mapping[str, object] = {}


def error_content(shape: str, error: ErrorFacts) -> dict[str, object]:
    """Return the JSON document of a refusal in one of `SHAPES`."""
    match shape:
        case "openai":
            return {
                "error": {
                    "message": error.message,
                    "type": _type(_OPENAI_TYPES, error.status, "invalid_request_error", "server_error"),
                    "param": error.field,
                    "code": error.code,
                    **error.limit,
                }
            }
        case "anthropic":
            kind = _type(_ANTHROPIC_TYPES, error.status, "invalid_request_error", "api_error")
            content = {"type": kind, "message": error.message, "code": error.code, **error.limit}
            return {"type": "error", "error": content, "request_id": error.request_id}
        case "gemini":
            return {"error": _gemini(error)}
        case "ollama":
            return {"error": error.message, "code": error.code, **error.limit}
        case "bedrock":
            return {"message": error.message, "code": error.code, **error.limit}
    raise ValueError(f"no error format {shape}")


def error_type_field(shape: str, status: int) -> str | None:
    """Return the header line with the type of a refusal, from which the SDK selects its exception; None without one."""
    if shape != "bedrock":
        return None
    return f"x-amzn-ErrorType: {_type(_BEDROCK_TYPES, status, 'ValidationException', 'InternalServerException')}"


def retry_field(shape: str, seconds: int) -> str | None:
    """Return the header line for SDKs that do not read Retry-After; None without one."""
    return f"x-amz-retry-after: {1_000 * seconds}" if shape == "bedrock" else None


def bedrock_stream_exception(status: int) -> str:
    """Return the `:exception-type` of the message that ends an event stream."""
    return _type(_BEDROCK_STREAM_TYPES, status, "validationException", "internalServerException")


def rpc_error(problem: Mapping[str, object], *, rpc_id: bytes, code: int | None, is_malformed: bool) -> bytes:
    """Return the error response to a JSON-RPC request. `rpc_id`: its id as JSON text; empty: it is not known.

    `code`: None for the one of the problem's status, or of a malformed request.
    """
    if code is None:
        status = problem["status"]
        code = _RPC_INVALID if is_malformed or not isinstance(status, int) else _RPC_BASE - status
    error = {"code": code, "message": problem["title"], "data": problem}
    member = b'"id": %b, ' % rpc_id if rpc_id else b""
    return b'{"jsonrpc": "2.0", %b"error": %b}' % (member, json.dumps(error).encode("utf-8"))


def _gemini(error: ErrorFacts) -> dict[str, object]:
    reason: dict[str, object] = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": error.code, "domain": _DOMAIN,
    }  # fmt: skip
    if error.limit:
        # The metadata of an ErrorInfo are strings.
        reason["metadata"] = {name: _text(value) for name, value in error.limit.items() if value is not None}
    return {
        "code": error.status,
        "message": error.message,
        "status": _type(_GEMINI_STATUSES, error.status, "FAILED_PRECONDITION", "INTERNAL"),
        "details": [reason],
    }


def _type(types: Mapping[int, str], status: int, client_error: str, server_error: str) -> str:
    return types.get(status, client_error if status < _SERVER_ERROR else server_error)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
