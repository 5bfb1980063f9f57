"""What an outgoing request carries, whichever HTTP client sends it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from keyproxy_client.acting import Acting, NoActingUser, acting, acting_async
from keyproxy_client.outgoing.key_sources import Key, KeysByMode, KeySource, SecretUnavailable, source_of
from keyproxy_client.outgoing.origin import Origin
from keyproxy_client.outgoing.repetition import Repetitions

AUTHORIZATION: Final = "Authorization"
HEADER_PREFIX: Final = "X-Keyproxy-"
WAIT_MAX_SECONDS: Final = 5.0

#: The user to act for: fixed, or a function that finds it for each request. None: the key's own identity.
ActFor: TypeAlias = "Acting | str | Callable[[], Acting | str | Awaitable[Acting | str | None] | None] | None"


@dataclass(frozen=True, slots=True)
class Credential:
    """The headers of one request."""

    secret: str = field(repr=False)
    act_for: str | None

    @property
    def authorization(self) -> str:
        """The value of the Authorization header."""
        return f"Api-Key {self.secret}"


class Authorizer:
    """The origin, the key and the acting user of a client's requests. Never shows a secret."""

    def __init__(
        self,
        origin: str,
        key: Key,
        act_for: ActFor = acting,
        wait_max_seconds: float = WAIT_MAX_SECONDS,
        *,
        test_key: Key | None = None,
        default_tenant: str | None = None,
        header_prefix: str = HEADER_PREFIX,
    ) -> None:
        if wait_max_seconds < 0:
            raise ValueError("wait_max_seconds must not be negative")
        self.origin = Origin.configured(origin)
        #: The name of the header with the acting user.
        self.act_for_header = f"{header_prefix}Act-For"
        live = source_of(key, default_tenant=default_tenant)
        test = None if test_key is None else source_of(test_key, default_tenant=default_tenant)
        self._source: KeySource = live if test is None and live.chooses_mode else KeysByMode(live, test)
        self._act_for = Acting(act_for) if isinstance(act_for, str) else act_for
        self._wait_max_seconds = wait_max_seconds
        self._replaced = frozenset({"authorization", self.act_for_header.lower()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.origin)!r})"

    def repetitions(self) -> Repetitions:
        """The repetitions of one request."""
        return Repetitions(self._wait_max_seconds)

    def is_replaced(self, name: str) -> bool:
        """Whether a header that the caller set is dropped, in any spelling that servers may take for the same name."""
        return name.lower().replace("_", "-") in self._replaced

    def acting(self) -> Acting | None:
        """The user to act for; None: the key's own identity. Raises NoActingUser."""
        if not callable(self._act_for):
            return self._act_for
        found = self._act_for()
        if inspect.isawaitable(found):
            if inspect.iscoroutine(found):
                found.close()
            raise TypeError("act_for is asynchronous, but the HTTP client is not")
        return _acting(found)

    async def acting_async(self) -> Acting | None:
        """Like `acting`, for coroutines."""
        if not callable(self._act_for):
            return self._act_for
        if self._act_for is acting:
            return _acting(await acting_async())
        found = self._act_for()
        return _acting(await found if inspect.isawaitable(found) else found)

    def credential(self, user: Acting | None) -> Credential:
        """The headers of a request for this user. Raises SecretUnavailable."""
        return self._credential(self._source.secret(user), user)

    async def credential_async(self, user: Acting | None) -> Credential:
        """Like `credential`, for coroutines."""
        return self._credential(await self._source.secret_async(user), user)

    def renewed(self, refused: Credential, user: Acting | None) -> Credential | None:
        """The credential after keyproxy refused one, if reading the secret again gives another."""
        self._source.forget()
        try:
            found = self.credential(user)
        except SecretUnavailable:
            return None
        return found if found != refused else None

    async def renewed_async(self, refused: Credential, user: Acting | None) -> Credential | None:
        """Like `renewed`, for coroutines."""
        self._source.forget()
        try:
            found = await self.credential_async(user)
        except SecretUnavailable:
            return None
        return found if found != refused else None

    def _credential(self, secret: str, user: Acting | None) -> Credential:
        return Credential(secret, user.user if user is not None and self._source.delegates else None)


def _acting(found: Acting | str | None) -> Acting:
    if found is None:
        raise NoActingUser
    return Acting(found) if isinstance(found, str) else found
