"""Report failed TLS handshakes to the peer: by an alert, or for HTTP without TLS by a plain response.

Also reads the end of a response over TLS after the event loop has given up its connection.

The event loop drops a connection whose handshake fails without sending what OpenSSL has written for the peer. So the
context hands out objects that know the socket and the buffers of their connection: when a handshake fails, the object
sends the alert itself. The loop then closes its descriptor of the socket; a duplicate stays open until the peer has
read the alert, since closing with bytes unread would make the kernel send a reset after it.

Object and socket are paired by a context variable: the loop makes the object in the context in which it was given the
socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final

#: How long the peer of a failed handshake may take to read the alert, and how much it may still send.
_LINGER_SECONDS: Final = 1.0
_LINGER_READS_MAX: Final = 16
_READ_BYTES: Final = 65_536

#: OpenSSL's names for the beginning of a plain HTTP request. It does not know every method.
_PLAIN_HTTP: Final = ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST")
_IN_A_REQUEST_LINE: Final = b" HTTP/1."


#: The ALPN protocol of this port, and the alert for a client that does not offer it.
PROTOCOL: Final = b"http/1.1"
_NO_APPLICATION_PROTOCOL: Final = 120

_HANDSHAKE_RECORD: Final = b"\x16"
_RECORD_HEADER_BYTES: Final = 5
_ALPN: Final = b"\x00\x10"


class AcceptedSocket:
    """An accepted socket during its handshake. `plain_response` builds the response to HTTP without TLS."""

    def __init__(self, sock: socket.socket, plain_response: Callable[[], bytes]) -> None:
        self.plain_response: Final = plain_response
        self._sock = sock
        self._duplicate: socket.socket | None = None

    def open(self) -> None:
        """Assign further handshakes in this context to this socket."""
        _accepted.set(self)

    def send_last(self, data: bytes) -> None:
        """Send the last bytes to the peer, as many as fit without waiting."""
        with contextlib.suppress(OSError):
            self._duplicate = self._sock.dup()
            self._duplicate.send(data)

    async def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the peer read what was sent last, in bounded time, and close."""
        duplicate = self._duplicate
        if duplicate is None:
            return
        with duplicate, contextlib.suppress(OSError, TimeoutError):
            duplicate.setblocking(False)
            duplicate.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LINGER_SECONDS):
                for _ in range(_LINGER_READS_MAX):
                    if not await loop.sock_recv(duplicate, _READ_BYTES):
                        return


_accepted: contextvars.ContextVar[AcceptedSocket | None] = contextvars.ContextVar("keyproxy_accepted", default=None)


class TlsObject(ssl.SSLObject):
    """The TLS of one connection. `incoming` and `outgoing` are the bytes on their way from and to its peer."""

    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    accepted: AcceptedSocket | None = None
    offered: list[bytes] | None = None

    def _has_hello(self) -> bool:
        """Whether the client's first record, or something else, has arrived. Records the ALPN offer."""
        if self.offered is None:
            begun = self.incoming.read()
            self.incoming.write(begun)
            if begun[:1] == _HANDSHAKE_RECORD and len(begun) < _RECORD_HEADER_BYTES + int.from_bytes(begun[3:5], "big"):
                return False
            self.offered = offered_protocols(begun)
        return True

    def do_handshake(self) -> None:
        """Continue the handshake. If it fails, send the reason to the peer."""
        if self.server_side and self.incoming.pending and not self._has_hello():
            raise ssl.SSLWantReadError("the first record has not arrived whole")
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLSyscallError):
            raise
        except ssl.SSLError as error:
            accepted = self.accepted
            if accepted is not None:
                alert = self.outgoing.read()
                is_plain = error.reason in _PLAIN_HTTP or _IN_A_REQUEST_LINE in self.incoming.read()
                accepted.send_last(accepted.plain_response() if is_plain else alert)
            raise

    def decrypt(self, data: bytes) -> bytes:
        """Decrypt bytes that the event loop has not read any more; empty if they are incomplete."""
        self.incoming.write(data)
        content = b""
        with contextlib.suppress(ssl.SSLError):
            while more := self.read(_READ_BYTES):
                content += more
        return content


def refuse_other_protocols(tls: ssl.SSLObject, _server_name: str | None, _context: ssl.SSLContext) -> int | None:
    """For `sni_callback`: the alert for a client that offers only other protocols. RFC 7301 section 3.2."""
    offered = tls.offered if isinstance(tls, TlsObject) else []
    return _NO_APPLICATION_PROTOCOL if offered and PROTOCOL not in offered else None


def offered_protocols(record: bytes) -> list[bytes]:
    """Return the ALPN offer of a TLS record with a ClientHello; empty if there is none, or for any other record."""
    try:
        # Record and handshake headers, version, random; then the session id, cipher suites and compression methods.
        hello = record[43:]
        for length_bytes in (1, 2, 1):
            hello = _split(hello, length_bytes)[1]
        extensions = _split(hello, 2)[0]
        while extensions:
            kind, extensions = extensions[:2], extensions[2:]
            content, extensions = _split(extensions, 2)
            if kind == _ALPN:
                names, found = _split(content, 2)[0], []
                while names:
                    name, names = _split(names, 1)
                    found.append(name)
                return found
    except ValueError:
        pass  # OpenSSL reports the fault
    return []


def _split(data: bytes, length_bytes: int) -> tuple[bytes, bytes]:
    """Split off a TLS vector, which begins with its length. Return it and the rest."""
    end = length_bytes + int.from_bytes(data[:length_bytes], "big")
    if len(data) < max(end, length_bytes):
        raise ValueError("the vector is cut off")
    return data[length_bytes:end], data[end:]


class TlsContext(ssl.SSLContext):
    """An SSL context whose `wrap_bio` makes TlsObjects."""

    sslobject_class = TlsObject

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *arguments: Any, **named: Any) -> TlsObject:
        """The TLS between two buffers."""
        made = super().wrap_bio(incoming, outgoing, *arguments, **named)
        assert isinstance(made, TlsObject)  # noqa: S101 - for the type checker: the class is set above
        made.incoming, made.outgoing = incoming, outgoing
        if made.server_side:
            made.accepted = _accepted.get()
        return made
