"""One suite for each port, run on the fake and on the real implementation: what both guarantee can be relied on."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from typing import Protocol

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.minting import MintedToken, MintParent, MintRequest, MintRules, parse_mint_request
from keyproxy.http import identity_headers
from keyproxy.limits.calendar_windows import span
from keyproxy.limits.ledger_protocol import BUDGETS, FEW_HOLDERS, LeaseGrant, LeaseReport, Pool, Window
from keyproxy.limits.plan import PERIODS
from keyproxy.model import Identity, Missing, Moment, TimeBudget
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.ports.identities import Identities
from keyproxy.ports.tenant_records import OwnedIds, PromptTemplates
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.ledger.backend import LedgerBackend
from keyproxy.store.ledger.postgres_backend import WindowState
from keyproxy.store.postgres.database import StoreUnavailable
from tests import fakes
from tests.reference_ledger import ReferenceLedger, timed

KNOWN, OTHER, STRANGER = (fakes.key(number) for number in (1, 2, 3))

_DIGEST = bytes(range(32))


class IdentitiesStage(Protocol):
    """An implementation of the port, over a store that can be filled and made unavailable."""

    @property
    def identities(self) -> Identities:
        """The implementation under test."""
        ...

    def now(self) -> Moment:
        """The current time."""
        ...

    async def add(self, secret: SecretKey, user: str, *, is_test: bool = False, standing: Reason | None = None) -> None:
        """Add a key of a user of `acme` to the store, but not to the cache."""
        ...

    async def let_act(self, secret: SecretKey, user: str) -> None:
        """Let a key that was added act for this user, who is added to `acme`."""
        ...

    async def goes_down(self) -> None:
        """Make the store unavailable."""
        ...

    async def comes_back(self) -> None:
        """Make the store available again."""
        ...


class IdentitiesContract:
    """The port Identities."""

    async def test_uncached_key_is_missing_until_it_has_been_fetched(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        with pytest.raises(Missing) as error:
            self._look(stage, KNOWN)
        assert str(error.value) == "identity"
        await error.value.fetch_missing()
        assert self._look(stage, KNOWN, is_first_lookup=False).user_id == "u_42"

    async def test_first_and_later_lookups_give_the_same_result(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        with pytest.raises(Missing):
            self._look(stage, KNOWN, is_first_lookup=False)
        await self._told(stage, KNOWN)
        # The same object, not an equal one: values that depend on the key are looked up by it.
        assert self._look(stage, KNOWN) is self._look(stage, KNOWN, is_first_lookup=False)

    @pytest.mark.parametrize("is_test", [False, True])
    @pytest.mark.parametrize("standing", [None, Reason.KEY_REVOKED, Reason.ACCOUNT_DISABLED])
    async def test_known_key_has_an_identity_with_its_headers_whatever_its_standing(
        self, stage: IdentitiesStage, is_test: bool, standing: Reason | None
    ) -> None:
        await stage.add(KNOWN, "u_42", is_test=is_test, standing=standing)
        who = await self._told(stage, KNOWN)
        assert isinstance(who, Identity)
        assert (who.user_id, who.tenant_id, who.scopes) == ("u_42", "acme", frozenset({"jobs:write"}))
        assert (who.is_test, who.standing) == (is_test, standing)
        values = (
            ("User", "u_42"),
            ("Tenant", "acme"),
            ("Scope", "jobs:write"),
            ("Test", "true" if is_test else "false"),
            ("Key-Id", who.key_id),
        )
        assert who.header_block == identity_headers.identity_block("X-Keyproxy-", values)

    async def test_each_key_has_its_own_identity(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_1")
        await stage.add(OTHER, "u_2")
        told = [await self._told(stage, secret) for secret in (KNOWN, OTHER, KNOWN)]
        assert [who.user_id for who in told if isinstance(who, Identity)] == ["u_1", "u_2", "u_1"]

    async def test_unknown_key_is_invalid(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        assert await self._told(stage, STRANGER) is Reason.KEY_INVALID
        with pytest.raises(Refusal) as error:
            self._look(stage, STRANGER)
        assert error.value.reason is Reason.KEY_INVALID

    async def test_outage_refuses_uncached_keys_as_unavailable_and_serves_cached_ones(
        self, stage: IdentitiesStage
    ) -> None:
        await stage.add(KNOWN, "u_42")
        await stage.add(OTHER, "u_43")
        who = await self._told(stage, KNOWN)
        await stage.goes_down()
        assert await self._told(stage, OTHER) is Reason.STORE_UNAVAILABLE
        assert await self._told(stage, STRANGER) is Reason.STORE_UNAVAILABLE
        assert await self._told(stage, KNOWN) is who

    async def test_after_an_outage_every_key_is_decided_correctly(self, stage: IdentitiesStage) -> None:
        await stage.add(OTHER, "u_43")
        await stage.goes_down()
        for secret in (OTHER, STRANGER):
            assert await self._told(stage, secret) is Reason.STORE_UNAVAILABLE
        await stage.comes_back()
        who = await self._told(stage, OTHER)
        assert isinstance(who, Identity)
        assert who.user_id == "u_43"
        assert await self._told(stage, STRANGER) is Reason.KEY_INVALID

    async def test_cancelled_lookup_does_not_affect_another_one_that_waits(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        leaving, staying = (asyncio.create_task(self._told(stage, KNOWN)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        who = await staying
        assert isinstance(who, Identity)
        assert self._look(stage, KNOWN) is who

    @pytest.mark.parametrize("is_test", [False, True])
    async def test_acting_identity_is_that_of_the_user_in_the_mode_and_with_the_id_of_the_key(
        self, stage: IdentitiesStage, is_test: bool
    ) -> None:
        await stage.add(KNOWN, "u_worker", is_test=is_test)
        await stage.let_act(KNOWN, "u_42")
        who = await self._told(stage, KNOWN, "u_42")
        assert isinstance(who, Identity)
        assert (who.user_id, who.tenant_id, who.actor_user_id) == ("u_42", "acme", "u_worker")
        assert (who.is_test, who.standing, who.can_act) == (is_test, None, True)
        values = (
            ("User", "u_42"),
            ("Tenant", "acme"),
            ("Scope", "jobs:write"),
            ("Test", "true" if is_test else "false"),
            ("Key-Id", who.key_id),
            ("Actor", "u_worker"),
        )
        assert who.header_block == identity_headers.identity_block("X-Keyproxy-", values)
        own = await self._told(stage, KNOWN)
        assert isinstance(own, Identity)
        assert (own.user_id, own.actor_user_id, own.key_id) == ("u_worker", None, who.key_id)

    @pytest.mark.parametrize("user", ["u_43", "u_unknown", "", "two words", "ü", "x" * 129])
    async def test_key_that_may_not_act_for_a_user_is_refused_for_that(self, stage: IdentitiesStage, user: str) -> None:
        await stage.add(KNOWN, "u_worker")
        await stage.let_act(KNOWN, "u_42")
        who = await self._told(stage, KNOWN, user)
        assert isinstance(who, Identity)
        assert (who.standing, who.user_id, who.actor_user_id) == (Reason.DELEGATION_REFUSED, "u_worker", None)

    @pytest.mark.parametrize("standing", [Reason.KEY_REVOKED, Reason.ACCOUNT_DISABLED])
    async def test_key_that_does_not_work_itself_is_refused_for_that_whatever_it_may_act_for(
        self, stage: IdentitiesStage, standing: Reason
    ) -> None:
        await stage.add(KNOWN, "u_worker", standing=standing)
        who = await self._told(stage, KNOWN, "u_42")
        assert isinstance(who, Identity)
        assert who.standing is standing

    async def test_unknown_key_is_invalid_whatever_it_acts_for(self, stage: IdentitiesStage) -> None:
        assert await self._told(stage, STRANGER, "u_42") is Reason.KEY_INVALID
        assert await self._told(stage, STRANGER, "") is Reason.KEY_INVALID

    async def test_outage_serves_verified_pairs_and_refuses_others_as_unavailable(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_worker")
        await stage.let_act(KNOWN, "u_42")
        who = await self._told(stage, KNOWN, "u_42")
        await stage.goes_down()
        assert await self._told(stage, KNOWN, "u_43") is Reason.STORE_UNAVAILABLE
        assert await self._told(stage, KNOWN, "u_42") is who

    async def test_review_resolves_what_the_request_was_resolved_to(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_worker")
        await stage.let_act(KNOWN, "u_42")
        own, acting = await self._told(stage, KNOWN), await self._told(stage, KNOWN, "u_42")
        assert isinstance(own, Identity)
        assert isinstance(acting, Identity)
        for who in (own, acting):
            assert stage.identities.reviewed(KNOWN.digest(), who, stage.now()) is who

    def _look(
        self, stage: IdentitiesStage, secret: SecretKey, acting_for: str | None = None, *, is_first_lookup: bool = True
    ) -> Identity:
        identities, digest, now = stage.identities, secret.digest(), stage.now()
        if acting_for is None:
            return identities.known(digest, now, is_first_lookup=is_first_lookup)
        return identities.acting(digest, acting_for, now, is_first_lookup=is_first_lookup)

    async def _told(
        self, stage: IdentitiesStage, secret: SecretKey, acting_for: str | None = None
    ) -> Identity | Reason:
        """The outcome of a request with this key, after waiting once for what is missing."""
        try:
            try:
                return self._look(stage, secret, acting_for)
            except Missing as missing:
                await missing.fetch_missing()
                return self._look(stage, secret, acting_for, is_first_lookup=False)
        except Refusal as refusal:
            return refusal.reason


class TemplatesStage(Protocol):
    """An implementation of the port, over a store that can be filled and made unavailable."""

    @property
    def templates(self) -> PromptTemplates:
        """The implementation under test. Nothing is loaded at first."""
        ...

    def now(self) -> Moment:
        """The current time."""
        ...

    async def loads(self) -> None:
        """Load the templates for the first time."""
        ...

    async def register(self, digest: bytes, category: str, tenant_id: str | None = None) -> None:
        """Register a template in the store, and wait until it is effective."""
        ...

    async def remove(self, digest: bytes) -> None:
        """Remove a template from the store, and wait until that is effective."""
        ...

    async def goes_down(self) -> None:
        """Make the store unavailable."""
        ...

    async def comes_back(self) -> None:
        """Make the store available again, and wait until that is noticed."""
        ...

    def grows_old(self) -> None:
        """Let `stale_seconds` pass."""
        ...


class PromptTemplatesContract:
    """The port PromptTemplates. The tenants `acme` and `other` exist."""

    async def test_templates_are_unavailable_before_the_first_load(self, template_stage: TemplatesStage) -> None:
        assert self._category(template_stage, _DIGEST) is Reason.STORE_UNAVAILABLE

    async def test_registered_digest_has_its_category_and_any_other_has_none(
        self, template_stage: TemplatesStage
    ) -> None:
        await template_stage.loads()
        await template_stage.register(_DIGEST, "code")
        assert self._category(template_stage, _DIGEST) == "code"
        assert self._category(template_stage, b"\1" * 32) is None

    async def test_template_of_a_tenant_is_unregistered_for_every_other_tenant(
        self, template_stage: TemplatesStage
    ) -> None:
        await template_stage.loads()
        await template_stage.register(_DIGEST, "code", "acme")
        assert self._category(template_stage, _DIGEST, "acme") == "code"
        assert self._category(template_stage, _DIGEST, "other") is None

    async def test_changed_and_removed_templates_are_effective(self, template_stage: TemplatesStage) -> None:
        await template_stage.loads()
        await template_stage.register(_DIGEST, "code")
        await template_stage.register(_DIGEST, "review")
        assert self._category(template_stage, _DIGEST) == "review"
        await template_stage.remove(_DIGEST)
        assert self._category(template_stage, _DIGEST) is None

    async def test_templates_are_served_during_an_outage_until_they_are_too_old(
        self, template_stage: TemplatesStage
    ) -> None:
        await template_stage.loads()
        await template_stage.register(_DIGEST, "code")
        await template_stage.goes_down()
        assert self._category(template_stage, _DIGEST) == "code"
        assert self._category(template_stage, b"\1" * 32) is None
        template_stage.grows_old()
        for digest in (_DIGEST, b"\1" * 32):
            assert self._category(template_stage, digest) is Reason.STORE_UNAVAILABLE
        await template_stage.comes_back()
        assert self._category(template_stage, _DIGEST) == "code"

    def _category(self, stage: TemplatesStage, digest: bytes, tenant_id: str = "acme") -> str | Reason | None:
        try:
            return stage.templates.category(digest, tenant_id, stage.now())
        except Refusal as refusal:
            return refusal.reason


LEASE_SECONDS = 1000.0
LIMITS = {
    "concurrency": 5, "requests_per_day": 50, "tokens_per_month": 500, "spend_per_week": 10**12, "requests_total": 30,
    "tokens_total": 300,
}  # fmt: skip
BURST, INTERVAL_SECONDS = 400, 1e6
_ROUNDING_SECONDS = 1e-3


SELECTORS = ("", "model:gpt-4o", "mode:live,model:gpt-4o,route:POST /v1/chat")


class OwnedIdsStage(Protocol):
    """An implementation of the port, over a store that can be filled and made unavailable."""

    @property
    def owned(self) -> OwnedIds:
        """The implementation under test."""
        ...

    def now(self) -> Moment:
        """The current time."""
        ...

    async def add(self, kind: str, object_id: str, tenant: str) -> None:
        """Let a tenant own an id in the store, but not in the cache."""
        ...

    async def goes_down(self) -> None:
        """Make the store unavailable."""
        ...

    async def comes_back(self) -> None:
        """Make the store available again."""
        ...


class OwnedIdsContract:
    """The port OwnedIds."""

    async def test_uncached_id_is_missing_until_it_has_been_fetched(self, stage: OwnedIdsStage) -> None:
        await stage.add("collection", "docs", "acme")
        with pytest.raises(Missing) as error:
            self._look(stage, "docs")
        assert str(error.value) == "ownership"
        await error.value.fetch_missing()
        assert self._look(stage, "docs", is_first_lookup=False) is True
        assert self._look(stage, "docs") is True

    async def test_id_is_owned_by_its_tenant_under_its_kind_only(self, stage: OwnedIdsStage) -> None:
        await stage.add("collection", "docs", "acme")
        await stage.add("collection", "other/docs", "globex")
        await stage.add("model", "ft:1", "acme")
        assert await self._told(stage, "docs") is True
        assert await self._told(stage, "docs", tenant="globex") is False
        assert await self._told(stage, "docs", kind="model") is False
        assert await self._told(stage, "other/docs") is False
        assert await self._told(stage, "other/docs", tenant="globex") is True
        assert await self._told(stage, "ft:1", kind="model") is True
        assert await self._told(stage, "ft:2", kind="model") is False

    async def test_foreign_and_unknown_ids_are_decided_alike(self, stage: OwnedIdsStage) -> None:
        await stage.add("collection", "docs", "acme")
        await stage.add("collection", "plans", "globex")
        assert await self._told(stage, "plans") is await self._told(stage, "no-such-id") is False

    async def test_outage_refuses_uncached_ids_as_unavailable_and_serves_cached_ones(
        self, stage: OwnedIdsStage
    ) -> None:
        await stage.add("collection", "docs", "acme")
        await stage.add("collection", "plans", "acme")
        assert await self._told(stage, "docs") is True
        await stage.goes_down()
        assert await self._told(stage, "plans") is Reason.STORE_UNAVAILABLE
        assert await self._told(stage, "docs") is True
        await stage.comes_back()
        assert await self._told(stage, "plans") is True

    def _look(
        self, stage: OwnedIdsStage, object_id: str, *, kind: str = "collection", tenant: str = "acme",
        is_first_lookup: bool = True,
    ) -> bool:  # fmt: skip
        return stage.owned.is_owned(kind, object_id, tenant, stage.now(), is_first_lookup=is_first_lookup)

    async def _told(
        self, stage: OwnedIdsStage, object_id: str, *, kind: str = "collection", tenant: str = "acme"
    ) -> bool | Reason:
        try:
            return self._look(stage, object_id, kind=kind, tenant=tenant)
        except Missing as missing:
            failure = await missing.failure(TimeBudget())
            if failure is not None:
                return failure.reason
            return self._look(stage, object_id, kind=kind, tenant=tenant, is_first_lookup=False)
        except Refusal as refusal:
            return refusal.reason


#: What the mints of the contract are bounded by.
MINT_RULES = MintRules(("keyproxy", "reports"), ttl_seconds_max=900, depth_max=1, tokens_max=3, issuer="keyproxy")


class MintStage(Protocol):
    """An implementation of the port under MINT_RULES, over a store that can be filled and made unavailable.

    The store has the role `reader` with the scope data:read.
    """

    @property
    def mint(self) -> AgentTokenMint:
        """The implementation under test."""
        ...

    def wall_seconds(self) -> float:
        """The current time of the store."""
        ...

    async def key(self, *scopes: str, is_test: bool = False) -> MintParent:
        """Add a key of the user u_42 of acme with these scopes."""
        ...

    async def goes_down(self) -> None:
        """Make the store unavailable."""
        ...

    async def comes_back(self) -> None:
        """Make the store available again."""
        ...


def mint_request(agent: str = "crawler", **members: object) -> MintRequest:
    """A request for a token with the role `reader`, unless `scopes` are given."""
    content = {"agent": agent, **({} if "scopes" in members else {"role": "reader"}), **members}
    return parse_mint_request(json.dumps(content).encode(), MINT_RULES)


class AgentTokenMintContract:
    """The port AgentTokenMint."""

    async def test_minted_token_is_what_was_asked_for_of_its_parent(self, stage: MintStage) -> None:
        parent = await stage.key("agents:mint", "data:read", "jobs:write", is_test=True)
        asked = mint_request(scopes=["jobs:write"], token_budget=10, ttl_seconds=60, audience="reports")
        token = await self._mint(stage, parent, asked)
        assert isinstance(token, MintedToken)
        assert (token.agent, token.user_id, token.tenant_id, token.is_test) == ("crawler", "u_42", "acme", True)
        assert (token.scopes, token.audience, token.depth) == (("jobs:write",), "reports", 0)
        assert (token.token_budget, token.request_budget) == (10, None)
        assert 0.0 <= stage.wall_seconds() + 60 - token.expires_wall_seconds <= 5.0
        assert token.id.startswith("agt_")
        other = await self._mint(stage, parent, asked)
        assert isinstance(other, MintedToken)
        assert other.id != token.id
        assert other.token.reveal() != token.token.reveal()

    async def test_role_grants_its_scopes_as_far_as_the_parent_has_them(self, stage: MintStage) -> None:
        token = await self._mint(stage, await stage.key("agents:mint", "data:read", "jobs:write"), mint_request())
        assert isinstance(token, MintedToken)
        assert token.scopes == ("data:read",)
        assert await self._mint(stage, await stage.key("agents:mint"), mint_request()) is Reason.DELEGATION_REFUSED

    async def test_what_exceeds_the_parent_is_refused(self, stage: MintStage) -> None:
        parent = await stage.key("agents:mint", "data:read")
        beyond = mint_request(scopes=["data:read", "data:write"])
        assert await self._mint(stage, parent, beyond) is Reason.DELEGATION_REFUSED
        assert await self._mint(stage, parent, mint_request(role="no-such-role")) is Reason.DELEGATION_REFUSED
        assert await self._mint(stage, await stage.key("data:read"), mint_request()) is Reason.DELEGATION_REFUSED
        unknown = MintParent("key_unknown", None, None, is_operator=False)
        assert await self._mint(stage, unknown, mint_request()) is Reason.DELEGATION_REFUSED

    async def test_token_of_a_token_is_bounded_by_it(self, stage: MintStage) -> None:
        root = await stage.key("agents:mint", "data:read", "jobs:write")
        asked = mint_request(scopes=["agents:mint", "data:read"], token_budget=10, ttl_seconds=60)
        first = await self._mint(stage, root, asked)
        assert isinstance(first, MintedToken)
        parent = MintParent(root.key_id, first.id, None, is_operator=False)
        for beyond in (
            mint_request(scopes=["jobs:write"]),
            mint_request(token_budget=11),
            mint_request(ttl_seconds=61),
        ):
            assert await self._mint(stage, parent, beyond) is Reason.DELEGATION_REFUSED
        child = await self._mint(stage, parent, mint_request("child", scopes=["agents:mint"], token_budget=10))
        assert isinstance(child, MintedToken)
        assert (child.depth, child.user_id) == (1, "u_42")
        assert child.expires_wall_seconds <= first.expires_wall_seconds
        below = MintParent(root.key_id, child.id, None, is_operator=False)
        assert await self._mint(stage, below, mint_request(scopes=["agents:mint"])) is Reason.DELEGATION_REFUSED

    async def test_root_key_has_a_bounded_number_of_live_tokens(self, stage: MintStage) -> None:
        parent = await stage.key("agents:mint", "data:read")
        for _ in range(MINT_RULES.tokens_max):
            assert isinstance(await self._mint(stage, parent, mint_request()), MintedToken)
        with pytest.raises(Refusal) as error:
            await stage.mint.mint(parent, mint_request(), actor=f"key:{parent.key_id}")
        limit = error.value.limit
        assert error.value.reason is Reason.QUOTA_EXHAUSTED
        assert limit is not None
        assert (limit.policy.name, limit.policy.quota, limit.remaining) == ("key.agent_tokens", 3, 0)
        assert 0.0 < (limit.reset_seconds or 0.0) <= 900.0
        assert isinstance(
            await self._mint(stage, await stage.key("agents:mint", "data:read"), mint_request()), MintedToken
        )

    async def test_outage_refuses_as_unavailable_never_as_forbidden(self, stage: MintStage) -> None:
        parent = await stage.key("agents:mint", "data:read")
        await stage.goes_down()
        assert await self._mint(stage, parent, mint_request()) is Reason.STORE_UNAVAILABLE
        assert await self._mint(stage, parent, mint_request(role="no-such-role")) is Reason.STORE_UNAVAILABLE
        await stage.comes_back()
        assert isinstance(await self._mint(stage, parent, mint_request()), MintedToken)

    async def _mint(self, stage: MintStage, parent: MintParent, request: MintRequest) -> MintedToken | Reason:
        actor = f"key:{parent.key_id}" if parent.token_id is None else f"agent_token:{parent.token_id}"
        try:
            return await stage.mint.mint(parent, request, actor=actor)
        except Refusal as refusal:
            return refusal.reason


def window(measure: str = "requests_per_day", owner: str = "u_42", selector: str = "") -> Window:
    """A user's window."""
    return Window(Pool("user", owner, False), measure, selector)


