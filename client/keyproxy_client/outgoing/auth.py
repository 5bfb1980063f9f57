"""The auth object for httpx and for requests. It depends on neither."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

from keyproxy_client.acting import acting
from keyproxy_client.outgoing.authorizer import HEADER_PREFIX, WAIT_MAX_SECONDS, ActFor, Authorizer
from keyproxy_client.outgoing.key_sources import Key

# httpx recognises an auth object with more than one request by its base class.
if TYPE_CHECKING:
    from httpx import Auth as _Auth
else:
    try:
        from httpx import Auth as _Auth
    except ImportError:
        _Auth = object


class KeyproxyAuth(_Auth):
    """Sends the key and the acting user with each request to one origin: `auth=` of httpx clients and of requests.

    `key`: the secret, the path of a file (a `Path`, or text that begins with "/"; read again when it changes; `{tenant}`
    is the acting user's), or a function of the acting user or of nothing. `act_for`: the user to act for, or a function
    that finds it, by default `acting`; None: the key's own identity. `test_key`: the key for users in test mode.
    """

    def __init__(
        self,
        origin: str,
        key: Key,
        act_for: ActFor = acting,
        wait_max_seconds: float = WAIT_MAX_SECONDS,
        *,
        test_key: Key | None = None,
        header_prefix: str = HEADER_PREFIX,
    ) -> None:
        self._authorizer = Authorizer(
            origin, key, act_for, wait_max_seconds, test_key=test_key, header_prefix=header_prefix
        )

    @classmethod
    def of(cls, authorizer: Authorizer) -> KeyproxyAuth:
        """The auth object of an authorizer that exists."""
        made = cls.__new__(cls)
        made._authorizer = authorizer  # noqa: SLF001 - an object of this class
        return made

    def __repr__(self) -> str:
        return f"KeyproxyAuth({str(self._authorizer.origin)!r})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a KeyproxyAuth cannot be serialised: it holds a secret")

    def __call__(self, request: Any) -> Any:
        """Authenticate a request of requests."""
        from keyproxy_client.outgoing import requests_auth

        return requests_auth.authenticate(self._authorizer, request)

    def sync_auth_flow(self, request: Any) -> Generator[Any, Any, None]:
        """Authenticate a request of a synchronous httpx client."""
        from keyproxy_client.outgoing import httpx_flow

        return httpx_flow.flow(self._authorizer, request)

    def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        """Authenticate a request of an asynchronous httpx client."""
        from keyproxy_client.outgoing import httpx_flow

        return httpx_flow.flow_async(self._authorizer, request)
