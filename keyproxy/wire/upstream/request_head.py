"""The head of a request as it goes upstream, with the signed assertion of its identity.

The assertion is signed once per identity, and again when half of its life is over or the configuration has changed.
"""

from __future__ import annotations

from keyproxy.http import headers
from keyproxy.http.forwarding import Forwarding
from keyproxy.http_messages import RequestHead
from keyproxy.model import Grant, Permit
from keyproxy.ports import Assertions, Exchange
from keyproxy.reasons import Refusal
from keyproxy.wire.context import ServerContext


def request_head(
    exchange: Exchange,
    head: RequestHead,
    permit: Permit,
    server: ServerContext,
    *,
    forwarding: Forwarding,
    host: bytes,
    now: float,
) -> bytes:
    """The head of a request that is sent now. Raises a Refusal if there is no key to sign its assertion with.

    `now`: monotonic seconds.
    """
    assertions, grant, line = server.assertions, permit.grant, b""
    if assertions is not None and isinstance(grant, Grant):
        cached = grant.identity.assertion
        if cached.signed_by != assertions.number or now >= cached.renew_mono_seconds:
            assertions.sign(grant.identity, now)
        line = cached.line
    return headers.build_upstream_head(
        head,
        head.block if exchange.block is None else exchange.block,
        permit,
        request_id=exchange.request_id,
        forwarding=forwarding,
        host=host,
        assertion=line,
    )


def unsigned_because(assertions: Assertions, permit: Permit, server: ServerContext) -> Refusal | None:
    """Sign an identity that never was, before a connection is taken. Returns why that is impossible, else None."""
    grant = permit.grant
    if not isinstance(grant, Grant) or grant.identity.assertion.signed_by == assertions.number:
        return None
    try:
        assertions.sign(grant.identity, server.clock())
    except Refusal as refusal:
        return refusal
    return None
