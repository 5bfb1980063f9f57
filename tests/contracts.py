"""One suite per port, run on the fake and on the real thing: what holds for both is what may be built on."""

from __future__ import annotations

import asyncio
from typing import Protocol

import pytest

from keyproxy import headers
from keyproxy.keyformat import SecretKey
from keyproxy.model import Identity, Missing, Moment
from keyproxy.ports import Identities
from keyproxy.reasons import Reason, Refusal
from tests import fakes

KNOWN, OTHER, STRANGER = (fakes.key(number) for number in (1, 2, 3))


class IdentitiesStage(Protocol):
    """An implementation of the port, over a store that can be filled and taken away."""

    @property
    def identities(self) -> Identities:
        """What is judged."""
        ...

    def now(self) -> Moment:
        """This moment."""
        ...

    async def add(self, secret: SecretKey, user: str, *, is_test: bool = False, standing: Reason | None = None) -> None:
        """The store has this key of a user of `acme`, of which memory has not heard."""
        ...

    async def goes_down(self) -> None:
        """The store cannot be asked."""
        ...

    async def comes_back(self) -> None:
        """The store can be asked again."""
        ...


class IdentitiesContract:
    """The port Identities."""

    async def test_what_memory_lacks_is_missing_until_it_has_been_brought(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        with pytest.raises(Missing) as error:
            self._look(stage, KNOWN)
        assert str(error.value) == "identity"
        await error.value.bring()
        assert self._look(stage, KNOWN, is_first_look=False).user_id == "u_42"

    async def test_whether_it_is_a_first_look_changes_no_answer(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        with pytest.raises(Missing):
            self._look(stage, KNOWN, is_first_look=False)
        await self._told(stage, KNOWN)
        # One value, not two that are equal: what depends on the key is looked up by it.
        assert self._look(stage, KNOWN) is self._look(stage, KNOWN, is_first_look=False)

    @pytest.mark.parametrize("is_test", [False, True])
    @pytest.mark.parametrize("standing", [None, Reason.KEY_REVOKED, Reason.ACCOUNT_DISABLED])
    async def test_a_real_key_has_an_identity_with_its_headers_whatever_its_standing(
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
        assert who.header_block == headers.identity_block("X-Keyproxy-", values)

    async def test_each_key_has_its_own_identity(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_1")
        await stage.add(OTHER, "u_2")
        told = [await self._told(stage, secret) for secret in (KNOWN, OTHER, KNOWN)]
        assert [who.user_id for who in told if isinstance(who, Identity)] == ["u_1", "u_2", "u_1"]

    async def test_a_stranger_is_told_that_the_key_is_invalid(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        assert await self._told(stage, STRANGER) is Reason.KEY_INVALID
        with pytest.raises(Refusal) as error:
            self._look(stage, STRANGER)
        assert error.value.reason is Reason.KEY_INVALID

    async def test_an_outage_refuses_strangers_as_unknowable_and_serves_whom_memory_knows(
        self, stage: IdentitiesStage
    ) -> None:
        await stage.add(KNOWN, "u_42")
        await stage.add(OTHER, "u_43")
        who = await self._told(stage, KNOWN)
        await stage.goes_down()
        assert await self._told(stage, OTHER) is Reason.STORE_UNAVAILABLE
        assert await self._told(stage, STRANGER) is Reason.STORE_UNAVAILABLE
        assert await self._told(stage, KNOWN) is who

    async def test_after_an_outage_everybody_is_told_the_truth(self, stage: IdentitiesStage) -> None:
        await stage.add(OTHER, "u_43")
        await stage.goes_down()
        for secret in (OTHER, STRANGER):
            assert await self._told(stage, secret) is Reason.STORE_UNAVAILABLE
        await stage.comes_back()
        who = await self._told(stage, OTHER)
        assert isinstance(who, Identity)
        assert who.user_id == "u_43"
        assert await self._told(stage, STRANGER) is Reason.KEY_INVALID

    async def test_who_leaves_while_waiting_takes_nothing_from_who_stays(self, stage: IdentitiesStage) -> None:
        await stage.add(KNOWN, "u_42")
        leaving, staying = (asyncio.create_task(self._told(stage, KNOWN)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        who = await staying
        assert isinstance(who, Identity)
        assert self._look(stage, KNOWN) is who

    def _look(self, stage: IdentitiesStage, secret: SecretKey, *, is_first_look: bool = True) -> Identity:
        return stage.identities.known(secret.digest(), stage.now(), is_first_look=is_first_look)

    async def _told(self, stage: IdentitiesStage, secret: SecretKey) -> Identity | Reason:
        """What a request with this key is told, after waiting once for what is missing."""
        try:
            try:
                return self._look(stage, secret)
            except Missing as missing:
                await missing.bring()
                return self._look(stage, secret, is_first_look=False)
        except Refusal as refusal:
            return refusal.reason
