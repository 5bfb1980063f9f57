"""`Idempotency-Key`: recognise a retried request, so that it is charged once.

A fingerprint is a digest of tenant, user, mode, Idempotency-Key, method, target, the agents and the whole body. So the
same key with a different body is a different request, and a client that sends the same key with every request is charged
for each. The user is the one that the request is made for; a renewed token of the same agent retries the same request.
Header fields are excluded, since dates and trace ids differ between attempts. The key itself is not stored anywhere, nor
kept in memory beyond the request's head.

The body is digested as it passes through, without buffering.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from keyproxy.http_messages import RequestHead
from keyproxy.model import Identity
from keyproxy.reasons import SPENT, Reason

#: The header's name, in lower case.
NAME: Final = b"idempotency-key"

#: 1 to 255 visible characters; quoted, as in the draft of the header, or bare, as most clients send it.
_SANE = re.compile(rb"(?:^|\n)" + NAME + rb":[ \t]*([!-~]{1,255})[ \t]*\r\n", re.IGNORECASE)


class Fingerprint:
    """The fingerprint of a request, updated with the body as it arrives.

    `paid`: the tokens that an earlier attempt was charged; None unless a lookup has found one.
    """

    __slots__ = ("_body", "_request", "is_looked_up", "paid")

    def __init__(self, identity: Identity, head: RequestHead, key: bytes) -> None:
        self._request = hashlib.sha256()
        names = (identity.tenant_id, identity.user_id, identity.mode)
        parts = [*(name.encode("utf-8") for name in names), key, head.line.method, head.line.target]
        if identity.agent_token is not None:
            parts += [agent.encode("utf-8") for agent in identity.agent_token.agents]
        for part in parts:
            # With length prefixes, no two requests produce the same bytes.
            self._request.update(b"%d:%b" % (len(part), part))
        self._body = hashlib.sha256()
        self.is_looked_up = False
        self.paid: int | None = None

    def feed(self, content: bytes) -> None:
        """Update with the next part of the body."""
        self._body.update(content)

    def digest(self) -> bytes:
        """The digest, 32 bytes. Meaningful only after the whole body was fed."""
        request = self._request.copy()
        request.update(self._body.digest())
        return request.digest()

    def may_be_paid(self, reason: Reason) -> bool:
        """Whether a refusal for this reason is provisional, because an earlier charge has not been looked up yet."""
        return reason in SPENT and not self.is_looked_up


def fingerprint(identity: Identity, head: RequestHead, content: bytes) -> Fingerprint | None:
    """The fingerprint of a request; `content` is the part of the body that has arrived. None: charged without one.

    That applies to a request without a valid key or with several, and to a WebSocket handshake, which has no fixed end.
    """
    if not head.fields.has_idempotency_key or head.fields.opens_tunnel:
        return None
    found = _SANE.search(head.block)
    if found is None:
        return None
    made = Fingerprint(identity, head, found[1])
    made.feed(content)
    return made
