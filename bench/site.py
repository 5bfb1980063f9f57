"""keyproxy for measurements: `keyproxy serve` over an embedded PostgreSQL, with routes, access log and metrics on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

from bench.peers import METERED_PATH, PATH, free_port, running
from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.delegation_settings import AccessSettings
from keyproxy.platform import clock
from keyproxy.store.directory.agents.operator_mint import minting
from keyproxy.store.directory.directory import Actor, Directory, KeyWish
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import Database

_CONFIG = """
[listen]
address = "127.0.0.1:{port}"
{listen}
[ops]
address = "127.0.0.1:{ops}"
[upstream]
url = "http://127.0.0.1:{upstream}"
[store]
dsn = "{dsn}"
[cache]
{cache}
[access]
{access}
[[routes]]
match = "POST {path}"
scopes = ["jobs:write"]
[[routes]]
match = "POST {metered}"
scopes = ["jobs:write"]
tokens = "header"
[[routes]]
match = "POST /v1/ai/streams/metered"
tokens = "openai"
[[routes]]
match = "POST /v1/ai/streams/plain"
[[routes]]
match = "GET /files/{{rest...}}"
[[routes]]
match = "POST /files/{{rest...}}"
"""


#: None of these is ever reached. No rate or concurrency: they would refuse wrk's requests.
_LIMITS = {
    "requests_per_day": 10**9,
    "requests_per_month": 10**9,
    "tokens_per_request": 10_000,
    "tokens_per_day": 10**10,
    "tokens_per_month": 10**10,
}


class Site:
    """A database with keys, for proxies started on it."""

    def __init__(self, home: Path, server: embedded_postgres.EmbeddedServer, upstream: int) -> None:
        self.home = home
        self.dsn = server.dsn()
        self.upstream = upstream
        self.ops_port = 0

    def keys(self, number: int) -> list[str]:
        """Secrets of new keys, each of its own user."""
        return uvloop.run(self._keys(number))

    def limited_key(self) -> str:
        """The secret of a key that, like its user and its tenant, has request and token windows."""
        return uvloop.run(self._limited_key())

    def delegation(self) -> tuple[str, str]:
        """The secret of a key that acts for `u_alice`, and an agent token of 15 minutes cut from it."""
        return uvloop.run(self._delegation())

    @contextlib.contextmanager
    def serving(
        self,
        port: int,
        *,
        cache: str = "",
        listen: str = "",
        access: str = "",
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
        upstream: int = 0,
    ) -> Iterator[list[int]]:
        """`keyproxy serve` on a port, as installed for this Python; yields its processes.

        `cache`, `listen`, `access`: additional lines of these configuration tables. `upstream`: the port of another
        compute server.
        """
        self.ops_port = free_port()
        text = _CONFIG.format(
            port=port,
            ops=self.ops_port,
            upstream=upstream or self.upstream,
            dsn=self.dsn,
            cache=cache,
            listen=listen,
            access=access,
            path=PATH,
            metered=METERED_PATH,
        )
        config = self.home / f"keyproxy-{port}.toml"
        config.write_text(text, encoding="utf-8")
        # stdout is the access log; write it to a file, as in production.
        command = [python, "-P", "-m", "keyproxy", "serve", "--config", str(config)]
        os.environ.update(environment or {})
        with running(command, port, self.home / f"keyproxy-{port}.log") as pids:
            yield pids

    async def _limited_key(self) -> str:
        database = Database(self.dsn, pool_size_max=1, statement_timeout_seconds=60.0)
        await database.open()
        directory = Directory(database, KeyFormat(), Actor("bench", "local"))
        await directory.plans.set("windows", _LIMITS)
        await directory.tenants.create("limited", "", "windows")
        wish = KeyWish(scopes=("jobs:write",), plan="windows")
        user = await directory.users.create("u_limited", "limited", wish, plan="windows")
        await database.close()
        secret: str = user["key"]["secret"]
        return secret

    async def _delegation(self) -> tuple[str, str]:
        database = Database(self.dsn, pool_size_max=1, statement_timeout_seconds=60.0)
        await database.open()
        async with minting(database, AccessSettings(), clock.now) as mint:
            directory = Directory(database, KeyFormat(), Actor("bench", "local"), mint=mint)
            await directory.tenants.create("delegation", "")
            for user in ("u_worker", "u_alice"):
                await directory.users.create(user, "delegation", None)
            key = await directory.keys.issue("u_worker", KeyWish(scopes=("jobs:write",), acts_for="tenant"))
            token = await directory.agent_tokens.mint(key["id"], {"agent": "crawler", "scopes": ["jobs:write"]})
        await database.close()
        return key["secret"], token["token"]

    async def _keys(self, number: int) -> list[str]:
        database = Database(self.dsn, pool_size_max=4, statement_timeout_seconds=60.0)
        await database.open()
        directory = Directory(database, KeyFormat(), Actor("bench", "local"))
        await directory.tenants.create("acme", "")
        wish = KeyWish(scopes=("jobs:write",))
        made_secrets: list[str] = []
        batch = secrets.token_hex(4)
        for start in range(0, number, 64):
            made = await asyncio.gather(
                *(
                    directory.users.create(f"u_{batch}_{start + one}", "acme", wish)
                    for one in range(min(64, number - start))
                )
            )
            made_secrets += [user["key"]["secret"] for user in made]
        await database.close()
        return made_secrets


@contextlib.contextmanager
def site(home: Path, upstream: int) -> Iterator[Site]:
    """A site over an embedded PostgreSQL in `home`."""
    server = embedded_postgres.start(home / "pg", {"fsync": "off"})
    try:
        uvloop.run(migrations.migrate(server.dsn()))
        yield Site(home, server, upstream)
    finally:
        server.stop()


def machine() -> str:
    """Describe this machine in one line."""
    lscpu = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=False).stdout
    fields = {row["field"]: row["data"] for row in json.loads(lscpu)["lscpu"]} if lscpu else {}
    model = fields.get("Model name:", "unknown processor")
    return f"{os.cpu_count()} x {model}, Linux {os.uname().release}, Python {sys.version.split()[0]}"
