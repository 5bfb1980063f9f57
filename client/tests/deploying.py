"""Starts the keyproxy of a row: its database, proxy, admin API, broker and upstream. Rows share the PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import asyncpg

from client.tests.echo import echoing
from client.tests.support.deployment import SCOPES, TENANTS, VARIABLE, Deployment, free_port, running, serving, toml
from keyproxy.auth.api_key import KeyFormat
from keyproxy.store.directory.directory import Actor, Directory, KeyWish
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.embedded.postgres_binaries import find_binaries
from keyproxy.store.postgres import migrations, roles, scratch_databases
from keyproxy.store.postgres.database import Database
from tests import server as servers
from tests.acceptance.command_server import CommandServer
from tests.store.redis_server import RedisServer, program

_ROLE = "app"
_REPOSITORY = Path(__file__).parents[2]
_KEY_LIFE = timedelta(days=1)

#: The role of an application, as docs/django.md makes it: keyproxy's rights, and a schema of its own for its tables.
_APP_ROLE = f"""
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{_ROLE}') THEN CREATE ROLE {_ROLE} LOGIN; END IF;
END $$;
GRANT CREATE ON SCHEMA public TO {_ROLE};
GRANT keyproxy_app TO {_ROLE};
"""


class Deployer:
    """A PostgreSQL server with a template: a migrated database with roles, tenants and service keys."""

    def __init__(self, server: servers.Server, home: Path, keyproxy: Path) -> None:
        """`home`: a directory for files of deployments. `keyproxy`: a program that runs keyproxy's commands."""
        self._server = server
        self._keyproxy = keyproxy
        self._maintenance_dsn = server.dsn("postgres")
        self._home = home
        self._template = f"kp_client_{secrets.token_hex(4)}"
        #: Contents of the files of service keys, by name.
        self._keys: dict[str, str] = {}

    async def prepare(self) -> None:
        """Make the template."""
        await scratch_databases.create(self._maintenance_dsn, self._template)
        dsn = self._server.dsn(self._template)
        await migrations.migrate(dsn)
        await roles.create(dsn, "keyproxy")
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(_APP_ROLE)
            await connection.execute(servers.may_log_in(dsn, _ROLE))
        finally:
            await connection.close()
        database = Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
        await database.open()
        try:
            directory = Directory(database, KeyFormat(), Actor("test", "local"))
            for tenant in TENANTS:
                await directory.tenants.create(tenant, "")
                await directory.users.create(f"u_service_{tenant}", tenant, None)
                for mode, is_test in (("live", False), ("test", True)):
                    wish = KeyWish(scopes=SCOPES, is_test=is_test, acts_for="tenant", expires_in=_KEY_LIFE)
                    issued = await directory.keys.issue(f"u_service_{tenant}", wish)
                    self._keys[f"{tenant}-{mode}.key"] = issued["secret"]
        finally:
            await database.close()

    def remove(self) -> None:
        """Drop the template."""
        asyncio.run(scratch_databases.drop(self._maintenance_dsn, self._template))

    @contextlib.contextmanager
    def deployed(self, name: str) -> Iterator[dict[str, str]]:
        """The deployment of a row until the context ends; the environment variables that name it."""
        home = self._home / name
        home.mkdir()
        database = f"{self._template}_{name.replace('-', '_').replace('.', '_')}"
        asyncio.run(scratch_databases.create(self._maintenance_dsn, database, template=self._template))
        dsn = self._server.dsn(database)
        try:
            with contextlib.ExitStack() as stack:
                deployment = self._start(stack, dsn, home)
                path = home / "deployment.json"
                path.write_text(json.dumps(dataclasses.asdict(deployment), default=str), encoding="utf-8")
                yield {VARIABLE: str(path)}
        finally:
            asyncio.run(scratch_databases.drop(self._maintenance_dsn, database))

    def _start(self, stack: contextlib.ExitStack, dsn: str, home: Path) -> Deployment:
        for file, secret in self._keys.items():
            (home / file).write_text(f"{secret}\n", encoding="ascii")
        token_file = home / "admin-token"
        token_file.write_text(secrets.token_urlsafe(32), encoding="ascii")
        upstream = stack.enter_context(echoing())
        admin_port = free_port()
        admin = {"address": f"127.0.0.1:{admin_port}", "token_file": str(token_file)}
        config = home / "admin.toml"
        config.write_text(toml({"store": {"dsn": dsn}, "admin": admin}), encoding="utf-8")
        admin_url = f"http://127.0.0.1:{admin_port}"
        command = [sys.executable, "-m", "keyproxy", "admin", "--config", str(config)]
        stack.enter_context(running(command, f"{admin_url}/readyz", home / "admin.log"))
        origin, ops_url = stack.enter_context(
            serving(sys.executable, dsn, home, {"upstream": {"url": upstream}, "admin": admin})
        )
        broker = RedisServer(program("valkey"), home, "broker")
        broker.start()
        stack.callback(broker.stop)
        return Deployment(
            dsn=dsn,
            app_dsn=servers.as_role(dsn, _ROLE),
            origin=origin,
            ops_url=ops_url,
            admin_url=admin_url,
            admin_token_file=token_file,
            broker_url=broker.url.replace("unix://", "redis+socket://"),
            upstream=upstream,
            home=home,
            python=sys.executable,
            keyproxy=self._keyproxy,
            config=config,
            programs=[str(found.directory) for found in find_binaries(os.environ)],
        )


@contextlib.contextmanager
def deployer() -> Iterator[Deployer]:
    """A PostgreSQL for the whole run, or the one that KEYPROXY_TEST_POSTGRES names."""
    with tempfile.TemporaryDirectory(prefix="kpc-", dir=servers.home()) as directory, contextlib.ExitStack() as stack:
        server: servers.Server | None = servers.given()
        if server is None:
            (Path(directory) / "pg").mkdir()
            started = embedded_postgres.start(Path(directory) / "pg", servers.FAST_SETTINGS)
            stack.callback(started.stop)
            server = started
        # The imports of a command take ten times as long as its work.
        commands = stack.enter_context(contextlib.closing(CommandServer(_REPOSITORY)))
        # Memory is often mounted without the right to execute.
        keyproxy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kpc-"))) / "keyproxy"
        keyproxy.write_text(commands.program, encoding="utf-8")
        keyproxy.chmod(0o755)
        found = Deployer(server, Path(directory), keyproxy)
        stack.callback(found.remove)
        asyncio.run(found.prepare())
        yield found
