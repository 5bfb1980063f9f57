"""The contract suites of the ports, run against the fakes and the implementations over a real PostgreSQL."""

from __future__ import annotations

import dataclasses
import time

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.minting import MintParent
from keyproxy.config.schema import Cache
from keyproxy.model import Moment
from keyproxy.platform import clock
from keyproxy.ports.identities import Identities
from keyproxy.ports.tenant_records import OwnedIds, PromptTemplates
from keyproxy.reasons import Reason
from keyproxy.signing.signing_key import SigningKey
from keyproxy.store.agent_tokens.minter import TokenMinter
from tests import contracts, fakes
from tests.store.conftest import MakeRig
from tests.store.harness import Clock, Rig, add_owned, add_template, add_tenant, add_user

_STANDINGS = {
    None: "SELECT",
    Reason.KEY_REVOKED: "UPDATE keyproxy.api_keys SET revoked_at = now()",
    Reason.ACCOUNT_DISABLED: "UPDATE keyproxy.users SET disabled_at = now()",
}


class _FakeStage:
    def __init__(self) -> None:
        self.identities = fakes.FakeIdentities()
        self.identities.slow = {secret.digest() for secret in (contracts.KNOWN, contracts.OTHER, contracts.STRANGER)}
        self.now = Clock()

    async def add(self, secret: SecretKey, user: str, *, is_test: bool = False, standing: Reason | None = None) -> None:
        self.identities.add(secret, fakes.identity(user, is_test=is_test, standing=standing))

    async def let_act(self, secret: SecretKey, user: str) -> None:
        self.identities.let_act(secret, user)

    async def goes_down(self) -> None:
        self.identities.is_down = True

    async def comes_back(self) -> None:
        self.identities.is_down = False


class _CacheStage:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    @property
    def identities(self) -> Identities:
        return self._rig.cache

    def now(self) -> Moment:
        return self._rig.clock()

    async def add(self, secret: SecretKey, user: str, *, is_test: bool = False, standing: Reason | None = None) -> None:
        await add_user(self._rig.sql, user)
        await self._rig.sql.execute(
            "INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes, is_test)"
            " VALUES ('key_of_' || $1, $1, $2, '{jobs:write}', $3)",
            user,
            secret.digest(),
            is_test,
        )
        await self._rig.sql.execute(_STANDINGS[standing])
        await self._rig.feed.poll()

    async def let_act(self, secret: SecretKey, user: str) -> None:
        await add_user(self._rig.sql, user)
        await self._rig.sql.execute(
            "UPDATE keyproxy.api_keys SET acts_for = 'tenant' WHERE digest = $1", secret.digest()
        )
        await self._rig.feed.poll()

    async def goes_down(self) -> None:
        await self._rig.goes_down()

    async def comes_back(self) -> None:
        await self._rig.comes_back()


class TestFakeIdentities(contracts.IdentitiesContract):
    """The fake that the tests of the wire use."""

    @pytest.fixture
    def stage(self) -> contracts.IdentitiesStage:
        """Make the fake in memory."""
        return _FakeStage()


class TestIdentityCache(contracts.IdentitiesContract):
    """The identity cache in front of the store."""

    @pytest.fixture
    def stage(self, rig: Rig) -> contracts.IdentitiesStage:
        """Make it over a relay that can be cut."""
        return _CacheStage(rig)


class _FakeOwnedStage:
    def __init__(self) -> None:
        self.owned = fakes.FakeOwnedIds()
        self.now = Clock()

    async def add(self, kind: str, object_id: str, tenant: str) -> None:
        self.owned.add(kind, object_id, tenant, is_slow=True)

    async def goes_down(self) -> None:
        self.owned.is_down = True

    async def comes_back(self) -> None:
        self.owned.is_down = False


class _OwnedCacheStage:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    @property
    def owned(self) -> OwnedIds:
        return self._rig.owned

    def now(self) -> Moment:
        return self._rig.clock()

    async def add(self, kind: str, object_id: str, tenant: str) -> None:
        await add_owned(self._rig.sql, object_id, tenant, kind=kind)
        await self._rig.feed.poll()

    async def goes_down(self) -> None:
        await self._rig.goes_down()

    async def comes_back(self) -> None:
        await self._rig.comes_back()


class TestFakeOwnedIds(contracts.OwnedIdsContract):
    """The fake that the tests of the gateway use."""

    @pytest.fixture
    def stage(self) -> contracts.OwnedIdsStage:
        """Make the fake in memory."""
        return _FakeOwnedStage()


class TestOwnedIdCache(contracts.OwnedIdsContract):
    """The cache of ownership in front of the store."""

    @pytest.fixture
    def stage(self, rig: Rig) -> contracts.OwnedIdsStage:
        """Make it over a relay that can be cut."""
        return _OwnedCacheStage(rig)


