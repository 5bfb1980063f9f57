"""An authorization server with the resources of the rows that tests insert."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing
from tests.store.oauth_rows import RESOURCE, TEST_RESOURCE


@pytest.fixture
async def authority(database: Database) -> AsyncIterator[Authority]:
    """An authorization server over this test's database."""
    async with authorizing(database, resource=RESOURCE, test_resource=TEST_RESOURCE) as authority:
        yield authority
