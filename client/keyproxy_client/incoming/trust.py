"""Trust rules: which requests may state an identity. No rule trusts every request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from keyproxy_client.incoming.assertions import AssertionVerifier
from keyproxy_client.incoming.peers import LOOPBACK_NETWORKS, NetworkPeers, UnixPeers


class Trust:
    """Which requests to trust: `Trust.unix()`, `Trust.loopback()` or `Trust.signed(...)`.

    Either `peers` decides by the connection alone, or `verifier` by a signed assertion in each request.
    """

    __slots__ = ("_peers", "verifier")

    def __init__(
        self, *, peers: UnixPeers | NetworkPeers | None = None, verifier: AssertionVerifier | None = None
    ) -> None:
        if (peers is None) == (verifier is None):
            raise TypeError("use Trust.unix(), Trust.loopback() or Trust.signed(...)")
        self._peers: Final = peers
        self.verifier: Final = verifier

    @classmethod
    def unix(cls) -> Trust:
        """Trust requests that come by a unix socket. Its file mode must admit keyproxy alone."""
        return cls(peers=UnixPeers())

    @classmethod
    def loopback(cls, networks: Iterable[str] = LOOPBACK_NETWORKS) -> Trust:
        """Trust peers in these networks. All processes with an address in them can then state identities.

        Raises ValueError for invalid networks, and for those that are larger than any private one.
        """
        return cls(peers=NetworkPeers(networks))

    @classmethod
    def signed(cls, jwks_url: str, issuer: str = "keyproxy", audience: str = "upstream") -> Trust:
        """Trust requests with an assertion that keyproxy signed, from any peer. Needs the extra `signed`.

        `jwks_url`: `/jwks.json` of keyproxy's ops listener; `issuer`, `audience`: `access.issuer` and
        `access.assertion_audience` of the proxy.
        """
        return cls(verifier=AssertionVerifier(jwks_url, issuer=issuer, audience=audience))

    def peer_is_trusted_asgi(self, scope: Mapping[str, Any], forwarding: Iterable[str | bytes] | None) -> bool:
        """Whether the connection alone makes a request trusted. `forwarding`: its Forwarded, X-Forwarded-For, -Port."""
        return self._peers is not None and self._peers.trusts_asgi(scope, forwarding)

    def peer_is_trusted_wsgi(self, environ: Mapping[str, Any], forwarding: Iterable[str | bytes] | None) -> bool:
        """Like `peer_is_trusted_asgi`."""
        return self._peers is not None and self._peers.trusts_wsgi(environ, forwarding)

    def __repr__(self) -> str:
        return f"Trust({self._peers or self.verifier!r})"
