"""What there is to tell of an exchange: what the gateway found out about it, and what the recorder counts."""

from __future__ import annotations

from keyproxy.idempotency import Fingerprint
from keyproxy.model import ANSWERED, Ending, Identity, KeyDigest, Permit, Route, TokenUse
from keyproxy.reasons import Reason
from keyproxy.tokens.ask import TokenAsk
from keyproxy.tokens.meter import Meter


class Outcome:
    """What every exchange has when it begins. On the class, so that making one writes only what is its own."""

    digest: KeyDigest | None = None
    identity: Identity | None = None
    route: Route | None = None
    permit: Permit | None = None
    reason: Reason | None = None
    refusal_detail: str = ""
    ending: Ending = ANSWERED
    status: int = 0
    sent_mono: float = 0.0
    answered_mono: float = 0.0
    ended_mono: float = 0.0
    bytes_out: int = 0
    is_over: bool = False
    is_tunnel: bool = False
    ask: TokenAsk | None = None
    meter: Meter | None = None
    token_use: TokenUse | None = None
    is_estimated: bool = False
    fingerprint: Fingerprint | None = None
    block: bytes | None = None
    bytes_in: int = 0
    is_complete: bool = True

    def note_arrived(self, content: bytes, *, is_complete: bool) -> None:
        """So much more of the request's body has arrived, and whether that was the last."""
        self.bytes_in += len(content)
        self.is_complete = is_complete
        if self.fingerprint is not None:
            self.fingerprint.feed(content)
