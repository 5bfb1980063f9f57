"""keyproxy for measurements: `keyproxy serve` over an embedded PostgreSQL, with routes, access log and metrics on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import uvloop

from bench.peers import CHAT_PATH, METERED_CHAT_PATH, METERED_PATH, PATH, free_port, running
from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.delegation_settings import AccessSettings
from keyproxy.limits.plan import Limit, Plan
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
[log]
{log}
[access]
{access}
[[models]]
name = "gpt-4o"
scopes = ["models:large"]
input_micros_per_million = 2500000
output_micros_per_million = 10000000
[[routes]]
match = "POST {path}"
scopes = ["jobs:write"]
[[routes]]
match = "POST {path}/{{id}}"
scopes = ["jobs:write"]
[[routes]]
match = "POST {chat}"
scopes = ["jobs:write"]
[[routes]]
match = "POST {metered_chat}"
scopes = ["jobs:write"]
tokens = "openai"
[[routes]]
match = "POST {metered}"
scopes = ["jobs:write"]
tokens = "header"
[[routes]]
match = "POST /v1/ai/streams/metered"
tokens = "openai"
model = "none"
[[routes]]
match = "POST /v1/ai/streams/plain"
[[routes]]
match = "GET /files/{{rest...}}"
[[routes]]
match = "POST /files/{{rest...}}"
"""


_SCOPES = ("jobs:write", "models:large")

#: How many entities are created at a time.
_BATCH = 64

#: None of these is ever reached. No rate or concurrency: they would refuse wrk's requests.
_MANY = 10**10
_LIMITS = Plan(
    [
        *Plan(requests_per_day=_MANY, requests_per_month=_MANY).limits,
        *Plan(tokens_per_request=10_000, tokens_per_day=_MANY, tokens_per_month=_MANY).limits,
        Limit("spend", "day", _MANY),
        Limit("spend", "month", _MANY),
    ]
)


class Site:
    """A database with keys, for proxies started on it."""

    def __init__(self, home: Path, server: embedded_postgres.EmbeddedServer, upstream: int) -> None:
        self.home = home
        self.dsn = server.dsn()
        self.upstream = upstream
        self.ops_port = 0

    def keys(self, number: int, *, limited: bool = False) -> list[str]:
        """Secrets of new keys, each of its own user. `limited`: each key, its user and their tenant have windows."""
        return uvloop.run(self._keys(number, limited=limited))

    def delegated(self, number: int) -> tuple[str, list[str], list[str]]:
        """The secret of a key that acts for users, the ids of these, and as many agent tokens cut from the key."""
        return uvloop.run(self._delegated(number))

    @contextlib.contextmanager
    def serving(
        self,
        port: int,
        *,
        cache: str = "",
        listen: str = "",
        access: str = "",
        log: str = "",
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
        upstream: int = 0,
    ) -> Iterator[list[int]]:
        """`keyproxy serve` on a port, as installed for this Python; yields its processes.

        `cache`, `listen`, `access`, `log`: additional lines of these configuration tables. `upstream`: the port of
        another compute server.
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
            log=log,
            path=PATH,
            metered=METERED_PATH,
            chat=CHAT_PATH,
            metered_chat=METERED_CHAT_PATH,
        )
        config = self.home / f"keyproxy-{port}.toml"
        config.write_text(text, encoding="utf-8")
        # stdout is the access log; write it to a file, as in production.
        command = [python, "-P", "-m", "keyproxy", "serve", "--config", str(config)]
        os.environ.update(environment or {})
        with running(command, port, self.home / f"keyproxy-{port}.log") as pids:
            yield pids

    async def _delegated(self, number: int) -> tuple[str, list[str], list[str]]:
        tokens: list[str] = []
        async with self._database() as database, minting(database, AccessSettings(), clock.now) as mint:
            directory = Directory(database, KeyFormat(), Actor("bench", "local"), mint=mint)
            await directory.tenants.create("delegation", "")
            users = [f"u_acted_for_{one}" for one in range(number)]
            for some in _batches(["u_worker", *users]):
                await asyncio.gather(*(directory.users.create(user, "delegation", None) for user in some))
            key = await directory.keys.issue("u_worker", KeyWish(scopes=_SCOPES, acts_for="tenant"))
            for some in _batches(users):
                wish = {"agent": "crawler", "scopes": ["jobs:write"]}
                minted = await asyncio.gather(*(directory.agent_tokens.mint(key["id"], wish) for _ in some))
                tokens += [one["token"] for one in minted]
        return key["secret"], users, tokens

    async def _keys(self, number: int, *, limited: bool) -> list[str]:
        secrets_made: list[str] = []
        batch = secrets.token_hex(4)
        tenant, plan = (f"limited_{batch}", "limited") if limited else (f"free_{batch}", None)
        async with self._database() as database:
            directory = Directory(database, KeyFormat(), Actor("bench", "local"))
            if limited:
                await directory.plans.set("limited", _LIMITS.to_json())
            await directory.tenants.create(tenant, "", plan)
            wish = KeyWish(scopes=_SCOPES, plan=plan)
            for some in _batches([f"u_{batch}_{one}" for one in range(number)]):
                made = await asyncio.gather(*(directory.users.create(user, tenant, wish, plan=plan) for user in some))
                secrets_made += [user["key"]["secret"] for user in made]
        return secrets_made

    @contextlib.asynccontextmanager
    async def _database(self) -> AsyncIterator[Database]:
        database = Database(self.dsn, pool_size_max=4, statement_timeout_seconds=60.0)
        await database.open()
        yield database
        await database.close()


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _BATCH] for start in range(0, len(names), _BATCH))


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
