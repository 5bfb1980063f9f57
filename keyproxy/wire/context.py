"""The objects that all connections of one proxied port share. `server` sets them, and replaces them on a reload."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.schema import Listen
from keyproxy.config.token_settings import Tokens
from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.http.forwarding import TrustRule
from keyproxy.http.headers import FieldNames
from keyproxy.http.routes import RouteTable
from keyproxy.ports.gate import Assertions, Gate, Recorder
from keyproxy.wire.body_buffer import BodyMemory
from keyproxy.wire.client.exchange_owner import ExchangeOwner
from keyproxy.wire.client.request_ids import RequestIds
from keyproxy.wire.parsing.head_cache import RequestReader
from keyproxy.wire.reading_turns import ReadingTurns
from keyproxy.wire.upstream.pool import Upstreams
from keyproxy.wire.usage_reads import UsageReads


@dataclass(frozen=True, slots=True)
class ServerTerms:
    """The settings and objects with which requests are served.

    `tls` None: without TLS. `assertions` None: no assertions are forwarded.
    """

    listen: Listen
    tokens: Tokens
    gate: Gate
    routes: RouteTable
    key_format: KeyFormat
    upstreams: Upstreams
    names: FieldNames
    problems: ErrorRenderer
    trust: TrustRule
    tls: ssl.SSLContext | None = None
    assertions: Assertions | None = None


class ServerContext:
    """The shared state of all connections of one proxied port."""

    clock: Callable[[], float]
    wall: Callable[[], float]
    gate: Gate
    assertions: Assertions | None
    is_draining: bool
    key_format: KeyFormat
    listen: Listen
    #: Three of its settings, which every request reads: attributes of `listen` are found by name.
    header_bytes_max: int
    body_bytes_max: int
    keepalive_seconds: float
    loop: asyncio.AbstractEventLoop
    problems: ErrorRenderer
    recorder: Recorder
    request_ids: RequestIds
    requests: RequestReader
    room: BodyMemory
    routes: RouteTable
    trust: TrustRule
    turns: ReadingTurns
    upstreams: Upstreams
    usage_reads: UsageReads

    def admit(self, connection: ExchangeOwner) -> bool:
        """Register a new connection. False if it is over the bound and has to be refused."""
        raise NotImplementedError

    def forget(self, connection: ExchangeOwner) -> None:
        """Remove a lost connection."""
        raise NotImplementedError

    def date_line(self) -> bytes:
        """The Date line of a response that is sent now."""
        raise NotImplementedError
