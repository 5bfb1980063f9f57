"""The operator's policy for clients: which may register, which redirect hosts and documents are allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from keyproxy.oauth import redirect_uris
from keyproxy.oauth.client_document import DocumentUrl
from keyproxy.oauth.known_clients import KnownClients


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """The policy. It applies at each use of a client id, not only at registration.

    `registers_any`: any client may register; else only redirect URIs of known clients are accepted. `registers`: whether
    there is registration at all, and with it ids that encode their metadata. `redirect_hosts`, `document_hosts`: the
    allowed hosts of https redirect URIs and of documents, in lower case; empty: any.
    """

    known: KnownClients
    registers: bool = True
    registers_any: bool = True
    redirect_hosts: frozenset[str] = field(default_factory=frozenset)
    accepts_documents: bool = True
    document_hosts: frozenset[str] = field(default_factory=frozenset)

    def redirect_fault(self, uri: str) -> str | None:
        """What is wrong with a redirect URI of a client that is not known, as a predicate, or None."""
        fault = redirect_uris.fault(uri, self.known.schemes)
        if fault is not None or self.known.has(uri):
            return fault
        if self.redirect_hosts and uri.startswith("https:") and redirect_uris.host(uri) not in self.redirect_hosts:
            return "has a host that is not allowed here"
        return None

    def registration_fault(self, uris: Iterable[str]) -> str | None:
        """The first fault of the redirect URIs of a registration, as a sentence, or None."""
        for uri in uris:
            fault = self.redirect_fault(uri)
            if fault is None and not self.registers_any and not self.known.has(uri):
                fault = "is not that of a known client"
            if fault is not None:
                return f"redirect_uris: a URI {fault}"
        return None

    def allows_document(self, url: DocumentUrl) -> bool:
        """Whether documents of this host are accepted."""
        return self.accepts_documents and (not self.document_hosts or url.host in self.document_hosts)
