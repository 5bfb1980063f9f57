"""Read the message of a request to an MCP server: one JSON-RPC object, of which every server reads the same.

The body decides which tool is called. A member that counts must appear once, spelled exactly, because servers differ in
which of two they read, and some ignore case or end a name at a NUL. Header fields that repeat parts of the message must
agree with it, because a server may follow these.

https://modelcontextprotocol.io/specification has the versions. 2026-07-28 has no sessions: a client states the version
in every message, and repeats method and name in header fields.
"""

from __future__ import annotations

import re
from typing import Final

import orjson

from keyproxy.ai.requests.request_facts import ambiguous_type, malformed
from keyproxy.ai.requests.scan_faults import refusal_of
from keyproxy.ai.scanning.compact_values import compact_values
from keyproxy.ai.scanning.json_bounds import JsonBounds, JsonError, TooDenseError
from keyproxy.ai.scanning.member_scope import NO_MEMBERS, AmbiguousNameError, MemberScope, scope_of_paths
from keyproxy.ai.scanning.member_values import MemberValues
from keyproxy.ai.scanning.request_parts import DoubledNameError
from keyproxy.ai.scanning.request_scanner import RequestScanner
from keyproxy.ai.tools.mcp_headers import McpHeaders, is_encoded_value, is_value, mcp_headers
from keyproxy.http_messages import RequestHead
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

#: The method that calls a tool, and the one that lists them.
CALL: Final = "tools/call"
LIST: Final = "tools/list"

#: The codes of JSON-RPC, and of MCP since 2026-07-28.
NOT_JSON: Final = -32700
INVALID_REQUEST: Final = -32600
HEADER_MISMATCH: Final = -32020
UNSUPPORTED_VERSION: Final = -32022

#: Versions without sessions: each message states its version, and clients send no responses.
_STATELESS: Final = frozenset({"2026-07-28"})

_JSON: Final = b"application/json"
_VERSION_MEMBER: Final = "params._meta.io.modelcontextprotocol/protocolVersion"
#: The members that Mcp-Name repeats.
_NAMED_BY: Final = {CALL: "params.name", "prompts/get": "params.name", "resources/read": "params.uri"}

_SCOPE: Final[MemberScope] = scope_of_paths(
    [
        *((name,) for name in ("jsonrpc", "id", "method", "params", "result", "error")),
        *(("params", name) for name in ("name", "arguments", "uri", "_meta", "inputResponses", "requestState")),
        ("params", "_meta", "io.modelcontextprotocol/protocolVersion"),
    ],
    NO_MEMBERS,
)
_DEPTH_MAX: Final = 64
#: The work of one portion, in bytes of text: about two milliseconds.
_PORTION: Final = 131_072
#: A body up to this size is read at once: that costs no more than to wait for a turn.
AT_ONCE_BYTES: Final = 65_536

_ID_CHARACTERS_MAX: Final = 128
_INTEGER: Final = re.compile(rb"-?[0-9]{1,128}")
_METHOD: Final = re.compile(r"[!-~]{1,256}")
_TOOL: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")
#: The methods without their separators, in lower case: what a lenient server could compare.
_BARE: Final = {"toolscall": CALL, "toolslist": LIST}
#: A requested version that a refusal repeats. It is shorter than any key.
_REQUESTED: Final = re.compile(rb"[0-9A-Za-z.-]{1,32}")
_NULL: Final = b"null"


class McpRules:
    """How messages are read. `versions`: the accepted ones."""

    __slots__ = ("body_bytes_max", "bounds", "versions")

    def __init__(self, versions: tuple[str, ...], body_bytes_max: int) -> None:
        self.versions: Final = versions
        self.body_bytes_max: Final = body_bytes_max
        # No document has more values than bytes.
        self.bounds: Final = JsonBounds(body_bytes_max, body_bytes_max, _DEPTH_MAX)


@mypyc_attr(acyclic=True)
class McpMessage:
    """One message. `method` is empty for the response to a request of the server.

    `rpc_id`: the id of a request as JSON text, empty for a notification or response. `tool`: the name of the tool that is
    called; None: the message calls none. `version`: as the client states it, empty if it does not.
    """

    __slots__ = ("_members", "method", "rpc_id", "tool", "version")

    def __init__(self, method: str, rpc_id: bytes, tool: str | None, version: str, *, members: MemberValues) -> None:
        self.method: Final = method
        self.rpc_id: Final = rpc_id
        self.tool: Final = tool
        self.version: Final = version
        self._members: Final = members

    @property
    def params(self) -> bytes:
        """The JSON text of the parameters; empty without any."""
        members = self._members
        return members.raw("params") if isinstance(members.values.get("params"), dict) else b""

    def __repr__(self) -> str:
        return f"McpMessage({self.method!r}, {self.tool!r})"