def line(lease: int = 1, of: Window | None = None, *, limit: int = 10, want: int = 0, at_least: int = 1,
         granted: int = 0, used: int = 0, returned: int = 0, interval_seconds: float = 0.0,
         most: int = 0, is_closing: bool = False) -> LeaseReport:  # fmt: skip
    """A holder's report of a lease; by default of a day's requests."""
    return LeaseReport(
        lease, of or window(), 0, limit, interval_seconds, granted, used, returned, want, min(at_least, want),
        most, is_closing,
    )  # fmt: skip


async def granted_to(ledger: LedgerBackend, serial: int, *lines: LeaseReport) -> dict[int, int]:
    """The total grant of each lease of one holder after one message."""
    replies = await ledger.sync("a", serial, lines)
    assert replies is not None
    return {reply.lease: reply.granted for reply in replies}


def assert_same_reply(expected: LeaseGrant, reply: LeaseGrant) -> None:
    """Assert that a backend replies as the reference does at the same instant; times are rounded differently."""
    assert reply._replace(ends_seconds=0.0, wait_seconds=0.0) == expected._replace(ends_seconds=0.0, wait_seconds=0.0)
    assert reply.ends_seconds == pytest.approx(expected.ends_seconds, abs=_ROUNDING_SECONDS)
    assert reply.wait_seconds == pytest.approx(expected.wait_seconds, abs=_ROUNDING_SECONDS)


