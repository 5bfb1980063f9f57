"""A tool as configured: what a credential needs to call it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

#: The values of `approval`. CONSENT: the user's consent, or an approval of one call; HUMAN, ADMIN: an approval of each
#: call.
NO_APPROVAL: Final = "none"
CONSENT: Final = "consent"
HUMAN: Final = "human"
ADMIN: Final = "admin"
APPROVALS: Final = (NO_APPROVAL, CONSENT, HUMAN, ADMIN)

#: The kinds of credentials.
KEY_CREDENTIAL: Final = "key"
AGENT_CREDENTIAL: Final = "agent"
OAUTH_CREDENTIAL: Final = "oauth"
CREDENTIALS: Final = (KEY_CREDENTIAL, AGENT_CREDENTIAL, OAUTH_CREDENTIAL)

#: The protocol of a route whose tools are called by MCP.
MCP: Final = "mcp"


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """One row of `tools`. `name`: its label in records; `mcp`: its name in `tools/call`.

    All `scopes` are required. `credentials`: the accepted kinds, any if empty. `needs_certificate`: the client presents a
    certificate on this connection, which was verified. `approval`: one of APPROVALS. `line`: the header line that names
    it to the upstream. `has_approval`: its calls need one, or a consent.
    """

    name: str
    mcp: str
    scopes: frozenset[str] = frozenset()
    credentials: frozenset[str] = frozenset()
    needs_certificate: bool = False
    approval: str = NO_APPROVAL
    line: bytes = b""
    has_approval: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_approval", self.approval != NO_APPROVAL)
