"""The header fields that repeat parts of an MCP message: they are compared with it, and decide nothing.

https://modelcontextprotocol.io/specification/2026-07-28/basic/transports/streamable-http, Request Metadata.
"""

from __future__ import annotations

import binascii
import re
from typing import Final

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.mypyc_compat import mypyc_attr

_VERSION: Final = b"mcp-protocol-version"
_METHOD: Final = b"mcp-method"
_NAME: Final = b"mcp-name"

_START: Final = b"mcp"
_LF: Final = 0x0A
_OWS: Final = b" \t\r"

#: What a field value may consist of. RFC 9110 section 5.5, without the obsolete bytes.
_VISIBLE: Final = re.compile(rb"[\t\x20-\x7e]*+")
_ENCODED_START: Final = b"=?base64?"
_ENCODED_END: Final = b"?="


@mypyc_attr(acyclic=True)
class McpHeaders:
    """The values of the fields; None: absent. `has_versions`, `has_methods`, `has_names`: the field is repeated."""

    __slots__ = ("has_methods", "has_names", "has_versions", "method", "name", "version")

    def __init__(self) -> None:
        self.version: bytes | None = None
        self.method: bytes | None = None
        self.name: bytes | None = None
        self.has_versions = False
        self.has_methods = False
        self.has_names = False


def mcp_headers(block: bytes) -> McpHeaders:
    """Find the fields among these header lines, each ended by CR LF.

    Raises a Refusal (REQUEST_MALFORMED) for a name with `_` or `.`, which some servers take for the one with `-`.
    """
    found = McpHeaders()
    lines = block.lower()
    at = lines.find(_START)
    while at >= 0:
        end = lines.find(b"\n", at)
        if end < 0:
            end = len(lines)
        if at == 0 or lines[at - 1] == _LF:
            colon = lines.find(b":", at, end)
            name = lines[at : max(at, colon)]
            if name == _VERSION:
                found.has_versions = found.version is not None
                found.version = block[colon + 1 : end].strip(_OWS)
            elif name == _METHOD:
                found.has_methods = found.method is not None
                found.method = block[colon + 1 : end].strip(_OWS)
            elif name == _NAME:
                found.has_names = found.name is not None
                found.name = block[colon + 1 : end].strip(_OWS)
            elif name.replace(b"_", b"-").replace(b".", b"-") in (_VERSION, _METHOD, _NAME):
                raise malformed("A header name of MCP is spelled with '_' or '.'.")
        at = lines.find(_START, end)
    return found


def is_value(field: bytes, value: str) -> bool:
    """Whether a field has this value, as it is."""
    return field == value.encode("utf-8") and _VISIBLE.fullmatch(field) is not None


def is_encoded_value(field: bytes, value: str) -> bool:
    """Whether a field has this value, as it is or in base64 between the marks for it."""
    if not (field.startswith(_ENCODED_START) and field.endswith(_ENCODED_END)):
        return is_value(field, value)
    encoded = field[len(_ENCODED_START) : -len(_ENCODED_END)]
    # Compared encoded: a decoder might accept further spellings.
    return encoded == binascii.b2a_base64(value.encode("utf-8"), newline=False)
