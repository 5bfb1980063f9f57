"""The signed assertion of the identity that a request goes upstream with.

It is signed once per identity, and again when half of its life is over or the configuration has changed.
"""

from __future__ import annotations

from keyproxy.model import Grant, Permit
from keyproxy.ports.gate import Assertions
from keyproxy.reasons import Refusal


def unsigned_because(assertions: Assertions, permit: Permit, now: float) -> Refusal | None:
    """Sign the identity of a request if it has no assertion that may be sent now. Returns why that is impossible, None
    if there is one. On a public route there is no identity to sign.

    `now`: monotonic seconds.
    """
    grant = permit.grant
    if not isinstance(grant, Grant):
        return None
    cached = grant.identity.assertion
    if cached.signed_by == assertions.number and now < cached.renew_mono_seconds:
        return None
    try:
        assertions.sign(grant.identity, now)
    except Refusal as refusal:
        return refusal
    return None
