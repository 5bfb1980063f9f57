"""P3: a key, sent in every position and form, appears in no output, table, metric, command line or environment."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat
from tests.acceptance.conftest import Configure, Site, until
from tests.auth.test_agent_token_format import HEADER, jwt
from tests.rawhttp import connect

CANARY = KeyFormat().make(b"canary canary canary canary 1234", is_test=False).reveal().decode()

#: An agent token, signed with no key of this site.
TOKEN = jwt(HEADER, b'{"iss":"canary","jti":"agt_canary"}', hashlib.sha512(b"canary").digest()).decode()

#: This many consecutive characters of a key's random part are a leak: more than its hint contains.
REVEALING_DIGITS = 12


def _encoded(text: str, times: int) -> str:
    """Percent-encode every character repeatedly."""
    text = "".join(f"%{ord(sign):02x}" for sign in text)
    for _ in range(times - 1):
        text = quote(text, safe="")
    return text


def _start_encoded(text: str, times: int) -> str:
    """Encode only the part that identifies a key; the rest is plain."""
    return _encoded(text[:3], times) + text[3:]


def _forms(canary: str, cut: int) -> list[str]:
    """A key in its forms. The characters before `cut` are enough to recognise it."""
    return [
        canary,
        canary[: cut + 10],
        canary[:-1] + ("a" if canary[-1] != "a" else "b"),
        canary.upper(),
        canary.replace("_live_", "_test_"),
        canary + "x" * 20,
        canary[:cut] + "\x01" + canary[cut:],
        canary[:cut] + "\x80" + canary[cut:],
        canary + "\0",
        canary[:cut] + " " + canary[cut:],
        canary[:cut] + "," + canary[cut:],
        _encoded(canary, 1),
        _encoded(canary, 2),
        *(_start_encoded(canary, times) for times in (1, 2, 3, 6)),
    ]


#: The positions of a key. `{key}` is the canary in one of its forms, `{good}` a valid credential; lines end in LF here.
POSITIONS = [
    "GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: bearer   {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Basic {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Unknown key={key}, x={key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key} {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key\n {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization Api-Key {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization : Api-Key {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nX-Api-Key: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nX_Api_Key: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nX-Api-Key: {key}\nX-Api-Key: {key}y\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Bearer {key}\nX-Api-Key: {key}x\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}X-Api-Key: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}X-Request-Id: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\nX-Request-Id: a-{key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}Proxy-Authorization: Api-Key {key}\nTE: {key}\nKeep-Alive: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}X-Forwarded-For: {key}\nForwarded: for={key}\nX-Real-Ip: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}X-Keyproxy-User: {key}\nX_Keyproxy_Key_Id: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}X-Keyproxy-Act-For: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}X-Keyproxy-Act-For: {key}\nx_keyproxy_act_for: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\nX-Api-Key: {key}\nX-Keyproxy-Act-For: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}Connection: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}Expect: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}Content-Length: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}Transfer-Encoding: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}Content-Type: {key}\nContent-Type: {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}Upgrade: {key}\nConnection: Upgrade\n\n",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\nUpgrade: websocket\nConnection: Upgrade\n\n{key}",
    "GET / HTTP/1.1\nHost: a\n{good}{key}: x\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}{key}\n\n",
    "GET / HTTP/1.1\nHost: {key}\n{good}\n",
    "GET / HTTP/1.1\nHost: {key}:80\n{good}\n",
    "GET /{key} HTTP/1.1\nHost: a\n{good}\n",
    "GET /a/{key}/b;{key} HTTP/1.1\nHost: a\n{good}\n",
    "GET /?api_key={key} HTTP/1.1\nHost: a\n{good}\n",
    "GET /?a=b&x={key}&c=d HTTP/1.1\nHost: a\n{good}\n",
    "GET /?{key} HTTP/1.1\nHost: a\n{good}\n",
    "GET /a#{key} HTTP/1.1\nHost: a\n{good}\n",
    "GET http://{key}/ HTTP/1.1\nHost: {key}\n{good}\n",
    "GET http://{key}@a/ HTTP/1.1\nHost: a\n{good}\n",
    "GET http://a/{key} HTTP/1.1\nHost: a\n{good}\n",
    "GET {key} HTTP/1.1\nHost: a\n{good}\n",
    "CONNECT {key}:443 HTTP/1.1\nHost: a\n{good}\n",
    "{key} / HTTP/1.1\nHost: a\n{good}\n",
    "GET / {key}\nHost: a\n{good}\n",
    "GET / HTTP/1.1 {key}\nHost: a\n{good}\n",
    "{key}\n\n",
    "\n\n{key}",
    "POST / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\nContent-Length: 9\n\n{key}",
    "POST / HTTP/1.1\nHost: a\nContent-Length: 500\n\n{key}",
    "POST / HTTP/1.1\nHost: a\n{good}Transfer-Encoding: chunked\n\n{key}\n\n",
    "POST / HTTP/1.1\nHost: a\n{good}Transfer-Encoding: chunked\n\n1;{key}={key}\nx\n0\n\n",
    'POST / HTTP/1.1\nHost: a\n{good}Transfer-Encoding: chunked\n\n1;a="{key}"\nx\n0\n\n',
    "POST / HTTP/1.1\nHost: a\n{good}Transfer-Encoding: chunked\n\n1\nx\n0\nX-Sum: {key}\nX-Api-Key: {key}\n\n",
    "POST / HTTP/1.1\nHost: a\n{good}Transfer-Encoding: chunked\n\n0\n{key}: x\nbad\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}\nGET /{key} HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\n\n",
    "GET / HTTP/1.1\nHost: a\n{good}\n{key}",
    "GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\nX-Filler: {filler}\n\n",
    "GET /{filler}{key} HTTP/1.1\nHost: a\n{good}\n",
]

#: Incomplete requests: the client waits for the timeout response.
ENDLESS = [
    "GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {key}\n",
    "GET /{key}",
    "POST / HTTP/1.1\nHost: a\n{good}Content-Length: 500\n\n{key}",
]


def _rows(positions: list[str], good: str, forms: list[str]) -> Iterator[bytes]:
    whole, *others = forms
    for number, position in enumerate(positions):
        # Every form at some positions and every position with some forms: all combinations would take too long.
        for form in (whole, *(others[(number + step) % len(others)] for step in (0, 3, 7, 10))):
            row = position.replace("\n", "\r\n")
            row = row.replace("{good}", f"Authorization: Api-Key {good}\r\n").replace("{filler}", "f" * 40_000)
            yield row.replace("{key}", form).encode("latin-1")
    yield f"GET / HTTP/1.1\nHost: a\nAuthorization: Api-Key {whole}\n\n".encode()


def _leaks(content: bytes, secret: str) -> list[str]:
    """The pieces of a key's random part, or of a token after its header, that an output contains."""
    digits = secret.partition(".")[2] or secret[8:]
    pieces = {digits[at : at + REVEALING_DIGITS] for at in range(len(digits) - REVEALING_DIGITS + 1)}
    text = content.decode("latin-1").lower()
    return sorted(piece for piece in pieces if piece.lower() in text)


