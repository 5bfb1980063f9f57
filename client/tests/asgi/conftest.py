"""What the tests of outgoing requests share."""

from __future__ import annotations

from collections.abc import Iterator

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
