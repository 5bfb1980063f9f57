"""Ids in requests that are bound to a tenant: in paths, queries, headers and JSON. Foreign and unknown ids look alike."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.model import Ending
from keyproxy.reasons import Reason
from tests import fakes
from tests.rawhttp import Message, Upstream, answer_with
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_ai_examples import plan

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
JSON = "Content-Type: application/json"


async def binding(start: Start, *binds: dict[str, str], match: str = "* /{rest...}", **row: Any) -> Wire:
    serving = row.pop("serving", Upstream(answer_with(OK)))
    rows = [RouteRow(match, binds=list(binds), **row)]
    return await start(serving=serving, rows=rows)


async def ask(wire: Wire, target: str, *lines: str, body: bytes = b"") -> Message:
    async with wire.client() as client:
        await client.send(request("POST" if body else "GET", target, *lines, body=body))
        return await client.answer(seconds=20)


def code(message: Message) -> str | None:
    return None if message.status == 200 else str(json.loads(message.body)["code"])


FORBIDDEN = "namespace_forbidden"
MALFORMED = "request_malformed"


@pytest.mark.parametrize(
    ("bind", "match", "target", "expected"),
    [
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/acme/docs", None),
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/%61cme/docs", None),
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/globex/docs", FORBIDDEN),
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/acme", FORBIDDEN),
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/acme/", FORBIDDEN),
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/acme//docs", FORBIDDEN),
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/acme;x/docs", FORBIDDEN),
        ({"value": "path:c", "starts": "{tenant}/"}, "* /{c...}", "/acme/../globex/docs", MALFORMED),
        ({"value": "path:t", "is": "{tenant}"}, "* /t/{t}/{rest...}", "/t/acme/docs", None),
        ({"value": "path:t", "is": "{tenant}"}, "* /t/{t}/{rest...}", "/t/acmes/docs", FORBIDDEN),
        ({"value": "path:t", "is": "{tenant}"}, "* /t/{t}/{rest...}", "/t/ACME/docs", FORBIDDEN),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x?ns=acme", None),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x?a=b&ns=acme&c", None),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x?ns=globex", FORBIDDEN),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x?ns=", FORBIDDEN),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x?ns", FORBIDDEN),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x", FORBIDDEN),
        ({"value": "query:ns", "is": "{tenant}", "missing": "allow"}, "* /x", "/x", None),
        ({"value": "query:ns", "is": "{tenant}", "missing": "allow"}, "* /x", "/x?ns=globex", FORBIDDEN),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x?ns=acme&ns=acme", MALFORMED),
        ({"value": "query:ns", "is": "{tenant}"}, "* /x", "/x?ns=acme&NS=globex", MALFORMED),
        ({"value": "query:ns", "is": "{tenant}", "missing": "allow"}, "* /x", "/x?n%73%00=globex", MALFORMED),
        ({"value": "query:ns", "is": "{tenant}", "missing": "allow"}, "* /x", "/x?ns[]=globex", MALFORMED),
        ({"value": "query:ns", "starts": "{tenant}/"}, "* /x", "/x?ns=acme/a%2Fb", None),
        ({"value": "query:ns", "starts": "{tenant}/"}, "* /x", "/x?ns=acme/../globex/x", FORBIDDEN),
        ({"value": "query:ns", "starts": "{tenant}/"}, "* /x", "/x?ns=acme/./x", FORBIDDEN),
        ({"value": "query:ns", "starts": "{tenant}/"}, "* /x", "/x?ns=acme/%252e%252e/globex", FORBIDDEN),
        ({"value": "query:ns", "starts": "{tenant}/"}, "* /x", "/x?ns=acme/a%0ab", FORBIDDEN),
        ({"value": "query:ns", "starts": "{tenant}/"}, "* /x", f"/x?ns=acme/{'a' * 251}", None),
        ({"value": "query:ns", "starts": "{tenant}/"}, "* /x", f"/x?ns=acme/{'a' * 252}", FORBIDDEN),
        ({"value": "query:ns", "starts": "{tenant}/{user}/"}, "* /x", "/x?ns=acme/u_42/a", None),
        ({"value": "query:ns", "starts": "{tenant}/{user}/"}, "* /x", "/x?ns=acme/u_43/a", FORBIDDEN),
        ({"value": "query:ns", "is": "t={tenant}"}, "* /x", "/x?ns=t%3Dacme", None),
        ({"value": "query:ns", "is": "{key}"}, "* /x", "/x?ns=key_of_u_42", None),
    ],
)  # fmt: skip
async def test_a_bound_id_belongs_to_the_caller(
    start: Start, bind: dict[str, str], match: str, target: str, expected: str | None
) -> None:
    wire = await binding(start, bind, match=match)
    assert code(await ask(wire, target)) == expected
    assert len(wire.upstream.requests) == (expected is None)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/c/acme%2Fdocs", None), ("/c/globex%2Fdocs", FORBIDDEN), ("/c/acme", FORBIDDEN),
        ("/c/acme%2F..%2Fglobex", MALFORMED), ("/c/acme%2F%2Fx", MALFORMED), ("/c/acme%252Fdocs", MALFORMED),
    ],
)  # fmt: skip
async def test_an_encoded_slash_in_a_bound_id_is_a_slash(start: Start, target: str, expected: str | None) -> None:
    bind = {"value": "path:c", "starts": "{tenant}/"}
    wire = await binding(start, bind, match="* /c/{c}", encoded_slash="forward")
    assert code(await ask(wire, target)) == expected
    if expected is None:
        assert wire.upstream.requests[-1].start == f"GET {target} HTTP/1.1"


@pytest.mark.parametrize(
    ("pointer", "body", "expected"),
    [
        ("/ns", b'{"ns":"acme"}', None), ("/ns", b'{"ns":"globex"}', FORBIDDEN), ("/ns", b"{}", FORBIDDEN),
        ("/ns", b'{"ns":null}', FORBIDDEN), ("/ns", b'{"ns":["acme"]}', FORBIDDEN), ("/ns", b"[]", FORBIDDEN),
        ("/ns", b'{"ns":"acme","ns":"acme"}', MALFORMED), ("/ns", b'{"ns":"acme","Ns":"globex"}', MALFORMED),
        ("/ns", b'{"ns":"\\u0061cme"}', None), ("/ns", b'{"n\\u0073":"acme"}', None),
        ("/ns", b'{"ns":"acme","n\\u0073":"x"}', MALFORMED), ("/ns", b'{"ns\\u0000":"x","ns":"acme"}', MALFORMED),
        ("/ns", b'{"ns":"acme"', MALFORMED), ("/ns", b'{"ns":"acme","x":1e999}', MALFORMED),
        ("/a/b", b'{"a":{"b":"acme"}}', None), ("/a/b", b'{"a":{"b":"acme","B":1}}', MALFORMED),
        ("/a/b", b'{"a":{"b":"x"},"a":{"b":"acme"}}', MALFORMED), ("/a/b", b'{"a":{}}', FORBIDDEN),
        ("/a/b", b'{"a":"acme"}', FORBIDDEN), ("/a/b", b'{"a":[{"b":"acme"}]}', FORBIDDEN),
        ("/f/*/ns", b'{"f":[{"ns":"acme"},{"ns":"acme","x":1}]}', None),
        ("/f/*/ns", b'{"f":[{"ns":"acme"},{"ns":"globex"}]}', FORBIDDEN),
        ("/f/*/ns", b'{"f":[{"ns":"acme"},{}]}', FORBIDDEN), ("/f/*/ns", b'{"f":[]}', FORBIDDEN),
        ("/f/*/ns", b'{"f":{"ns":"acme"}}', FORBIDDEN), ("/f/*/ns", b'{"f":["acme"]}', FORBIDDEN),
        ("/f/*/ns", b'{"f":[{"ns":"acme"},{"ns":"globex","ns":"acme"}]}', MALFORMED),
        ("/f/*/ns", b'{"f":[{"ns":"acme"},{"ns":"acme","nS":"globex"}]}', MALFORMED),
        ("/f/*/ns", b'{"f":[{"ns":"acme","x":[{"ns":1,"ns":2}]}]}', None),
        ("/f/*", b'{"f":["acme","acme"]}', None), ("/f/*", b'{"f":["acme",1]}', FORBIDDEN),
        ("/f/*/*/ns", b'{"f":[[{"ns":"acme"}]]}', None),
        ("/f/*/*/ns", b'{"f":[[{"ns":"globex","ns":"acme"}]]}', MALFORMED),
        ("/f/*/*/ns", b'{"f":[[{"ns":"acme"}],[]]}', FORBIDDEN),
        ("/*/ns", b'[{"ns":"acme"},{"ns":"acme"}]', None), ("/*/ns", b'[{"ns":"x","ns":"acme"}]', MALFORMED),
        ("/a~1b", b'{"a/b":"acme"}', None),
        ("/f/*", b'{"f":[%b"acme"]}' % (b'"acme",' * 999), None),
        ("/f/*", b'{"f":[%b"acme"]}' % (b'"acme",' * 1_000), MALFORMED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", ["none", "openai", "gemini"])
async def test_bound_ids_in_json_are_found_without_a_second_reading(
    start: Start, tokens: str, pointer: str, body: bytes, expected: str | None
) -> None:
    row = {} if tokens == "none" else {"tokens": tokens, "cap": "off"}
    wire = await binding(start, {"value": f"json:{pointer}", "is": "{tenant}"}, match="POST /x", **row)
    assert code(await ask(wire, "/x", JSON, body=body)) == expected


@pytest.mark.parametrize("body", [b'{"tenant_id":"globex"}', b'{"tenantID":"globex"}', b'{"tenantId":"globex"}'])
async def test_spellings_that_protocol_buffers_accept_are_refused(start: Start, body: bytes) -> None:
    bind = {"value": "json:/tenantId", "is": "{tenant}", "missing": "allow"}
    wire = await binding(start, bind, match="POST /x", tokens="gemini")
    assert code(await ask(wire, "/x", JSON, body=body)) in (MALFORMED, FORBIDDEN)


@pytest.mark.parametrize(
    ("body", "lines", "expected"),
    [
        (b"ns=acme", ("Content-Type: application/x-www-form-urlencoded",), MALFORMED),
        (b'{"ns":"acme"}', ("Content-Type: text/plain",), MALFORMED), (b'{"ns":"acme"}', ("X: 1",), None),
        (b'{"ns":"acme"}', ("Content-Type: application/ld+json; charset=utf-8",), None), (b" ", (JSON,), FORBIDDEN),
        (b'\xef\xbb\xbf{"ns":"acme"}', (JSON,), MALFORMED),
    ],
)  # fmt: skip
async def test_a_bound_id_in_json_needs_a_body_of_that_type(
    start: Start, body: bytes, lines: tuple[str, ...], expected: str | None
) -> None:
    wire = await binding(start, {"value": "json:/ns", "is": "{tenant}"}, match="POST /x")
    assert code(await ask(wire, "/x", *lines, body=body)) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("X-Ns: acme",), None), (("x-ns:acme ",), None), (("X-Ns: globex",), FORBIDDEN), ((), FORBIDDEN),
        (("X-Ns: acme", "X-NS: acme"), MALFORMED), (("X-Ns: acme, globex",), FORBIDDEN),
        (("X-Ns: acme", "X_Ns: globex"), MALFORMED), (("X-Ns: acme", "X.Ns: globex"), MALFORMED),
        (("X-Ns: acme", "Connection: X-Ns"), FORBIDDEN),
    ],
)  # fmt: skip
async def test_a_bound_header_stands_once(start: Start, lines: tuple[str, ...], expected: str | None) -> None:
    wire = await binding(start, {"value": "header:X-Ns", "is": "{tenant}"}, match="* /x")
    assert code(await ask(wire, "/x", *lines)) == expected


async def test_a_foreign_and_an_unknown_owned_id_get_the_same_response(start: Start) -> None:
    wire = await binding(start, {"value": "query:id", "owned": "collection"}, match="GET /x", error_shape="openai")
    wire.owned_ids.add("collection", "c-1", "acme")
    wire.owned_ids.add("collection", "c-2", "globex")
    assert (await ask(wire, "/x?id=c-1")).status == 200
    bodies = []
    for target in ("/x?id=c-2", "/x?id=c-3", "/x?id=../c-1"):
        told = await ask(wire, target)
        body = json.loads(told.body)
        body["error"].pop("request_id", None)
        bodies.append((told.status, told.one("WWW-Authenticate"), body))
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0][0] == 403


async def test_ownership_of_many_ids_is_looked_up_at_once(start: Start) -> None:
    wire = await binding(start, {"value": "json:/ids/*", "owned": "collection"}, match="POST /x")
    for number in range(200):
        wire.owned_ids.add("collection", f"c-{number}", "acme", is_slow=True)
    body = json.dumps({"ids": [f"c-{number}" for number in range(200)]}).encode()
    assert (await ask(wire, "/x", JSON, body=body)).status == 200
    assert wire.owned_ids.brought == 200


async def test_an_id_whose_owner_cannot_be_looked_up_is_neither_accepted_nor_forbidden(start: Start) -> None:
    wire = await binding(start, {"value": "query:id", "owned": "collection"}, match="GET /x")
    wire.owned_ids.add("collection", "c-1", "acme", is_slow=True)
    wire.owned_ids.is_down = True
    assert code(await ask(wire, "/x?id=c-1")) == "store_unavailable"


async def test_a_stream_and_a_tunnel_end_when_the_tenant_loses_the_id(start: Start) -> None:
    async def lasting(received: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if received.one("Upgrade"):
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await asyncio.sleep(30)
        return False

    bind = {"value": "query:id", "owned": "collection"}
    wire = await binding(start, bind, match="GET /x", serving=Upstream(lasting))
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    for lines in ((), (*upgrade, "Sec-WebSocket-Key: " + "a" * 24)):
        wire.owned_ids.add("collection", "c-1", "acme")
        wire.upstream.requests.clear()
        async with wire.client() as client:
            await client.send(request("GET", "/x?id=c-1", *lines))
            await until(lambda: bool(wire.upstream.requests), "it has begun")
            seen = len(wire.recorder.seen)
            wire.owned_ids.add("collection", "c-1", "globex")
            await until(lambda seen=seen: len(wire.recorder.seen) > seen, "it was ended", seconds=3)  # type: ignore[misc]
        assert (wire.recorder.seen[-1].ending, wire.recorder.seen[-1].reason) == (
            Ending.CUT,
            Reason.NAMESPACE_FORBIDDEN,
        )


async def test_binds_are_judged_after_scopes_and_consume_nothing(start: Start) -> None:
    wire = await binding(start, {"value": "query:ns", "is": "{tenant}"}, match="GET /x", scopes=["other"])
    assert code(await ask(wire, "/x?ns=globex")) == "insufficient_scope"
    wire.identities.add(fakes.key(1), fakes.identity(scopes=frozenset({"other"})))
    assert code(await ask(wire, "/x?ns=globex")) == FORBIDDEN
    assert not wire.ledger.settled


async def test_a_spent_window_refuses_before_an_id_is_judged_also_without_a_body(start: Start) -> None:
    wire = await binding(start, {"value": "query:ns", "is": "{tenant}"})
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan("requests/day=1")))
    assert code(await ask(wire, "/x?ns=globex")) == FORBIDDEN
    assert (await ask(wire, "/x?ns=acme")).status == 200
    assert code(await ask(wire, "/x?ns=acme")) == "quota_exhausted"
    assert code(await ask(wire, "/x?ns=globex")) == "quota_exhausted"


async def test_the_owners_of_many_ids_are_looked_up_until_one_is_foreign(start: Start) -> None:
    wire = await binding(start, {"value": "json:/ids/*", "owned": "collection"})
    ids = [f"c-{number}" for number in range(900)]
    for number, one in enumerate(ids):
        wire.owned_ids.add("collection", one, "globex" if number == 150 else "acme", is_slow=True)
    told = await ask(wire, "/x", JSON, body=json.dumps({"ids": ids}).encode())
    assert (told.status, code(told)) == (403, FORBIDDEN)
    assert 150 < wire.owned_ids.brought <= 200
    ids.remove("c-150")
    assert (await ask(wire, "/x", JSON, body=json.dumps({"ids": ids}).encode())).status == 200
    assert wire.owned_ids.brought == 900
