"""The ports to approvals and consents, and to the credentials of upstreams."""

from __future__ import annotations

from typing import Final, NamedTuple

from keyproxy.ai.tools.tool_call import ToolClaim
from keyproxy.model import Identity, Moment, TimeBudget
from keyproxy.mypyc_compat import mypyc_attr

#: How long another credential is preferred after the upstream has refused one.
_REFUSED_SECONDS: Final = 60.0

#: How long the response to a request that tries a credential is awaited before another request tries it.
_TRIAL_SECONDS: Final = 10.0

#: The first status of errors.
_ERRORS: Final = 400


class ApprovalRequest(NamedTuple):
    """A call that needs an approval. `digest`: what it is bound to, 32 bytes. `kind`: the tool's `approval`.

    `summary`: what the approver sees, a JSON object of at most 8,192 bytes without secrets. `client`: the client's
    address as it may be recorded, None for none. `key_hint` is part of the summary that the store adds.
    """

    digest: bytes
    identity: Identity
    tool: str
    kind: str
    summary: bytes
    client: str | None


@mypyc_attr(allow_interpreted_subclasses=True)
class Approvals:
    """Approvals of calls and consents of users."""

    def has_consent(self, identity: Identity, tool: str, now: Moment, *, is_first_lookup: bool = True) -> bool:
        """Whether the user has consented to this tool for the agent of the identity, or any; from memory. Never waits.

        Raises Missing if the store has to be queried, a Refusal (APPROVALS_UNAVAILABLE) if it cannot be queried now.
        """
        raise NotImplementedError

    async def claim(self, request: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        """Claim the approval of this call, which no other request can use then. Without one, request it.

        Raises a Refusal: APPROVAL_REQUIRED or APPROVAL_DENIED, with the approval as members; APPROVALS_UNAVAILABLE if
        the store does not respond. If the reply to a claim was lost, it is given back.
        """
        raise NotImplementedError

    def give_back(self, claim: ToolClaim) -> None:
        """Restore a claimed approval, of which nothing was sent upstream. Never waits; retried until its expiry."""
        raise NotImplementedError


class UpstreamCredential:
    """The credential of one upstream, as header line. `number` differs from that of any other one in this process.

    `replaces`: the name of the client's lines that it replaces, in canonical form; empty if none of them is forwarded.
    `refused_until_mono_seconds`: until then another credential is preferred, because the upstream has refused this one.
    """

    __slots__ = (
        "_accepted_mono_seconds",
        "_refused_since_mono_seconds",
        "_tried_until_mono_seconds",
        "line",
        "number",
        "provider",
        "refused_until_mono_seconds",
        "replaces",
    )

    def __init__(self, provider: str, number: int, line: bytes, replaces: bytes = b"") -> None:
        self.provider = provider
        self.number = number
        self.line = line
        self.replaces = replaces
        self.refused_until_mono_seconds = 0.0
        self._refused_since_mono_seconds = 0.0
        #: When the last request that the upstream has accepted with this credential was sent.
        self._accepted_mono_seconds = 0.0
        #: Until then a response to a request with this credential is awaited.
        self._tried_until_mono_seconds = 0.0

    def note_sent(self, now_mono: float) -> None:
        """A request with this credential is sent."""
        self._tried_until_mono_seconds = now_mono + _TRIAL_SECONDS

    def note_response(self, status: int, sent_mono: float) -> None:
        """The upstream has responded, other than with 401, to a request that was sent then."""
        self._tried_until_mono_seconds = 0.0
        # Servers may reject an invalid request before they read its credential.
        if status < _ERRORS:
            self._accepted_mono_seconds = sent_mono

    def was_refused(self, now_mono: float) -> None:
        """The upstream has responded with 401: prefer another credential for a minute."""
        if self.refused_until_mono_seconds <= now_mono:
            self._refused_since_mono_seconds = now_mono
        self.refused_until_mono_seconds = now_mono + _REFUSED_SECONDS

    def can_replace(self, newer: UpstreamCredential, now_mono: float) -> bool:
        """Whether to use this one while a newer one counts as refused.

        Clients can provoke a 401, and this one may have been withdrawn since: until the upstream has accepted it, it is
        tried by one request at a time, while the others are sent with the newer one.
        """
        if self.refused_until_mono_seconds > now_mono:
            return False
        if self._accepted_mono_seconds > newer._refused_since_mono_seconds:
            return True
        return self._tried_until_mono_seconds <= now_mono

    def __repr__(self) -> str:
        return f"UpstreamCredential({self.provider!r}, {self.number})"


@mypyc_attr(allow_interpreted_subclasses=True)
class UpstreamCredentials:
    """The credentials with which the proxy presents itself to upstreams."""

    def choose(
        self, provider: str, tenant_id: str, now: Moment, *, is_test: bool, is_first_lookup: bool = True
    ) -> UpstreamCredential:
        """The credential for a request of this tenant, from memory. Never waits.

        Raises Missing if the store has to be queried, a Refusal (UPSTREAM_CREDENTIAL_UNAVAILABLE) if there is none
        that is usable, or the store cannot be queried now.
        """
        raise NotImplementedError

    def was_refused(self, credential: UpstreamCredential, now_mono: float) -> None:
        """The upstream has responded with 401: prefer another credential for a minute. Never waits."""
        raise NotImplementedError
