"""The secret of a provider in a file: the newest content, and for a day the one before."""

from __future__ import annotations

from typing import Final

from keyproxy.platform import clock
from keyproxy.ports.tools import UpstreamCredential
from keyproxy.process.providers.watched_file import WatchedFile
from keyproxy.store.provider_keys.credential_header import CredentialHeader, read_secret

#: How long the secret before the newest one stays in memory.
_PREVIOUS_SECONDS: Final = 24 * 3600.0


class SecretFile:
    """Credentials from one file. `since_wall_seconds`: when the newest secret was written."""

    def __init__(self, path: str, what: str, header: CredentialHeader) -> None:
        """`what`: the name of the file in messages."""
        self.file: Final = WatchedFile(path, what, self._take)
        self.since_wall_seconds = 0.0
        self._header = header
        self._secret = b""
        self._newest: UpstreamCredential | None = None
        self._previous: UpstreamCredential | None = None
        self._previous_until_mono = 0.0

    def credential(self, mono: float) -> UpstreamCredential | None:
        """The newest secret, unless the upstream has just refused it, and not the one before. None: none was read."""
        newest = self._newest
        if newest is None or newest.refused_until_mono_seconds <= mono:
            return newest
        previous = self._previous
        if previous is None or mono >= self._previous_until_mono or not previous.can_replace(newest, mono):
            return newest
        return previous

    def forget_previous(self, mono: float) -> None:
        """Forget the secret before the newest one once its day is over."""
        if mono >= self._previous_until_mono:
            self._previous = None

    def _take(self, content: bytes, modified_wall_seconds: float) -> None:
        secret = read_secret(content)
        if secret == self._secret:
            return
        self._previous, self._previous_until_mono = self._newest, clock.monotonic() + _PREVIOUS_SECONDS
        self._secret, self._newest = secret, self._header.credential(secret)
        self.since_wall_seconds = modified_wall_seconds
