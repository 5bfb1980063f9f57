"""The objects that all connections of one proxied port share. `server` sets them, and replaces them on a reload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from keyproxy.config.schema import Listen
from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.http.headers import TrustRule
from keyproxy.ports import Gate, Recorder
from keyproxy.wire.body_buffer import BodyMemory
from keyproxy.wire.client.transport import ClientTransport
from keyproxy.wire.parsing.head_cache import RequestReader
from keyproxy.wire.reading_turns import ReadingTurns
from keyproxy.wire.upstream.pool import Upstreams


class ServerContext:
    """The shared state of all connections of one proxied port."""

    clock: Callable[[], float]
    gate: Gate
    is_draining: bool
    listen: Listen
    loop: asyncio.AbstractEventLoop
    problems: ErrorRenderer
    recorder: Recorder
    requests: RequestReader
    room: BodyMemory
    trust: TrustRule
    turns: ReadingTurns
    upstreams: Upstreams

    def admit(self, connection: ClientTransport) -> bool:
        """Register a new connection. False if it is over the bound and has to be refused."""
        raise NotImplementedError

    def forget(self, connection: ClientTransport) -> None:
        """Remove a lost connection."""
        raise NotImplementedError

    def date_line(self) -> bytes:
        """The Date line of a response that is sent now."""
        raise NotImplementedError
