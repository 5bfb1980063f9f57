"""Keys that change while a proxy serves: rotated, imported, reported as leaked."""

from __future__ import annotations

import hashlib

import aiohttp

from tests.acceptance.conftest import Configure, Site, until

_OLD_KEY = "Ab3dE6gH.abcdefghijklmnopqrstuvwxyz012345"


async def _expires_in(site: Site, secret: str) -> tuple[int, str | None]:
    """(status, X-Keyproxy-Key-Expires-In) of one call."""
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{site.proxy_port}/v1/ai/jobs"
        async with session.post(url, headers={"Authorization": f"Api-Key {secret}"}, data=b"{}") as response:
            return response.status, response.headers.get("X-Keyproxy-Key-Expires-In")


async def test_the_use_of_a_rotated_key_is_shown_in_responses_and_counted(site: Site) -> None:
    old = await site.key()
    async with site.serving():
        assert await _expires_in(site, old["secret"]) == (200, None)
        new = await site.run_json("key", "rotate", old["id"], "--grace", "1h")

        async def is_warned() -> bool:
            return (await _expires_in(site, old["secret"]))[1] is not None

        await until(is_warned, seconds=2)
        status, left = await _expires_in(site, old["secret"])
        assert status == 200
        assert left is not None
        assert 3500 < int(left) <= 3600
        assert await _expires_in(site, new["secret"]) == (200, None)
        assert await site.metric("keyproxy_retiring_key_requests_total") >= 2
        await site.run_json("key", "revoke", new["id"])
        await site.run_json("key", "rotate", old["id"], "--grace", "0s")

        async def has_ended() -> bool:
            return await site.call(old["secret"]) == (401, "api_key_expired")

        await until(has_ended, seconds=2)


async def test_an_imported_key_works_as_presented_by_its_holder_and_its_leak_ends_it(site: Site) -> None:
    await site.key()
    hashed = "sha512$$" + hashlib.sha512(_OLD_KEY.encode()).hexdigest()
    table = f"prefix,hashed_key,user\nAb3dE6gH,{hashed},u_42\n".encode()
    async with site.serving():
        output = await site.run("key", "import", "-", "--json", stdin=table)
        assert (output.status, output.json["imported"]) == (0, 1)
        wrong = _OLD_KEY[:-1] + "6"
        assert await site.call(wrong) == (401, "api_key_invalid")
        assert await site.call(_OLD_KEY) == (200, "")
        assert site.upstream.requests[-1].one("X-Keyproxy-User") == "u_42"
        leaked = await site.run("key", "report-leaked", "--json", stdin=_OLD_KEY.encode())
        assert [one["user"] for one in leaked.json["found"]] == ["u_42"]

        async def is_refused() -> bool:
            return await site.call(_OLD_KEY) == (401, "api_key_revoked")

        await until(is_refused, seconds=2)
    assert _OLD_KEY.encode() not in b"".join(site.printed)


async def test_scopes_that_are_changed_count_within_a_second(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=[{"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]}])
    key = await site.key()
    async with site.serving():
        assert await site.call(key["secret"]) == (403, "insufficient_scope")
        for scope, answer in (("jobs:write", (200, "")), ("jobs:read", (403, "insufficient_scope"))):
            assert (await site.run("key", "set-scopes", key["id"], "--scope", scope)).status == 0

            async def is_so(answer: tuple[int, str] = answer) -> bool:
                return await site.call(key["secret"]) == answer

            await until(is_so, seconds=1)
