"""The interface that an exchange requires of its client connection. `ClientConnection` implements it."""

from __future__ import annotations

import asyncio

from keyproxy.http.forwarding import Forwarding
from keyproxy.wire.client.transport import ClientTransport


class ExchangeOwner(asyncio.Protocol):
    """A client connection, as seen by its exchange."""

    transport: ClientTransport
    forwarding: Forwarding

    def pause(self) -> None:
        """Stop reading the request."""
        raise NotImplementedError

    def resume(self) -> None:
        """Read the request again."""
        raise NotImplementedError

    def enter_tunnel(self) -> None:
        """From now on bytes are relayed unchanged."""
        raise NotImplementedError

    def exchange_over(self, now: float, *, closes: bool, is_cut: bool) -> None:
        """The response was written or abandoned."""
        raise NotImplementedError
