"""What the tests of outgoing requests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from outgoing_clients import CLIENTS, Client
from scripted_server import ScriptedServer, scripted_server


@pytest.fixture(scope="session")
def _servers() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with scripted_server() as first, scripted_server() as second:
        yield first, second


@pytest.fixture
def origin(_servers: tuple[ScriptedServer, ScriptedServer]) -> ScriptedServer:
    """The server that receives the credential."""
    return _servers[0].script()


@pytest.fixture
def elsewhere(_servers: tuple[ScriptedServer, ScriptedServer]) -> ScriptedServer:
    """A server at another origin."""
    return _servers[1].script()


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    """Each HTTP client."""
    return CLIENTS[request.param]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of the clients, which do not happen."""
    found: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float, *rest: Any) -> None:
        if seconds:
            found.append(seconds)
        await real_sleep(0, *rest)

    monkeypatch.setattr(time, "sleep", found.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(anyio, "sleep", sleep)
    return found
