"""Metadata documents: no URL leads into a private network, and what is fetched is bounded, checked and kept."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import trustme
from aiohttp import web

from keyproxy.authorize.clients import document_cache, document_fetcher
from keyproxy.authorize.clients.document_fetcher import BYTES_MAX, DocumentFetcher
from keyproxy.authorize.clients.documents import Documents
from keyproxy.oauth import client_document
from keyproxy.oauth.client import AuthMethod, Client, ClientKind
from keyproxy.oauth.client_document import client_of, document_url
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.client_refusals import (
    ClientRefused,
    DocumentRefused,
    DocumentUnavailable,
    TooManyDocuments,
    UnknownClient,
)
from keyproxy.oauth.known_clients import KnownClients
from keyproxy.oauth.public_addresses import IpNetwork, is_public
from tests.authorize.authority import FakeClock
from tests.authorize.document_server import HOST, DocumentServer, Handler, serving_documents

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
ACME = "https://acme.example/client.json"

#: Trusts no certificate of a test.
TLS = ssl.create_default_context()


class Resolver:
    """A resolver that a test controls. `asked`: the hosts that were looked up."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self.asked: list[str] = []

    async def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.addresses


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def server(ca: trustme.CA) -> AsyncIterator[DocumentServer]:
    async with serving_documents(ca) as server:
        yield server


class Fetched:
    """The documents of a server of this machine, on a clock of the test."""

    def __init__(self, server: DocumentServer, **policy: Any) -> None:
        self.clock = FakeClock()
        self.outcomes: list[str] = []
        self.resolver = Resolver("127.0.0.1")
        self.limited: list[None] = []
        fetcher = DocumentFetcher(LOOPBACK, server.tls(), resolve=self.resolver)
        rules = ClientPolicy(KnownClients([]), **policy)
        self.documents = Documents(rules, fetcher, now=self.clock.now, count=self.outcomes.append)

    async def client(self, url: str) -> Client:
        return await self.documents.client(url, before_fetch=lambda: self.limited.append(None))


@pytest.fixture
def fetched(server: DocumentServer) -> Fetched:
    return Fetched(server)


# -- addresses


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.255.254", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1",
        "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::",
        "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "2606:4700::1%eth0", "fec0::1",
        "ff02::1", "not an address",
    ],
)  # fmt: skip
async def test_address_that_is_not_public_is_never_connected_to(address: str, ca: trustme.CA) -> None:
    url = document_url(ACME)
    assert url is not None
    # One such address is enough: which one a connection would use is not certain.
    for addresses in ([address], ["1.1.1.1", address], [address, "2606:4700::1111"]):
        fetcher = DocumentFetcher((), TLS, resolve=Resolver(*addresses))
        with pytest.raises(DocumentRefused, match="not public"):
            await fetcher.fetch(url)


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
        "172.15.0.1", "172.32.0.0", "192.167.255.255", "192.169.0.0", "223.255.255.255", "2606:4700::1111", "2a00::1",
        "64:ff9b::101:101", "::ffff:1.1.1.1",
    ],
)  # fmt: skip
def test_public_address_may_be_connected_to(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("networks", "address", "url"),
    [
        (["10.1.0.0/16"], "10.1.2.3", ACME),
        (["10.1.0.0/16"], "::ffff:10.1.2.3", ACME),
        (["10.1.0.0/16"], "64:ff9b::a01:203", ACME),
        (["fd00::/8"], "fd00::1", ACME),
        (["10.1.0.0/16"], "10.1.2.3", "https://10.1.2.3/c"),
        (["10.1.0.0/16"], "10.1.2.3", "https://acme.internal:8443/c"),
    ],
)
def test_networks_of_the_operator_may_be_connected_to(networks: list[str], address: str, url: str) -> None:
    parsed = document_url(url)
    assert parsed is not None
    allowed: list[IpNetwork] = [ipaddress.ip_network(network) for network in networks]
    assert DocumentFetcher(allowed, TLS)._checked(parsed, [address]) == [address]


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("10.2.0.1", ACME),
        ("1.1.1.1", "https://1.1.1.1/c"),
        ("2606:4700::1111", "https://[2606:4700::1111]/c"),
        ("1.1.1.1", "https://0x1010101/c"),
        ("1.1.1.1", "https://16843009/c"),
        ("1.1.1.1", "https://1.1/c"),
        ("1.1.1.1", "https://acme.example:8443/c"),
        ("1.1.1.1", "https://acme.example:80/c"),
    ],
)
def test_addresses_and_other_ports_are_refused_outside_the_networks_of_the_operator(address: str, url: str) -> None:
    parsed = document_url(url)
    assert parsed is not None
    with pytest.raises(DocumentRefused):
        DocumentFetcher([ipaddress.ip_network("10.1.0.0/16")], TLS)._checked(parsed, [address])


