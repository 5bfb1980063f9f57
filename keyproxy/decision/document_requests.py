"""Respond to requests for documents that the proxy publishes itself, before routes and credentials are looked at."""

from __future__ import annotations

from typing import Final

from keyproxy.http.discovery.published_documents import PublishedDocuments
from keyproxy.model import Route
from keyproxy.ports.exchange import Exchange

#: For the records.
_ROUTE: Final = Route(name="/.well-known/oauth-protected-resource", is_public=True)


def respond(exchange: Exchange, documents: PublishedDocuments) -> bool:
    """Respond, if the request is for one of the documents. Return whether it is. Raises a Refusal for its method."""
    head = exchange.head
    if head is None or not documents.has(head.line):
        return False
    exchange.route = _ROUTE
    exchange.respond(documents.response(head))
    return True
