"""Every transition that a table of phases allows occurs, and every other one raises."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import pytest

from keyproxy.ai.dialects.header import HEADER
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.usage_reader import ResponseUsageReader
from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.http.headers import FieldNames
from keyproxy.http.own_response import created
from keyproxy.http_messages import RequestHead, ResponseHead
from keyproxy.model import Grant, Permit, Route
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.gate import Gate
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire import phases
from keyproxy.wire.client.connection import ClientConnection
from keyproxy.wire.client.transport import ClientTransport
from keyproxy.wire.parsing.head_cache import RequestReader, ResponseReader
from keyproxy.wire.phases import IllegalTransitionError, PhaseTable
from keyproxy.wire.responses.response_writer import ResponseWriter
from keyproxy.wire.upstream.connection import UpstreamConnection
from tests import fakes
from tests.wire.conftest import AUTHORIZATION, Start, Wire

TABLES: Final = {
    "exchange": (phases.EXCHANGE, phases.EXCHANGE_TRANSITIONS),
    "response": (phases.RESPONSE, phases.RESPONSE_TRANSITIONS),
    "socket": (phases.SOCKET, phases.SOCKET_TRANSITIONS),
    "reading": (phases.READ, phases.READING_TRANSITIONS),
}

GET: Final = b"GET / HTTP/1.1\r\nHost: h\r\n" + AUTHORIZATION + b"\r\n"
POST: Final = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n" + AUTHORIZATION + b"\r\n"
HANDSHAKE: Final = (
    b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + AUTHORIZATION + b"\r\n"
)
HINTS: Final = b"HTTP/1.1 103 Early Hints\r\n\r\n"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
SWITCH: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
PERMIT: Final = Permit(Grant(fakes.identity(), Route("any")))


def named(table: PhaseTable, transitions: dict[int, tuple[int, ...]]) -> set[tuple[str, str]]:
    """The allowed transitions by name."""
    return {(table.names[phase], table.names[to]) for phase, following in transitions.items() for to in following}


@pytest.mark.parametrize("name", TABLES)
def test_a_transition_that_is_not_in_the_table_raises(name: str) -> None:
    table, transitions = TABLES[name]
    assert sorted(transitions) == list(range(len(table.names)))
    for phase, following in transitions.items():
        for to in range(len(table.names)):
            if to in following:
                assert table.step(phase, to) == to
            else:
                with pytest.raises(IllegalTransitionError, match=f"{table.names[phase]} -> {table.names[to]}"):
                    table.step(phase, to)


class _Transport:
    """A socket that accepts everything."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.is_closed = False

    def write(self, data: bytes) -> None: ...

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("127.0.0.1", 4), "socket": self._sock}.get(name)

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def write_eof(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True

    abort = close


class _Gate(Gate):
    """Decides when the test does. Notes how the connection presents itself meanwhile."""

    def __init__(self) -> None:
        self.exchange: Exchange | None = None
        self.client: ClientConnection | None = None
        self.seen = ""

    def begin(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.seen = repr(self.client)

    def review(self, exchange: Exchange) -> None: ...

    def settle(self, exchange: Exchange) -> None: ...

    def meter(self, exchange: Exchange, answer: ResponseHead) -> Meter:
        return Meter(ResponseUsageReader(HEADER, HEADER.usual))

    def watch(self, exchange: Exchange) -> None: ...


class Stage:
    """One client connection, and one to the upstream that is idle once it was offered."""

    def __init__(self, wire: Wire, sock: socket.socket) -> None:
        self.gate = _Gate()
        wire.server.gate = self.gate
        self.pool = wire.pool
        self.upstream = UpstreamConnection(wire.pool, wire.server.loop)
        self.upstream.connection_made(cast("Any", _Transport(sock)))
        self.client = self.gate.client = ClientConnection(wire.server)
        self.client.connection_made(cast("Any", _Transport(sock)))

    def offer_again(self) -> None:
        """The idle connection has served another request before."""
        self.upstream.is_reused = True
        self.pool.release(self.upstream, self.pool.clock())

    @property
    def exchange(self) -> Exchange:
        """The current exchange, or the last one."""
        assert self.gate.exchange is not None
        return self.gate.exchange

    def phase(self) -> str:
        """The phase of that exchange."""
        return repr(self.exchange).removesuffix(">").split(" ", 2)[2]


@pytest.fixture
async def stage(start: Start) -> Any:
    """A proxy whose gate decides nothing by itself."""
    wire = await start(upstream={"connections_max": 2})
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        stage = Stage(wire, near)
        yield stage
        if stage.client.transport.phase != phases.LOST:
            stage.client.connection_lost(None)


Event = Callable[[Stage], object]

EVENTS: Final[dict[str, Event]] = {
    "get": lambda stage: stage.client.data_received(GET),
    "post": lambda stage: stage.client.data_received(POST),
    "handshake": lambda stage: stage.client.data_received(HANDSHAKE),
    "body": lambda stage: stage.client.data_received(b"xy"),
    "offer": lambda stage: stage.pool.release(stage.upstream, stage.pool.clock()),
    "offer again": lambda stage: stage.offer_again(),
    "forward": lambda stage: stage.exchange.forward(PERMIT),
    "serve": lambda stage: stage.exchange.serve(PERMIT),
    "respond": lambda stage: stage.exchange.respond(created({})),
    "refuse": lambda stage: stage.exchange.refuse(Refusal(Reason.KEY_INVALID)),
    "pause": lambda stage: stage.exchange.pause_stream(),
    "extend": lambda stage: stage.exchange.extend(PERMIT),
    "hints": lambda stage: stage.upstream.data_received(HINTS),
    "head": lambda stage: stage.upstream.data_received(OK),
    "content": lambda stage: stage.upstream.data_received(b"done"),
    "switch": lambda stage: stage.upstream.data_received(SWITCH),
    "upstream lost": lambda stage: stage.upstream.connection_lost(ConnectionResetError()),
    "client lost": lambda stage: stage.client.connection_lost(None),
}

#: Events, and the transition that the last one of them causes.
EXCHANGES: Final = [
    ("post, forward", "deciding", "awaiting body"),
    ("get, forward", "deciding", "connecting"),
    ("offer, get, forward", "deciding", "requested"),
    ("get, refuse", "deciding", "over"),
    ("get, serve", "deciding", "serving"),
    ("get, serve, respond", "serving", "over"),
    ("get, serve, client lost, respond", "serving", "over"),
    ("get, serve, client lost, refuse", "serving", "over"),
    ("post, forward, body", "awaiting body", "connecting"),
    ("offer, post, forward, body", "awaiting body", "requested"),
    ("post, forward, client lost", "awaiting body", "over"),
    ("get, forward, offer", "connecting", "requested"),
    ("get, forward, client lost", "connecting", "over"),
    ("offer again, get, forward, upstream lost", "requested", "connecting"),
    ("offer, get, forward, hints", "requested", "informed"),
    ("offer, get, forward, head", "requested", "responding"),
    ("handshake, forward, offer, switch", "requested", "tunnel"),
    ("offer, get, forward, upstream lost", "requested", "over"),
    ("offer, get, forward, hints, head", "informed", "responding"),
    ("handshake, forward, offer, hints, switch", "informed", "tunnel"),
    ("offer again, get, forward, hints, upstream lost", "informed", "over"),
    ("offer, get, forward, head, pause", "responding", "paused"),
    ("offer, get, forward, head, content", "responding", "over"),
    ("offer, get, forward, head, pause, extend", "paused", "responding"),
    ("offer, get, forward, head, pause, client lost", "paused", "over"),
    ("handshake, forward, offer, switch, upstream lost", "tunnel", "over"),
]


def test_the_cases_below_are_all_transitions_of_an_exchange() -> None:
    assert {(before, after) for _, before, after in EXCHANGES} == named(*TABLES["exchange"])


@pytest.mark.parametrize(("events", "before", "after"), EXCHANGES)
async def test_every_transition_of_an_exchange_occurs(stage: Stage, events: str, before: str, after: str) -> None:
    *preparing, last = events.split(", ")
    for event in preparing:
        EVENTS[event](stage)
    assert stage.phase() == before
    EVENTS[last](stage)
    assert stage.phase() == after


def _socket(steps: str) -> Iterator[str]:
    """The phases of a client's socket, step by step."""
    near, far = socket.socketpair()
    with near, far:
        transport = ClientTransport(1.0)
        transport.attach(cast("Any", _Transport(near)))
        calls: dict[str, Callable[[], object]] = {
            "end of input": transport.end_of_input,
            "finish": lambda: transport.finish(0.0, lingers=True, ends_response=False),
            "close": lambda: transport.close(0.0),
            "abort": transport.abort,
            "lose": transport.lose,
        }
        yield _shown(transport)
        for step in steps.split(", "):
            calls[step]()
            yield _shown(transport)


def _response(steps: str) -> Iterator[str]:
    """The phases of a response, step by step."""
    response = ResponseWriter(ClientTransport(1.0), b"r")
    head: RequestHead = RequestReader(FieldNames(), fakes.holds_key).read(GET, len(GET) - 4)
    answer, switch = (ResponseReader(FieldNames()).read(raw, len(raw) - 4) for raw in (OK, SWITCH))
    own = ErrorRenderer().render(Refusal(Reason.KEY_INVALID), "r")
    calls: dict[str, Callable[[], object]] = {
        "begin": lambda: response.begin(head, answer, b"", may_continue=True),
        "tunnel": lambda: response.begin_tunnel(switch, b""),
        "own": lambda: response.send_own(head, own, b"", closes=False),
        "write": lambda: response.write(b"d", is_last=False),
        "write last": lambda: response.write(b"d", is_last=True),
    }
    yield _shown(response)
    for step in steps.split(", "):
        calls[step]()
        yield _shown(response)


def _shown(item: object) -> str:
    match = re.fullmatch(r"<\w+ (.+)>", repr(item))
    assert match is not None
    return match[1]


WALKS: Final = {
    "socket": [
        "end of input, close, lose",
        "end of input, lose",
        "finish, close",
        "finish, lose",
        "close",
        "abort, abort",
        "lose",
    ],
    "response": ["begin, write, write last", "begin, write last", "begin, own", "tunnel, write last", "own"],
}


@pytest.mark.parametrize(("name", "walk"), [("socket", _socket), ("response", _response)])
def test_every_transition_of_a_socket_and_of_a_response_occurs(name: str, walk: Callable[[str], Iterator[str]]) -> None:
    seen = set()
    for steps in WALKS[name]:
        shown = list(walk(steps))
        seen |= {(before, after) for before, after in itertools.pairwise(shown) if before != after}
    assert seen == named(*TABLES[name])


async def test_every_transition_of_the_reading_of_a_client_occurs(stage: Stage) -> None:
    assert repr(stage.client).startswith("<ClientConnection resting")
    stage.client.data_received(GET)
    assert stage.gate.seen.startswith("<ClientConnection reading")
    assert repr(stage.client).startswith("<ClientConnection resting")
    EVENTS["refuse"](stage)
    malformed = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"

    class Refuses(_Gate):
        def begin(self, exchange: Exchange) -> None:
            exchange.refuse(Refusal(Reason.KEY_MISSING))

    stage.client.server.gate = Refuses()
    stage.client.data_received(malformed * 6)
    assert repr(stage.client).startswith("<ClientConnection due")
    await asyncio.sleep(0)
    assert repr(stage.client).startswith("<ClientConnection resting")
