"""Known clients: programs whose redirect URIs the operator, or the package, has verified. They are listed by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from keyproxy.oauth import redirect_uris
from keyproxy.oauth.client import Client, ClientKind
from keyproxy.oauth.client_ids import LISTED_PREFIX


@dataclass(frozen=True, slots=True)
class KnownClient:
    """One known client. `{}` in a redirect URI stands for one path segment."""

    name: str
    redirect_uris: tuple[str, ...]
    client_ids: tuple[str, ...] = ()

    @property
    def hosts(self) -> frozenset[str]:
        """The hosts of the vendor: those of its https redirect URIs and client ids."""
        return frozenset(
            redirect_uris.host(uri) for uri in (*self.redirect_uris, *self.client_ids) if uri.startswith("https:")
        )

    def presented_as(self, client_id: str) -> Client:
        """The client that a request with this id comes from."""
        return Client(LISTED_PREFIX + self.name, client_id, ClientKind.LISTED, self.name, self.redirect_uris)


class KnownClients:
    """All known clients of a configuration."""

    def __init__(self, clients: Iterable[KnownClient]) -> None:
        self.clients = tuple(clients)
        uris = [uri for client in self.clients for uri in client.redirect_uris]
        #: Private-use schemes that other clients may register too: a scheme does not identify a program.
        self.schemes = frozenset(redirect_uris.scheme(uri) for uri in uris) - {"https", "http"}
        self._by_id = {client_id: client for client in self.clients for client_id in client.client_ids}
        self._by_name = {LISTED_PREFIX + client.name: client for client in self.clients}

    def by_redirect_uri(self, uri: str) -> KnownClient | None:
        """The client with exactly this https redirect URI. Other schemes identify no client."""
        return self._with_uri(uri) if uri.startswith("https://") else None

    def by_client_id(self, client_id: str) -> KnownClient | None:
        """The client that uses this id."""
        return self._by_id.get(client_id)

    def by_row(self, client_id: str) -> KnownClient | None:
        """The client whose row has this id, `listed:<name>`."""
        return self._by_name.get(client_id)

    def has(self, uri: str) -> bool:
        """Whether a known client has this redirect URI, of any scheme."""
        return self._with_uri(uri) is not None

    def _with_uri(self, uri: str) -> KnownClient | None:
        return next((one for one in self.clients if redirect_uris.matches_any(one.redirect_uris, uri)), None)