def test_loopback_address_that_the_operator_does_not_name_is_not_connected_to_beside_one_that_is_named() -> None:
    url = document_url("https://localhost:8443/c")
    assert url is not None
    fetcher = DocumentFetcher(LOOPBACK, TLS)
    assert fetcher._checked(url, ["::1", "127.0.0.1"]) == ["127.0.0.1"]
    for addresses in (["::1"], ["127.0.0.1", "10.0.0.1"], ["127.0.0.1", "::ffff:10.0.0.1"], ["::1", "1.1.1.1"]):
        with pytest.raises(DocumentRefused):
            fetcher._checked(url, addresses)


async def test_name_is_resolved_once_and_the_connection_uses_the_checked_address(
    fetched: Fetched, server: DocumentServer
) -> None:
    """DNS rebinding: a second look-up could lead elsewhere."""
    client = await fetched.client(server.publish("/client.json"))
    assert (client.kind, client.name) == (ClientKind.DOCUMENT, "Acme")
    assert fetched.resolver.asked == [HOST]
    with pytest.raises(DocumentRefused, match="not checked"):
        document_fetcher._socket((2, 1, 6, "", ("127.0.0.2", 443)), ["127.0.0.1"])


async def test_certificate_of_the_server_is_verified(server: DocumentServer) -> None:
    url = server.publish("/client.json")
    other = Fetched(server)
    other.documents._clients._fetcher._tls = TLS
    with pytest.raises(DocumentUnavailable, match="ertificate"):
        await other.client(url)
    with pytest.raises(DocumentUnavailable, match="ertificate"):
        await Fetched(server).client(server.publish("/client.json", host="other.example"))


# -- URLs


NOT_DOCUMENTS = [
    "http://acme.example/c",
    "https://acme.example",
    "https://acme.example/",
    "https://acme.example?x",
    "https://user@acme.example/c",
    "https://user:p@acme.example/c",
    "https://acme.example/c#x",
    "https://acme.example/a/../c",
    "https://acme.example/a/./c",
    "https://acme.example/..",
    "https://acme.example/a/%2e%2E/c",
    "https://acme.example/a/.%2e/c",
    "https://acme.example:0/c",
    "https://acme.example:65536/c",
    "https://acme.example:/c",
    "https://acme.example\\@evil.example/c",
    "https://acme.example/c d",
    "https://acme.example/\u00e9",
    "https://acme.example/c\n",
    "https:///c",
    "https://a..b/c",
    "https://.a/c",
    "https://a./c",
    "https://" + "a" * 64 + ".example/c",
    "https://" + "a." * 127 + "b/c",
    "https://%31.example/c",
    "https://acme.example/" + "a" * 2_000,
]


async def test_url_that_no_document_may_have_is_not_fetched(fetched: Fetched) -> None:
    for url in NOT_DOCUMENTS:
        with pytest.raises(UnknownClient):
            await fetched.client(url)
    assert fetched.resolver.asked == []


@pytest.mark.parametrize(
    "url",
    ["https://acme.example/c", "https://acme.example/c/", "https://ACME.example/c?v=1&a", "https://a/%2F.well/..x"],
)
def test_url_of_a_document_is_accepted(url: str) -> None:
    assert document_url(url) is not None


