"""Request ids: the client's if it is safe to log and echo, else a unique one."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.auth.agent_token_format import signature_of
from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Settings
from keyproxy.http.headers import sane_request_id
from keyproxy.http.routes import RouteTable
from keyproxy.http_messages import CredentialField, RequestFields, RequestHead, RequestLine
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


_SECRETS = [b"k", b"abc", b"k" * 8, b"ab.cd", b"...", b"a.b", TOKEN, TOKEN.rpartition(b".")[2], b"x" * 40, b""]
_SCHEMES = [b"", b"Api-Key ", b"Api-Key\t", b"Bearer  "]


@given(
    st.lists(st.sampled_from([*_SECRETS, b"r", b"-", b"k" * 7]), min_size=1, max_size=3).map(b"".join),
    st.lists(
        st.tuples(st.sampled_from([b"", b"Api-Key ", b"Api-Key\t", b"Bearer  "]), st.sampled_from(_SECRETS)).map(
            b"".join
        ),
        max_size=2,
    ),
)
@example(b"r-" + b"k" * 9, [b"Api-Key " + b"k" * 8])
@settings(max_examples=500)
def test_no_request_id_with_the_end_of_a_credential_is_kept(sent: bytes, values: list[bytes]) -> None:
    fields = tuple(CredentialField(b"x-api-key", value.strip(b" \t")) for value in values)
    head = RequestHead(RequestLine(b"GET", b"/", b"/", 1, b""), RequestFields(b"a", b""), b"", fields, 0)
    head.request_id = sent
    keys = [token for field in fields for token in field.value.split()[-1:]]
    contains_key = fakes.FORMAT.is_within(sent) or any((signature_of(key) or key) in sent for key in keys)
    is_kept = RequestIds(b"made-").choose(head, fakes.FORMAT) == sent
    assert is_kept == (sane_request_id(sent) and not contains_key)