class McpReading:
    """Reads the complete body of one POST in portions. `message` is set once `advance` has returned True.

    `rpc_id`: of the request, as soon as it is known; also if `advance` refuses it.
    """

    def __init__(self, head: RequestHead, body: bytes, rules: McpRules) -> None:
        """Raises a Refusal (BODY_TOO_LARGE), as `check_head` does."""
        check_head(head)
        if len(body) > rules.body_bytes_max:
            raise too_large(rules)
        self.message: McpMessage | None = None
        self.rpc_id = b""
        self._head: Final = head
        self._body: Final = body
        self._rules: Final = rules
        self._members = MemberValues(body)
        self._scanner: RequestScanner | None = None

    def advance(self) -> bool:
        """Read the next portion; return whether the message is read. Raises a Refusal (REQUEST_MALFORMED)."""
        if self.message is not None:
            return True
        try:
            if not self._read_members():
                return False
        except JsonError as fault:
            raise _coded(refusal_of(fault), NOT_JSON if _is_no_json(self._body) else INVALID_REQUEST) from None
        except (TooDenseError, AmbiguousNameError, DoubledNameError) as doubt:
            raise _coded(refusal_of(doubt), INVALID_REQUEST) from None
        self.message = self._read()
        return True

    def _read_members(self) -> bool:
        scanner = self._scanner
        if scanner is None:
            if len(self._body) <= AT_ONCE_BYTES:
                compact = compact_values(self._body, _SCOPE, _DEPTH_MAX)
                if compact is not None:
                    self._members = compact
                    return True
            scanner = self._scanner = RequestScanner(self._body, _SCOPE, self._rules.bounds, self._members)
        return scanner.advance(_PORTION) > 0

    def _read(self) -> McpMessage:
        members = self._members
        values = members.values
        if not members.is_object:
            raise malformed("The body must be one JSON object. A batch is not accepted.")
        if values.get("jsonrpc") != "2.0":
            raise malformed("'jsonrpc' must be \"2.0\".", "jsonrpc")
        rpc_id = _rpc_id(members)
        params = values.get("params", _NULL)
        if params != _NULL and not isinstance(params, dict):
            raise malformed("'params' must be an object.", "params")
        is_response = "method" not in values
        if is_response:
            self._check_response(rpc_id)
            method, tool = "", None
        else:
            self.rpc_id = rpc_id
            method = self._method()
            tool = self._tool(rpc_id) if method == CALL else None
        headers = mcp_headers(self._head.block)
        version = self._version(headers)
        if is_response and version in _STATELESS:
            raise malformed(f"Clients do not send responses in version {version}.")
        self._check_headers(headers, method, version)
        return McpMessage(method, self.rpc_id, tool, version, members=members)

    def _check_response(self, rpc_id: bytes) -> None:
        values = self._members.values
        if ("result" in values) == ("error" in values) or "params" in values:
            raise malformed("The body must be a request, a notification or a response.", "method")
        if not rpc_id:
            raise malformed("A response must have an 'id'.", "id")

    def _method(self) -> str:
        values = self._members.values
        method = values["method"]
        if not isinstance(method, str) or _METHOD.fullmatch(method) is None:
            raise malformed("'method' must be a string of up to 256 visible characters of ASCII.", "method")
        if "result" in values or "error" in values:
            raise malformed("A request has neither 'result' nor 'error'.", "method")
        if method not in (CALL, LIST):
            meant = _BARE.get(_SEPARATORS.sub("", method.lower()))
            if meant is not None:
                raise malformed(f"The method must be spelled exactly '{meant}'.", "method")
        return method

    def _tool(self, rpc_id: bytes) -> str:
        values = self._members.values
        if not rpc_id:
            raise malformed(f"'{CALL}' must have an 'id'.", "id")
        name = values.get("params.name")
        if not isinstance(name, str) or _TOOL.fullmatch(name) is None:
            raise malformed(
                "'params.name' must be the name of a tool: up to 128 letters, digits, '_', '.' and '-'.", "params.name"
            )
        if not isinstance(values.get("params.arguments", {}), dict):
            raise malformed("'params.arguments' must be an object.", "params.arguments")
        return name

    def _version(self, headers: McpHeaders) -> str:
        """The version of the message; empty if the client states none."""
        field = headers.version
        if _VERSION_MEMBER in self._members.values and not headers.has_versions:
            # Before its support: if the client states two versions, neither can be supported.
            stated = self._members.text(_VERSION_MEMBER)
            if field is None or stated is None or not is_value(field, stated):
                raise _mismatch("MCP-Protocol-Version", HEADER_MISMATCH)
        if field is None:
            return ""
        version = field.decode("latin-1")
        if headers.has_versions or version not in self._rules.versions:
            raise _unsupported(field, self._rules)
        return version

    def _check_headers(self, headers: McpHeaders, method: str, version: str) -> None:
        """Raise a Refusal unless the header fields agree with the message."""
        # No version defines these fields for a notification, which has no id.
        is_required = version in _STATELESS and bool(self.rpc_id)
        code = HEADER_MISMATCH if version in _STATELESS else INVALID_REQUEST
        if is_required and _VERSION_MEMBER not in self._members.values:
            raise _mismatch("MCP-Protocol-Version", code)
        if headers.has_methods or (is_required if headers.method is None else not is_value(headers.method, method)):
            raise _mismatch("Mcp-Method", code)
        member = _NAMED_BY.get(method)
        if headers.has_names:
            raise _mismatch("Mcp-Name", code)
        if member is None:
            return
        if headers.name is None:
            if is_required:
                raise _mismatch("Mcp-Name", code)
            return
        value = self._members.text(member)
        if value is None or not is_encoded_value(headers.name, value):
            raise _mismatch("Mcp-Name", code)


