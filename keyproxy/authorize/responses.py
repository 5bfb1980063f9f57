"""The responses of the authorization server that are not those of an endpoint: errors, CORS, common header fields."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Final

import orjson
from aiohttp import web

from keyproxy.auth.api_key import masked
from keyproxy.authorize.endpoint import Endpoint, PageError
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.postgres.database import StoreUnavailable

_log = logging.getLogger(__name__)

_STORE_RETRY_SECONDS: Final = "2"

#: Named although `*` covers them: it does not cover Authorization, and older browsers read it as a name.
_REQUEST_FIELDS: Final = "Authorization, Content-Type, MCP-Protocol-Version, *"
_PREFLIGHT_SECONDS: Final = "3600"

#: The names of the texts of pages.
_PAGE_MESSAGES: Final = {
    404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 429: "too_many_requests",
    500: "internal_error", 503: "store_unavailable",
}  # fmt: skip
#: Header fields of an error that its page shows.
_VALUES: Final = {"Retry-After": "seconds"}

NOT_FOUND: Final = "not_found"
METHOD_NOT_ALLOWED: Final = "method_not_allowed"


def not_found() -> OAuthError:
    """The error for a path that does not exist."""
    return OAuthError(NOT_FOUND, "The path does not exist.", status=404)


def method_not_allowed(allowed: Iterable[str]) -> OAuthError:
    """The error for a method that an endpoint does not have."""
    return OAuthError(
        METHOD_NOT_ALLOWED, "The method is not supported for this path.", status=405, headers={"Allow": _list(allowed)}
    )


def too_many_requests(wait_seconds: int) -> OAuthError:
    """The error for an address that has to wait."""
    return OAuthError(
        "temporarily_unavailable",
        "Too many requests from this address; retry later.",
        status=429,
        headers={"Retry-After": str(wait_seconds)},
    )


def error_of(failure: Exception, request_id: str) -> OAuthError | PageError:
    """The error that a failure of a handler is for the client."""
    match failure:
        case OAuthError() | PageError():
            return failure
        case StoreUnavailable():
            return OAuthError(
                "temporarily_unavailable",
                "The database is unavailable; retry shortly.",
                status=503,
                detail=str(failure),
                headers={"Retry-After": _STORE_RETRY_SECONDS},
            )
        case web.HTTPRequestEntityTooLarge():
            return OAuthError("invalid_request", "The body is too large.", status=413)
        case web.HTTPException():
            return OAuthError("invalid_request", "The request is malformed.")
        case ConnectionResetError():
            return OAuthError("invalid_request", "The client disconnected.")
        case _:
            _log.error("internal error, request_id=%s", request_id, exc_info=failure)
            return OAuthError("server_error", "Internal error; see the log for this request's id.", status=500)


def page_error_of(error: OAuthError) -> PageError:
    """The error as a page, whose text depends on the status."""
    values = {name: value for field, value in (error.headers or {}).items() if (name := _VALUES.get(field))}
    message = _PAGE_MESSAGES.get(error.status, "request_malformed")
    return PageError(error.status, message, values=values, detail=error.detail or error.description)


def json_error(error: OAuthError) -> web.Response:
    """The response with an error. Keys are masked: a client may send one where an id belongs."""
    content = {"error": error.code, "error_description": masked(error.description)}
    return json_response(error.status, content, error.headers)


def json_response(status: int, content: object, headers: Mapping[str, str] | None = None) -> web.Response:
    """A response with JSON. No response of the authorization server is stored by caches."""
    return web.Response(status=status, body=orjson.dumps(content), content_type="application/json", headers=headers)


def options(endpoint: Endpoint) -> web.Response:
    """The response to OPTIONS: a preflight too, if scripts of any origin may call the endpoint."""
    allowed = _list(methods_of(endpoint))
    headers = {"Allow": allowed}
    if endpoint.is_cross_origin:
        headers |= {
            "Access-Control-Allow-Methods": allowed,
            "Access-Control-Allow-Headers": _REQUEST_FIELDS,
            "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
        }
    return web.Response(status=204, headers=headers)


def methods_of(endpoint: Endpoint) -> set[str]:
    """The methods of an endpoint."""
    return {*endpoint.handlers, "OPTIONS", *(["HEAD"] if "GET" in endpoint.handlers else [])}


def add_headers(response: web.StreamResponse, request_id: str, *, is_cross_origin: bool) -> None:
    """Add the header fields of every response. A page brings its own policy."""
    headers = response.headers
    headers["X-Request-Id"] = request_id
    headers.setdefault("Cache-Control", "no-store")
    headers["X-Content-Type-Options"] = "nosniff"
    headers["X-Frame-Options"] = "DENY"
    headers["Referrer-Policy"] = "no-referrer"
    headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    if is_cross_origin:
        headers["Access-Control-Allow-Origin"] = "*"


def _list(methods: Iterable[str]) -> str:
    return ", ".join(sorted(methods))
