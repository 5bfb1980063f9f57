"""Assertions as an upstream verifies them, with the code of the documentation, over real processes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import jwt
import pytest

from keyproxy.platform import clock
from keyproxy.signing.signing_key import SigningKey
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.postgres.database import Database
from keyproxy.store.signing_keys import SigningKeyCache
from tests.acceptance.conftest import Configure, Site, administering, until
from tests.acceptance.fleet import Fleet, beside
from tests.rawhttp import OK, Message, free_port
from tests.store.harness import Relay

ROUTES = [{"match": "POST /v1/ai/jobs"}, {"match": "GET /public", "access": "public"}]
ACCESS = {"assertion": True}

#: Between two calls of a client: without it this process, not the proxies, is what is tested.
PAUSE_SECONDS = 0.04


class Verifier:
    """The verification of the documentation, over the key set at a URL."""

    def __init__(self, url: str) -> None:
        self.keys = jwt.PyJWKClient(url, lifespan=60, cooldown_duration=1)

    def claims_of(self, assertion: str) -> dict[str, Any]:
        key = self.keys.get_signing_key_from_jwt(assertion)
        found = jwt.decode_complete(
            assertion, key.key, algorithms=["ES256"], issuer="keyproxy", audience="upstream", leeway=5,
            options={"require": ["exp", "iat", "iss", "aud", "sub", "tenant"]},
        )  # fmt: skip
        if found["header"].get("typ") != "keyproxy-assertion+jwt":
            raise jwt.InvalidTokenError("not an assertion")
        claims: dict[str, Any] = found["payload"]
        return claims


def verifier(site: Site) -> Verifier:
    return Verifier(f"http://127.0.0.1:{site.ops_port}/jwks.json")


async def assertion_of(site: Site, secret: str) -> str:
    """The assertion that the upstream receives with a request."""
    assert await site.call(secret) == (200, "")
    found = site.upstream.requests[-1].one("X-Keyproxy-Assertion")
    assert found is not None
    return found


async def rows(dsn: str) -> dict[str, Any]:
    """The published keys by `kid`."""
    connection = await asyncpg.connect(dsn)
    try:
        found = await connection.fetch("SELECT *, jwk::text AS content FROM keyproxy.signing_keys")
    finally:
        await connection.close()
    return {row["kid"]: row for row in found}


async def test_the_upstream_verifies_the_identity_with_the_documented_code(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS)
    key = await site.key(scopes=["jobs:write", "data:read"], is_test=True)
    async with site.serving():
        first = await assertion_of(site, key["secret"])
        claims = await asyncio.to_thread(verifier(site).claims_of, first)
        now = time.time()
        assert abs(claims.pop("iat") - now) < 30
        assert claims.pop("exp") - now <= 60
        assert claims == {
            "iss": "keyproxy", "aud": "upstream", "sub": "u_42", "tenant": "acme", "scope": "data:read jobs:write",
            "key_id": key["id"], "test": True,
        }  # fmt: skip
        header = jwt.get_unverified_header(first)
        (kid,) = await rows(dsn)
        assert header == {"typ": "keyproxy-assertion+jwt", "alg": "ES256", "kid": kid}
        assert await assertion_of(site, key["secret"]) == first, "it is signed once"
        assert await site.metric("keyproxy_assertions_signed_total") == 1
        assert await site.metric("keyproxy_signing_keys") == 1
        assert 0 < await site.metric("keyproxy_signing_key_age_seconds") < 120


async def test_no_spelling_of_the_header_by_a_client_reaches_the_upstream(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS)
    key = await site.key()
    async with site.serving(), site.client() as client:
        forged = "".join(
            f"{name}: forged\r\n"
            for name in ("X-Keyproxy-Assertion", "x_keyproxy_assertion", "X.Keyproxy.Assertion", "X-KEYPROXY_assertion")
        )
        for start, lines in (("POST /v1/ai/jobs", f"X-Api-Key: {key['secret']}\r\n"), ("GET /public", "")):
            raw = f"{start} HTTP/1.1\r\nHost: a\r\n{lines}{forged}Content-Length: 0\r\n\r\n"
            await client.send(raw.encode())
            assert (await client.answer()).status == 200
            request = site.upstream.requests[-1]
            assert not [value for _, value in request.headers if "forged" in value]
            named = [name for name, _ in request.headers if "assertion" in name.lower()]
            assert named == (["X-Keyproxy-Assertion"] if lines else [])


async def test_a_websocket_handshake_has_an_assertion(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=[{"match": "GET /ws"}], access=ACCESS)
    key = await site.key()

    async def switches(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        await writer.drain()
        return False

    site.upstream.answering = switches
    async with site.serving(), site.client() as client:
        await client.send(
            b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Api-Key: %b\r\n\r\n" % key["secret"].encode()
        )
        assert (await client.answer()).status == 101
        assertion = site.upstream.heads[-1].one("X-Keyproxy-Assertion")
        assert assertion is not None
        assert (await asyncio.to_thread(verifier(site).claims_of, assertion))["sub"] == "u_42"


async def test_an_assertion_has_half_its_life_left_when_it_arrives(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access={"assertion": True, "assertion_ttl_seconds": 10})
    key = await site.key()
    async with site.serving():
        seen = set()
        for _ in range(70):
            assertion = await assertion_of(site, key["secret"])
            claims = jwt.decode(assertion, options={"verify_signature": False})
            assert claims["exp"] - claims["iat"] == 10
            assert claims["exp"] - time.time() >= 5
            seen.add(assertion)
            await asyncio.sleep(0.1)
        assert 2 <= len(seen) <= 4


async def test_an_assertion_ends_with_its_key(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS)
    await site.key()
    key = await site.run_json("key", "issue", "--user", "u_42", "--expires-in", "20s")
    expires = datetime.fromisoformat(key["expires_at"]).timestamp()
    async with site.serving():
        claims = jwt.decode(await assertion_of(site, key["secret"]), options={"verify_signature": False})
        assert claims["exp"] <= expires < claims["iat"] + 60


async def test_a_reload_turns_assertions_on_and_off_and_renews_them(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES)
    key = await site.key()
    content = site.config.read_text(encoding="utf-8")

    async with site.serving() as process:

        async def reloaded(access: str, times: int) -> str | None:
            site.config.write_text(content + access, encoding="utf-8")
            process.send_signal(signal.SIGHUP)
            await site.until_logged("configuration reloaded", times=times)
            assert await site.call(key["secret"]) == (200, "")
            return site.upstream.requests[-1].one("X-Keyproxy-Assertion")

        assert await site.call(key["secret"]) == (200, "")
        assert site.upstream.requests[-1].one("X-Keyproxy-Assertion") is None
        first = await reloaded("[access]\nassertion = true\n", 1)
        assert first is not None
        assert (await asyncio.to_thread(verifier(site).claims_of, first))["sub"] == "u_42"
        assert await reloaded("[access]\nassertion = true\n", 2) == first
        other = await reloaded('[access]\nassertion = true\nissuer = "b"\nassertion_audience = "c"\n', 3)
        claims = jwt.decode(other or "", options={"verify_signature": False})
        assert (claims["iss"], claims["aud"]) == ("b", "c")
        assert await reloaded("[access]\nassertion = false\n", 4) is None


async def test_a_changed_identity_has_another_assertion_within_a_second(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS)
    key = await site.key(scopes=["a"])
    async with site.serving():
        first = jwt.decode(await assertion_of(site, key["secret"]), options={"verify_signature": False})
        assert first["scope"] == "a"
        await site.run_json("key", "set-scopes", key["id"], "--scope", "b")

        async def is_changed() -> bool:
            claims = jwt.decode(await assertion_of(site, key["secret"]), options={"verify_signature": False})
            return bool(claims["scope"] == "b")

        await until(is_changed, seconds=2)


async def test_a_start_without_a_store_refuses_with_503_until_the_key_is_published(
    configure: Configure, dsn: str
) -> None:
    relay = Relay(Path(tempfile.mkdtemp(prefix="kp-")), dsn)
    site = configure(relay.dsn, routes=ROUTES, access=ACCESS)
    key = await replace(site, dsn=dsn).key()
    started = time.monotonic()
    async with site.serving():
        assert time.monotonic() - started < 20
        assert await site.call(key["secret"]) == (503, "store_unavailable")
        assert (await site.ops("/jwks.json"))[0] == 503
        await relay.mend()

        async def is_served() -> bool:
            return (await site.call(key["secret"]))[0] == 200

        await until(is_served)
        assertion = site.upstream.requests[-1].one("X-Keyproxy-Assertion")
        assert (await asyncio.to_thread(verifier(site).claims_of, assertion or ""))["sub"] == "u_42"
    await relay.cut()


async def test_a_key_that_cannot_be_published_is_not_used(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS)
    key = await site.key()
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("ALTER TABLE keyproxy.signing_keys ADD CONSTRAINT none CHECK (kid = '')")
        async with site.serving():
            for _ in range(20):
                assert await site.call(key["secret"]) == (503, "store_unavailable")
            assert not site.upstream.requests
            assert site.upstream.connections <= 1, "a refused request takes no connection"
            await connection.execute("ALTER TABLE keyproxy.signing_keys DROP CONSTRAINT none")

            async def is_served() -> bool:
                return (await site.call(key["secret"]))[0] == 200

            await until(is_served)
    finally:
        await connection.close()


async def test_the_key_of_a_stopped_proxy_ends_with_what_it_signed_last(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS)
    key = await site.key()
    async with site.serving():
        (row,) = (await rows(dsn)).values()
        assert row["ends_at"] - row["created_at"] == timedelta(hours=25)
        claims = jwt.decode(await assertion_of(site, key["secret"]), options={"verify_signature": False})
    (row,) = (await rows(dsn)).values()
    assert row["ends_at"].timestamp() == claims["exp"]
    assert "d" not in json.loads(row["content"])


async def test_the_key_of_a_proxy_that_signed_nothing_ends_when_it_stops(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES)
    async with site.serving():
        await _until_published(dsn, 1)
    (row,) = (await rows(dsn)).values()
    assert abs(row["ends_at"].timestamp() - time.time()) < 30


async def test_a_start_waits_two_seconds_if_other_keys_are_live(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS)
    key = await site.key()
    async with site.serving():
        await assertion_of(site, key["secret"])
        another = beside(site, dsn)
        other = asyncio.create_task(_served_once(another, key["secret"]))
        published = await _until_published(dsn, 2)
        accepted = await other
        assert accepted - published > 1.8
        # Its key is in the set of the first one, whose upstream may read it there.
        assertion = site.upstream.requests[-1].one("X-Keyproxy-Assertion")
        assert (await asyncio.to_thread(verifier(site).claims_of, assertion or ""))["sub"] == "u_42"


async def _served_once(site: Site, secret: str) -> float:
    """When a proxy that starts has accepted its first connection."""
    async with site.serving():
        accepted = time.monotonic()
        assert await site.call(secret) == (200, "")
        return accepted


async def _until_published(dsn: str, number: int) -> float:
    async def is_published() -> bool:
        return len(await rows(dsn)) == number

    await until(is_published)
    return time.monotonic()


async def test_the_workers_of_a_supervisor_sign_with_one_key_which_each_of_them_gets(
    configure: Configure, dsn: str
) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS, listen={"workers": 2})
    key = await site.key()
    async with site.serving() as process:
        await site.until_ready(process)
        (kid,) = await rows(dsn)

        async def kids(calls: int = 16) -> set[str]:
            return {jwt.get_unverified_header(await assertion_of(site, key["secret"]))["kid"] for _ in range(calls)}

        assert await kids() == {kid}
        check = verifier(site)
        assert (await asyncio.to_thread(check.claims_of, await assertion_of(site, key["secret"])))["sub"] == "u_42"
        before = await workers_of(process.pid)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)

        async def is_replaced() -> bool:
            return len(await workers_of(process.pid)) == 2 and before[0] not in await workers_of(process.pid)

        await until(is_replaced)
        await site.until_ready(process)
        assert await kids() == {kid}
        content = site.config.read_text(encoding="utf-8")
        site.config.write_text(content.replace("workers = 2", "workers = 3"), encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        await site.until_logged("configuration reloaded")
        assert await kids() == {kid}
        assert await asyncio.to_thread(check.claims_of, await assertion_of(site, key["secret"]))
        row = (await rows(dsn))[kid]
        assert row["ends_at"] - row["created_at"] == timedelta(hours=25), "a replaced worker does not cut the key"
        status, page = await site.ops("/jwks.json")
        assert (status, [one["kid"] for one in json.loads(page)["keys"]]) == (200, [kid])
        assert await site.metric("keyproxy_assertions_signed_total") >= 3
        assert await site.metric("keyproxy_signing_keys") == 1
    row = (await rows(dsn))[kid]
    left = row["ends_at"].timestamp() - time.time()
    assert 840 < left < 906, "a worker was killed, so its last signature is unknown"


async def test_the_key_of_a_supervisor_ends_with_what_any_worker_signed_last(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS, listen={"workers": 2})
    key = await site.key()
    async with site.serving() as process:
        await site.until_ready(process)
        ends = set()
        for _ in range(24):
            assertion = await assertion_of(site, key["secret"])
            ends.add(jwt.decode(assertion, options={"verify_signature": False})["exp"])
    ((_, row),) = (await rows(dsn)).items()
    assert row["ends_at"].timestamp() == max(ends)


async def test_replaced_workers_that_wait_for_verifiers_fail_no_request(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS, listen={"workers": 2})
    key = await site.key()
    await publish(dsn, SigningKey.make(time.time()))  # that of another proxy, so that a start waits
    check, faults = verifier(site), []

    async def verified(request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            await asyncio.to_thread(check.claims_of, request.one("X-Keyproxy-Assertion") or "")
        except jwt.PyJWTError as error:
            faults.append(repr(error))
        writer.write(OK)
        await writer.drain()
        return True

    site.upstream.answering = verified
    async with site.serving() as process:
        await site.until_ready(process)
        is_over = asyncio.Event()
        outcomes: list[tuple[int, str]] = []

        async def calling() -> None:
            while not is_over.is_set():
                outcomes.append(await site.call(key["secret"]))
                await asyncio.sleep(PAUSE_SECONDS)

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(calling())
            content = site.config.read_text(encoding="utf-8")
            site.config.write_text(content.replace("workers = 2", "workers = 3"), encoding="utf-8")
            began = time.monotonic()
            process.send_signal(signal.SIGHUP)
            await site.until_logged("configuration reloaded")
            assert time.monotonic() - began > 2.0, "the new workers wait before they accept connections"
            await asyncio.sleep(1.0)
            is_over.set()
    assert set(outcomes) == {(200, "")}
    assert faults == []


async def publish(dsn: str, key: SigningKey) -> None:
    """Publish a key as another process does."""
    database = Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    await SigningKeyCache(database, ACCEPTS_NONE, clock.now).publish(key)
    await database.close()


async def workers_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    text = await asyncio.to_thread(Path(f"/proc/{pid}/task/{pid}/children").read_text)
    return [int(child) for child in text.split()]


@pytest.mark.parametrize("workers", [1, 2])
async def test_no_private_key_leaves_the_processes(configure: Configure, dsn: str, workers: int) -> None:
    site = configure(dsn, routes=ROUTES, access=ACCESS, listen={"workers": workers}, log={"level": "debug"})
    key = await site.key()
    async with site.serving() as process:
        await site.until_ready(process)
        await assertion_of(site, key["secret"])
        pids = [process.pid, *await workers_of(process.pid)]
        texts = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in ("environ", "cmdline")]
        _, metrics = await site.ops("/metrics")
        texts += [metrics.encode(), (await site.ops("/jwks.json"))[1].encode()]
    texts += [*site.printed, *(row["content"].encode() for row in (await rows(dsn)).values())]
    for text in texts:
        assert not re.search(rb'"d"\s*:|PRIVATE KEY', text)
    assert not list(site.config.parent.rglob("*.pem"))


async def test_the_admin_listener_serves_the_key_set_without_a_token(configure: Configure, dsn: str) -> None:
    port = free_port()
    site = configure(dsn, routes=ROUTES, access=ACCESS, admin={"address": f"127.0.0.1:{port}"})
    key = await site.key()
    async with administering(site, port), aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{port}/jwks.json"

        async def kids() -> list[str]:
            async with session.get(url) as response:
                assert response.status == 200
                assert response.headers["Content-Type"] == "application/jwk-set+json"
                assert response.headers["Cache-Control"] == "max-age=60"
                return [one["kid"] for one in (await response.json(content_type=None))["keys"]]

        assert await kids() == []
        async with site.serving():
            assertion = await assertion_of(site, key["secret"])

            async def is_published() -> bool:
                return await kids() == list(await rows(dsn))

            # The set that was read before the start of the proxy is served for half a second.
            await until(is_published, seconds=1.0)
            assert (await asyncio.to_thread(Verifier(url).claims_of, assertion))["sub"] == "u_42"
            async with session.get(f"http://127.0.0.1:{site.ops_port}/jwks.json") as response:
                assert response.headers["Content-Type"] == "application/jwk-set+json"
                assert response.headers["Cache-Control"] == "max-age=60"


async def test_a_rolling_restart_fails_no_request_at_an_upstream_that_verifies(configure: Configure, dsn: str) -> None:
    port = free_port()
    first = configure(dsn, routes=ROUTES, access=ACCESS, admin={"address": f"127.0.0.1:{port}"})
    key = await first.key()
    keys = Verifier(f"http://127.0.0.1:{port}/jwks.json")
    faults: list[str] = []

    async def verified(request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            await asyncio.to_thread(keys.claims_of, request.one("X-Keyproxy-Assertion") or "")
        except jwt.PyJWTError as error:
            faults.append(repr(error))
        writer.write(OK)
        await writer.drain()
        return True

    first.upstream.answering = verified
    fleet = Fleet([first, beside(first, dsn)], [], key["secret"])
    async with administering(first, port):
        await fleet.start(0)
        await fleet.start(1)
        serving = [True, True]
        is_over = asyncio.Event()
        outcomes: list[tuple[int, str]] = []

        async def calling() -> None:
            while not is_over.is_set():
                number = random.choice([one for one, is_up in enumerate(serving) if is_up])
                outcomes.append(await fleet.sites[number].call(key["secret"]))
                await asyncio.sleep(PAUSE_SECONDS)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(calling())
            for number in (0, 1, 0, 1):
                serving[number] = False
                await asyncio.sleep(0.5)
                await fleet.stop(number)
                await fleet.start(number)
                serving[number] = True
                await asyncio.sleep(0.5)
            is_over.set()
        await fleet.close()
    assert faults == []
    assert set(outcomes) == {(200, "")}
    assert len(outcomes) > 100
    assert len(await rows(dsn)) == 6
