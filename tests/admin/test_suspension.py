"""Suspended keys and the origins of keys: the directory and the admin API give the same results."""

from __future__ import annotations

import pytest

from keyproxy.store.directory.directory import Conflict, KeyFilter, KeyWish, NotFound
from tests.admin.conftest import Api
from tests.admin.test_roles import Operations, operations

__all__ = ["operations"]


async def test_key_is_suspended_until_it_is_resumed(operations: Operations) -> None:
    keys = operations.directory.keys
    key = await keys.issue("u_1", KeyWish())
    suspended = await keys.suspend(key["id"], "two countries")
    assert (suspended["state"], suspended["suspend_reason"]) == ("suspended", "two countries")
    assert await keys.suspend(key["id"], "again") == suspended
    assert [one["id"] for one in await keys.list_by_id("", 10, KeyFilter(state="suspended"))] == [key["id"]]
    resumed = await keys.resume(key["id"])
    assert (resumed["state"], resumed["suspended_at"], resumed["suspend_reason"]) == ("active", None, None)
    await keys.revoke(key["id"], "")
    with pytest.raises(Conflict, match="cannot be suspended"):
        await keys.suspend(key["id"], "")
    with pytest.raises(NotFound):
        await keys.suspend("key_unknown", "")


async def test_suspension_by_the_admin_api_is_audited_and_needs_the_current_version(api: Api) -> None:
    key = (await api.user())["key"]["id"]
    etag = (await api.call("GET", f"/v1/keys/{key}")).headers["ETag"]
    await api.done("POST", f"/v1/keys/{key}/suspend", {"reason": "x"}, headers={"If-Match": etag})
    assert (await api.call("POST", f"/v1/keys/{key}/resume", headers={"If-Match": etag})).code == "outdated"
    suspended, _ = await api.audit(entity="key", entity_id=key)
    assert (suspended["changed"], suspended["after"]["suspend_reason"]) == (["suspend_reason", "suspended_at"], "x")


async def test_origins_of_a_key_are_empty_without_requests_and_not_found_without_a_key(api: Api) -> None:
    key = (await api.user())["key"]["id"]
    assert await api.done("GET", f"/v1/keys/{key}/origins") == {"items": []}
    assert (await api.call("GET", "/v1/keys/key_unknown/origins")).status == 404
