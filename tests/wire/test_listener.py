"""Connections are accepted within the bound, including those that are not open yet; any others wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from keyproxy.wire.handshake import offered_protocols
from keyproxy.wire.tls import server_context
from tests.rawhttp import Client
from tests.wire.conftest import Start, Wire, request

#: Connections over the bound that are accepted in order to be refused.
TURNED_AWAY_MAX = 128


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(context of the server, context of a client that trusts it)."""
    authority = trustme.CA()
    file = tmp_path / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(file))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return server_context(str(file), ""), trusting


async def tls_status(wire: Wire, trusting: ssl.SSLContext) -> int:
    """The status of one request over TLS."""
    assert not isinstance(wire.address, str)
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*wire.address, ssl=trusting, server_hostname="localhost")
        client = Client(reader, writer)
        await client.send(request("GET", "/"))
        status = (await client.answer()).status
        await client.close()
    return status


@contextlib.contextmanager
def silent_clients(wire: Wire, number: int) -> Iterator[list[socket.socket]]:
    """Clients that connect and send nothing."""
    assert not isinstance(wire.address, str)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(wire.address, timeout=5)) for _ in range(number)]


async def test_handshakes_under_way_are_bounded_and_end_in_time(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    wire = await start(listen={"connections_max": 2, "header_timeout_seconds": 0.5}, tls=certificate[0])
    listener = wire.server._listener
    assert listener is not None
    with silent_clients(wire, 300):
        async with asyncio.timeout(5):
            while listener.opening() < 2 + TURNED_AWAY_MAX:
                await asyncio.sleep(0.01)
        most = 0
        request = asyncio.create_task(tls_status(wire, certificate[1]))
        while not request.done():
            most = max(most, listener.opening() + wire.server.open_connections())
            await asyncio.sleep(0.01)
        assert await request == 200
    assert most <= 2 + TURNED_AWAY_MAX + 1
    assert wire.server.failed_connections()["handshake"] >= 300 - TURNED_AWAY_MAX


@pytest.mark.parametrize("first_bytes", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""])
async def test_a_client_that_does_not_use_tls_is_disconnected_and_counted(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext], first_bytes: bytes
) -> None:
    wire = await start(listen={"header_timeout_seconds": 0.3}, tls=certificate[0])
    async with wire.client() as client:
        await client.send(first_bytes)
        await client.ends(seconds=3)
    async with asyncio.timeout(3):
        while not wire.server.failed_connections()["handshake"]:
            await asyncio.sleep(0.01)
    assert await tls_status(wire, certificate[1]) == 200
    assert wire.recorder.seen[-1].status == 200


async def _raw(wire: Wire, sent: bytes) -> bytes:
    """What a client gets that sends these bytes to the port in the clear, until the connection ends."""
    async with wire.client() as client:
        await client.send(sent)
        return await client.ends(seconds=3)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "CONNECT", "QUERY"])