def parse_mcp(head: RequestHead, body: bytes, rules: McpRules) -> McpMessage:
    """The message of a complete body, read at once. Raises a Refusal (REQUEST_MALFORMED, BODY_TOO_LARGE)."""
    reading = McpReading(head, body, rules)
    while not reading.advance():
        pass
    assert reading.message is not None  # noqa: S101 - for the type checker: it is read
    return reading.message


def rpc_id_in(body: bytes) -> bytes:
    """The id of the request in a complete body, for the response to one that is refused; empty if none is found.

    A larger body is not read for it.
    """
    if len(body) > AT_ONCE_BYTES:
        return b""
    members = MemberValues(body)
    scanner = RequestScanner(body, _SCOPE, JsonBounds(AT_ONCE_BYTES, AT_ONCE_BYTES, _DEPTH_MAX), members)
    try:
        while scanner.advance(_PORTION) <= 0:
            pass
        return _rpc_id(members) if isinstance(members.values.get("method"), str) else b""
    except (JsonError, TooDenseError, AmbiguousNameError, DoubledNameError, Refusal):
        return b""


def check_head(head: RequestHead) -> None:
    """Raise a Refusal (REQUEST_MALFORMED) unless the body is JSON in UTF-8, and not encoded."""
    fields = head.fields
    if fields.media_type != _JSON:
        raise malformed("Content-Type must be application/json.")
    if not fields.has_clear_type:
        raise ambiguous_type()
    if fields.codings:
        raise malformed("The body must have no Content-Encoding.")


def too_large(rules: McpRules) -> Refusal:
    """The refusal of a body that is too large."""
    return Refusal(Reason.BODY_TOO_LARGE, f"a message of more than {rules.body_bytes_max} bytes")


def _rpc_id(members: MemberValues) -> bytes:
    """The id as JSON text; empty without one. Raises a Refusal."""
    value = members.values.get("id")
    if value is None:
        return b""
    if isinstance(value, str):
        is_valid = len(value) <= _ID_CHARACTERS_MAX
    else:
        is_valid = isinstance(value, bytes) and _INTEGER.fullmatch(value) is not None
    if not is_valid:
        raise malformed(f"'id' must be an integer, or a string of up to {_ID_CHARACTERS_MAX} characters.", "id")
    return members.raw("id")


def _unsupported(field: bytes, rules: McpRules) -> Refusal:
    sentence = "MCP-Protocol-Version must appear once, with a supported version."
    requested = field.decode("ascii") if _REQUESTED.fullmatch(field) else ""
    return Refusal(
        Reason.REQUEST_MALFORMED,
        sentence,
        caller_text=sentence,
        replaces_sentence=True,
        members={"supported": list(rules.versions), "requested": requested},
        rpc_code=UNSUPPORTED_VERSION,
    )


def _mismatch(field: str, code: int) -> Refusal:
    refusal = malformed(f"The header {field} must appear once and agree with the message.")
    return _coded(refusal, code)


def _coded(refusal: Refusal, code: int) -> Refusal:
    refusal.rpc_code = code
    return refusal


def _is_no_json(body: bytes) -> bool:
    """Whether a body that was refused is not JSON. A large one is not parsed again."""
    if len(body) > AT_ONCE_BYTES:
        return True
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return True
    return False