class _FakeTemplatesStage:
    def __init__(self) -> None:
        self.templates = fakes.FakePromptTemplates()
        self.templates.is_loaded = False
        self.now = Clock()

    async def loads(self) -> None:
        self.templates.is_loaded = True

    async def register(self, digest: bytes, category: str, tenant_id: str | None = None) -> None:
        self.templates.register(digest, category, tenant_id)

    async def remove(self, digest: bytes) -> None:
        del self.templates.table[digest]

    async def goes_down(self) -> None:
        """Nothing changes at first."""

    def grows_old(self) -> None:
        self.templates.is_too_old = True

    async def comes_back(self) -> None:
        self.templates.is_too_old = False


class _TemplateCacheStage:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    @property
    def templates(self) -> PromptTemplates:
        return self._rig.templates

    def now(self) -> Moment:
        return self._rig.clock()

    async def loads(self) -> None:
        for tenant in ("acme", "other"):
            await add_tenant(self._rig.sql, tenant)
        await self._follow()

    async def register(self, digest: bytes, category: str, tenant_id: str | None = None) -> None:
        await add_template(self._rig.sql, digest, category, tenant_id)
        await self._follow()

    async def remove(self, digest: bytes) -> None:
        await self._rig.sql.execute("DELETE FROM keyproxy.prompt_templates WHERE digest = $1", digest)
        await self._follow()

    async def goes_down(self) -> None:
        await self._rig.goes_down()

    def grows_old(self) -> None:
        self._rig.clock.advance(Cache().stale_seconds + 1)

    async def comes_back(self) -> None:
        await self._rig.comes_back()
        await self._rig.templates.read()

    async def _follow(self) -> None:
        await self._rig.feed.poll()
        await self._rig.templates.read()


class TestFakePromptTemplates(contracts.PromptTemplatesContract):
    """The fake that the tests of the gateway use."""

    @pytest.fixture
    def template_stage(self) -> contracts.TemplatesStage:
        """Make the fake in memory."""
        return _FakeTemplatesStage()


class TestTemplateCache(contracts.PromptTemplatesContract):
    """The templates of the store, in memory."""

    @pytest.fixture
    async def template_stage(self, make_rig: MakeRig) -> contracts.TemplatesStage:
        """Make it over a relay that can be cut."""
        return _TemplateCacheStage(await make_rig())


class _FakeMintStage:
    def __init__(self) -> None:
        self.mint = fakes.FakeMint(contracts.MINT_RULES)
        self._count = 0

    def wall_seconds(self) -> float:
        return time.time()

    async def key(self, *scopes: str, is_test: bool = False) -> MintParent:
        self._count += 1
        key_id = f"key_{self._count}"
        who = fakes.identity(scopes=frozenset(scopes), is_test=is_test)
        self.mint.parents[key_id] = dataclasses.replace(who, key_id=key_id)
        return MintParent(key_id, None, None, is_operator=False)

    async def goes_down(self) -> None:
        self.mint.is_down = True

    async def comes_back(self) -> None:
        self.mint.is_down = False


class _StoreMintStage:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        signing_key = SigningKey.make(time.time())
        self.mint = TokenMinter(
            rig.door, rules=lambda: contracts.MINT_RULES, signing_key=lambda _now: signing_key, now=clock.now
        )
        self._count = 0

    def wall_seconds(self) -> float:
        return time.time()

    async def key(self, *scopes: str, is_test: bool = False) -> MintParent:
        self._count += 1
        sql, key_id = self._rig.sql, f"key_{self._count}"
        if self._count == 1:
            await add_user(sql)
            await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('reader', '{data:read}')")
        await sql.execute(
            "INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes, is_test) VALUES ($1, 'u_42', $2, $3, $4)",
            key_id, fakes.key(self._count).digest(), list(scopes), is_test,
        )  # fmt: skip
        return MintParent(key_id, None, None, is_operator=False)

    async def goes_down(self) -> None:
        await self._rig.goes_down()

    async def comes_back(self) -> None:
        await self._rig.comes_back()


class TestFakeMint(contracts.AgentTokenMintContract):
    """The fake that the tests of the wire use."""

    @pytest.fixture
    def stage(self) -> contracts.MintStage:
        """Make the fake in memory."""
        return _FakeMintStage()


class TestTokenMinter(contracts.AgentTokenMintContract):
    """The minting of the store."""

    @pytest.fixture
    def stage(self, rig: Rig) -> contracts.MintStage:
        """Make it over a relay that can be cut."""
        return _StoreMintStage(rig)
