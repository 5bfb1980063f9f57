"""Signs identity assertions: implements the port Assertions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from keyproxy.config.delegation_settings import AccessSettings
from keyproxy.model import Identity, Moment
from keyproxy.ports.gate import Assertions
from keyproxy.signing.claims import ASSERTION_TYPE, assertion_claims
from keyproxy.signing.signing_key import SigningKey

#: How much earlier than half of its life an assertion is renewed, so that at least half is left when it arrives.
_ARRIVAL_SECONDS: Final = 1.0


class SignatureCount:
    """How many assertions this process has signed, over all configurations."""

    def __init__(self) -> None:
        self.total = 0


class AssertionSigner(Assertions):
    """Signs assertions by one configuration. `key`: the key to sign with; it raises a Refusal if there is none."""

    def __init__(
        self,
        number: int,
        access: AccessSettings,
        *,
        header_prefix: str,
        key: Callable[[Moment], SigningKey],
        now: Callable[[], Moment],
        count: SignatureCount,
    ) -> None:
        self.number = number
        self._access = access
        self._field = f"{header_prefix}Assertion: ".encode("ascii")
        self._key = key
        self._now = now
        self._count = count

    def sign(self, identity: Identity, now_mono: float) -> None:
        now, access = self._now(), self._access
        key = self._key(now)
        issued = int(now.wall_seconds)
        claims = assertion_claims(
            identity,
            issuer=access.issuer,
            audience=access.assertion_audience,
            issued_wall=issued,
            ttl_seconds=access.assertion_ttl_seconds,
        )
        cached = identity.assertion
        cached.line = self._field + key.sign(ASSERTION_TYPE, claims) + b"\r\n"
        left = issued + access.assertion_ttl_seconds / 2 - now.wall_seconds
        cached.renew_mono_seconds = now_mono + left - _ARRIVAL_SECONDS
        cached.signed_by = self.number
        self._count.total += 1
