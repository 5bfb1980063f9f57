"""An authorization server for each test: see `authority`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing


@pytest.fixture
def dsn(shared_dsn: str) -> str:
    """A migrated, empty database."""
    return shared_dsn


@pytest.fixture
async def authority(database: Database) -> AsyncIterator[Authority]:
    """An authorization server over this test's database."""
    async with authorizing(database) as authority:
        yield authority
