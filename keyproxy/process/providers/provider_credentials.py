"""Chooses the credential of a request: that of its tenant, a shared one, or one of a file. Implements the port."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Final, Protocol

from keyproxy.model import Moment
from keyproxy.ports.tools import UpstreamCredential, UpstreamCredentials
from keyproxy.process.providers.secret_file import SecretFile
from keyproxy.reasons import Reason, Refusal


class StoredCredentials(Protocol):
    """The credentials in the store."""

    def find(self, provider: str, tenant_id: str, now: Moment, *, is_test: bool) -> UpstreamCredential | None:
        """That of the tenant, else the shared one; None if there are no rows. Raises Missing or a Refusal."""
        ...

    def since_wall(self, provider: str) -> float:
        """When the oldest one in use was first used; infinite without any."""
        ...


class Provider:
    """Where the secrets of one provider are. A file is None if it is not configured."""

    __slots__ = ("is_stored", "live_file", "test_file")

    def __init__(self, *, is_stored: bool, live_file: SecretFile | None, test_file: SecretFile | None) -> None:
        self.is_stored: Final = is_stored
        self.live_file: Final = live_file
        self.test_file: Final = test_file


class ProviderCredentials(UpstreamCredentials):
    """The credentials under one configuration. `lends_live`: test requests may use live secrets where no test one is."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        stored: StoredCredentials,
        *,
        lends_live: bool,
        failures: MutableMapping[str, int],
    ) -> None:
        """`failures`: counts by provider, continued over reloads."""
        self._providers = dict(providers)
        self._stored = stored
        self._lends_live = lends_live
        self._failures = failures

    def choose(
        self, provider: str, tenant_id: str, now: Moment, *, is_test: bool, is_first_lookup: bool = True
    ) -> UpstreamCredential:
        """The credential for a request of this tenant. Raises Missing or a Refusal."""
        source = self._providers[provider]
        found: UpstreamCredential | None
        if is_test:
            found = self._of_mode(provider, source, tenant_id, now, is_test=True)
            if found is None and self._lends_live:
                found = self._of_mode(provider, source, tenant_id, now, is_test=False)
        else:
            found = self._stored.find(provider, tenant_id, now, is_test=False) if source.is_stored else None
            if found is None and source.live_file is not None:
                found = source.live_file.credential(now.mono_seconds)
        if found is None:
            mode = "test" if is_test else "live"
            raise Refusal(Reason.UPSTREAM_CREDENTIAL_UNAVAILABLE, f"provider {provider}: no secret for {mode} requests")
        return found

    def _of_mode(
        self, provider: str, source: Provider, tenant_id: str, now: Moment, *, is_test: bool
    ) -> UpstreamCredential | None:
        if source.is_stored:
            found = self._stored.find(provider, tenant_id, now, is_test=is_test)
            if found is not None:
                return found
        file = source.test_file if is_test else source.live_file
        return None if file is None else file.credential(now.mono_seconds)

    def was_refused(self, credential: UpstreamCredential, now_mono: float) -> None:
        """The upstream has responded with 401: prefer another credential for a minute."""
        credential.was_refused(now_mono)
        self._failures[credential.provider] = self._failures.get(credential.provider, 0) + 1

    def ages(self, wall: float) -> dict[str, float]:
        """The age of each provider's oldest secret in use, in seconds; none for a provider whose secrets are unknown."""
        found = {}
        for name, source in self._providers.items():
            since = self._stored.since_wall(name) if source.is_stored else math.inf
            for file in (source.live_file, source.test_file):
                if file is not None:
                    since = min(since, file.since_wall_seconds)
            if since < math.inf:
                found[name] = max(0.0, wall - since)
        return found