class InspectedBackend(LedgerBackend, Protocol):
    """A backend that reports the state of windows."""

    async def windows(self, windows: Sequence[Window]) -> Sequence[WindowState | None]:
        """The state of the current windows."""
        ...


class LedgerStage(Protocol):
    """A ledger without history."""

    @property
    def ledger(self) -> InspectedBackend:
        """The backend under test. Its leases last `LEASE_SECONDS`."""
        ...

    @property
    def brief(self) -> LedgerBackend:
        """The same ledger, for holders whose leases expire at once."""
        ...

    async def credit(self, window: Window, amount: int) -> None:
        """Add an amount to the limit of a current window, and wait until the backend knows of it."""
        ...


class Holders:
    """Processes that hold leases and send random valid messages, also about two leases of one window at once."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.names = [f"{seed}a", f"{seed}b"]
        self.serials: dict[str, int] = {}
        self.leases: dict[tuple[str, str], list[int]] = {}
        self.numbers = 0

    def message(self) -> tuple[str, int, list[LeaseReport]]:
        """The next message: holder, serial and lines."""
        name = self.random.choice(self.names)
        self.serials[name] = self.serials.get(name, 0) + 1
        keys = [
            f"{measure} {place} {selector}"
            for measure in LIMITS
            for place, selector in ((0, ""), (1, ""), (0, self.random.choice(SELECTORS)))
            if self.random.random() < 0.35
        ]
        lines = [self._line(name, key) for key in dict.fromkeys(keys)]
        lines += [self._rate_line("rate", place) for place in range(2) if self.random.random() < 0.3]
        lines += [self._rate_line("token_rate", 2) for _ in range(1) if self.random.random() < 0.3]
        self.random.shuffle(lines)
        return name, self.serials[name], lines

    def replace(self) -> str:
        """Replace one holder by a new one, and return the name of the old one."""
        name = self.names.pop(self.random.randrange(2))
        self.leases = {key: lease for key, lease in self.leases.items() if key[0] != name}
        self.names.append(name + "'")
        return name

    def hear(self, name: str, lease: int, granted: int, starts: int) -> None:
        """Record the grant of a lease."""
        for key, known in self.leases.items():
            if key[0] == name and known[0] == lease:
                known[1], known[4] = granted, starts

    def _line(self, name: str, key: str) -> LeaseReport:
        measure, _, selector = key.split(" ", 2)
        if (name, key) not in self.leases:
            self.numbers += 1
            self.leases[name, key] = [self.numbers, 0, 0, 0, 0]
        lease = self.leases[name, key]
        number, granted, used, returned, starts = lease
        if measure != "concurrency":
            used += self.random.randint(0, granted - used - returned) if granted > used + returned else 0
            used += self.random.random() < 0.1  # more than was granted
        if granted > used + returned:
            returned += self.random.randint(0, granted - used - returned)
        lease[2:4] = used, returned
        is_closing = self.random.random() < 0.1
        if is_closing:
            del self.leases[name, key]
        want = 0 if is_closing else self.random.choice([0, 1, 5, 30])
        at_least = self.random.randint(1, want) if want else 0
        # Two leases of one window may come from two plans.
        limit = LIMITS[measure] - (self.random.random() < 0.1)
        return LeaseReport(number, window(measure, selector=selector), starts, limit, 0.0, granted, used, returned, want,
                    at_least, self._most(at_least, want), is_closing)  # fmt: skip

    def _most(self, at_least: int, want: int) -> int:
        return self.random.randint(at_least, want) if want and self.random.random() < 0.7 else 0

    def _rate_line(self, measure: str, place: int) -> LeaseReport:
        want = self.random.choice([0, 1, 20, 90])
        burst = BURST - 100 * (self.random.random() < 0.1)
        # The ledger stores no lease for a rate: any number that is unique in this message will do.
        at_least = self.random.randint(1, want) if want else 0
        returned = self.random.choice([-30, 0, 0, 7, 80]) if measure == "token_rate" else 0
        granted_at = time.time() - self.random.choice([0, 1, 10]) if returned > 0 else 0.0
        return LeaseReport(1_000_000 + place, window(measure), 0, burst, INTERVAL_SECONDS, 0, 0, returned, want,
                    at_least, self._most(at_least, want), False, granted_at)  # fmt: skip


class LedgerContract:
    """The port LedgerBackend: message by message as the reference."""

    @pytest.fixture
    def ledger(self, ledger_stage: LedgerStage) -> InspectedBackend:
        """The backend under test."""
        return ledger_stage.ledger

    @pytest.mark.parametrize("seed", range(12))
    async def test_every_reply_equals_the_reference_s(self, ledger: InspectedBackend, seed: int) -> None:
        reference, holders = ReferenceLedger(time.time, lease_seconds=LEASE_SECONDS), Holders(seed)
        for _ in range(60):
            if holders.random.random() < 0.05:
                name = holders.replace()
                reference.end(name)
                await ledger.end(name)
            name, serial, lines = holders.message()
            lines = timed(*lines)
            answered = await ledger.sync(name, serial, lines)
            assert answered is not None
            expected = reference.follow(name, serial, lines, answered)
            assert expected is not None
            for one, other in zip(sorted(expected), sorted(answered), strict=True):
                assert_same_reply(one, other)
                holders.hear(name, other.lease, other.granted, other.starts)
        for name in holders.names:
            reference.end(name)
            await ledger.end(name)
        rows = {of: row for (of, _), row in reference.windows.items() if of.measure in LIMITS}
        for (of, row), state in zip(rows.items(), await ledger.windows(list(rows)), strict=True):
            assert state is not None
            assert (row.spent, row.held, row.forfeited) == (state.spent, state.held, state.forfeited), of
            assert state.held == 0

    async def test_message_that_arrives_after_a_later_one_changes_nothing(self, ledger: InspectedBackend) -> None:
        await ledger.sync("a", 2, [line(want=4)])
        with pytest.raises(StoreUnavailable):
            await ledger.sync("a", 2, [line(want=4)])
        with pytest.raises(StoreUnavailable):
            await ledger.sync("a", 1, [line(want=4)])
        (state,) = await ledger.windows([window()])
        assert state is not None
        assert (state.spent, state.held) == (0, 4)

    async def test_repeated_message_counts_once(self, ledger: InspectedBackend) -> None:
        replies = await ledger.sync("a", 1, [line(want=4)])
        assert replies is not None
        assert replies[0].granted == 4
        for serial in (2, 3):
            await ledger.sync("a", serial, [line(granted=4, used=3, returned=1)])
        (state,) = await ledger.windows([window()])
        assert state is not None
        assert (state.spent, state.held) == (3, 0)

    async def test_ended_holder_is_rejected_and_its_units_are_charged(self, ledger: InspectedBackend) -> None:
        await ledger.sync("a", 1, [line(want=4), line(2, window("concurrency"), want=2)])
        await ledger.end("a")
        assert await ledger.sync("a", 2, [line(granted=4, used=1)]) is None
        requests, slots = await ledger.windows([window(), window("concurrency")])
        assert requests is not None
        assert slots is not None
        assert (requests.spent, requests.held, requests.forfeited) == (4, 0, 4)
        assert (slots.spent, slots.held, slots.forfeited) == (0, 0, 0)

    async def test_only_expired_holders_are_ended(self, ledger_stage: LedgerStage) -> None:
        ledger = ledger_stage.ledger
        await ledger_stage.brief.sync("dead", 1, [line(want=4)])
        await ledger.sync("alive", 1, [line(want=4)])
        await ledger.reap()
        (state,) = await ledger.windows([window()])
        assert state is not None
        assert (state.spent, state.held, state.forfeited) == (4, 4, 4)
        assert await ledger_stage.brief.sync("dead", 2, [line(granted=4, used=1)]) is None
        assert await ledger.sync("alive", 2, [line(granted=4, used=1)]) is not None

    async def test_holder_without_units_at_its_expiry_can_continue(self, ledger_stage: LedgerStage) -> None:
        ledger, brief, rate = ledger_stage.ledger, ledger_stage.brief, window("rate")
        await brief.sync("a", 1, [line(want=4), line(2, rate, interval_seconds=60.0, want=1)])
        await brief.sync("a", 2, [line(granted=4, used=1, returned=3, is_closing=True)])
        for serial in (3, 5):
            await ledger.reap()
            replies = await brief.sync("a", serial, [line(serial, want=2)])
            assert replies is not None
            assert replies[0].granted == 2
            with pytest.raises(StoreUnavailable):
                await brief.sync("a", serial - 1, [])
            await brief.sync("a", serial + 1, [line(serial, granted=2, returned=2, is_closing=True)])
        (state,) = await ledger.windows([window()])
        assert state is not None
        assert (state.spent, state.held, state.forfeited) == (1, 0, 0)

    async def test_resting_or_unknown_holder_that_claims_units_has_ended(self, ledger_stage: LedgerStage) -> None:
        ledger = ledger_stage.ledger
        await ledger_stage.brief.sync("resting", 1, [])
        await ledger.reap()
        for holder in ("resting", "deleted"):
            assert await ledger.sync(holder, 7, [line(granted=4, used=1)]) is None, holder
        (state,) = await ledger.windows([window()])
        assert state is None
        # A new holder, or one whose first replies were lost, has been granted nothing.
        assert await ledger.sync("new", 7, [line(want=1)]) is not None

    async def test_of_leases_that_want_units_of_one_window_in_one_message_only_the_latest_gets_any(
        self, ledger: InspectedBackend
    ) -> None:
        assert await granted_to(ledger, 1, line(2, want=8), line(1, want=8)) == {1: 0, 2: 8}
        # Units that one lease returns can be granted to another in the same message, in any order of lines.
        told = line(1, want=8), line(2, granted=8, returned=3, want=8), line(3, want=9, at_least=5)
        assert await granted_to(ledger, 2, *told) == {1: 0, 2: 8, 3: 5}
        told = line(4, want=1), line(3, granted=5, used=2, returned=3), line(2, granted=8, returned=3)
        assert await granted_to(ledger, 3, *told) == {2: 8, 3: 5, 4: 1}
        # This holds even if there is enough for both. Other windows are independent.
        told = (
            line(5, want=1),
            line(6, window(owner="u_43"), want=1),
            line(7, window("rate"), interval_seconds=9, want=1),
        )
        assert await granted_to(ledger, 4, line(4, granted=1, want=1), *told) == {4: 1, 5: 1, 6: 1, 7: 1}
        (state,) = await ledger.windows([window()])
        assert state is not None
        assert (state.spent, state.held) == (2, 5 + 1 + 1)

    async def test_every_reply_has_the_state_of_its_window_after_the_message(self, ledger: InspectedBackend) -> None:
        replies = await ledger.sync("a", 1, [line(1, want=4), line(2, limit=9, want=5)])
        assert replies is not None
        assert [(reply.spent, reply.held) for reply in replies] == [(0, 5), (0, 5)]
        replies = await ledger.sync("a", 2, [line(2, granted=5, used=2), line(1, want=3)])
        assert replies is not None
        assert [(reply.spent, reply.held) for reply in replies] == [(2, 6), (2, 6)]

    async def test_two_leases_of_one_rate_in_one_message_share_its_burst(self, ledger: InspectedBackend) -> None:
        rate = window("rate")
        told = [line(number, rate, limit=5, want=4, interval_seconds=60.0) for number in (2, 1)]
        replies = await ledger.sync("a", 1, told)
        assert replies is not None
        assert {one.lease: (one.granted, one.held, one.wait_seconds) for one in replies} == {1: (0, 0, 0), 2: (4, 4, 0)}
        replies = await ledger.sync("a", 2, told)
        assert replies is not None
        assert {one.lease: (one.granted, one.held) for one in replies} == {1: (0, 4), 2: (1, 5)}

    async def test_rate_grants_its_burst_and_then_reports_the_wait_for_the_next_unit(
        self, ledger: InspectedBackend
    ) -> None:
        rate = window("rate")
        replies = await ledger.sync("a", 1, [line(1, rate, limit=5, want=9, interval_seconds=0.5)])
        assert replies is not None
        assert (replies[0].granted, replies[0].wait_seconds) == (5, 0.0)
        replies = await ledger.sync("a", 2, [line(1, rate, limit=5, want=1, interval_seconds=0.5)])
        assert replies is not None
        assert replies[0].granted == 0
        assert 0.0 < replies[0].wait_seconds <= 0.5

    async def test_units_that_one_holder_lacks_are_wanted_from_the_others(self, ledger: InspectedBackend) -> None:
        await ledger.sync("a", 1, [line(want=10)])
        replies = await ledger.sync("b", 1, [line(want=1)])
        assert replies is not None
        assert (replies[0].granted, replies[0].held) == (0, 10)
        replies = await ledger.sync("a", 2, [line(granted=10)])
        assert replies is not None
        assert replies[0].is_wanted

    async def test_credit_is_added_to_the_limit_of_its_window_alone(self, ledger_stage: LedgerStage) -> None:
        ledger, other = ledger_stage.ledger, window(selector="model:gpt-4o")
        assert await granted_to(ledger, 1, line(want=10), line(2, other, want=10)) == {1: 10, 2: 10}
        await ledger_stage.credit(window(), 5)
        replies = await ledger.sync(
            "a", 2, [line(granted=10, used=10, want=20), line(2, other, granted=10, used=10, want=20)]
        )
        assert replies is not None
        told = {reply.lease: (reply.granted, reply.credited, reply.spent, reply.held) for reply in replies}
        assert told == {1: (15, 5, 10, 5), 2: (10, 0, 10, 0)}
        # A negative one takes effect for what is not granted yet.
        await ledger_stage.credit(window(), -4)
        replies = await ledger.sync("a", 3, [line(granted=15, used=10, returned=5, want=20)])
        assert replies is not None
        assert (replies[0].granted, replies[0].credited, replies[0].held) == (16, 1, 1)

    async def test_window_that_is_credited_before_its_first_use_grants_more_than_its_limit(
        self, ledger_stage: LedgerStage
    ) -> None:
        await ledger_stage.credit(window(), 5)
        assert await granted_to(ledger_stage.ledger, 1, line(want=16, at_least=16)) == {1: 0}
        assert await granted_to(ledger_stage.ledger, 2, line(want=15, at_least=15)) == {1: 15}

    async def test_replies_have_the_number_of_holders_with_a_lease_of_the_window(
        self, ledger: InspectedBackend
    ) -> None:
        serials = dict.fromkeys("abc", 0)

        async def holders(name: str, *lines: LeaseReport) -> list[int]:
            serials[name] += 1
            replies = await ledger.sync(name, serials[name], lines)
            assert replies is not None
            return [reply.holders for reply in replies]

        other = window(selector="model:gpt-4o")
        assert await holders("a", line(want=1)) == [1]
        assert await holders("b", line(want=1), line(2, other, want=1)) == [2, 1]
        # A second lease of the same holder does not count; one that was never opened does not either.
        assert await holders("a", line(2, want=1), line(3, other, is_closing=True)) == [2, 1]
        assert await holders("c", line(want=1), line(2, want=1), line(3, window("rate"), interval_seconds=9)) == [
            3,
            3,
            1,
        ]
        assert await holders("c", line(granted=1, used=1, is_closing=True)) == [3]
        assert await holders("c", line(2, granted=1, used=1, is_closing=True)) == [2]
        assert await holders("a", line(granted=1, used=1, is_closing=True), line(4, want=1)) == [2, 2]
        await ledger.end("b")
        assert await holders("a", line(4, granted=1)) == [1]

    async def test_window_with_many_holders_has_the_pace_and_the_slices_of_the_reference(
        self, ledger: InspectedBackend
    ) -> None:
        chance, reference = random.Random(5), ReferenceLedger(time.time, lease_seconds=LEASE_SECONDS)
        names = [f"m{number:03}" for number in range(FEW_HOLDERS + 20)]
        granted, used, serials = dict.fromkeys(names, 0), dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        waits = 0
        for name in [*names, *(chance.choice(names) for _ in range(120))]:
            used[name] = chance.randint(used[name], granted[name])
            serials[name] += 1
            want = chance.choice([0, 1, 8, 30])
            told = timed(
                line(limit=600, want=want, granted=granted[name], used=used[name], most=want and chance.choice([0, 1]))
            )
            replies = await ledger.sync(name, serials[name], told)
            assert replies is not None
            expected = reference.follow(name, serials[name], told, replies)
            assert expected is not None
            one, other = min(expected), min(replies)
            # The schedule of messages may end on a whole number of holders: rounding decides.
            assert one.holders == pytest.approx(other.holders, abs=1)
            # A backend without recalls requests idle units of all holders.
            assert_same_reply(one._replace(holders=other.holders, is_wanted=other.is_wanted), other)
            granted[name], waits = one.granted, waits + (other.wait_seconds > 0)
        account = next(row for (of, _), row in reference.windows.items() if of == window())
        assert account.spent + account.held == 600
        assert waits > 20

    async def test_new_window_expects_the_holders_of_the_one_before_it(self, ledger: InspectedBackend) -> None:
        today, tomorrow = span(window().measure, time.time())
        names = [f"n{number:03}" for number in range(2 * FEW_HOLDERS)]
        holders = []
        for serial, starts in ((1, today), (2, int(tomorrow))):
            for name in names:
                replies = await ledger.sync(name, serial, [line(serial, limit=9_000, want=4)._replace(starts=starts)])
                assert replies is not None
                (reply,) = replies
                assert (reply.starts, reply.granted > 0) == (starts, True)
                assert reply.ends_seconds == pytest.approx(span(window().measure, starts)[1] - time.time(), abs=5.0)
                holders.append(reply.holders)
        assert holders[0] == 1
        # The first one that asks for tomorrow's units learns how many others will.
        assert min(holders[len(names) :]) >= len(names)

    async def test_windows_of_budgets_start_at_0_and_never_end(self, ledger: InspectedBackend) -> None:
        budgets = [Window(Pool("token", "agt_1", False), measure) for measure in BUDGETS]
        replies = await ledger.sync("a", 1, [line(n + 1, of, want=1) for n, of in enumerate(budgets)])
        assert replies is not None
        assert [(reply.starts, reply.granted, reply.ends_seconds) for reply in replies] == [(0, 1, math.inf)] * 2
        for state in await ledger.windows(budgets):
            assert state is not None
            assert (state.held, state.ends_seconds) == (1, math.inf)

    async def test_two_holders_spend_a_budget_to_its_last_unit_and_no_further(self, ledger: InspectedBackend) -> None:
        budget, taken = Window(Pool("token", "agt_1", False), "requests_total"), 0
        granted = dict.fromkeys("ab", 0)
        for serial in range(1, 9):
            for name in "ab":
                used = line(of=budget, limit=5, granted=granted[name], used=granted[name], want=4)
                replies = await ledger.sync(name, serial, [used])
                assert replies is not None
                taken += replies[0].granted - granted[name]
                granted[name] = replies[0].granted
        assert taken == 5
        (state,) = await ledger.windows([budget])
        assert state is not None
        assert (state.spent, state.held) == (5, 0)

    async def test_budget_of_0_grants_nothing(self, ledger: InspectedBackend) -> None:
        budgets = [Window(Pool("token", "agt_1", False), measure) for measure in BUDGETS]
        lines = [line(n + 1, of, limit=0, want=1) for n, of in enumerate(budgets)]
        assert await granted_to(ledger, 1, *lines) == {1: 0, 2: 0}

    @pytest.mark.parametrize("period", PERIODS)
    async def test_windows_are_calendar_periods(self, ledger: InspectedBackend, period: str) -> None:
        measures = [f"{kind}_per_{period}" for kind in ("requests", "tokens", "spend")]
        before = time.time()
        replies = await ledger.sync("a", 1, [line(n + 1, window(of), want=1) for n, of in enumerate(measures)])
        assert replies is not None
        expected = [span(measures[0], at) for at in (before, time.time())]
        for reply in replies:
            assert reply.starts in [starts for starts, _ in expected]
            assert (
                reply.ends_seconds == pytest.approx(expected[1][1] - time.time(), abs=5) or expected[0] != expected[1]
            )

    async def test_token_rate_takes_back_unused_units_less_those_that_were_refilled(
        self, ledger: InspectedBackend
    ) -> None:
        rate = line(1, window("token_rate"), limit=1000, interval_seconds=1.0, want=1000)
        replies = await ledger.sync("a", 1, [rate])
        assert replies is not None
        granted_at = replies[0].granted_at
        assert replies[0].granted == 1000
        assert granted_at == pytest.approx(time.time(), abs=5)
        for serial, (returned, ago, available) in enumerate([(600, 400, 200), (600, 700, 0), (300, -50, 300)], 2):
            replies = await ledger.sync("a", serial, [rate._replace(returned=returned, granted_at=granted_at - ago)])
            assert replies is not None
            # Some seconds have passed.
            assert available <= replies[0].granted <= available + 5
        # Use beyond the units that were held counts in full, up to the burst.
        for serial, (returned, available) in enumerate([(300, 300), (-100, 200), (-5000, 0)], 5):
            replies = await ledger.sync("a", serial, [rate._replace(returned=returned, granted_at=granted_at, want=0)])
            assert replies is not None
            assert available - 1 <= 1000 - replies[0].held <= available + 5

    async def test_request_rate_takes_nothing_back(self, ledger: InspectedBackend) -> None:
        rate = line(1, window("rate"), limit=1000, interval_seconds=10.0, want=1000)
        assert await granted_to(ledger, 1, rate) == {1: 1000}
        assert await granted_to(ledger, 2, rate._replace(returned=500, granted_at=time.time())) == {1: 0}
