"""What each phase of a request costs, without sockets: so that a regression shows which phase it came from.

Prints microseconds of CPU per request, best of several rounds. The numbers of one run compare with each other only.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import cast

import uvloop

from keyproxy import admission, clock, credential, headers
from keyproxy.gateway import Gateway
from keyproxy.headers import FieldNames, TrustRule
from keyproxy.keyformat import KeyFormat, SecretKey
from keyproxy.limits.allowance import Allowance, Hold, TokenNeed
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.recorder import Recorder
from keyproxy.model import NEVER, Identity, KeyDigest, Missing, Moment, Permit
from keyproxy.problems import Problems
from keyproxy.settings import Listen, RouteRow, Settings
from keyproxy.settings import Upstream as UpstreamSettings
from keyproxy.wire.client import ClientConnection
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.pool import UpstreamPool, Upstreams
from keyproxy.wire.readers import RequestReader, ResponseReader
from keyproxy.wire.server import ProxyServer, Terms
from keyproxy.wire.upstream import UpstreamConnection

_CALLS = 5_000
_ROUNDS = 7

FORMAT = KeyFormat()
SECRET = FORMAT.make(bytes(32), is_test=False)


def requests(secret: SecretKey) -> dict[str, bytes]:
    """Two requests: a plain one, and one with the headers that an instrumented worker sends."""
    plain = (
        b"POST /v1/ai/jobs HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: Api-Key %b\r\n"
        b"Content-Type: application/json\r\nContent-Length: 90\r\n" % secret.reveal()
    )
    rich = plain + (
        b"User-Agent: python-requests/2.32\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nX-Request-Id: 8f14e45f\r\n"
    )
    return {"plain": plain + b"\r\n" + b"x" * 90, "rich": rich + b"\r\n" + b"x" * 90}


RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Sat, 21 Nov 2026 10:06:43 GMT\r\n"
    b"Content-Type: application/json\r\nContent-Length: 39\r\n\r\n" + b"x" * 39
)


class _Identities:
    """One known key."""

    def __init__(self, identity: Identity) -> None:
        self._table = {SECRET.digest(): identity}

    def known(self, digest: KeyDigest, now: Moment, *, is_first_look: bool = True) -> Identity:
        return self._table[digest]

    def fetching(self, key: SecretKey, missing: Missing) -> Missing:
        raise AssertionError("the one key is known")


class _Transport:
    """Takes bytes and forgets them."""

    def __init__(self) -> None:
        self.written = 0
        self._socket, self._other_end = socket.socketpair()

    def write(self, data: bytes) -> None:
        self.written += 1

    def get_extra_info(self, name: str) -> object:
        return ("127.0.0.1", 40000) if name == "peername" else self._socket if name == "socket" else None

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        raise AssertionError("the exchange was not clean")

    close = pause_reading = resume_reading = abort


class _NoLedger:
    """For identities without limits."""

    def take(self, allowance: Allowance, now: Moment, tokens: TokenNeed | None = None) -> Hold:
        raise AssertionError("nobody is under limits here")

    def extend(self, hold: Hold, tokens: int) -> Hold:
        raise AssertionError("nobody is under limits here")

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0) -> None:
        raise AssertionError("nobody is under limits here")


class Bench:
    """A proxy without sockets."""

    def __init__(self, loop: asyncio.AbstractEventLoop, null: int) -> None:
        self.names = FieldNames()
        block = headers.identity_block("X-Keyproxy-", (("User", "u_42"), ("Tenant", "acme"), ("Scope", "jobs:write")))
        self.identity = Identity("k", "u_42", "acme", frozenset({"jobs:write"}), False, NEVER, None, block)
        self.routes = Settings(routes=(RouteRow("POST /v1/ai/jobs", ["jobs:write"]),)).route_table()
        self.log = AccessLog(null, wall_offset=clock.wall_offset)
        self.recorder = Recorder(self.log)
        self.gateway = Gateway(
            key_format=FORMAT, identities=_Identities(self.identity), ledger=_NoLedger(), routes=self.routes,
            now=clock.now, instance=b"bench",
        )  # fmt: skip
        deadlines = Deadlines(loop, clock.monotonic)
        settings = UpstreamSettings()
        pool = UpstreamPool(
            "http://127.0.0.1:9", settings, ResponseReader(self.names), deadlines, clock=clock.monotonic, loop=loop
        )
        self.upstream = UpstreamConnection(pool, loop)
        self.upstream.connection_made(cast("asyncio.Transport", _Transport()))
        pool.release(self.upstream, clock.monotonic())
        self.server = ProxyServer(
            Terms(Listen(), self.gateway, Upstreams(pool), self.names, Problems(), TrustRule([])),
            recorder=self.recorder, deadlines=deadlines, clock=clock.monotonic, loop=loop,
        )  # fmt: skip
        self.client = ClientConnection(self.server)
        self.client.connection_made(cast("asyncio.Transport", _Transport()))

    def whole(self, request: bytes) -> None:
        """One request and its answer."""
        self.client.data_received(request)
        self.upstream.data_received(RESPONSE)


def timed(call: Callable[[], object]) -> float:
    """Microseconds of CPU for one call."""
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.process_time()
        for _ in range(_CALLS):
            call()
        best = min(best, time.process_time() - started)
    return best / _CALLS * 1e6


def phases(bench: Bench, raw: bytes) -> dict[str, Callable[[], object]]:
    """Each phase as a call of its own, on values as the phase before leaves them."""
    reader, responses = RequestReader(bench.names, bench.gateway.holds_key), ResponseReader(bench.names)
    head_bytes = raw[: raw.index(b"\r\n\r\n") + 4]
    response_bytes = RESPONSE[: RESPONSE.index(b"\r\n\r\n") + 4]
    reader.read(head_bytes, len(head_bytes) - 4)
    head = reader.read(head_bytes, len(head_bytes) - 4)
    now = clock.now()
    route = bench.routes.match(head.line.method, head.line.path)
    permit = Permit(admission.admit(bench.identity, route, now))
    forwarding = bench.server.trust.forwarding("127.0.0.1", is_tls=False)
    return {
        "(an empty call)": lambda: None,
        "1 read": lambda: reader.read(head_bytes, len(head_bytes) - 4),
        "2 present": lambda: credential.presented(head, FORMAT),
        "4 admit": lambda: admission.admit(bench.identity, bench.routes.match(head.line.method, head.line.path), now),
        "6 dress": lambda: headers.dress(head, permit, request_id=b"0123456789", forwarding=forwarding, host=b"u"),
        "7 read the answer": lambda: responses.read(response_bytes, len(response_bytes) - 4),
        "the whole, without counting": lambda: bench.whole(raw),
    }


def main() -> None:
    """Print the table."""
    loop = uvloop.new_event_loop()
    with open("/dev/null", "wb") as null:  # noqa: PTH123
        bench = Bench(loop, null.fileno())
        for kind, raw in requests(SECRET).items():
            print(f"\n{kind} request, {len(raw)} bytes                µs")
            for name, call in phases(bench, raw).items():
                print(f"  {name:<32} {timed(call):8.2f}")
        bench.recorder.count_pending()
        pending = bench.recorder._pending  # noqa: SLF001
        bench.whole(raw)
        exchange = pending[0] if pending else bench.recorder._pending[0]  # noqa: SLF001
        many = [exchange] * 1000

        def count() -> None:
            bench.recorder._pending = list(many)  # noqa: SLF001
            bench.recorder.count_pending()

        started = time.process_time()
        for _ in range(20):
            count()
        print(f"\n  10 record and log                {(time.process_time() - started) / 20_000 * 1e6:8.2f}")


if __name__ == "__main__":
    main()
