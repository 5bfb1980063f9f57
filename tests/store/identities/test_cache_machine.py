"""Random changes, outages and polls: no key is served beyond what the guarantees allow.

The model knows the tables at every instant. What the cache serves must be a recent state of the tables: within
`fresh_seconds` while changes are not noticed, and never one from before a poll that has read the revocation or
restriction of the key. The test sets the clock and makes the feed poll; PostgreSQL is real.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Cache
from keyproxy.model import Identity
from keyproxy.reasons import Reason
from keyproxy.store.postgres.database import StoreUnavailable
from tests import fakes
from tests.store.conftest import MakeRig
from tests.store.harness import Rig

_FRESH, _STALE, _UNKNOWN = 10.0, 100.0, 5.0
_CURRENT, _GAP = 1.5, 600.0
_STEPS = 400

_TENANTS = ("t_1", "t_2")
_USERS = {"u_1": "t_1", "u_2": "t_1", "u_3": "t_2"}
_KEYS = {number: f"u_{1 + number % 3}" for number in range(9)}

#: What the cache may return for a key: unknown, or the values that decide its requests.
Fact = tuple[str, str, frozenset[str], bool, Reason | None, float] | None

_FACTS = """
SELECT k.id, k.digest, k.user_id, u.tenant_id, k.scopes, k.is_test, k.revoked_at IS NOT NULL AS is_revoked,
       coalesce(u.disabled_at, t.disabled_at) IS NOT NULL AS is_disabled,
       extract(epoch FROM k.expires_at)::float8 AS expires
FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
"""

_UPSERT = """
INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_{key}', '{user}', '\\x{digest}')
ON CONFLICT (id) DO UPDATE SET scopes = '{{upserted}}'
"""

#: Statements with the number of a key as {key}, a user, another one and a tenant. Each may turn out to change nothing.
_ENDING = (
    "UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_{key}'",
    "UPDATE keyproxy.api_keys SET revoked_at = NULL WHERE id = 'key_{key}'",
    "UPDATE keyproxy.api_keys SET scopes = ARRAY['s:{any}'] WHERE id = 'key_{key}'",
    "UPDATE keyproxy.api_keys SET scopes = ARRAY['s:{any}'], plan_id = 'p_{plan}' WHERE id = 'key_{key}'",
    "UPDATE keyproxy.api_keys SET is_test = NOT is_test WHERE id = 'key_{key}'",
    "UPDATE keyproxy.api_keys SET expires_at = to_timestamp(4000000000 + {any}) WHERE id = 'key_{key}'",
    "UPDATE keyproxy.api_keys SET user_id = '{other}' WHERE id = 'key_{key}'",
    "DELETE FROM keyproxy.api_keys WHERE id = 'key_{key}'",
    _UPSERT,
    "UPDATE keyproxy.users SET disabled_at = now() WHERE id = '{user}'",
    "UPDATE keyproxy.users SET disabled_at = NULL WHERE id = '{user}'",
    "UPDATE keyproxy.users SET tenant_id = '{tenant}', plan_id = 'p_{plan}' WHERE id = '{user}'",
    "UPDATE keyproxy.tenants SET disabled_at = now(), name = 'n{any}' WHERE id = '{tenant}'",
    "UPDATE keyproxy.tenants SET disabled_at = NULL WHERE id = '{tenant}'",
    "TRUNCATE keyproxy.api_keys CASCADE",
)
_LIMITS = (
    "UPDATE keyproxy.plans SET limits = jsonb_build_object('requests_per_day', {any}) WHERE id = 'p_{plan}'",
    "UPDATE keyproxy.tenants SET plan_id = 'p_{plan}' WHERE id = '{tenant}'",
    "UPDATE keyproxy.tenants SET name = 'n{any}' WHERE id = '{tenant}'",
    "UPDATE keyproxy.users SET plan_id = 'p_{plan}', test_plan_id = NULL WHERE id = '{user}'",
    "UPDATE keyproxy.users SET test_plan_id = 'p_{plan}' WHERE id = '{user}'",
    "UPDATE keyproxy.api_keys SET plan_id = 'p_{plan}' WHERE id = 'key_{key}'",
    "UPDATE keyproxy.api_keys SET name = 'n{any}', last_used_at = now() WHERE id = 'key_{key}'",
)


@dataclass
class Model:
    """The history of each key, and how far the feed has read it."""

    secrets: dict[int, SecretKey]
    #: For each key: (start time, state), the newest last.
    history: dict[int, list[tuple[float, Fact]]] = field(default_factory=dict)
    #: For each key: the oldest of these that may still be served, since a poll has read it.
    seen: dict[int, int] = field(default_factory=dict)
    #: For each key: the newest of these at the time when changes may have been lost.
    missed: dict[int, int] = field(default_factory=dict)

    def note(self, facts: dict[int, Fact], now: float) -> None:
        """Record the current state of the tables."""
        for number in self.secrets:
            past = self.history.setdefault(number, [])
            if not past or past[-1][1] != facts.get(number):
                past.append((now, facts.get(number)))

    def looked(self, *, has_gap: bool) -> None:
        """The feed has polled; after a gap it may have missed changes, and looks up every key again."""
        newest = {number: len(past) - 1 for number, past in self.history.items()}
        if has_gap:
            self.missed = newest
        else:
            self.seen |= {number: place for number, place in newest.items() if place > self.missed.get(number, -1)}

    def may_be(self, number: int, since: float) -> list[Fact]:
        """The states of the key since `since`, without those older than the last poll."""
        past = self.history[number]
        return [
            fact
            for place, (_, fact) in enumerate(past)
            if place >= self.seen.get(number, 0) and (place + 1 == len(past) or past[place + 1][0] >= since)
        ]


async def _facts(rig: Rig, secrets: dict[int, SecretKey]) -> dict[int, Fact]:
    numbers = {secret.digest(): number for number, secret in secrets.items()}
    return {
        numbers[row["digest"]]: (
            row["user_id"],
            row["tenant_id"],
            frozenset(row["scopes"]),
            row["is_test"],
            Reason.KEY_REVOKED if row["is_revoked"] else Reason.ACCOUNT_DISABLED if row["is_disabled"] else None,
            row["expires"] or float("inf"),
        )
        for row in await rig.sql.fetch(_FACTS)
        if row["digest"] in numbers
    }


def _fact_of(identity: Identity) -> Fact:
    return (
        identity.user_id,
        identity.tenant_id,
        identity.scopes,
        identity.is_test,
        identity.standing,
        identity.expires_wall_seconds,
    )


class Machine:
    """One random run."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.dice = random.Random(seed)
        self.model = Model({number: fakes.key(number) for number in _KEYS})
        self.is_cut = False
        self.looked_at = float("-inf")
        #: When the row of each key was last read, as far as the test knows.
        self.read_at: dict[int, float] = {}

    @property
    def now(self) -> float:
        return self.rig.clock.mono_seconds

    async def begin(self) -> None:
        sql = self.rig.sql
        await sql.execute("INSERT INTO keyproxy.plans (id) SELECT 'p_' || n FROM generate_series(0, 2) AS n")
        for tenant in _TENANTS:
            await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ($1)", tenant)
        for user, tenant in _USERS.items():
            await sql.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, $2)", user, tenant)
        for number, user in _KEYS.items():
            await sql.execute(
                "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ($1, $2, $3)",
                f"key_{number}",
                user,
                self.model.secrets[number].digest(),
            )
        self.model.note(await _facts(self.rig, self.model.secrets), self.now)
        await self.poll()

    async def change(self) -> None:
        key = self.dice.choice(list(_KEYS))
        kind = self.dice.choice((_ENDING, _LIMITS))
        # The table is emptied only rarely, so that the other statements get their turn.
        statement = self.dice.choice(
            kind if self.dice.random() < 0.05 else kind[: len(_LIMITS) if kind is _LIMITS else -1]
        )
        await self.rig.sql.execute(
            statement.format(
                key=key,
                digest=self.model.secrets[key].digest().hex(),
                any=self.dice.randrange(1, 9),
                plan=self.dice.randrange(3),
                user=self.dice.choice(list(_USERS)),
                other=self.dice.choice(list(_USERS)),
                tenant=self.dice.choice(_TENANTS),
            )
        )
        self.model.note(await _facts(self.rig, self.model.secrets), self.now)

    async def poll(self) -> None:
        try:
            await self.rig.feed.poll()
        except StoreUnavailable:
            assert self.is_cut
            return
        assert not self.is_cut
        self.model.looked(has_gap=self.now - self.looked_at > _GAP)
        self.looked_at = self.now

    async def lose_changes(self) -> None:
        """Delete changes, as other proxies do, after this one has not polled for a long time."""
        self.rig.clock.advance(601.0)
        await self.rig.sql.execute("DELETE FROM keyproxy.changes")

    async def cut_or_mend(self) -> None:
        if self.is_cut:
            await self.rig.relay.mend()
        else:
            await self.rig.relay.cut()
        self.is_cut = not self.is_cut

    async def use(self, number: int) -> None:
        outcome = await self.rig.resolve(self.model.secrets[number])
        if isinstance(outcome, Identity):
            # An entry is at most `_STALE` old; `judge` checks how old it may be now.
            self.judge(number, _fact_of(outcome))
        elif outcome is Reason.KEY_INVALID:
            self.judge(number, None)
        else:
            assert outcome is Reason.STORE_UNAVAILABLE, outcome
            assert self.is_cut or self.rig.door.is_down

    def judge(self, number: int, fact: Fact) -> None:
        reach = _STALE if self.is_cut or self.rig.door.is_down else self.age()
        allowed = self.model.may_be(number, self.now - reach)
        assert fact in allowed, f"key_{number} is served as {fact}, which is not a recent state: {allowed}"

    def age(self) -> float:
        """The maximum age of an entry while the store is up: since the last poll, or fresh."""
        since_look = self.now - self.looked_at
        return max(since_look, 0.0) if since_look < _CURRENT else _FRESH

    async def step(self) -> None:
        match self.dice.randrange(20):
            case 0 | 1 | 2 | 3 | 4 | 5:
                await self.change()
            case 6 | 7 | 8 | 9:
                await self.poll()
            case 10:
                await self.cut_or_mend()
            case 11 | 12:
                self.rig.clock.advance(self.dice.choice((0.3, 0.6, 1.6, 4.0, 9.9, 10.1, 50.0, 99.0)))
            case 13 if self.dice.random() < 0.2:
                await self.lose_changes()
            case _:
                await self.use(self.dice.choice(list(_KEYS)))


_SEEDS = int(os.environ.get("KEYPROXY_TEST_SEEDS", "4"))


@pytest.mark.parametrize("seed", range(_SEEDS))
async def test_no_sequence_of_changes_and_outages_serves_a_key_beyond_the_guarantees(
    make_rig: MakeRig, seed: int
) -> None:
    cache = Cache(
        fresh_seconds=_FRESH, stale_seconds=_STALE, unknown_seconds=_UNKNOWN, entries_max=6, unknown_entries_max=2
    )
    machine = Machine(await make_rig(cache=cache), seed)
    await machine.begin()
    for _ in range(_STEPS):
        await machine.step()
