"""What a proxy signs with and signs: its key ring, and the signer of assertions for each configuration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from keyproxy.config.schema import Settings
from keyproxy.platform import clock
from keyproxy.process.signing.key_ring import SigningKeyRing
from keyproxy.signing.assertions import AssertionSigner, SignatureCount
from keyproxy.signing.signing_key import SigningKey
from keyproxy.store.signing_keys import SigningKeyCache

#: A start waits for the store no longer than this; then requests that need a key are refused until it is published.
_START_SECONDS: Final = 5.0


class ProxySigning:
    """The signing of one proxy. `drained`: called when nothing more is signed, while the store is still open."""

    def __init__(self, keys: Sequence[SigningKey], store: SigningKeyCache) -> None:
        self.ring = SigningKeyRing(keys, store)
        self.assertions = SignatureCount()
        self.drained: Callable[[], Awaitable[None]] | None = None
        self._signers = 0
        self._signer: AssertionSigner | None = None
        self._signer_of: tuple[object, ...] = ()

    def signer(self, settings: Settings) -> AssertionSigner | None:
        """The signer for a configuration; the same one while nothing has changed that it depends on."""
        access, prefix = settings.access, settings.identity.header_prefix
        self.ring.waits_for_verifiers = access.assertion
        if not access.assertion:
            self._signer, self._signer_of = None, ()
        elif self._signer is None or self._signer_of != (access, prefix):
            self._signers += 1
            self._signer_of = (access, prefix)
            self._signer = AssertionSigner(
                self._signers,
                access,
                header_prefix=prefix,
                key=self.ring.usable,
                now=clock.now,
                count=self.assertions,
            )
        return self._signer

    def start(self) -> None:
        """Start publishing the keys."""
        self.ring.start()

    async def until_started(self, settings: Settings) -> None:
        """If this proxy signs: wait until it can, or the store does not respond."""
        if settings.access.assertion or any(row.serves for row in settings.routes):
            await self.ring.until_started(_START_SECONDS)

    async def end(self) -> None:
        """After draining: stop publishing, and let the keys end."""
        await self.ring.close()
        if self.drained is not None:
            await self.drained()
