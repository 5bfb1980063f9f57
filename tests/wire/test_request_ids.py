"""Request ids: the client's if it is safe to log and echo, else a unique one."""

from __future__ import annotations

from keyproxy.config.schema import Settings
from keyproxy.http.routes import RouteTable
from keyproxy.process.terms import build_gateway, build_terms
from keyproxy.wire.client.request_ids import RequestIds
from tests import fakes
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
                    ledger=wire.ledger, claims=wire.claims, mint=wire.mint,
                )  # fmt: skip
                terms = build_terms(settings, routes, gateway, wire.server.upstreams, tls=None)
                wire.server.change(terms, None)
    assert len(seen) == 6
