"""P3: a canary key, presented in every position and form, is found in no output, table, metric or command line."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg

from keyproxy.keyformat import KeyFormat
from tests.acceptance.conftest import Site

CANARY = KeyFormat().make(b"canary canary canary canary 1234", is_test=False).reveal().decode()
HALF = CANARY[:40]


def _requests(key: str, upstream_knows: str) -> list[bytes]:
    """The key in every position of a request, well-formed and not."""
    good = f"Authorization: Api-Key {upstream_knows}\r\n"
    rows = [
        f"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Api-Key {key}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nX-Api-Key: {key}x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Api-Key {key} {key}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\n{good}X-Request-Id: {key}\r\n\r\n",
        f"GET /{key} HTTP/1.1\r\nHost: a\r\n{good}\r\n",
        f"GET /?api_key={key} HTTP/1.1\r\nHost: a\r\n{good}\r\n",
        f"GET /%6b%70{key[2:]}?a=%6b%70{key[2:]} HTTP/1.1\r\nHost: a\r\n{good}\r\n",
        f"GET / HTTP/1.1\r\nHost: {key}\r\n{good}\r\n",
        f"{key} / HTTP/1.1\r\nHost: a\r\n{good}\r\n",
        f"GET / {key}\r\nHost: a\r\n{good}\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\n{good}{key}: x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\n{good}X-Forwarded-For: {key}\r\nForwarded: for={key}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\n{good}Connection: {key}\r\nExpect: {key}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\n{good}Content-Length: {key}\r\n\r\n",
        f"POST / HTTP/1.1\r\nHost: a\r\n{good}Transfer-Encoding: chunked\r\n\r\n{key}\r\n\r\n",
        f"POST / HTTP/1.1\r\nHost: a\r\n{good}Transfer-Encoding: chunked\r\n\r\n0\r\n{key}: x\r\nbad\r\n\r\n",
        f"GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\n\n",
        f"{key}\r\n\r\n",
    ]
    return [row.encode() for row in rows]


async def test_a_key_is_found_in_no_output_table_metric_or_command_line(site: Site, dsn: str) -> None:
    other = await site.key()
    secrets = [CANARY, HALF]
    answers: list[bytes] = []
    command_lines: list[bytes] = []
    async with site.serving() as process:
        for secret in secrets:
            for raw in _requests(secret, other["secret"]):
                async with site.client() as client:
                    await client.send(raw)
                    client.half_close()
                    answers.append(await client.ends(seconds=10))
        _, metrics = await site.ops("/metrics")
        _, ready = await site.ops("/readyz")
        command_lines.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        # The access log is written in turns.
        await asyncio.sleep(0.5)
    connection = await asyncpg.connect(dsn)
    tables = await connection.fetch("SELECT table_name FROM information_schema.tables WHERE table_schema = 'keyproxy'")
    rows = [str(await connection.fetch(f'SELECT * FROM keyproxy."{row[0]}"')) for row in tables]
    await connection.close()
    told = b"".join([*site.printed, *answers, *command_lines, metrics.encode(), ready.encode(), *map(str.encode, rows)])
    assert len(site.log()) >= len(answers)
    for secret in (*secrets, other["secret"]):
        assert secret.encode() not in told
    assert CANARY[8:30].encode() not in told
    for message in site.upstream.heads:
        assert other["secret"] not in str(message)
        assert CANARY not in str([message.start, message.one("X-Request-Id"), message.all("Authorization")])
