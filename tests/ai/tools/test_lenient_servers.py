"""No spelling, batch or header calls a tool that the proxy does not see, even of servers that read leniently."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.ai.tools.mcp_message import parse_mcp
from keyproxy.reasons import Refusal
from tests.ai.tools.test_mcp_message import RULES, head, lines

Pairs = list[tuple[str, Any]]


def _first(pairs: Pairs) -> dict[str, Any]:
    return dict(reversed(pairs))


def _last(pairs: Pairs) -> dict[str, Any]:
    return dict(pairs)


def _renamed(pairs: Iterable[tuple[str, Any]], rename: Callable[[str], str]) -> Pairs:
    return [(rename(name), value) for name, value in pairs]


def _case(name: str) -> str:
    return name.casefold()


def _until_nul(name: str) -> str:
    return name.partition("\0")[0]


def _stripped(name: str) -> str:
    return name.strip()


Reader = Callable[[Pairs], dict[str, Any]]


def _reader(keep: Reader, rename: Callable[[str], str]) -> Reader:
    return lambda pairs: keep(_renamed(pairs, rename))


#: How servers build an object from its members.
READERS = [_reader(keep, rename) for keep in (_first, _last) for rename in (str, _case, _until_nul, _stripped)]


def tools_called(body: bytes) -> set[str]:
    """The names of all tools that some server would call."""
    found: set[str] = set()
    for reader in READERS:
        try:
            document = json.loads(body, object_pairs_hook=reader)
        except (ValueError, RecursionError):
            continue
        for message in document if isinstance(document, list) else [document]:
            if not isinstance(message, dict) or not isinstance(message.get("method"), str):
                continue
            method = _until_nul(message["method"]).strip().casefold().strip("/").replace("//", "/")
            if method != "tools/call":
                continue
            params = message.get("params")
            name = params.get("name") if isinstance(params, dict) else None
            found.add(_until_nul(name).strip() if isinstance(name, str) else "?")
    return found


NAMES = ("jsonrpc", "id", "method", "params", "result", "name", "arguments", "_meta", "x")
SPELLINGS: tuple[Callable[[str], str], ...] = (
    str, str, str, str.upper, str.capitalize, lambda name: name + "\0", lambda name: name + "\0x",
    lambda name: f" {name}",
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    ["2.0", 1, "tools/call", "tools/list", "ping", "Tools/Call", "tools/call\0", "search", "run_shell", None, {}, []]
)
names = st.tuples(st.sampled_from(NAMES), st.sampled_from(SPELLINGS)).map(lambda one: one[1](one[0]))


class Members(list[tuple[str, Any]]):
    """An object whose names may repeat."""


def written(value: Any) -> str:
    if isinstance(value, Members):
        return "{" + ",".join(f"{json.dumps(name)}:{written(inner)}" for name, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


inner = st.lists(st.tuples(names, VALUES), max_size=3).map(Members)
usual_params = inner.map(lambda more: Members([("name", "search"), *more]))
usual = st.lists(st.tuples(names, VALUES | inner | usual_params), max_size=3)
messages = st.tuples(
    st.sampled_from(["tools/call", "ping", "Tools/call"]), usual_params | inner, usual, st.permutations(range(4))
).map(
    lambda one: Members(
        [
            *(
                [("jsonrpc", "2.0"), ("id", 1), ("method", one[0]), ("params", one[1])][place]
                for place in one[3]
            ),
            *one[2],
        ]
    )
)  # fmt: skip
bodies = (messages | st.lists(messages, max_size=2) | usual.map(Members)).map(lambda value: written(value).encode())


@example(b'{"jsonrpc":"2.0","id":1,"method":"ping","method\\u0000":"tools/call","params":{"name":"run_shell"}}')
@example(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","Name":"run_shell"}}')
@example(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search"},"Params":{"name":"run_shell"}}')
@example(b'[{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"run_shell"}}]')
@settings(max_examples=1_500, deadline=None)
@given(bodies)
def test_no_spelling_or_batch_calls_a_tool_that_the_proxy_does_not_see(body: bytes) -> None:
    try:
        message = parse_mcp(head(), body, RULES)
    except Refusal:
        return
    assert tools_called(body) == (set() if message.tool is None else {message.tool})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["Mcp-Method", "mcp-method", "Mcp_Method", "MCP.METHOD", "Mcp-Name", "mcp_name", "X-Mcp-Name"]),
    st.sampled_from(["tools/call", "Tools/Call", "run_shell", "search", "ping", "=?base64?cnVuX3NoZWxs?="]),
    st.sampled_from(["", "2025-06-18", "2025-11-25"]),
    st.sampled_from(["ping", "tools/call"]),
)
def test_no_header_names_another_call_than_the_message(name: str, value: str, version: str, method: str) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"name": "search"}}
    headers = {name: value, **({"MCP-Protocol-Version": version} if version else {})}
    try:
        parse_mcp(head(lines(headers)), json.dumps(body).encode(), RULES)
    except Refusal:
        return
    folded = name.lower().replace("_", "-").replace(".", "-")
    if folded == "mcp-method":
        assert value == method
    elif folded == "mcp-name" and method == "tools/call":
        assert value == "search"


def outcome(body: bytes) -> object:
    """What is read of a message, or why it is refused."""
    try:
        message = parse_mcp(head(), body, RULES)
    except Refusal as refusal:
        return refusal.detail, refusal.field, refusal.rpc_code
    return message.method, message.tool, message.rpc_id, message.version, message.params


@example(b'{"jsonrpc":"2.0","id":12345678901234567890123,"method":"ping"}')
@example(b'{"jsonrpc":"2.0","id":-0,"method":"ping","params":{"n":1e3}}')
@example(b'{"jsonrpc":"2.0","id":"a","method":"tools/call","params":{"name":"search","arguments":{"a":[1.50,[]]}}}')
@example('{"jsonrpc":"2.0","id":"é","method":"ping","params":{"_meta":{"x":null}}}'.encode())
@settings(max_examples=1_000, deadline=None)
@given(bodies)
def test_document_in_its_shortest_form_is_read_as_any_other(body: bytes) -> None:
    # With a space it is scanned.
    assert outcome(body) == outcome(b" " + body)
