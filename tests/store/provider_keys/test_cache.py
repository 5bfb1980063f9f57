"""The cache of provider keys: whose credential a request gets, and what revocations, marks and outages do to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from keyproxy.config.schema import Cache
from keyproxy.model import Missing, TimeBudget
from keyproxy.ports.tools import UpstreamCredential
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.sealing import SealedPlace, SealingKeys
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.provider_keys.cache import ProviderKeyCache
from keyproxy.store.provider_keys.credential_header import CredentialHeader
from tests.store.harness import Rig, add_tenant

KEYS = SealingKeys({"k1": b"\1" * 32})
UNAVAILABLE = Reason.UPSTREAM_CREDENTIAL_UNAVAILABLE
HEADERS = {"openai": CredentialHeader("openai", "Authorization", "Bearer {secret}")}
FRESH, STALE = 30.0, 600.0


@dataclass
class Providing:
    """A cache of provider keys over a rig, and a feed that it follows."""

    rig: Rig
    cache: ProviderKeyCache
    feed: ChangeFeed

    async def add(
        self,
        name: str,
        secret: str,
        tenant: str | None = None,
        *,
        is_test: bool = False,
        place: SealedPlace | None = None,
    ) -> None:
        """A row `pvk_<name>`, sealed for its place or another one."""
        place = place or SealedPlace("openai", tenant, is_test, f"pvk_{name}")
        await self.rig.sql.execute(
            "INSERT INTO keyproxy.provider_keys (id, provider, tenant_id, is_test, sealed, sealed_with, starts_at)"
            " VALUES ($1, 'openai', $2, $3, $4, 'k1', now() - interval '5 seconds')",
            f"pvk_{name}", tenant, is_test, KEYS.seal(secret.encode(), place),
        )  # fmt: skip

    async def change(self, name: str, what: str) -> None:
        """Change a row, as any SQL client does, and let the feed deliver it."""
        await self.rig.sql.execute(f"UPDATE keyproxy.provider_keys SET {what} WHERE id = $1", f"pvk_{name}")
        await self.feed.poll()

    def look(self, tenant: str, *, is_test: bool = False) -> UpstreamCredential | Reason | str:
        """The immediate result: a credential, a refusal, `missing`, or `none` without rows."""
        try:
            return self.cache.find("openai", tenant, self.rig.clock(), is_test=is_test) or "none"
        except Missing:
            return "missing"
        except Refusal as refusal:
            return refusal.reason

    async def credential(self, tenant: str, *, is_test: bool = False) -> UpstreamCredential | None:
        """The credential of a request, with the lookups that the gateway would do. Raises a Refusal."""
        for _ in range(4):
            try:
                return self.cache.find("openai", tenant, self.rig.clock(), is_test=is_test)
            except Missing as missing:
                failure = await missing.failure(TimeBudget())
                if failure is not None:
                    raise failure from None
        raise AssertionError("the value stays missing")

    async def secret(self, tenant: str, *, is_test: bool = False) -> str:
        """The secret of a request; the code of its refusal; `none` without rows."""
        try:
            found = await self.credential(tenant, is_test=is_test)
        except Refusal as refusal:
            return refusal.reason.code
        return "none" if found is None else found.line.decode().removeprefix("Authorization: Bearer ").strip()


@pytest.fixture
async def providing(rig: Rig) -> AsyncIterator[Providing]:
    """The tenants acme and globex, and a cache that opens rows."""
    for tenant in ("acme", "globex"):
        await add_tenant(rig.sql, tenant)
    cache = ProviderKeyCache(rig.door, Cache(), feed=rig.state, look_ups_max=1, now=rig.clock)
    cache.configure(KEYS, HEADERS)
    feed = ChangeFeed(rig.door, None, rig.cache, rig.state, rig.clock, followers={"provider_key": cache})
    await feed.poll()
    yield Providing(rig, cache, feed)
    await cache.close()


async def test_tenants_key_is_used_before_the_shared_one(providing: Providing) -> None:
    assert await providing.secret("acme") == "none"
    await providing.add("shared", "sk-shared")
    await providing.add("own", "sk-own", "acme")
    await providing.feed.poll()
    assert await providing.secret("acme") == "sk-own"
    assert await providing.secret("globex") == "sk-shared"


async def test_both_kinds_of_rows_are_read_by_one_query(providing: Providing) -> None:
    await providing.add("shared", "sk-shared")
    before = providing.rig.door.queries["provider_keys_of"]
    assert await providing.secret("acme") == "sk-shared"
    assert providing.rig.door.queries["provider_keys_of"] == before + 1
    assert isinstance(providing.look("acme"), UpstreamCredential)


@pytest.mark.parametrize(
    "what",
    ["revoked_at = now()", "ends_at = now() - interval '1 day'", "sealed_with = 'k9'", "sealed = sealed || '\\x00'"],
)
async def test_tenant_without_a_usable_key_never_gets_the_shared_one(providing: Providing, what: str) -> None:
    await providing.add("shared", "sk-shared")
    await providing.add("own", "sk-own", "acme")
    assert await providing.secret("acme") == "sk-own"
    await providing.change("own", what)
    assert await providing.secret("acme") == UNAVAILABLE.code
    assert await providing.secret("globex") == "sk-shared"
    await providing.rig.sql.execute("DELETE FROM keyproxy.provider_keys WHERE id = 'pvk_own'")
    await providing.feed.poll()
    assert await providing.secret("acme") == "sk-shared"


async def test_revoked_shared_key_is_replaced_by_no_other_credential(providing: Providing) -> None:
    await providing.add("shared", "sk-shared")
    await providing.change("shared", "revoked_at = now()")
    assert await providing.secret("acme") == UNAVAILABLE.code


async def test_row_that_was_copied_to_another_tenant_does_not_open(providing: Providing) -> None:
    place = SealedPlace("openai", "acme", False, "pvk_own")
    await providing.add("own", "sk-own", "acme")
    await providing.add("copy", "sk-own", "globex", place=place)
    assert await providing.secret("acme") == "sk-own"
    assert await providing.secret("globex") == UNAVAILABLE.code


async def test_modes_are_separate(providing: Providing) -> None:
    await providing.add("live", "sk-live", "acme")
    await providing.add("shared", "sk-shared-test", is_test=True)
    assert await providing.secret("acme") == "sk-live"
    assert await providing.secret("acme", is_test=True) == "sk-shared-test"
    assert await providing.secret("globex") == "none"


async def test_newest_key_is_used_and_the_other_one_while_it_is_marked(providing: Providing) -> None:
    await providing.add("old", "sk-old", "acme")
    await providing.change("old", "starts_at = starts_at - interval '1 hour'")
    await providing.add("new", "sk-new", "acme")
    await providing.feed.poll()
    newest = await providing.credential("acme")
    assert newest is not None
    assert await providing.secret("acme") == "sk-new"
    newest.refused_until_mono_seconds = providing.rig.clock().mono_seconds + 60.0
    other = await providing.credential("acme")
    assert other is not None
    assert await providing.secret("acme") == "sk-old"
    other.refused_until_mono_seconds = newest.refused_until_mono_seconds
    assert await providing.secret("acme") == "sk-new"
    other.refused_until_mono_seconds = 0.0
    # An unrelated change of the rows does not forget the mark.
    await providing.change("old", "hint = 'x'")
    assert await providing.secret("acme") == "sk-old"
    providing.rig.clock.advance(61.0)
    assert await providing.secret("acme") == "sk-new"


async def test_key_that_starts_later_does_not_count_yet(providing: Providing) -> None:
    await providing.add("shared", "sk-shared")
    await providing.add("own", "sk-own", "acme")
    await providing.change("own", "starts_at = now() + interval '1 hour'")
    assert await providing.secret("acme") == "sk-shared"
    await providing.change("own", "revoked_at = now()")
    assert await providing.secret("acme") == UNAVAILABLE.code


async def test_key_stops_at_its_end_without_a_look_up(providing: Providing) -> None:
    await providing.add("own", "sk-own", "acme")
    await providing.change("own", "ends_at = now() + interval '10 seconds'")
    assert await providing.secret("acme") == "sk-own"
    providing.rig.clock.advance(11.0)
    assert providing.look("acme") is UNAVAILABLE


async def test_opened_keys_are_served_while_the_store_is_down_but_not_changed_ones(providing: Providing) -> None:
    await providing.add("own", "sk-own", "acme")
    await providing.add("other", "sk-other", "globex")
    assert await providing.secret("acme") == "sk-own"
    assert await providing.secret("globex") == "sk-other"
    providing.cache.changed('["openai", "globex"]')
    await providing.rig.goes_down()
    providing.rig.clock.advance(FRESH + 1)
    assert await providing.secret("acme") == "sk-own"
    assert await providing.secret("globex") == UNAVAILABLE.code
    assert await providing.secret("stranger") == UNAVAILABLE.code
    providing.rig.clock.advance(STALE)
    assert await providing.secret("acme") == UNAVAILABLE.code


async def test_refusal_during_an_outage_has_a_short_retry_after(providing: Providing) -> None:
    await providing.rig.goes_down()
    with pytest.raises(Refusal) as refused:
        await providing.credential("acme")
    assert refused.value.retry_after_seconds == 2


async def test_keys_that_open_after_the_key_file_has_changed_are_used(providing: Providing) -> None:
    await providing.add("own", "sk-own", "acme")
    providing.cache.configure(None, HEADERS)
    assert await providing.secret("acme") == UNAVAILABLE.code
    providing.cache.configure(KEYS, HEADERS)
    assert await providing.secret("acme") == "sk-own"


async def test_truncated_table_and_lost_changes_cause_new_look_ups(providing: Providing) -> None:
    await providing.add("own", "sk-own", "acme")
    assert await providing.secret("acme") == "sk-own"
    await providing.rig.sql.execute("TRUNCATE keyproxy.provider_keys")
    await providing.feed.poll()
    assert await providing.secret("acme") == "none"
    await providing.add("own", "sk-new", "acme")
    providing.cache.distrust_all()
    assert await providing.secret("acme") == "sk-new"


async def test_renamed_tenant_has_no_usable_key(providing: Providing) -> None:
    await providing.add("own", "sk-own", "acme")
    assert await providing.secret("acme") == "sk-own"
    await providing.rig.sql.execute("UPDATE keyproxy.tenants SET id = 'acme2' WHERE id = 'acme'")
    await providing.feed.poll()
    assert await providing.secret("acme") == "none"
    assert await providing.secret("acme2") == UNAVAILABLE.code
