"""The head of a request as it goes upstream, from what its exchange holds."""

from __future__ import annotations

from keyproxy.http import headers
from keyproxy.model import Permit
from keyproxy.ports.exchange import Exchange


def request_head(exchange: Exchange, permit: Permit, host: bytes, *, is_signed: bool) -> bytes:
    """The head to write to the upstream named `host`. `is_signed`: with the assertion of the identity.

    The lines that name a tool follow the client's. The credential of the upstream replaces the client's lines of the same
    name, however these are spelt.
    """
    head, peer, block, credential = exchange.head, exchange.peer, exchange.block, exchange.upstream_credential
    assert head is not None  # noqa: S101 - for the type checker: it was forwarded
    assert peer is not None  # noqa: S101
    line = b""
    if credential is not None:
        line = credential.line
        credential.note_sent(exchange.sent_mono)
        if credential.replaces:
            block = headers.without_field(head.block if block is None else block, credential.replaces)
    if exchange.tool_call is not None:
        line = exchange.tool_call.lines + line
    return headers.build_upstream_head(
        head, block, permit,
        request_id=exchange.request_id, forwarding=peer, host=host, is_signed=is_signed, credential=line,
    )  # fmt: skip
