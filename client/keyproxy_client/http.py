"""Authenticated requests to a keyproxy: httpx, requests and aiohttp.

Each request carries the secret of a key in `Authorization` and the acting user in Act-For, to one origin only: another
origin raises WrongOrigin before anything is sent, and no redirect carries either elsewhere.

    with httpx_client() as http:  # for ORIGIN of KEYPROXY in Django's settings
        http.post("/v1/ai/jobs", json={"job_id": 7})

    with httpx_client(origin="https://api.example.com", key=Path("/run/secrets/keyproxy-key")) as http:
        ...
"""

from __future__ import annotations

import functools
import ssl
from typing import TYPE_CHECKING, Any

from keyproxy_client.acting import NoActingUser, acting
from keyproxy_client.missing_extra import missing_extra
from keyproxy_client.outgoing.authorizer import HEADER_PREFIX, WAIT_MAX_SECONDS, ActFor, Authorizer
from keyproxy_client.outgoing.configuration import Options, authorizer
from keyproxy_client.outgoing.key_sources import Key, SecretUnavailable
from keyproxy_client.outgoing.origin import WrongOrigin

if TYPE_CHECKING:
    import aiohttp
    import httpx
    import requests

    from keyproxy_client.outgoing.auth import KeyproxyAuth

__all__ = [
    "KeyproxyAuth",
    "NoActingUser",
    "SecretUnavailable",
    "WrongOrigin",
    "httpx_async_client",
    "httpx_client",
    "keyproxy_middleware",
    "requests_session",
]

_OPTIONS = frozenset(Options.__annotations__)


def __getattr__(name: str) -> Any:
    # Its base class is httpx's if that is installed, and importing this module imports no HTTP client.
    if name == "KeyproxyAuth":
        from keyproxy_client.outgoing.auth import KeyproxyAuth

        return KeyproxyAuth
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def httpx_client(**options: Any) -> httpx.Client:
    """A httpx client for the paths of the origin. `options`: of KeyproxyAuth and httpx.Client."""
    return _httpx("Client", options)


def httpx_async_client(**options: Any) -> httpx.AsyncClient:
    """An asynchronous httpx client for the paths of the origin. `options`: of KeyproxyAuth and httpx.AsyncClient."""
    return _httpx("AsyncClient", options)


def requests_session(**options: Any) -> requests.Session:
    """A session of requests for the paths of the origin. `options`: of KeyproxyAuth."""
    try:
        from keyproxy_client.outgoing.requests_auth import OriginSession
    except ImportError as error:
        raise missing_extra("requests", error) from error
    chosen, rest = _split(options)
    if rest:
        raise TypeError(f"requests_session has no option {min(rest)!r}")
    session = OriginSession(chosen)
    session.trust_env = chosen.origin.is_encrypted
    return session


def keyproxy_middleware(
    origin: str,
    key: Key,
    act_for: ActFor = acting,
    wait_max_seconds: float = WAIT_MAX_SECONDS,
    *,
    test_key: Key | None = None,
    header_prefix: str = HEADER_PREFIX,
) -> aiohttp.ClientMiddlewareType:
    """A middleware of aiohttp.ClientSession that authenticates its requests as KeyproxyAuth does."""
    try:
        from keyproxy_client.outgoing.aiohttp_middleware import Middleware
    except ImportError as error:
        raise missing_extra("aiohttp", error) from error
    return Middleware(
        Authorizer(origin, key, act_for, wait_max_seconds, test_key=test_key, header_prefix=header_prefix)
    )


def _httpx(kind: str, options: dict[str, Any]) -> Any:
    try:
        import httpx
    except ImportError as error:
        raise missing_extra("httpx", error) from error
    from keyproxy_client.outgoing.auth import KeyproxyAuth

    chosen, rest = _split(options)
    # A proxy from the environment would read what is sent to an unencrypted origin.
    trust_env = rest.setdefault("trust_env", chosen.origin.is_encrypted)
    if not {"verify", "cert", "http2", "transport"} & set(rest):
        rest["verify"] = _ssl_context(trust_env)
    return getattr(httpx, kind)(base_url=str(chosen.origin), auth=KeyproxyAuth.of(chosen), **rest)


@functools.lru_cache(maxsize=2)
def _ssl_context(trust_env: bool) -> ssl.SSLContext:
    """Loading the certificates takes longer than a request; clients that are made for one request share them."""
    import httpx

    return httpx.create_ssl_context(trust_env=trust_env)


def _split(options: dict[str, Any]) -> tuple[Authorizer, dict[str, Any]]:
    """The authorizer of a client, and the options that are the HTTP library's."""
    ours: Any = {name: value for name, value in options.items() if name in _OPTIONS}
    return authorizer(ours), {name: value for name, value in options.items() if name not in _OPTIONS}
