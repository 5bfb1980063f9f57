"""What tools, and routes that call them, contradict. Each function yields one sentence per fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

from keyproxy.ai.tools.tool import CREDENTIALS, MCP, NO_APPROVAL, OAUTH_CREDENTIAL
from keyproxy.config.route_access import PUBLIC, default_of
from keyproxy.config.tools.tool_settings import ToolRow

#: Keys of a route that depend on the caller's identity.
_NEEDS_IDENTITY: Final = ("tool", "protocol", "filter_tools_list", "provider")


def tool_faults(tools: Sequence[ToolRow], *, verifies_certificates: bool, accepts_oauth: bool) -> Iterator[str]:
    """The faults of `[[tools]]`. `verifies_certificates`: of clients, on the proxied port. `accepts_oauth`: tokens."""
    occurring = [kind for kind in CREDENTIALS if accepts_oauth or kind != OAUTH_CREDENTIAL]
    names, mcp_names = [row.name for row in tools], [row.mcp or row.name for row in tools]
    for number, row in enumerate(tools, start=1):
        before = number - 1
        if row.name in names[:before]:
            yield f"tools[{number}].name: {row.name!r} is configured twice"
        if mcp_names[before] in mcp_names[:before]:
            other = mcp_names.index(mcp_names[before]) + 1
            yield f"tools[{number}].mcp: {mcp_names[before]!r} is the name of tools[{other}] in `tools/call` too"
        if row.client_certificate and not verifies_certificates:
            yield (
                f"tools[{number}].client_certificate: needs listen.tls_client_ca_file,"
                " without which client certificates are not verified"
            )
        if row.credentials and not set(occurring).intersection(row.credentials):
            kinds = " or ".join(repr(kind) for kind in row.credentials)
            yield (
                f"tools[{number}].credentials: no credential of the kind {kinds} can occur without oauth.resource;"
                " set that, or add one of 'key', 'agent'"
            )


def route_faults(rows: Sequence[Any], tools: Sequence[ToolRow]) -> Iterator[str]:
    """The faults of the `RouteRow`s, as far as they concern tools."""
    names = {row.name for row in tools}
    for number, row in enumerate(rows, start=1):
        place = f"routes[{number}]"
        if row.tool and row.tool not in names:
            yield f"{place}.tool: there is no tool {row.tool!r} in [[tools]]"
        if row.tool and row.protocol:
            yield f"{place}.tool: must not be set with protocol = {row.protocol!r}, by which requests name their tool"
        if row.protocol == MCP and not tools:
            yield f"{place}.protocol: 'mcp' needs [[tools]]: without any, every call is refused"
        if row.error_shape == MCP and row.protocol != MCP:
            yield f"{place}.error_shape: 'mcp' needs protocol = 'mcp'"
        if row.filter_tools_list and row.protocol != MCP:
            yield f"{place}.filter_tools_list: needs protocol = 'mcp'"
        for key in dataclasses.fields(row):
            if key.name not in _NEEDS_IDENTITY or getattr(row, key.name) == default_of(key):
                continue
            if row.access == PUBLIC:
                yield f"{place}.{key.name}: must not be set with access = 'public', which checks no key"
            if row.serves:
                yield f"{place}.{key.name}: must not be set with serves = {row.serves!r}: nothing goes upstream"


def body_faults(
    rows: Sequence[Any], tools: Sequence[ToolRow], *, bytes_max: int, memory_bytes_max: int
) -> Iterator[str]:
    """The fault of `mcp.body_bytes_max`, if bodies are read up to it: `memory_bytes_max` is for all bodies together."""
    approved = {row.name for row in tools if row.approval != NO_APPROVAL}
    reads = any(row.protocol == MCP or row.tool in approved for row in rows)
    if reads and bytes_max > memory_bytes_max:
        yield "mcp.body_bytes_max: must not be more than tokens.body_memory_max, the memory of all bodies that are read"
