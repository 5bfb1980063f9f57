"""Forms and queries of OAuth requests, read strictly: RFC 6749 section 3.1 and appendix B."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl

from aiohttp import web

from keyproxy.oauth.oauth_error import OAuthError

BODY_BYTES_MAX: Final = 64 << 10

_BODY_SECONDS: Final = 10.0
_PARAMETERS_MAX: Final = 100
_IDENTITY: Final = "identity"


async def body_of(request: web.Request) -> bytes:
    """Read the body, within bounds on its size and time. Raises OAuthError, also for a compressed one."""
    if request.headers.get("Content-Encoding", _IDENTITY).strip().lower() != _IDENTITY:
        raise OAuthError("invalid_request", "Send the body without a content encoding.")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except TimeoutError as error:
        raise OAuthError("invalid_request", "The request body did not arrive in time.", status=408) from error


async def form_of(request: web.Request) -> Mapping[str, str]:
    """Parse the form in the body. A parameter without a value counts as absent. Raises OAuthError."""
    if "?" in request.raw_path:
        # Values in a URL end up in the logs of other programs.
        raise OAuthError("invalid_request", "Send parameters in the body, not in the query string.")
    if request.content_type != "application/x-www-form-urlencoded":
        raise OAuthError("invalid_request", "Send application/x-www-form-urlencoded.")
    return parameters(await body_of(request))


def query_of(request: web.Request) -> Mapping[str, str]:
    """Parse the query string. A parameter without a value counts as absent. Raises OAuthError."""
    return parameters(request.raw_path.partition("?")[2].encode("utf-8", "surrogateescape"))


def parameters(encoded: bytes) -> Mapping[str, str]:
    """Parse `application/x-www-form-urlencoded` parameters. Raises OAuthError for a repeated or malformed one."""
    try:
        pairs = parse_qsl(
            encoded.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_PARAMETERS_MAX
        )
    except ValueError as error:
        raise OAuthError("invalid_request", "The parameters are malformed.") from error
    found = dict(pairs)
    if len(found) != len(pairs):
        raise OAuthError("invalid_request", "A parameter is repeated.")
    if any("\0" in value for value in found.values()):
        raise OAuthError("invalid_request", "A parameter contains a NUL character.")
    return {name: value for name, value in found.items() if value}
