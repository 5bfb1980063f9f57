"""`Idempotency-Key`: what a request is known by when it is sent again, so that it is charged once.

A fingerprint is a digest of whose request it is, in which mode, the key that its client gave it, and what it asks for:
method, target, the whole body. So the same key with another request is another request, and a client that sends one key
with everything is charged for everything. Header fields are not part of it, since dates and trace ids differ from one
attempt to the next. The key itself is kept nowhere, not even in memory beyond the request's own head.

The body is digested as it passes; nothing is held back for it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from keyproxy.model import Identity, RequestHead
from keyproxy.reasons import SPENT, Reason

#: The header's name, in lower case.
NAME: Final = b"idempotency-key"

#: Visible characters, so many at most; quoted, as the draft of the header has it, or bare, as most clients send it.
_SANE = re.compile(rb"(?:^|\n)" + NAME + rb":[ \t]*([!-~]{1,255})[ \t]*\r\n", re.IGNORECASE)


class Fingerprint:
    """A request that can be recognised. Fed with its body as that arrives.

    `paid`: what it was charged in tokens when it came before; None unless the store was asked and knows it.
    """

    __slots__ = ("_body", "_request", "is_asked", "paid")

    def __init__(self, identity: Identity, head: RequestHead, key: bytes) -> None:
        self._request = hashlib.sha256()
        who = (identity.tenant_id, identity.user_id, identity.mode)
        for part in (*(name.encode("utf-8") for name in who), key, head.line.method, head.line.target):
            # Lengths first: no two requests run together into the same bytes.
            self._request.update(b"%d:%b" % (len(part), part))
        self._body = hashlib.sha256()
        self.is_asked = False
        self.paid: int | None = None

    def feed(self, content: bytes) -> None:
        """The next content of the body."""
        self._body.update(content)

    def digest(self) -> bytes:
        """32 bytes, of all that was fed. It means something only when that is the whole body."""
        request = self._request.copy()
        request.update(self._body.digest())
        return request.digest()

    def may_be_paid(self, reason: Reason) -> bool:
        """Whether such a refusal is not the last word, since nobody has looked yet whether it was charged before."""
        return reason in SPENT and not self.is_asked


def fingerprint(identity: Identity, head: RequestHead, content: bytes) -> Fingerprint | None:
    """The fingerprint of a request of which so much content has arrived. None: it is charged like any other.

    That is one without a sane key, with several, and a WebSocket handshake, which is no request that ends.
    """
    if not head.fields.has_idempotency_key or head.fields.opens_tunnel:
        return None
    found = _SANE.search(head.block)
    if found is None:
        return None
    made = Fingerprint(identity, head, found[1])
    made.feed(content)
    return made
