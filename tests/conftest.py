"""Shared fixtures: a real PostgreSQL, a database per test, the event loop of the product."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import asyncpg
import pytest
import uvloop
from hypothesis import Phase, settings

from keyproxy import gateway
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations, scratch_databases
from keyproxy.store.postgres.database import Database
from tests import server as servers
from tests.common_database import CommonDatabase
from tests.server import Server

# How properties are searched for: a slow machine is no defect, and a run leaves no files behind.
settings.register_profile(
    "keyproxy", deadline=None, database=None, phases=[Phase.explicit, Phase.generate, Phase.shrink]
)
settings.load_profile("keyproxy")

_TEMPLATE = f"kp_test_template_{secrets.token_hex(4)}"


_NO_AUTHORITY = Path(__file__).with_name("no_authority.pem")

# Until all tests are collected: hardly anything of what imports and parameters make is garbage.
gc.disable()

_IS_COMPILED = not gateway.__file__.endswith(".py")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Undo what a command that runs in the process of the test does to logging: later tests read what is logged."""
    loggers = logging.getLogger(), logging.getLogger("asyncio")
    levels, handlers = [logger.level for logger in loggers], list(loggers[0].handlers)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    loggers[0].handlers[:] = [handler for handler in loggers[0].handlers if handler in handlers]


def pytest_configure() -> None:
    """With EXPECT_COMPILED=1, refuse to test any build but the compiled one."""
    # Tests start hundreds of processes, and each would spend half of its start on compiling modules again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Tests reach no public server: they trust one authority, whose key is lost, instead of the 140 of the system. Every
    # process that imports aiohttp loads them.
    os.environ["SSL_CERT_FILE"] = str(_NO_AUTHORITY)
    os.environ["SSL_CERT_DIR"] = os.devnull
    if os.environ.get("EXPECT_COMPILED") == "1" and not _IS_COMPILED:
        raise pytest.UsageError(f"the compiled build was to be tested, not {gateway.__file__}")


def pytest_collection_finish() -> None:
    """Leave what has been imported and collected out of every later collection of garbage."""
    gc.freeze()
    gc.enable()


def pytest_report_header() -> str:
    """The tested build and PostgreSQL."""
    place = "a given server" if os.environ.get(servers.VARIABLE) else "embedded"
    build = "compiled" if _IS_COMPILED else "pure Python"
    return f"keyproxy: {build}, {Path(gateway.__file__).parent}; PostgreSQL: {place}"


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run tests on the event loop of the product."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server for the whole run: an existing one, or one in a short path, since socket paths are bounded."""
    given = servers.given()
    if given is not None:
        asyncio.run(_make_template(given))
        yield given
        asyncio.run(scratch_databases.drop(given.dsn("postgres"), _TEMPLATE))
        return
    with tempfile.TemporaryDirectory(prefix="kp-", dir=servers.home()) as directory:
        server = embedded_postgres.start(Path(directory), servers.FAST_SETTINGS)
        try:
            asyncio.run(_make_template(server))
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def common_database(postgres: Server) -> Iterator[CommonDatabase]:
    """A migrated database that tests share: see `shared_dsn`."""
    name = f"kp_test_common_{secrets.token_hex(4)}"
    asyncio.run(scratch_databases.create(postgres.dsn("postgres"), name, template=_TEMPLATE))
    common = CommonDatabase(postgres.dsn(name))
    yield common
    common.close()
    asyncio.run(scratch_databases.drop(postgres.dsn("postgres"), name))


@pytest.fixture
def shared_dsn(common_database: CommonDatabase) -> str:
    """The shared database, emptied."""
    common_database.empty()
    return common_database.dsn


@pytest.fixture
def dsn(own_dsn: str) -> str:
    """A migrated, empty database."""
    return own_dsn


@pytest.fixture
async def own_dsn(postgres: Server) -> AsyncIterator[str]:
    """A migrated, empty database that this test may break."""
    name = f"test_{secrets.token_hex(6)}"
    await scratch_databases.create(postgres.dsn("postgres"), name, template=_TEMPLATE)
    yield postgres.dsn(name)
    await scratch_databases.drop(postgres.dsn("postgres"), name)


@pytest.fixture
async def empty_dsn(postgres: Server) -> AsyncIterator[str]:
    """A database for this test, without any schema."""
    name = f"test_{secrets.token_hex(6)}"
    await scratch_databases.create(postgres.dsn("postgres"), name)
    yield postgres.dsn(name)
    await scratch_databases.drop(postgres.dsn("postgres"), name)


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A raw connection to this test's database, in the place of any SQL client."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """An open Database on this test's database."""
    database = Database(dsn, pool_size_max=4, statement_timeout_seconds=5.0)
    await database.open()
    yield database
    await database.close()


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The directory of raw requests from other projects. Skips the test with a message if it is absent."""
    named = os.environ.get("KEYPROXY_TEST_CORPORA")
    directory = Path(named) if named else Path(__file__).parents[2] / "shared" / "corpora"
    if not directory.is_dir():
        pytest.skip(f"no request corpora in {directory}")
    return directory


async def _make_template(server: Server) -> None:
    await scratch_databases.create(server.dsn("postgres"), _TEMPLATE)
    await migrations.migrate(server.dsn(_TEMPLATE))
