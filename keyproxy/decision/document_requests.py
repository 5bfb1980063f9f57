"""Respond to requests for documents that the proxy publishes itself, before routes and credentials are looked at."""

from __future__ import annotations

from typing import Final

from keyproxy.http.discovery.published_documents import PublishedDocuments
from keyproxy.model import Route
from keyproxy.ports.exchange import Exchange

#: For the records.
_ROUTE: Final = Route(name="/.well-known/oauth-protected-resource", is_public=True)


def respond(exchange: Exchange, documents: PublishedDocuments) -> None:
    """Respond to a request with the target of a document. Raises a Refusal (METHOD_NOT_ALLOWED)."""
    head = exchange.head
    if head is None:
        return
    exchange.route = _ROUTE
    exchange.respond(documents.response(head))
