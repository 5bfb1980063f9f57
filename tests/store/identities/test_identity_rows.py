"""The identity of one row of the store."""

from __future__ import annotations

from typing import cast

import pytest

from keyproxy.store.identities.identity_rows import identity_of
from keyproxy.store.postgres.database import Row


def row(key_id: str, *, lineage: str, tenant: str = "acme") -> Row:
    """A row with texts of its own, as those from the store have."""
    texts = {
        "key_id": key_id, "key_pool": "".join([*lineage]), "user_id": "u_42", "tenant_id": "".join([*tenant]),
        "scopes": ["jobs:write"], "is_test": False, "can_act": False, "expires_wall_seconds": None,
        "is_revoked": False, "is_suspended": False, "is_disabled": False, "is_retiring": False,
        "key_limits": None, "user_limits": None, "tenant_limits": None, "oauth_client": None,
    }  # fmt: skip
    return cast("Row", texts)


def test_identities_share_equal_texts() -> None:
    first = identity_of(row("key_1", lineage="key_1"), "X-Keyproxy-")
    second = identity_of(row("key_2", lineage="key_2"), "X-Keyproxy-")
    assert first.lineage is first.key_id
    assert first.tenant_id is second.tenant_id
    assert first.scopes is second.scopes


@pytest.mark.parametrize("lineage", ["key_1", "key_2", ""])
def test_lineage_of_a_key_is_that_of_its_row(lineage: str) -> None:
    assert identity_of(row("key_2", lineage=lineage), "X-Keyproxy-").lineage == lineage
