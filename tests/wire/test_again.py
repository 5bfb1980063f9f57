"""The same bytes again on one connection: they are parsed once, and each request is decided on separately."""

from __future__ import annotations

import asyncio
import time
import types

from keyproxy.config.schema import IdentityHeaders, Settings
from keyproxy.http.routes import RouteTable
from keyproxy.process.terms import build_terms
from keyproxy.reasons import Reason
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from tests import fakes
from tests.rawhttp import Client
from tests.referents import referents
from tests.wire.conftest import KEY, Wire, request

#: Enough repetitions for a head to be cached, and sent again.
OFTEN = LEARNT_AFTER + 3
SAME = request("POST", "/v1/ai/jobs", "X-Other-User: evil", body=b"{}")


async def status_of(client: Client, raw: bytes) -> int:
    await client.send(raw)
    return (await client.answer()).status


async def test_a_revoked_key_is_refused_although_the_same_bytes_were_admitted_before(wire: Wire) -> None:
    digest = fakes.key(1).digest()
    async with wire.client() as client:
        assert [await status_of(client, SAME) for _ in range(OFTEN)] == [200] * OFTEN
        good, wire.identities.table[digest] = wire.identities.table[digest], fakes.identity(standing=Reason.KEY_REVOKED)
        assert await status_of(client, SAME) == 401
        wire.identities.table[digest] = good
        assert await status_of(client, SAME) == 200
    assert len(wire.upstream.requests) == OFTEN + 1


async def test_each_request_is_decided_by_its_own_key_whatever_preceded_it_on_the_connection(wire: Wire) -> None:
    wire.identities.add(fakes.key(2), fakes.identity("u_other"))
    other = SAME.replace(KEY, fakes.key(2).reveal())
    assert len(other) == len(SAME)
    sent = [SAME] * OFTEN + [other, SAME, other, other, SAME]
    async with wire.client() as client:
        for raw in sent:
            assert await status_of(client, raw) == 200
        assert await status_of(client, SAME.replace(KEY, fakes.key(3).reveal())) == 401
    users = [seen.one("X-Keyproxy-User") for seen in wire.upstream.requests]
    assert users == ["u_other" if raw is other else "u_42" for raw in sent]
    assert len({seen.one("X-Request-Id") for seen in wire.upstream.requests}) == len(sent)


async def test_the_same_bytes_are_parsed_again_after_a_reload(wire: Wire) -> None:
    server = wire.server
    async with wire.client() as client:
        for _ in range(OFTEN):
            assert await status_of(client, SAME) == 200
        settings = Settings(identity=IdentityHeaders(header_prefix="X-Other-"))
        server.change(build_terms(settings, RouteTable([]), wire.gateway, server.upstreams, tls=None), None)
        for _ in range(OFTEN):
            assert await status_of(client, SAME) == 200
    outcomes = [seen.one("X-Other-User") for seen in wire.upstream.requests]
    assert outcomes == ["evil"] * OFTEN + [None] * OFTEN


async def test_a_connection_on_which_nothing_is_under_way_keeps_no_key(wire: Wire) -> None:
    async with wire.client() as client:
        kept = []
        for _ in range(OFTEN):
            assert await status_of(client, SAME) == 200
            kept.append(_keys_in(wire.server))
        assert any(kept)  # or they would not be found if they stayed
        deadline = time.monotonic() + 1.0
        while _keys_in(wire.server) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert not _keys_in(wire.server)
        assert await status_of(client, SAME) == 200


def _keys_in(server: object) -> int:
    """How many bytes that hold the key can be reached from a server, through its connections too."""
    found, seen, reachable = 0, set(), [server]
    while reachable:
        thing = reachable.pop()
        if id(thing) in seen or isinstance(thing, type | types.FunctionType | types.ModuleType | types.FrameType):
            continue
        # A str: of functions of the compiled build it is a descriptor.
        if str(type(thing).__module__).split(".")[0] not in ("keyproxy", "builtins"):
            continue
        seen.add(id(thing))
        found += isinstance(thing, bytes) and KEY in thing
        reachable += referents(thing)
    return found
