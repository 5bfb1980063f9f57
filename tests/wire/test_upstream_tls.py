"""An upstream behind TLS: a response that ended can be distinguished from one that was cut off on the network path."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator

import pytest
import trustme

from keyproxy.model import Ending
from tests.wire.conftest import Start, request


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A socket that the upstream listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def _answer(listening: socket.socket, context: ssl.SSLContext, answer: bytes, *, sends_close_notify: bool) -> None:
    """Respond to one request and end the connection, with or without a TLS closure alert."""
    accepted, _ = listening.accept()
    with context.wrap_socket(accepted, server_side=True) as tls:
        tls.recv(65_536)
        tls.sendall(answer)
        if sends_close_notify:
            tls.unwrap().close()


@pytest.mark.parametrize(
    ("head", "sends_close_notify", "is_whole"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True, True),
        (b"HTTP/1.1 200 OK\r\n\r\n", False, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", False, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n", True, False),
    ],
    ids=["ended", "ended by an attacker", "counted", "counted, and ended early"],
)
async def test_a_response_is_complete_only_if_the_upstream_closed_tls_properly(
    start: Start, listening: socket.socket, head: bytes, *, sends_close_notify: bool, is_whole: bool
) -> None:
    """RFC 9112 section 9.8: an end of the connection without a TLS closure alert is no end of a response."""
    authority, serving = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    answering = asyncio.create_task(
        asyncio.to_thread(_answer, listening, serving, head + b"hello", sends_close_notify=sends_close_notify)
    )
    wire = await start(upstream={"url": f"https://127.0.0.1:{listening.getsockname()[1]}"}, upstream_tls=trusting)
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        try:
            answer = await client.answer()
        except ConnectionResetError:
            assert not is_whole
        else:
            assert answer.is_whole is is_whole
            assert answer.body == b"hello" or not is_whole
    assert wire.recorder.seen[0].ending is (Ending.COMPLETED if is_whole else Ending.CUT)
    await answering
