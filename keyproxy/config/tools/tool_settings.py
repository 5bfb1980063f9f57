"""Tools, the tables `[mcp]` and `[approvals]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keyproxy.ai.tools.tool import APPROVALS, CONSENT, CREDENTIALS, NO_APPROVAL, Tool
from keyproxy.config import value_checks
from keyproxy.config.value_checks import one_of, within
from keyproxy.config.value_types import setting

#: The versions of MCP that are understood. https://modelcontextprotocol.io/specification/versioning
MCP_VERSIONS: Final = ("2025-06-18", "2025-11-25", "2026-07-28")


def _known_versions(value: list[str]) -> str | None:
    unknown = [version for version in value if version not in MCP_VERSIONS]
    if not value:
        return "must not be empty"
    return f"unknown version {unknown[0]!r}; known are {', '.join(MCP_VERSIONS)}" if unknown else None


def _known_credentials(value: list[str]) -> str | None:
    unknown = [kind for kind in value if kind not in CREDENTIALS]
    return f"unknown kind {unknown[0]!r}; known are {', '.join(CREDENTIALS)}" if unknown else None


@dataclass(frozen=True, slots=True)
class McpSettings:
    """Routes with `protocol = "mcp"`."""

    versions: list[str] = setting([*MCP_VERSIONS], _known_versions)
    #: Of a POST to such a route, and of any call of a tool that needs an approval.
    body_bytes_max: int = setting(4_194_304, within(1024, 1 << 30))


@dataclass(frozen=True, slots=True)
class ApprovalSettings:
    """Approvals of calls of tools. Without a URL no webhook is sent."""

    #: The time to decide.
    pending_seconds: int = setting(900, within(10, 604_800))
    #: The time to use an approval.
    use_seconds: int = setting(300, within(10, 604_800))
    #: Undecided approvals per user.
    pending_max: int = setting(20, within(1, 10_000))
    webhook_url: str = setting("", value_checks.webhook_url)
    webhook_secret: str = setting("", value_checks.webhook_secret, secret=True)


@dataclass(frozen=True, slots=True)
class ToolRow:
    """One row of `tools`, as configured."""

    name: str = setting("", value_checks.tool_name)
    mcp: str = setting("", value_checks.optional_tool_name)
    scopes: list[str] = setting([], value_checks.route_scopes)
    credentials: list[str] = setting([], _known_credentials)
    client_certificate: bool = setting(False)
    approval: str = setting(NO_APPROVAL, one_of(*APPROVALS))

    def tool(self, header_prefix: str) -> Tool:
        """The tool of this row. `header_prefix`: of the header that names it to the upstream."""
        return Tool(
            self.name,
            self.mcp or self.name,
            frozenset(self.scopes),
            frozenset(self.credentials),
            self.client_certificate,
            self.approval,
            f"{header_prefix}Tool: {self.name}\r\n".encode("ascii"),
        )


def consent_warnings(tools: Sequence[ToolRow], name: str) -> list[str]:
    """Warnings about a consent to a tool that is not configured, or for which a consent does not suffice."""
    tool = next((row for row in tools if row.name == name), None)
    if tool is None:
        return [f"no row of [[tools]] has the name {name!r}: the consent has no effect"]
    if tool.approval != CONSENT:
        return [f"the tool {name!r} has approval = {tool.approval!r}: the consent has no effect"]
    return []