async def test_url_is_requested_byte_for_byte(fetched: Fetched, server: DocumentServer) -> None:
    url = server.publish("/a~b/c%7Ed?x=%41&y=a+b".partition("?")[0])
    server.responses["/a~b/c~d"] = json.dumps(
        {"client_id": url + "?x=%41&y=a+b", "redirect_uris": ["https://acme.example/cb"]}
    ).encode()
    await fetched.client(url + "?x=%41&y=a+b")
    assert server.requests == ["/a~b/c%7Ed?x=%41&y=a+b"]


async def test_policy_decides_which_hosts_have_documents(server: DocumentServer) -> None:
    url = server.publish("/c")
    assert (await Fetched(server, document_hosts=frozenset({HOST})).client(url)).client_id == url
    for policy in ({"document_hosts": frozenset({"acme.example"})}, {"accepts_documents": False}):
        refusing = Fetched(server, **policy)
        with pytest.raises(UnknownClient):
            await refusing.client(url)
        assert refusing.resolver.asked == []


# -- responses


def _response(status: int, **options: Any) -> Handler:
    async def respond(_request: web.Request) -> web.Response:
        return web.Response(status=status, **options)

    return respond


async def test_no_other_status_than_200_is_accepted_and_redirects_are_not_followed(
    fetched: Fetched, server: DocumentServer
) -> None:
    statuses = [201, 204, 301, 302, 303, 307, 308, 400, 401, 403, 404, 410]
    other = server.publish("/other")
    for status in statuses:
        server.responses[f"/{status}"] = _response(status, headers={"Location": other})
        with pytest.raises(DocumentRefused, match=str(status)) as error:
            await fetched.client(server.url(f"/{status}"))
        assert not isinstance(error.value, DocumentUnavailable)
    assert server.requests == [f"/{status}" for status in statuses]


async def test_response_that_is_no_http_leaves_a_short_reason(fetched: Fetched, server: DocumentServer) -> None:
    async def no_http(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"\0" * 5_000 + b"\nERROR forged\x1b[31m\n")
        request.transport.close()
        return web.Response()

    server.responses["/c"] = no_http
    with pytest.raises(DocumentUnavailable) as refused:
        await fetched.client(server.url("/c"))
    assert len(refused.value.detail) < 400, "each request for this client logs it"
    assert refused.value.detail.isprintable()


async def test_content_encoding_is_refused(fetched: Fetched, server: DocumentServer) -> None:
    """A small response must not become a large document."""
    for encoding in ("gzip", "br", "deflate", "x"):
        server.headers["Content-Encoding"] = encoding
        with pytest.raises(DocumentRefused, match="content encoding"):
            await fetched.client(server.publish(f"/{encoding}"))


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("excess", [0, 1])
async def test_document_has_at_most_5_kib(
    excess: int, *, is_chunked: bool, fetched: Fetched, server: DocumentServer
) -> None:
    url = server.publish("/c")
    content = server.responses["/c"]
    assert isinstance(content, bytes)
    content = content.ljust(BYTES_MAX + excess)

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if not is_chunked:
            response.content_length = len(content)
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(content)
        return response

    server.responses["/c"] = respond
    if excess:
        with pytest.raises(DocumentRefused, match="bytes"):
            await fetched.client(url)
    else:
        await fetched.client(url)


async def test_slow_response_ends_after_its_time(
    fetched: Fetched, server: DocumentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert document_fetcher.FETCH_SECONDS_MAX == 5.0
    monkeypatch.setattr(document_fetcher, "FETCH_SECONDS_MAX", 0.1)
    waiting = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"{")
        await waiting.wait()
        return response

    server.responses["/c"] = respond
    with pytest.raises(DocumentUnavailable, match=r"0\.1 s"):
        await fetched.client(server.url("/c"))
    waiting.set()


