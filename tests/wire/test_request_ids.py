"""Request ids: the client's if it is safe to log and echo, else a unique one."""

from __future__ import annotations

import hashlib

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Settings
from keyproxy.http.routes import RouteTable
from keyproxy.process.terms import build_gateway, build_terms
from keyproxy.wire.client.request_ids import RequestIds
from tests import fakes
from tests.auth.test_agent_token_format import HEADER, jwt
from tests.wire.conftest import Wire, request


def test_ids_of_one_process_differ_and_begin_with_its_instance() -> None:
    ids = RequestIds(b"abc")
    made = [ids.choose(None, fakes.FORMAT) for _ in range(100)]
    assert len(set(made)) == 100
    assert all(one.startswith(b"abc") for one in made)


async def test_request_ids_do_not_repeat_after_a_reload(wire: Wire) -> None:
    seen = set()
    async with wire.client() as client:
        for number in range(6):
            await client.send(request("GET", "/"))
            seen.add((await client.answer()).one("X-Request-Id"))
            if number % 2:
                settings, routes = Settings(), RouteTable([])
                gateway = build_gateway(
                    settings, routes, identities=wire.identities, owned_ids=wire.owned_ids, templates=wire.templates,
                    ledger=wire.ledger, claims=wire.claims, approvals=wire.approvals, mint=wire.mint,
                    upstream_credentials=wire.upstream_credentials,
                )  # fmt: skip
                terms = build_terms(settings, routes, gateway, wire.server.upstreams, tls=None)
                wire.server.change(terms, None)
    assert len(seen) == 6


TOKEN = jwt(HEADER, b'{"jti":"agt_0"}', hashlib.sha512(b"1").digest())


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [
        (TOKEN[:110], False),
        (b"r-" + TOKEN.rpartition(b".")[2], False),
        (TOKEN[48:110], True),
        (jwt(b'{"alg":"HS256"}', b"{}", b"s" * 32), True),
    ],
    ids=["start", "signature", "header", "another issuer"],
)
async def test_a_request_id_with_a_token_or_its_signature_is_not_kept(wire: Wire, sent: bytes, is_kept: bool) -> None:
    wire.identities.add(SecretKey(TOKEN), fakes.identity())
    async with wire.client() as client:
        for _ in range(12):
            await client.send(request("POST", "/", f"X-Request-Id: {sent.decode()}", key=TOKEN, body=b"x"))
            answer = await client.answer()
            assert answer.status == 200
            assert (answer.one("X-Request-Id") == sent.decode()) is is_kept
    assert [(seen.one("X-Request-Id") == sent.decode()) for seen in wire.upstream.requests] == [is_kept] * 12
