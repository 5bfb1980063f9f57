"""The call of a tool that one request makes."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.tools.tool import Tool
from keyproxy.model import Identity


class ToolClaim:
    """An approval that this request has claimed. `value`: the random 16 bytes that authorise giving it back."""

    __slots__ = ("approval_id", "value")

    def __init__(self, approval_id: str, value: bytes) -> None:
        self.approval_id: Final = approval_id
        self.value: Final = value


class ToolCall:
    """The tool that a request calls, and the approval that it uses.

    `digest`: the SHA-256 of the call, empty until it is needed. `claim`: None unless an approval was claimed, and after
    it was given back; `caller`: whose approval it is. `has_consent`: the user has consented to this tool. `lines`: the
    header lines that name the tool, and the approval if one was used, to the upstream.

    Requests share the call of a tool without approvals, of which nothing changes.
    """

    __slots__ = ("caller", "claim", "digest", "has_consent", "lines", "tool")

    def __init__(self, tool: Tool) -> None:
        self.tool: Final = tool
        self.digest = b""
        self.claim: ToolClaim | None = None
        self.caller: Identity | None = None
        self.has_consent = False
        self.lines = tool.line