@pytest.mark.parametrize(
    "metadata",
    [
        {"client_id": "https://docs.example/other"},
        {"client_id": None},
        {"redirect_uris": None},
        {"redirect_uris": "https://acme.example/cb"},
        {"redirect_uris": []},
        {"redirect_uris": ["javascript:alert(1)"]},
        {"redirect_uris": [f"https://acme.example/{number}" for number in range(11)]},
        {"client_secret": "s"},
        {"client_name": 1},
        {"client_name": "a" * 201},
        {"token_endpoint_auth_method": "client_secret_basic"},
        {"token_endpoint_auth_method": 1},
        {"token_endpoint_auth_method": "private_key_jwt"},  # without keys
        {"token_endpoint_auth_methods_supported": "none"},
        {"token_endpoint_auth_methods_supported": ["client_secret_post"]},
        {"jwks": "keys"},
        {"jwks_uri": 1},
    ],
)
def test_document_that_describes_no_usable_client_is_refused(metadata: dict[str, Any]) -> None:
    content = {"client_id": ACME, "redirect_uris": ["https://acme.example/cb"], **metadata}
    with pytest.raises(DocumentRefused):
        client_of(ACME, json.dumps(content).encode(), frozenset())


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff{}", b"[" * 5_000, b"null"])
def test_content_that_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(DocumentRefused):
        client_of(ACME, content, frozenset())


@pytest.mark.parametrize(
    ("metadata", "method"),
    [
        ({}, AuthMethod.NONE),
        ({"token_endpoint_auth_method": "none"}, AuthMethod.NONE),
        ({"token_endpoint_auth_method": "private_key_jwt", "jwks_uri": ACME}, AuthMethod.PRIVATE_KEY_JWT),
        ({"token_endpoint_auth_method": "private_key_jwt", "jwks": {"keys": []}}, AuthMethod.PRIVATE_KEY_JWT),
        ({"token_endpoint_auth_methods_supported": ["client_secret_post", "none"]}, AuthMethod.NONE),
        ({"token_endpoint_auth_methods_supported": ["private_key_jwt", "none"], "jwks_uri": ACME}, AuthMethod.NONE),
        (
            {"token_endpoint_auth_method": "client_secret_basic",
             "token_endpoint_auth_methods_supported": ["private_key_jwt"], "jwks_uri": ACME},
            AuthMethod.PRIVATE_KEY_JWT,
        ),
    ],
)  # fmt: skip
def test_any_common_authentication_method_works(metadata: dict[str, Any], method: AuthMethod) -> None:
    content = {"client_id": ACME, "redirect_uris": ["https://acme.example/cb"], **metadata}
    assert client_of(ACME, json.dumps(content).encode(), frozenset()).auth_method is method


def test_unacceptable_redirect_uris_of_a_document_are_dropped() -> None:
    uris = ["https://acme.example/cb", "javascript:alert(1)", "http://acme.example/", 1, "acme:/cb"]
    content = json.dumps({"client_id": ACME, "redirect_uris": uris, "client_name": "A\u202ec"}).encode()
    client = client_of(ACME, content, frozenset())
    assert (client.redirect_uris, client.name) == (("https://acme.example/cb",), "Ac")
    assert client_document.client_of(ACME, content, frozenset({"acme"})).redirect_uris[1:] == ("acme:/cb",)


# -- cache


async def test_document_is_fresh_as_its_server_states_within_5_minutes_and_a_day(
    fetched: Fetched, server: DocumentServer
) -> None:
    for number, (cache_control, seconds) in enumerate([
        ("", 300),
        ("no-store", 300),
        ("no-cache, max-age=3600", 300),
        ("max-age=0", 300),
        ("max-age=299", 300),
        ("max-age=301", 301),
        ("public, Max-Age=3600", 3_600),
        ("max-age=86400", 86_400),
        ("max-age=31536000", 86_400),
        ("max-age=x", 300),
    ]):  # fmt: skip
        path = f"/{number}"
        url = server.publish(path)
        server.headers["Cache-Control"] = cache_control
        for elapsed, requests in ((0, 1), (seconds - 0.5, 1), (0.5, 2)):
            fetched.clock.advance(elapsed)
            await fetched.client(url)
            assert server.requests.count(path) == requests, cache_control
        assert len(fetched.limited) == number + 1  # a document in memory is not a new one


async def test_document_is_used_for_7_days_while_its_server_fails(fetched: Fetched, server: DocumentServer) -> None:
    for status in (429, 500, 503):
        path = f"/{status}"
        url = server.publish(path)
        await fetched.client(url)
        server.responses[path] = _response(status)
        fetched.clock.advance(7 * 86_400 - 61)
        for _ in range(2):
            assert (await fetched.client(url)).name == "Acme"
        assert server.requests.count(path) == 2  # the failure is remembered
        fetched.clock.advance(61)
        with pytest.raises(DocumentUnavailable):
            await fetched.client(url)
    assert fetched.outcomes == ["ok", "unavailable", "unavailable"] * 3


async def test_document_that_its_server_removes_is_not_used_any_more(fetched: Fetched, server: DocumentServer) -> None:
    url = server.publish("/c")
    await fetched.client(url)
    del server.responses["/c"]
    fetched.clock.advance(301)
    with pytest.raises(DocumentRefused, match="404"):
        await fetched.client(url)


async def test_failure_is_remembered_for_a_minute(fetched: Fetched, server: DocumentServer) -> None:
    url = server.url("/c")
    for seconds, requests in ((0.0, 1), (59.5, 1), (0.5, 2)):
        fetched.clock.advance(seconds)
        with pytest.raises(DocumentRefused):
            await fetched.client(url)
        assert len(server.requests) == requests
    server.publish("/c")
    fetched.clock.advance(60)
    await fetched.client(url)
    assert fetched.outcomes == ["refused", "refused", "ok"]


@pytest.fixture
def slow(server: DocumentServer) -> asyncio.Event:
    """Every response waits for this event."""
    go = asyncio.Event()

    async def slowly(request: web.Request) -> web.StreamResponse:
        await go.wait()
        return web.Response(body=json.dumps(
            {"client_id": server.url(request.path), "redirect_uris": ["https://acme.example/cb"]}
        ).encode())  # fmt: skip

    for number in range(20):
        server.responses[f"/{number}"] = slowly
    return go


async def test_one_url_is_fetched_once_at_a_time_also_if_the_first_client_goes_away(
    fetched: Fetched, server: DocumentServer, slow: asyncio.Event
) -> None:
    waiting = [asyncio.create_task(fetched.client(server.url("/0"))) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    slow.set()
    clients = await asyncio.gather(*waiting[1:])
    assert {client.client_id for client in clients} == {server.url("/0")}
    assert server.requests == ["/0"]
    assert fetched.limited == [None]


async def test_at_most_16_documents_are_fetched_at_once(
    fetched: Fetched, server: DocumentServer, slow: asyncio.Event
) -> None:
    assert document_cache.FETCHES_MAX == 16
    waiting = [asyncio.create_task(fetched.client(server.url(f"/{number}"))) for number in range(16)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyDocuments):
        await fetched.client(server.url("/16"))
    slow.set()
    await asyncio.gather(*waiting)
    await fetched.client(server.url("/16"))


async def test_cache_is_bounded_and_keeps_what_was_used_last(
    fetched: Fetched, server: DocumentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert document_cache.ENTRIES_MAX == 1_000
    monkeypatch.setattr(document_cache, "ENTRIES_MAX", 2)
    first, second, third = (server.publish(path) for path in ("/1", "/2", "/3"))
    for url in (first, second, first, third, first):
        await fetched.client(url)
    assert server.requests == ["/1", "/2", "/3"]
    await fetched.client(second)
    assert server.requests == ["/1", "/2", "/3", "/2"]


async def test_limit_of_new_documents_stops_the_fetch(fetched: Fetched, server: DocumentServer) -> None:
    def limit() -> None:
        raise ClientRefused("limited")

    with pytest.raises(ClientRefused, match="limited"):
        await fetched.documents.client(server.publish("/c"), before_fetch=limit)
    assert server.requests == []
