"""Requests that other projects wrote to break servers, sent over a socket to a proxy with a real upstream behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.http.headers import canonical
from tests import fakes
from tests.rawhttp import OK, Client, Upstream, answer_with
from tests.wire.conftest import AUTHORIZATION, Start, Wire


def _with_lines(raw: bytes, lines: bytes) -> bytes:
    """The row with these lines after its first, such as a valid key, so that what is judged is the framing."""
    first, end, rest = raw.partition(b"\r\n")
    return first + end + lines + rest if end else raw


async def _statuses(client: Client) -> list[int]:
    """The statuses of all responses until the connection ends or is silent."""
    found: list[int] = []
    try:
        while True:
            message = await client.answer(method="GET", seconds=0.3 if found else 3.0)
            if message.status >= 200:
                found.append(message.status)
    except (AssertionError, TimeoutError, ConnectionError):
        return found


async def _play(wire: Wire, row: dict[str, Any], *, added: bytes = AUTHORIZATION) -> str:
    """What is wrong with how this row was handled; empty if nothing is."""
    raw = row["raw"].encode("latin-1")
    raw = _with_lines(raw, added)
    seen_before = len(wire.upstream.heads)
    async with wire.client() as client:
        await client.send(raw)
        if row["expect"] != "accept":
            client.half_close()
        statuses = await _statuses(client)
    seen = len(wire.upstream.heads) - seen_before
    if any(status >= 500 for status in statuses):
        return f"got {statuses}"
    if row["expect"] == "reject":
        if seen:
            return f"{seen} requests reached the upstream"
        if any(status < 400 for status in statuses):
            return f"got {statuses}"
    if row["expect"] == "accept" and (statuses[:1] != [200] or seen < 1):
        return f"got {statuses}, {seen} reached the upstream"
    if seen > raw.count(b"HTTP/1."):
        return f"{seen} requests reached the upstream"
    return ""


@pytest.mark.parametrize("name", ["gunicorn.json", "llhttp.json"])
async def test_every_row_of_the_corpus_has_its_expected_outcome(start: Start, corpora: Path, name: str) -> None:
    # One row announces more body than it has, and must get a response nevertheless: this upstream does not wait for it.
    wire = await start(serving=Upstream(answer_with(OK, goes_on=False), reads_bodies=False))
    rows = json.loads((corpora / name).read_text(encoding="utf-8"))
    played = [(row["name"], await _play(wire, row)) for row in rows]
    assert [(name, wrong) for name, wrong in played if wrong] == []


@pytest.mark.parametrize("name", ["gunicorn.json", "llhttp.json"])
async def test_it_has_the_same_outcome_without_a_key_on_a_public_route(start: Start, corpora: Path, name: str) -> None:
    rows = [RouteRow("* /{rest...}", access="public"), RouteRow("OPTIONS /files/{id}", encoded_slash="forward")]
    serving = Upstream(answer_with(OK, goes_on=False), reads_bodies=False)
    wire = await start(rows=rows[::-1], serving=serving)
    corpus = [row for row in json.loads((corpora / name).read_text(encoding="utf-8")) if not _needs_key(row["raw"])]
    played = [(row["name"], await _play(wire, row, added=b"")) for row in corpus]
    assert [(name, wrong) for name, wrong in played if wrong] == []
    assert all(not seen.one("X-Keyproxy-User") for seen in wire.upstream.heads)


@pytest.mark.parametrize("name", ["gunicorn.json", "llhttp.json"])
async def test_it_has_the_same_outcome_for_a_key_that_acts_for_a_user(start: Start, corpora: Path, name: str) -> None:
    wire = await start(serving=Upstream(answer_with(OK, goes_on=False), reads_bodies=False))
    wire.identities.let_act(fakes.key(1), "u_1")
    rows = json.loads((corpora / name).read_text(encoding="utf-8"))
    act_for = AUTHORIZATION + b"x_keyproxy.act-for: u_1\r\n"
    played = [(row["name"], await _play(wire, row, added=act_for)) for row in rows]
    assert [(name, wrong) for name, wrong in played if wrong] == []
    # A row may have a second request after the first, without a key of its own.
    assert {seen.one("X-Keyproxy-User") for seen in wire.upstream.heads} == {"u_1"}
    assert not any(
        b"act-for" in canonical(field.encode("latin-1")) for seen in wire.upstream.heads for field, _ in seen.headers
    )


def _needs_key(raw: str) -> bool:
    """Whether no public route can serve it: the target is not a path."""
    return raw.startswith("OPTIONS *")
