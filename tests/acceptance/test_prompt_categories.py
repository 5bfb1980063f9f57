"""Prompt categories as users run them: registered by a command, judged by a proxy, over a real PostgreSQL."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations
from tests.acceptance.conftest import Configure, Site, until

CHAT = "/v1/chat/completions"
SYSTEM = "You write code.\nBe brief."
NOT_ALLOWED = (403, "prompt_category_not_allowed")
CATEGORIES = """
[[categories]]
name = "code"
scopes = ["prompt:code"]

[[categories]]
name = "chat"

[[categories]]
name = "medical"
scopes = ["prompt:medical"]
patterns = ['(?i)\\bdiagnos(is|e)\\b']
"""


def judging(configure: Configure, dsn: str, **tables: Any) -> Site:
    """A site with a route that judges prompts by template and patterns."""
    site = configure(
        dsn, routes=[{"match": f"POST {CHAT}", "prompt": "openai", "category": ["template", "patterns"]}], **tables
    )
    site.config.write_text(site.config.read_text() + CATEGORIES)
    return site


async def ask(site: Site, secret: str, system: str, user: str = "hi") -> tuple[int, str]:
    """The status, and the code of a refusal or the categories that the upstream got."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    async with aiohttp.ClientSession() as session:
        url, headers = f"http://127.0.0.1:{site.proxy_port}{CHAT}", {"Authorization": f"Api-Key {secret}"}
        async with session.post(url, headers=headers, json={"model": "m", "messages": messages}) as response:
            content = await response.json(content_type=None)
            if response.status != 200:
                return response.status, str(content["code"])
    return 200, site.upstream.requests[-1].one("X-Keyproxy-Category") or ""


async def test_a_registered_prompt_has_its_category_upstream_in_the_log_and_in_the_metrics(
    configure: Configure, dsn: str, tmp_path: Path
) -> None:
    site = judging(configure, dsn)
    key, other = await site.key(scopes=["prompt:code"]), await site.key("u_43")
    async with site.serving() as process:
        await site.until_ready(process)
        assert await ask(site, key["secret"], SYSTEM) == NOT_ALLOWED
        (tmp_path / "system.txt").write_text(SYSTEM)
        made = await site.run_json("prompt", "register", str(tmp_path / "system.txt"), "--category", "code")
        registered = time.monotonic()
        assert made["digest"] == hashlib.sha256(SYSTEM.encode()).hexdigest()

        async def is_registered() -> bool:
            return await ask(site, key["secret"], SYSTEM) == (200, "code")

        await until(is_registered, seconds=1.0)
        assert time.monotonic() - registered < 1.0
        assert await ask(site, key["secret"], SYSTEM + " ") == NOT_ALLOWED
        assert await ask(site, other["secret"], SYSTEM) == NOT_ALLOWED
        assert await ask(site, key["secret"], SYSTEM, "My diagnosis?") == NOT_ALLOWED
        assert await site.metric("keyproxy_prompt_categories_total", category="code", source="template") == 1
        assert await site.metric("keyproxy_prompt_categories_total", category="medical", source="pattern") == 0
    logged = {(line["status"], json.dumps(line["category"])) for line in site.log()}
    assert (200, '["code"]') in logged
    assert SYSTEM[:10] not in b"".join(site.printed).decode()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE keyproxy.prompt_templates SET category = 'chat'", (200, "chat")),
        ("UPDATE keyproxy.prompt_templates SET tenant_id = 'other'", NOT_ALLOWED),
        ("DELETE FROM keyproxy.prompt_templates", NOT_ALLOWED),
        ("TRUNCATE keyproxy.prompt_templates", NOT_ALLOWED),
    ],
)
async def test_a_template_change_by_any_sql_client_takes_effect_within_a_second(
    configure: Configure, dsn: str, statement: str, expected: tuple[int, str]
) -> None:
    site = judging(configure, dsn)
    key = await site.key(scopes=["prompt:code"])
    await site.key("u_43", tenant="other")
    connection = await asyncpg.connect(dsn)
    await connection.execute("INSERT INTO keyproxy.prompt_templates VALUES (sha256($1), 'code')", SYSTEM.encode())
    async with site.serving() as process:
        await site.until_ready(process)
        assert await ask(site, key["secret"], SYSTEM) == (200, "code")
        await connection.execute(statement)
        changed = time.monotonic()

        async def is_changed() -> bool:
            return await ask(site, key["secret"], SYSTEM) == expected

        await until(is_changed, seconds=1.0)
        assert time.monotonic() - changed < 1.0
    await connection.close()


