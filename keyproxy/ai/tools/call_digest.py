"""The digest of a tool's call: what an approval is bound to.

An approval counts for exactly one call of one caller: the digest covers the caller, the route, the tool, and all that
the upstream acts on. Request ids, sessions and trace ids are not part of it, so that a restarted agent finds its
approval again.
"""

from __future__ import annotations

import hashlib
from typing import Final

from keyproxy.ai.tools.canonical_json import CanonicalJson
from keyproxy.ai.tools.tool import Tool
from keyproxy.http_messages import RequestHead
from keyproxy.model import Identity

#: What the members of `_meta` describe is the transport of a call, not the call.
_META: Final = b'"_meta"'
_TRANSPORT: Final = frozenset({b'"progressToken"', b'"traceparent"', b'"tracestate"', b'"baggage"'})
_PROTOCOL: Final = b'"io.modelcontextprotocol/'

#: The header lines with the values of parameters that intermediaries read, in lower case.
_PARAMETER: Final = b"mcp-param-"

_CONTENT_TYPE: Final = b"content-type"
_CONTENT_ENCODING: Final = b"content-encoding"


def canonical_params(params: bytes) -> CanonicalJson:
    """The reader of the `params` of an MCP call, whose canonical form is part of the digest."""
    return CanonicalJson(params, _META, _is_transport)


def http_digest(identity: Identity, route_name: str, tool: Tool, *, head: RequestHead, body: bytes) -> bytes:
    """The digest of a call on the route of an HTTP tool, 32 bytes. `body`: as it was sent."""
    fields = _fields(head.block)
    digest = _begun(b"http", identity, route_name, tool)
    _add(digest, head.line.method)
    _add(digest, head.line.target)
    for name in (_CONTENT_TYPE, _CONTENT_ENCODING):
        values = [value for field, value in fields if field == name]
        _add(digest, b"%d" % len(values))
        for value in values:
            _add(digest, value)
    _add(digest, body)
    return digest.digest()


def mcp_digest(identity: Identity, route_name: str, tool: Tool, *, head: RequestHead, params: bytes) -> bytes:
    """The digest of a call by MCP, 32 bytes. `params`: in canonical form, see `canonical_params`."""
    lines = [field for field in _fields(head.block) if _spelt_plainly(field[0]).startswith(_PARAMETER)]
    # The order of names is that of a library; of lines of one name, a server may read the first or the last.
    lines.sort(key=_name)
    digest = _begun(b"mcp", identity, route_name, tool)
    _add(digest, b"%d" % len(lines))
    for name, value in lines:
        _add(digest, name)
        _add(digest, value)
    _add(digest, params)
    return digest.digest()


def _begun(protocol: bytes, identity: Identity, route_name: str, tool: Tool) -> hashlib._Hash:
    agents = () if identity.agent_token is None else identity.agent_token.agents
    names = (
        identity.tenant_id,
        identity.user_id,
        identity.lineage or identity.key_id,
        # An agent may give a token that it mints another agent's name, so those above it count. No name has a slash.
        "/".join(dict.fromkeys(agents)),
        identity.mode,
        route_name,
        tool.name,
        tool.approval,
    )
    digest = hashlib.sha256()
    _add(digest, protocol)
    for name in names:
        _add(digest, name.encode("utf-8"))
    return digest


def _add(digest: hashlib._Hash, part: bytes) -> None:
    """With length prefixes, no two calls produce the same bytes."""
    digest.update(b"%d:" % len(part))
    digest.update(part)


def _fields(block: bytes) -> list[tuple[bytes, bytes]]:
    """The header fields, their names in lower case."""
    lines = [line.partition(b":") for line in block.split(b"\r\n") if line]
    return [(name.lower(), value.strip(b" \t")) for name, _, value in lines]


def _name(field: tuple[bytes, bytes]) -> bytes:
    return field[0]


def _spelt_plainly(name: bytes) -> bytes:
    """A name in lower case as CGI-like servers compare it."""
    return name.replace(b"_", b"-").replace(b".", b"-")


def _is_transport(name: bytes) -> bool:
    return name in _TRANSPORT or name.startswith(_PROTOCOL)