async def test_plain_http_on_a_tls_port_gets_a_plain_text_response(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext], method: str
) -> None:
    wire = await start(tls=certificate[0])
    head, _, body = (await _raw(wire, request(method, "/", body=b"x" * 20_000))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert {b"Content-Type: text/plain; charset=utf-8", b"Connection: close"} <= {*head.split(b"\r\n")}
    assert b"Content-Length: %d" % len(body) in head
    assert b"X-Request-Id: " in head
    assert b"https://" in body
    assert wire.upstream.connections == 0
    assert wire.server.failed_connections()["handshake"] == 1
    assert await tls_status(wire, certificate[1]) == 200


#: TLS alerts, RFC 8446 section 6.
ALERTS = {"protocol version": b"\x02\x46", "decode error": b"\x02\x32", "unexpected message": b"\x02\x0a"}


async def test_bytes_that_are_neither_get_an_alert(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    wire = await start(tls=certificate[0])
    got = await _raw(wire, b"\x16\x03\x01\x00\x05hello")
    assert (got[:1], got[3:5], got[5:]) == (b"\x15", b"\x00\x02", got[5:])
    assert got[5:] in ALERTS.values()


async def _alert(wire: Wire, context: ssl.SSLContext) -> str:
    """OpenSSL's error in a handshake, or in the first read after it; empty if there is none."""
    assert not isinstance(wire.address, str)
    try:
        reader, writer = await asyncio.open_connection(*wire.address, ssl=context, server_hostname="localhost")
        writer.write(request("GET", "/"))
        await asyncio.wait_for(reader.read(1), 5)
    except ssl.SSLError as error:
        return error.reason or str(error)
    writer.close()
    return ""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_that_is_refused_in_the_handshake_gets_an_alert(
    start: Start, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    file, clients = tmp_path / "server.pem", tmp_path / "clients.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(file))
    authority.cert_pem.write_to_path(str(clients))
    wire = await start(tls=server_context(str(file), "", str(clients)))

    def client(of: trustme.CA | None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        context.minimum_version = context.maximum_version = version
        if of is not None:
            of.issue_cert("client").configure_cert(context)
        return context

    missing = "TLSV13_ALERT_CERTIFICATE_REQUIRED" if version is ssl.TLSVersion.TLSv1_3 else "HANDSHAKE_FAILURE"
    for _ in range(5):
        assert missing in await _alert(wire, client(None))
        assert await _alert(wire, client(stranger)) == "TLSV1_ALERT_UNKNOWN_CA"
    assert await _alert(wire, client(authority)) == ""
    assert wire.server.failed_connections()["handshake"] == 10


async def test_a_client_without_a_version_in_common_gets_an_alert(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    wire = await start(tls=certificate[0])
    certificate[0].minimum_version = ssl.TLSVersion.TLSv1_3
    certificate[1].maximum_version = ssl.TLSVersion.TLSv1_2
    assert await _alert(wire, certificate[1]) == "TLSV1_ALERT_PROTOCOL_VERSION"


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [([], None), (["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), (["h2"], ""), (["h2", "http/1.0"], "")],
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_that_offers_other_protocols_alone_gets_an_alert(
    start: Start,
    certificate: tuple[ssl.SSLContext, ssl.SSLContext],
    version: ssl.TLSVersion,
    offered: list[str],
    chosen: str | None,
) -> None:
    wire = await start(tls=certificate[0])
    assert not isinstance(wire.address, str)
    context = certificate[1]
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(offered)
    result = await _alert(wire, context)
    assert ("no application protocol" in result) if chosen == "" else (result == "")
    if chosen != "":
        _, writer = await asyncio.open_connection(*wire.address, ssl=context, server_hostname="localhost")
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == chosen
        writer.close()


@pytest.mark.parametrize("piece_bytes", [1, 3, 100])
async def test_a_handshake_may_come_in_small_pieces(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext], piece_bytes: int
) -> None:
    wire = await start(tls=certificate[0])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = certificate[1].wrap_bio(incoming, outgoing, server_hostname="localhost")
    async with wire.client() as client, asyncio.timeout(10):
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                is_over = False
            else:
                is_over = True
            flight = outgoing.read()
            for at in range(0, len(flight), piece_bytes):
                await client.send(flight[at : at + piece_bytes])
                await asyncio.sleep(0)
            if is_over:
                break
            incoming.write(await client.reader.read(65_536))
        tls.write(request("GET", "/"))
        await client.send(outgoing.read())
        got = b""
        while not got:
            incoming.write(await client.reader.read(65_536))
            with contextlib.suppress(ssl.SSLWantReadError):
                got = tls.read(65_536)
        assert got.startswith(b"HTTP/1.1 200 OK")


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_no_bytes_are_too_odd_to_be_looked_at_for_protocols(data: bytes) -> None:
    assert isinstance(offered_protocols(data), list)
    assert isinstance(offered_protocols(bytes(43) + data), list)


async def test_half_a_request_over_tls_is_refused_or_dropped_and_leaves_nothing(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext], caplog: pytest.LogCaptureFixture
) -> None:
    wire = await start(tls=certificate[0])
    assert not isinstance(wire.address, str)
    for half in (b"GET / HT", request("POST", "/", "Content-Length: 5") + b"x", request("GET", "/") * 2):
        reader, writer = await asyncio.open_connection(*wire.address, ssl=certificate[1], server_hostname="localhost")
        client = Client(reader, writer)
        await client.send(half)
        writer.close()
        await client.ends()
    async with asyncio.timeout(5):
        while wire.server.open_connections():
            await asyncio.sleep(0.01)
    assert caplog.records == []


async def test_a_connection_made_before_a_drain_is_served_even_if_its_handshake_follows(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    wire = await start(tls=certificate[0])
    assert not isinstance(wire.address, str)
    reader, writer = await asyncio.open_connection(*wire.address)
    draining = asyncio.create_task(wire.server.drain(5.0))
    await asyncio.sleep(0.05)
    await writer.start_tls(certificate[1], server_hostname="localhost")
    client = Client(reader, writer)
    await client.send(request("GET", "/"))
    answer = await client.answer()
    assert (answer.status, answer.one("Connection")) == (200, "close")
    await client.close()
    async with asyncio.timeout(5):
        await draining
