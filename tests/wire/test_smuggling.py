"""What proxies have been fooled with, sent over sockets: judged as it should be, and nothing hangs or comes through."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tests.rawhttp import Client
from tests.wire.conftest import AUTHORIZATION, Wire
from tests.wire.smuggling import ROWS

EXPECTED: dict[str | int, list[int]] = {"reject": [400], "accept": [200], "first": [200, 400], "alone": [200]}
FORWARDED = ("accept", "first", "alone")


def _with_keys(raw: bytes) -> bytes:
    """The bytes with a valid key in the head of every request, so that what is judged is the framing."""
    head, end, rest = raw.partition(b"\r\n")
    raw = head + end + AUTHORIZATION + rest
    first, middle, second = raw.partition(b"\r\n\r\nGET ")
    if not middle:
        first, middle, second = raw.partition(b"\r\n\r\nPOST ")
    line, end, rest = second.partition(b"\r\n")
    return first + middle + line + end + (AUTHORIZATION if end else b"") + rest


async def _statuses(client: Client, method: str) -> list[int]:
    """Statuses of all final responses until the connection ends; a body that is too large counts as malformed."""
    found: list[int] = []
    while not client.reader.at_eof():
        try:
            status = (await client.answer(method=method)).status
        except AssertionError:
            break  # the end of the connection
        found += [400 if status == 413 else status] if status >= 200 else []
    return found


async def _play(wire: Wire, pieces: Sequence[bytes]) -> tuple[list[int], int]:
    """(statuses of all responses, how many requests the upstream got)."""
    before = len(wire.upstream.requests)
    async with wire.client() as client:
        for piece in pieces:
            await client.send(piece)
            await asyncio.sleep(0)
        client.half_close()
        statuses = await _statuses(client, pieces[0].partition(b" ")[0].decode("latin-1"))
    return statuses, len(wire.upstream.requests) - before


async def test_nothing_that_has_fooled_a_proxy_gets_through(wire: Wire) -> None:
    played = [(name, verdict, await _play(wire, [_with_keys(raw)])) for name, raw, verdict in ROWS]
    wrong = [(name, result) for name, verdict, result in played if result != _expected(verdict)]
    assert wrong == []


async def test_nor_in_pieces(wire: Wire) -> None:
    for name, raw, verdict in ROWS:
        stream = _with_keys(raw)
        statuses, seen = await _play(wire, [stream[at : at + 7] for at in range(0, len(stream), 7)])
        if verdict == "reject" and statuses[:1] == [200]:
            # What comes by itself after a whole request is judged by itself, or not at all if it was the last one.
            assert (statuses[1:], seen) in (([], 1), ([400], 1)), name
        else:
            assert (statuses, seen) == _expected(verdict), name


def _expected(verdict: str | int) -> tuple[list[int], int]:
    """(statuses of all responses, how many requests the upstream gets)."""
    statuses = [verdict] if isinstance(verdict, int) else EXPECTED[verdict]
    return statuses, int(verdict in FORWARDED)
