"""Documents that the proxy publishes itself. Every client may read them, whatever the routes and its credentials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from keyproxy.http.own_response import OwnResponse
from keyproxy.http_messages import RequestHead
from keyproxy.reasons import Reason, Refusal

_ALLOWED: Final = "GET, HEAD, OPTIONS"

#: Scripts of any origin may read the documents, and send what they like with the request: it has no effect.
_CROSS_ORIGIN: Final = b"Access-Control-Allow-Origin: *\r\n"
_FIELDS: Final = b"Content-Type: application/json\r\nCache-Control: no-store\r\n" + _CROSS_ORIGIN
_PREFLIGHT: Final = OwnResponse(
    204,
    b"No Content",
    b"Allow: %b\r\n%bAccess-Control-Allow-Methods: %b\r\nAccess-Control-Allow-Headers: *\r\n"
    b"Access-Control-Max-Age: 86400\r\n" % (_ALLOWED.encode("ascii"), _CROSS_ORIGIN, _ALLOWED.encode("ascii")),
    b"",
)


class PublishedDocument(NamedTuple):
    """A JSON document. `target`: of requests for it, encoded as in the URL; `host`: their Host."""

    host: str
    target: str
    content: bytes


class PublishedDocuments:
    """All published documents. If several have one target, the Host selects, and else the first one counts."""

    __slots__ = ("_by_target", "targets")

    def __init__(self, documents: Sequence[PublishedDocument]) -> None:
        self._by_target: Final[dict[bytes, list[tuple[bytes, OwnResponse]]]] = {}
        for document in documents:
            response = OwnResponse(200, b"OK", _FIELDS, document.content)
            one = (document.host.lower().encode("ascii"), response)
            self._by_target.setdefault(document.target.encode("ascii"), []).append(one)
        #: The targets of all documents. None has a query, and a target with one is another one.
        self.targets: Final = frozenset(self._by_target)

    def response(self, head: RequestHead) -> OwnResponse:
        """The response to a request for a document. Raises a Refusal (METHOD_NOT_ALLOWED)."""
        method, found = head.line.method, self._by_target[head.line.target]
        if method == b"OPTIONS":
            return _PREFLIGHT
        if method not in (b"GET", b"HEAD"):
            raise Refusal(
                Reason.METHOD_NOT_ALLOWED,
                caller_text=f"This document supports {_ALLOWED}.",
                replaces_sentence=True,
                allow=_ALLOWED,
            )
        host = (head.fields.host or b"").lower()
        for name, response in found:
            if name == host:
                return response
        return found[0][1]


#: Nothing is published.
NO_DOCUMENTS: Final = PublishedDocuments(())
