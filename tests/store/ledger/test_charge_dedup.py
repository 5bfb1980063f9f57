"""Claims over a real PostgreSQL: of all attempts at a request one is charged, however often they are reported."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import asyncpg
import pytest

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Bundle, Hold, Need
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing, Moment, TimeBudget
from keyproxy.platform import clock
from keyproxy.ports.ledger import Ledger
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.ledger.charge_dedup import Answer, Claim, Claims, ClaimStore, Cover
from keyproxy.store.ledger.charge_dedup_postgres import PostgresClaims
from keyproxy.store.ledger.ledger import Ledger as StoreLedger
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.database import Database, Row, StoreConflict, StoreUnavailable
from tests.reference_claims import ReferenceClaims
from tests.store.harness import Clock, Relay, Sql, StatementRunner, until_row
from tests.waiting import until

REPEAT = Answer(False, 0)
_NOTHING = Hold(Bundle(()))
_AGE = "UPDATE keyproxy.idempotent_charges SET charged_at = charged_at - $1::interval"
_CLAIM = "SELECT is_first, charged FROM keyproxy.claim_charges($1, $2, $3, $4, $5)"


def claim(fingerprint: int, used: int = 0, paid: int | None = None) -> Claim:
    """A finished request, identified by a number."""
    return Claim(fingerprint.to_bytes(32, "big"), used, paid, _NOTHING, 0.0)


@pytest.fixture
def store(database: Database) -> PostgresClaims:
    """A record of charges that cover as many repeats as these tests make."""
    return PostgresClaims(database, repeats_max=1_000)


# -- responses of the store


async def test_first_claim_is_charged_and_a_later_one_only_for_tokens_beyond_all_earlier_ones(
    store: PostgresClaims,
) -> None:
    told = [(12, Answer(True, 12)), (12, REPEAT), (20, Answer(False, 8)), (15, REPEAT), (21, Answer(False, 1))]
    for number, (used, answer) in enumerate(told):
        assert await store.claim(f"p{number % 2}", number + 1, [claim(1, used)]) == [answer]
    assert await store.cover([claim(1).fingerprint, claim(2).fingerprint]) == {claim(1).fingerprint: Cover(21, 1)}


async def test_attempts_at_one_request_in_one_batch_are_charged_in_their_order(store: PostgresClaims) -> None:
    batch = [claim(1, 5), claim(2, 7), claim(1, 9), claim(1, 8), claim(1, 10)]
    answers = [Answer(True, 5), Answer(True, 7), Answer(False, 4), REPEAT, Answer(False, 1)]
    assert await store.claim("p", 1, batch) == answers
    assert await store.claim("p", 2, batch) == [REPEAT] * 5


async def test_repeated_batch_gets_the_same_response_whatever_happened_in_between(store: PostgresClaims) -> None:
    await store.claim("a", 1, [claim(1, 10)])
    told = await store.claim("b", 1, [claim(1, 12), claim(2, 3)])
    assert told == [Answer(False, 2), Answer(True, 3)]
    await store.claim("a", 2, [claim(1, 50), claim(2, 50)])
    assert await store.claim("b", 1, [claim(1, 12), claim(2, 3)]) == told
    assert await store.claim("a", 3, [claim(1, 50)]) == [REPEAT]


async def test_batch_is_rejected_after_a_later_one(store: PostgresClaims) -> None:
    await store.claim("a", 2, [claim(1)])
    assert await store.claim("a", 1, [claim(2)]) is None
    assert await store.cover([claim(2).fingerprint]) == {}


async def test_fingerprint_is_charged_again_after_24_hours(store: PostgresClaims, sql: Sql) -> None:
    await store.claim("a", 1, [claim(1, 10)])
    await sql.execute(_AGE, timedelta(hours=23.9))
    assert await store.claim("a", 2, [claim(1, 11)]) == [Answer(False, 1)]
    await sql.execute(_AGE, timedelta(hours=0.2))
    assert await store.cover([claim(1).fingerprint]) == {}
    assert await store.claim("a", 3, [claim(1, 4)]) == [Answer(True, 4)]
    assert await store.cover([claim(1).fingerprint]) == {claim(1).fingerprint: Cover(4, 1)}


async def test_repeat_that_was_admitted_as_paid_does_not_extend_the_24_hours(store: PostgresClaims, sql: Sql) -> None:
    await store.claim("a", 1, [claim(1, 10)])
    await sql.execute(_AGE, timedelta(hours=25))
    assert await store.claim("a", 2, [claim(1, 13, paid=10), claim(1, 9, paid=10)]) == [Answer(False, 3), REPEAT]
    assert await store.cover([claim(1).fingerprint]) == {}
    assert await store.claim("a", 3, [claim(1, 6)]) == [Answer(True, 6)]


async def test_only_expired_charges_are_deleted_and_in_portions(store: PostgresClaims, sql: Sql) -> None:
    await store.claim("a", 1, [claim(number) for number in range(5)])
    await sql.execute(_AGE, timedelta(hours=25))
    await store.claim("b", 1, [claim(7)])
    await sql.execute("UPDATE keyproxy.claim_batches SET told_at = told_at - interval '25 hours' WHERE process = 'a'")
    assert await store.forget(3) is True
    assert await store.forget(3) is False
    assert await sql.fetchval("SELECT array_agg(fingerprint) FROM keyproxy.idempotent_charges") == [
        claim(7).fingerprint
    ]
    assert await sql.fetchval("SELECT array_agg(process) FROM keyproxy.claim_batches") == ["b"]


async def test_of_two_concurrent_claims_only_one_is_the_first(dsn: str, store: PostgresClaims, sql: Sql) -> None:
    other: Sql = await asyncpg.connect(dsn)
    async with sql.transaction():
        held = await sql.fetchrow(_CLAIM, "a", 1, [claim(1).fingerprint], [5], [None])
        waiting = asyncio.create_task(other.fetchrow(_CLAIM, "b", 1, [claim(1).fingerprint], [7], [None]))
        await until_row(sql, "SELECT FROM pg_locks WHERE NOT granted")
        assert not waiting.done()
    assert [tuple(row) for row in (held, await waiting) if row] == [([True], [5]), ([False], [2])]
    await other.close()


async def test_concurrent_batches_in_any_order_charge_each_fingerprint_once_without_deadlock(dsn: str) -> None:
    chance = random.Random(7)
    database = Database(dsn, pool_size_max=8, statement_timeout_seconds=10.0)
    await database.open()
    store = PostgresClaims(database, repeats_max=1_000)
    batches = [
        [claim(number % 40, chance.randint(0, 99)) for number in chance.sample(range(80), 60)] for _ in range(16)
    ]
    answers = await asyncio.gather(*(store.claim(f"p{place}", 1, batch) for place, batch in enumerate(batches)))
    await database.close()
    firsts, charged, most = dict[bytes, int](), dict[bytes, int](), dict[bytes, int]()
    for batch, told in zip(batches, answers, strict=True):
        assert told is not None
        for one, answer in zip(batch, told, strict=True):
            about = one.fingerprint
            firsts[about] = firsts.get(about, 0) + answer.is_first
            charged[about] = charged.get(about, 0) + answer.charged
            most[about] = max(most.get(about, 0), one.used)
    assert set(firsts.values()) == {1}
    assert charged == most


@pytest.mark.parametrize("repeats_max", [0, 1, 3, 1_000_000])
async def test_responses_match_the_reference(database: Database, sql: Sql, repeats_max: int) -> None:
    chance = random.Random(11)
    wall = [0.0]
    store = PostgresClaims(database, repeats_max=repeats_max)
    reference = ReferenceClaims(lambda: 1e9 + wall[0], repeats_max=repeats_max)
    numbers = {"a": 0, "b": 0}
    for _ in range(120):
        process = chance.choice(list(numbers))
        numbers[process] = max(1, numbers[process] + chance.choice([1, 1, 1, 0, -1]))
        batch = [
            claim(chance.randrange(8), chance.randrange(30), chance.choice([None, None, None, chance.randrange(30)]))
            for _ in range(chance.randint(1, 6))
        ]
        told = await store.claim(process, numbers[process], batch)
        assert told == await reference.claim(process, numbers[process], batch)
        every = [claim(number // 2).fingerprint for number in range(chance.randrange(16))]
        assert await store.cover(every) == await reference.cover(every)
        hours = chance.choice([0.0, 0.0, 5.0, 25.0])
        wall[0] += hours * 3600
        await sql.execute(_AGE, timedelta(hours=hours))


# -- repeats beyond those that a charge covers


async def test_fourth_repeat_is_charged_and_covers_nothing(database: Database, sql: Sql) -> None:
    store, about = PostgresClaims(database), claim(1).fingerprint
    answers = [await store.claim(f"p{number % 2}", number, [claim(1, 10 + number)]) for number in range(1, 7)]
    assert answers == [[Answer(True, 11)], *[[Answer(False, 1)]] * 3, [Answer(True, 15)], [Answer(True, 16)]]
    assert await store.cover([about]) == {}
    assert await sql.fetchval("SELECT tokens FROM keyproxy.idempotent_charges") == 14
    await sql.execute(_AGE, timedelta(hours=24))
    assert await store.claim("p1", 8, [claim(1, 5), claim(1, 6)]) == [Answer(True, 5), Answer(False, 1)]
    assert await store.cover([about]) == {about: Cover(6, 1)}


async def test_repeats_in_one_batch_are_covered_in_their_order(database: Database) -> None:
    store = PostgresClaims(database, repeats_max=2)
    batch = [claim(1, used) for used in (5, 9, 8, 10, 7)]
    assert await store.claim("p", 1, batch) == [
        Answer(True, 5), Answer(False, 4), REPEAT, Answer(True, 10), Answer(True, 7)
    ]  # fmt: skip
    assert await store.claim("q", 1, [claim(1, 9)]) == [Answer(True, 9)]


async def test_lookups_and_claims_share_the_covered_repeats(database: Database) -> None:
    store, about = PostgresClaims(database), claim(1).fingerprint
    await store.claim("p", 1, [claim(1, 10), claim(1, 10)])
    assert await store.cover([about]) == {about: Cover(10, 1)}
    # A repeat that was admitted as covered is not counted again when it ends.
    assert await store.claim("p", 2, [claim(1, 12, paid=10)]) == [Answer(False, 2)]
    assert await store.cover([about, about, about]) == {about: Cover(12, 1)}
    assert await store.cover([about]) == {}
    assert await store.claim("p", 3, [claim(1, 3)]) == [Answer(True, 3)]


async def test_concurrent_lookups_of_two_replicas_cover_three_repeats_in_all(dsn: str) -> None:
    database = Database(dsn, pool_size_max=8, statement_timeout_seconds=10.0)
    await database.open()
    replicas = [claims_over(PostgresClaims(database), LeaseTable(), clock.now) for _ in range(2)]
    await PostgresClaims(database).claim("p", 1, [claim(1, 10)])
    for replica in replicas:
        replica.start()
    results = await asyncio.gather(
        *(replicas[number % 2].paid(claim(1).fingerprint, TimeBudget()) for number in range(20))
    )
    assert sorted(results, key=str) == [10] * 3 + [None] * 17
    for replica in replicas:
        await replica.close()
    await database.close()


async def test_concurrent_claims_of_many_replicas_charge_all_but_three_repeats(dsn: str) -> None:
    database = Database(dsn, pool_size_max=8, statement_timeout_seconds=10.0)
    await database.open()
    store = PostgresClaims(database)
    answers = await asyncio.gather(*(store.claim(f"p{number}", 1, [claim(1, 7)]) for number in range(20)))
    await database.close()
    told = [answer for batch in answers if batch is not None for answer in batch]
    assert told.count(REPEAT) == 3
    assert told.count(Answer(True, 7)) == 17


# -- a proxy that claims


class LeaseTable:
    """A ledger that records how claims are settled."""

    def __init__(self) -> None:
        self.settled: list[tuple[Hold, int, bool]] = []

    def release(self, hold: Hold) -> Hold:
        return hold

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, spend: int = 0, is_repeat: bool = False) -> None:
        assert was_sent
        assert not spend
        self.settled.append((hold, tokens, is_repeat))


def claims_over(store: ClaimStore, book: LeaseTable, now: Callable[[], Moment], **config: Any) -> Claims:
    return Claims(store, cast("Ledger", book), schema.LedgerSettings(**({"settle_seconds": 0.01} | config)), now)


class Proxy:
    """A ledger and its claims, over one database."""

    def __init__(self, door: Database) -> None:
        config = schema.LedgerSettings(settle_seconds=0.02)
        self.ledger = StoreLedger(PostgresLedger(door, lease_seconds=config.lease_seconds), config, clock.now)
        self.claims = Claims(PostgresClaims(door), self.ledger, config, clock.now)
        self.allowance = Allowance(((Pool("user", "u_42", False), Plan(requests_per_day=9, tokens_per_day=900)),))

    async def take(self, most: int = 50) -> Hold:
        """Take as a request does."""
        for _ in range(9):
            try:
                return self.ledger.take(self.allowance, clock.now(), Need(most, most))
            except Missing as missing:
                await missing.fetch_missing()
        raise AssertionError("not decided")

    async def attempt(self, fingerprint: int, used: int) -> None:
        """Run one request to its end."""
        self.claims.add(await self.take(), claim(fingerprint).fingerprint, used, None)

    async def close(self) -> None:
        await self.claims.close()
        await self.ledger.close()


@pytest.fixture
async def door(dsn: str) -> AsyncIterator[StatementRunner]:
    door = StatementRunner(dsn)
    await door.open()
    yield door
    await door.close()


async def charged(sql: Sql) -> dict[str, tuple[int, int]]:
    """Spent and held, by measure."""
    rows = await sql.fetch("SELECT measure, sum(spent)::int8, sum(held)::int8 FROM keyproxy.windows GROUP BY 1")
    return {measure: (spent, held) for measure, spent, held in rows}


async def test_request_through_two_proxies_is_charged_once_as_the_larger_attempt(
    door: StatementRunner, sql: Sql
) -> None:
    one, other = Proxy(door), Proxy(door)
    for proxy in (one, other):
        proxy.ledger.start()
        proxy.claims.start()
    for proxy, used in ((one, 12), (other, 20), (one, 15)):
        await proxy.attempt(1, used)
    await one.attempt(2, 7)
    await one.close()
    await other.close()
    assert await charged(sql) == {"requests_per_day": (2, 0), "tokens_per_day": (27, 0)}


@pytest.mark.parametrize("losses", [1, 3])
async def test_lost_response_charges_nothing_twice(door: StatementRunner, sql: Sql, losses: int) -> None:
    proxy = Proxy(door)
    proxy.ledger.start()
    left = [losses]

    def lose(rows: Sequence[Row]) -> Sequence[Row]:
        left[0] -= 1
        if left[0] >= 0:
            raise StoreUnavailable("the answer got lost")
        return rows

    door.edit["claim_charges"] = lose
    proxy.claims.start()
    for used in (12, 20):
        await proxy.attempt(1, used)
    await until(lambda: not proxy.claims.pending, "claims are settled")
    assert proxy.claims.counts == {"repeats": 1, "unasked": 0}
    await proxy.close()
    assert await charged(sql) == {"requests_per_day": (1, 0), "tokens_per_day": (20, 0)}


async def test_claims_wait_while_the_store_is_unavailable(relay: Relay, sql: Sql) -> None:
    database = Database(relay.dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    proxy = Proxy(database)
    proxy.ledger.start()
    await proxy.attempt(1, 12)
    await proxy.attempt(1, 12)
    await relay.cut()
    proxy.claims.start()
    await until(lambda: bool(proxy.claims.down_because), "the outage is noticed")
    assert proxy.claims.pending == 2
    await relay.mend()
    await until(lambda: not proxy.claims.pending, "claims are settled")
    await proxy.close()
    await database.close()
    assert await charged(sql) == {"requests_per_day": (1, 0), "tokens_per_day": (12, 0)}


async def test_process_that_dies_with_claims_is_charged_everything_that_they_held(
    door: StatementRunner, sql: Sql
) -> None:
    dead, alive = Proxy(door), Proxy(door)
    dead.ledger.start()
    await dead.attempt(1, 12)
    await dead.ledger.conversation.lasting.end()
    await sql.execute("UPDATE keyproxy.lease_holders SET expires_at = clock_timestamp()")
    await alive.ledger.conversation._backend.reap()
    spent = await charged(sql)
    assert spent["requests_per_day"][0] >= 1
    assert spent["tokens_per_day"][0] >= 50
    assert {held for _, held in spent.values()} == {0}


async def test_lookup_sees_every_request_that_ended_before_it(store: PostgresClaims) -> None:
    claims = claims_over(store, LeaseTable(), clock.now, settle_seconds=60.0)
    claims.start()
    claims.add(_NOTHING, claim(1).fingerprint, 12, None)
    assert await claims.paid(claim(1).fingerprint, TimeBudget()) == 12
    assert await claims.paid(claim(2).fingerprint, TimeBudget()) is None
    await claims.close()


async def test_concurrent_lookups_share_one_query(door: StatementRunner) -> None:
    claims = claims_over(PostgresClaims(door), LeaseTable(), clock.now)
    claims.start()
    assert (
        await asyncio.gather(*(claims.paid(claim(number % 7).fingerprint, TimeBudget()) for number in range(100)))
        == [None] * 100
    )
    assert door.queries["cover_repeats"] == 1
    await claims.close()


# -- claims that the store does not decide


@pytest.fixture
def reference() -> ReferenceClaims:
    return ReferenceClaims()


async def test_claims_that_the_store_does_not_decide_in_time_are_charged_in_full(reference: ReferenceClaims) -> None:
    book, now = LeaseTable(), Clock()
    claims = claims_over(reference, book, now, lease_seconds=5.0)
    await reference.claim("another", 1, [claim(1, 12)])
    reference.answers = False
    claims.start()
    claims.add(_NOTHING, claim(1).fingerprint, 12, None)
    await until(lambda: bool(claims.down_because), "the outage is noticed")
    now.advance(4.9)
    claims.add(_NOTHING, claim(1).fingerprint, 20, 12)
    now.advance(0.2)
    await until(lambda: claims.pending == 1, "the first is given up")
    now.advance(5.0)
    await until(lambda: not claims.pending, "all are given up")
    assert [(tokens, is_repeat) for _, tokens, is_repeat in book.settled] == [(12, False), (8, True)]
    assert claims.counts == {"repeats": 0, "unasked": 2}
    reference.answers = True
    claims.add(_NOTHING, claim(1).fingerprint, 12, None)
    await until(lambda: len(book.settled) == 3, "it is asked again")
    assert book.settled[2] == (_NOTHING, 0, True)
    await claims.close()


async def test_waiting_claims_are_bounded_and_further_ones_are_charged(
    reference: ReferenceClaims,
) -> None:
    book = LeaseTable()
    claims = claims_over(reference, book, clock.now)
    for _ in range(10_000):
        claims.add(_NOTHING, claim(1).fingerprint, 3, None)
    assert (claims.pending, book.settled) == (10_000, [])
    claims.add(_NOTHING, claim(1).fingerprint, 3, None)
    assert (claims.pending, book.settled) == (10_000, [(_NOTHING, 3, False)])
    await claims.close()
    assert claims.counts == {"repeats": 9_999, "unasked": 1}
    assert [is_repeat for _, _, is_repeat in book.settled].count(False) == 2


async def test_concurrent_lookups_are_bounded(reference: ReferenceClaims) -> None:
    claims = claims_over(reference, LeaseTable(), clock.now)
    asking = [asyncio.create_task(claims.paid(claim(number).fingerprint, TimeBudget())) for number in range(1_000)]
    await asyncio.sleep(0)
    with pytest.raises(Refusal) as caught:
        await claims.paid(claim(1_000).fingerprint, TimeBudget())
    assert caught.value.reason is Reason.OVERLOADED
    await claims.close()
    assert set(await asyncio.gather(*asking)) == {None}


async def test_batch_that_the_store_rejects_is_charged_and_does_not_block_later_ones(
    reference: ReferenceClaims,
) -> None:
    class Refusing(ReferenceClaims):
        async def claim(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
            if claims[0].fingerprint == claim(1).fingerprint:
                raise StoreConflict("no", "")
            return await super().claim(process, number, claims)

    book = LeaseTable()
    claims = claims_over(Refusing(), book, clock.now)
    claims.add(_NOTHING, claim(1).fingerprint, 3, None)
    await claims.tell()
    claims.add(_NOTHING, claim(2).fingerprint, 4, None)
    await claims.tell()
    assert book.settled == [(_NOTHING, 3, False), (_NOTHING, 4, False)]
    assert claims.counts == {"repeats": 0, "unasked": 1}


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_is_lost_attempts_are_charged_at_least_as_the_largest(seed: int) -> None:
    chance, now = random.Random(seed), Clock()
    reference = ReferenceClaims(lambda: now.wall_seconds)
    books = [LeaseTable() for _ in range(3)]
    proxies = [claims_over(reference, book, now, lease_seconds=5.0) for book in books]
    most, holds = dict[int, int](), dict[int, int]()
    for number in range(200):
        proxy, about, used = chance.choice(proxies), chance.randrange(12), chance.randrange(40)
        hold = Hold(_NOTHING.bundle, None, number)
        holds[number], most[about] = about, max(used, most.get(about, 0))
        proxy.add(hold, claim(about).fingerprint, used, None)
        reference.answers, reference.loses_answers = chance.random() < 0.7, int(chance.random() < 0.3)
        now.advance(chance.choice([0.0, 0.1, 1.0]))
        if chance.random() < 0.4:
            teller = chance.choice(proxies)
            try:
                await teller.tell()
            except StoreUnavailable as error:
                teller._note_failure(error)
    reference.answers, reference.loses_answers = chance.random() < 0.8, 0
    for proxy in proxies:
        await proxy.close()
    requests, tokens = dict.fromkeys(most, 0), dict.fromkeys(most, 0)
    settled = [one for book in books for one in book.settled]
    assert sorted(hold.tokens for hold, _, _ in settled) == list(range(200))
    for hold, charged_tokens, is_repeat in settled:
        requests[holds[hold.tokens]] += not is_repeat
        tokens[holds[hold.tokens]] += charged_tokens
    assert min(requests.values()) >= 1
    assert all(tokens[about] >= used for about, used in most.items())
    if not any(proxy.counts["unasked"] for proxy in proxies):
        assert set(requests.values()) == {1}
        assert tokens == most