@pytest.mark.parametrize(("canary", "cut"), [(CANARY, 30), (TOKEN, 150)], ids=["key", "agent token"])
async def test_a_key_is_found_in_no_output_table_metric_or_command_line(
    configure: Configure, dsn: str, canary: str, cut: int
) -> None:
    site = configure(dsn, listen={"header_timeout_seconds": 1, "body_idle_timeout_seconds": 1}, log={"level": "debug"})
    good = (await site.key())["secret"]
    answers: list[bytes] = []
    forms = _forms(canary, cut)
    rows = [*_rows(POSITIONS, good, forms)]
    async with site.serving() as process:
        places = asyncio.Semaphore(16)

        async def send(raw: bytes, *, ends: bool) -> None:
            async with places, site.client() as client:
                await client.send(raw)
                if ends:
                    client.half_close()
                answers.append(await client.ends(seconds=30))

        await asyncio.gather(*(send(raw, ends=True) for raw in rows))
        places = asyncio.Semaphore(64)
        await asyncio.gather(*(send(raw, ends=False) for raw in _rows(ENDLESS, good, forms)))

        async def is_logged() -> bool:
            return len(site.log()) >= len(answers)

        await until(is_logged, seconds=10)
        # A client that mistakes the ops listener for the proxy: its malformed input is not repeated there either.
        for raw in (b"GET /x?key=%b HTTP/9.9\r\n\r\n", b"%b\r\n\r\n", b"GET / HTTP/1.1\r\nX Y: %b\r\n\r\n"):
            async with connect(("127.0.0.1", site.ops_port)) as client:
                await client.send(raw % good.encode())
                client.half_close()
                await client.ends(seconds=10)
        pages = [(await site.ops(path))[1].encode() for path in ("/metrics", "/readyz", "/livez")]
        own = [Path(f"/proc/{process.pid}/{file}").read_bytes() for file in ("cmdline", "environ", "comm")]
    assert not any(answer.startswith(b"HTTP/1.1 5") for answer in answers)
    content = b"".join([*site.printed, *answers, *pages, *own, *await _tables(dsn)])
    assert _leaks(content, canary) == []
    assert _leaks(content, good) == []
    for message in site.upstream.heads:
        assert good not in str(message)
        assert canary not in str([message.start, message.one("X-Request-Id"), message.all("Authorization")])


async def _tables(dsn: str) -> list[bytes]:
    """Every row of every table of keyproxy."""
    connection = await asyncpg.connect(dsn)
    tables = await connection.fetch("SELECT table_name FROM information_schema.tables WHERE table_schema = 'keyproxy'")
    rows = [str(await connection.fetch(f'SELECT * FROM keyproxy."{row[0]}"')).encode() for row in tables]
    await connection.close()
    assert len(rows) > 4
    return rows


@pytest.mark.parametrize("canary", [CANARY, TOKEN], ids=["key", "agent token"])
async def test_an_invalid_key_is_not_printed_by_a_command_either(site: Site, canary: str) -> None:
    for arguments in (("key", "show", canary), ("key", "revoke", canary), ("user", "show", canary), ("bogus", canary)):
        output = await site.run(*arguments)
        assert output.status != 0
        assert _leaks(output.out.encode() + output.err.encode(), canary) == [], arguments