async def test_an_outage_of_the_store_neither_registers_a_prompt_nor_forgets_one(
    configure: Configure, tmp_path: Path
) -> None:
    home = Path("/tmp") / f"kp-{tmp_path.name[-20:]}-{time.monotonic_ns() % 10**9}"
    server = embedded_postgres.start(home, {"fsync": "off"})
    await migrations.migrate(server.dsn())
    site = judging(configure, server.dsn(), cache={"fresh_seconds": 1.0, "stale_seconds": 6.0})
    key = await site.key(scopes=["prompt:code"])
    digest = hashlib.sha256(SYSTEM.encode()).hexdigest()
    await site.run_json("prompt", "register", "--digest", digest, "--category", "code")
    async with site.serving() as process:
        await site.until_ready(process)
        assert await ask(site, key["secret"], SYSTEM) == (200, "code")
        server.stop()
        assert await ask(site, key["secret"], SYSTEM) == (200, "code")
        assert await ask(site, key["secret"], "Another one.") == NOT_ALLOWED

        async def is_too_old() -> bool:
            return await ask(site, key["secret"], SYSTEM) == (503, "store_unavailable")

        await until(is_too_old)
        server = embedded_postgres.start(home, {"fsync": "off"})

        async def has_recovered() -> bool:
            return await ask(site, key["secret"], SYSTEM) == (200, "code")

        await until(has_recovered, seconds=8.0)
    server.stop()


async def test_config_check_names_every_fault_of_patterns(configure: Configure, dsn: str) -> None:
    site = judging(configure, dsn)
    assert (await site.run("config", "check", "--offline")).status == 0
    site.config.write_text(site.config.read_text() + "[[categories]]\nname = 'x'\npatterns = ['(', 'a', '(?=a)']\n")
    output = await site.run("config", "check", "--offline")
    assert (output.status, output.out) == (2, "")
    assert [line.partition(": '")[0] for line in output.err.splitlines()] == ["keyproxy: categories[4].patterns"] * 2
    served = await site.run("serve")
    assert served.status == 2
    assert "categories[4].patterns" in served.err


async def test_a_reload_applies_categories_and_patterns_or_nothing(configure: Configure, dsn: str) -> None:
    site = judging(configure, dsn)
    key = await site.key(scopes=["prompt:code"])
    await site.run_json("prompt", "register", "--digest", hashlib.sha256(b"S").hexdigest(), "--category", "chat")
    content = site.config.read_text()
    async with site.serving() as process:
        await site.until_ready(process)
        assert await ask(site, key["secret"], "S", "refactor this") == (200, "chat")
        site.config.write_text(f"{content}[[categories]]\nname = 'x'\npatterns = ['(']\n")
        process.send_signal(signal.SIGHUP)
        await site.until_logged("reload rejected: categories[4].patterns: '('")
        assert await ask(site, key["secret"], "S", "refactor this") == (200, "chat")
        site.config.write_text(f"{content}[[categories]]\nname = 'x'\npatterns = ['refactor']\n")
        process.send_signal(signal.SIGHUP)
        await site.until_logged("configuration reloaded")
        assert await ask(site, key["secret"], "S", "refactor this") == (200, "chat x")
