"""On whose behalf a request comes, as keyproxy's identity headers state it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

#: Where a framework keeps the identity of a request: WSGI's environ, and under "identity" ASGI's `scope["state"]`.
ENVIRON_KEY: Final = "keyproxy.identity"


class IdentityInvalid(ValueError):
    """The identity headers of a request are repeated, incomplete, or outside keyproxy's patterns. Never shows values."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The verified origin of a request.

    `user`, `tenant`: on whose behalf. `scopes`: what the key may do. `is_test`: test mode. `key_id`: the key that was
    presented, or the session of an OAuth client. `actor`: the user whose key acts for `user`; None if that is `user`.
    `agent`: the agent that presented the credential, if it is one.
    """

    user: str
    tenant: str
    scopes: frozenset[str]
    is_test: bool
    key_id: str
    actor: str | None = None
    agent: str | None = None

    def __post_init__(self) -> None:
        # Tests and settings have lists. In text, `in` would find parts of a scope.
        if type(self.scopes) is not frozenset:
            given: Any = self.scopes
            object.__setattr__(self, "scopes", frozenset(given.split() if isinstance(given, str) else given))
