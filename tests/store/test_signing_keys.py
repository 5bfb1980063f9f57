"""The public halves of signing keys: known everywhere within a second, read at most once per second for strangers."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from keyproxy.model import Missing
from keyproxy.platform import clock
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.signing_key import SigningKey
from keyproxy.signing.token_check import ACCEPTS_NONE, AcceptedTokens
from keyproxy.store.postgres.database import StoreUnavailable
from keyproxy.store.signing_keys import SigningKeyCache
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, Sql
from tests.waiting import until


def token(key: SigningKey, *, ttl: int = 60, audience: str = "keyproxy") -> bytes:
    now = int(time.time())
    return key.sign("at+jwt", {"iss": "keyproxy", "aud": audience, "iat": now, "exp": now + ttl})


def kids(cache: SigningKeyCache) -> list[str]:
    return [key["kid"] for key in json.loads(cache.jwks())["keys"]]


async def verified(cache: SigningKeyCache, content: bytes) -> Reason | None:
    """The outcome of a token, with the fetches that the gateway would do."""
    try:
        try:
            cache.verify(content, clock.now())
        except Missing as missing:
            await missing.fetch_missing()
            cache.verify(content, clock.now())
    except Refusal as refusal:
        return refusal.reason
    return None


@pytest.fixture
async def live_rig(make_rig: MakeRig) -> Rig:
    """A rig whose feed and keys are read."""
    rig = await make_rig(now=clock.now, listener="real")
    rig.signing_keys.rules = AcceptedTokens("keyproxy", "keyproxy")
    rig.signing_keys.start()
    rig.feed.start()
    await until(lambda: rig.signing_keys.is_read and rig.feed.is_current() and rig.feed.is_listening)
    return rig


async def publish_elsewhere(rig: Rig, key: SigningKey) -> None:
    """Publish as another process does."""
    await SigningKeyCache(rig.door, ACCEPTS_NONE, clock.now).publish(key)


async def test_a_published_key_is_stored_with_its_times_and_without_its_private_half(live_rig: Rig, sql: Sql) -> None:
    key = SigningKey.make(time.time())
    await live_rig.signing_keys.publish(key)
    await live_rig.signing_keys.publish(key)
    (row,) = await sql.fetch("SELECT *, jwk::text AS content FROM keyproxy.signing_keys")
    assert json.loads(row["content"]) == key.public_jwk()
    assert row["created_at"].timestamp() == pytest.approx(key.created_wall_seconds, abs=1e-3)
    assert row["ends_at"].timestamp() == pytest.approx(key.ends_wall_seconds, abs=1e-3)
    assert kids(live_rig.signing_keys) == [key.kid]
    assert await verified(live_rig.signing_keys, token(key)) is None


async def test_a_key_of_another_process_verifies_within_a_second_and_until_it_is_cut(live_rig: Rig, sql: Sql) -> None:
    key, cache = SigningKey.make(time.time()), live_rig.signing_keys
    began = time.monotonic()
    await publish_elsewhere(live_rig, key)
    await until(lambda: kids(cache) == [key.kid])
    assert time.monotonic() - began < 2.0
    assert await verified(cache, token(key)) is None
    for statement in (
        "UPDATE keyproxy.signing_keys SET ends_at = now()",
        "UPDATE keyproxy.signing_keys SET ends_at = now() + interval '1 hour'",
        "DELETE FROM keyproxy.signing_keys",
    ):
        await sql.execute(statement)
        is_live = "hour" in statement
        await until(lambda is_live=is_live: bool(kids(cache)) == is_live)  # type: ignore[misc]
        assert await verified(cache, token(key)) is (None if is_live else Reason.KEY_INVALID)


@pytest.mark.parametrize("seconds", [600.0, -5.0])
async def test_a_cut_only_shortens(live_rig: Rig, sql: Sql, seconds: float) -> None:
    key, cache = SigningKey.make(time.time()), live_rig.signing_keys
    await cache.publish(key)
    cut = time.time() + seconds
    await cache.cut(key.kid, cut)
    await cache.cut(key.kid, cut + 100)
    ends = (await sql.fetchval("SELECT ends_at FROM keyproxy.signing_keys")).timestamp()
    assert ends == pytest.approx(max(cut, key.created_wall_seconds), abs=1e-3)
    assert kids(cache) == ([key.kid] if seconds > 0 else [])


async def test_many_tokens_of_unknown_keys_cause_one_reading_per_second(live_rig: Rig) -> None:
    cache = live_rig.signing_keys
    before, began = live_rig.door.queries["signing_keys"], time.monotonic()
    keys = [SigningKey.make(time.time()) for _ in range(3)]
    while time.monotonic() - began < 2.2:
        outcomes = await asyncio.gather(*(verified(cache, token(key)) for key in keys * 50))
        assert set(outcomes) == {Reason.KEY_INVALID}
    assert live_rig.door.queries["signing_keys"] - before <= 4
    assert cache.rejected >= 150


async def test_a_token_of_a_key_that_was_published_just_now_waits_for_it_and_is_accepted(
    make_rig: MakeRig,
) -> None:
    rig = await make_rig(now=clock.now)  # no feed: nothing announces the key
    cache = rig.signing_keys
    cache.rules = AcceptedTokens("keyproxy", "keyproxy")
    cache.start()
    await until(lambda: cache.is_read)
    assert await verified(cache, token(SigningKey.make(time.time()))) is Reason.KEY_INVALID
    key = SigningKey.make(time.time())
    await publish_elsewhere(rig, key)
    began = time.monotonic()
    assert await verified(cache, token(key)) is None
    assert time.monotonic() - began < 2.0


async def test_a_forged_token_causes_no_query(live_rig: Rig) -> None:
    key, cache = SigningKey.make(time.time()), live_rig.signing_keys
    await cache.publish(key)
    await until(lambda: not cache.lasting.defects and kids(cache) == [key.kid])
    await asyncio.sleep(0.5)  # the reading that the publishing has caused
    genuine = token(key)
    forged = [
        genuine[:-4] + b"AAAA",
        token(key, audience="other"),
        key.sign("keyproxy-assertion+jwt", {"iss": "keyproxy", "aud": "upstream", "iat": 0, "exp": 4_000_000_000}),
        b"eyJhbGciOiJub25lIn0.e30.",
        genuine.replace(b".", b"..", 1),
    ]
    before = live_rig.door.queries["signing_keys"]
    for content in forged:
        with pytest.raises(Refusal) as refused:
            cache.verify(content, clock.now())
        assert refused.value.reason is Reason.KEY_INVALID
    with pytest.raises(Refusal) as refused:
        cache.verify(token(key, ttl=-1), clock.now())
    assert refused.value.reason is Reason.KEY_EXPIRED
    assert live_rig.door.queries["signing_keys"] == before
    assert cache.rejected == len(forged) + 1


async def test_an_outage_keeps_known_keys_and_never_calls_an_unknown_one_invalid(live_rig: Rig) -> None:
    key, cache = SigningKey.make(time.time()), live_rig.signing_keys
    await cache.publish(key)
    await live_rig.relay.cut()
    assert await verified(cache, token(key)) is None
    assert await verified(cache, token(SigningKey.make(time.time()))) is Reason.STORE_UNAVAILABLE
    assert json.loads(await cache.current_jwks())["keys"] == [key.public_jwk()]
    with pytest.raises(StoreUnavailable):
        await cache.publish(SigningKey.make(time.time()))
    other = SigningKey.make(time.time())
    await live_rig.relay.mend()
    await publish_elsewhere(live_rig, other)
    await until(lambda: set(kids(cache)) == {key.kid, other.kid})


async def test_the_key_set_is_current_without_a_feed_and_read_at_most_twice_per_second(make_rig: MakeRig) -> None:
    rig = await make_rig(now=clock.now)
    cache = rig.signing_keys
    await rig.relay.cut()
    with pytest.raises(Refusal):
        await cache.current_jwks()
    await rig.relay.mend()
    assert json.loads(await cache.current_jwks()) == {"keys": []}
    key = SigningKey.make(time.time())
    await publish_elsewhere(rig, key)
    before, began = rig.door.queries["signing_keys"], time.monotonic()
    while not json.loads(await cache.current_jwks())["keys"]:
        assert time.monotonic() - began < 1.0
    while time.monotonic() - began < 1.2:
        await asyncio.gather(*(cache.current_jwks() for _ in range(20)))
    assert rig.door.queries["signing_keys"] - before <= 4


async def test_requests_for_the_key_set_do_not_queue_while_the_store_hangs(make_rig: MakeRig) -> None:
    rig = await make_rig(now=clock.now)
    cache, key = rig.signing_keys, SigningKey.make(time.time())
    await publish_elsewhere(rig, key)
    await cache.read()
    await asyncio.sleep(0.6)  # what was read is too old to be served without another reading

    async def give_up() -> None:
        await asyncio.sleep(1.0)
        raise StoreUnavailable("timeout")

    rig.door.before["signing_keys"] = give_up
    before, began = rig.door.queries["signing_keys"], time.monotonic()
    for _ in range(2):
        sets = await asyncio.gather(*(cache.current_jwks() for _ in range(10)))
        assert [json.loads(content)["keys"] for content in sets] == [[key.public_jwk()]] * 10
    assert rig.door.queries["signing_keys"] - before == 1
    assert time.monotonic() - began < 3.0
    await asyncio.sleep(0.6)
    waiting = asyncio.create_task(cache.current_jwks())
    await asyncio.sleep(0.05)
    began = time.monotonic()
    assert json.loads(await cache.current_jwks())["keys"] == [key.public_jwk()]
    assert time.monotonic() - began < 0.5
    await waiting
    assert rig.door.queries["signing_keys"] - before == 2


async def test_a_reading_builds_only_keys_that_are_new(
    live_rig: Rig, caplog: pytest.LogCaptureFixture, sql: Sql
) -> None:
    key, cache = SigningKey.make(time.time()), live_rig.signing_keys
    await publish_elsewhere(live_rig, key)
    await sql.execute(
        "INSERT INTO keyproxy.signing_keys VALUES (repeat('0', 43), '{}', now(), now() + interval '1 day')"
    )
    await cache.read()
    (first,) = cache.live()
    caplog.clear()
    await sql.execute("UPDATE keyproxy.signing_keys SET ends_at = to_timestamp($1)", time.time() + 5)
    await cache.read()
    (again,) = cache.live()
    assert again is first
    assert again.ends_wall_seconds < time.time() + 6
    assert not caplog.records
    other = SigningKey.make(time.time())
    await sql.execute("UPDATE keyproxy.signing_keys SET jwk = $1::text::jsonb", json.dumps(other.public_jwk()))
    await cache.read()
    assert await verified(cache, token(key)) is Reason.KEY_INVALID


async def test_a_row_that_is_no_key_is_left_out_and_does_not_hide_the_others(live_rig: Rig, sql: Sql) -> None:
    key = SigningKey.make(time.time())
    await live_rig.signing_keys.publish(key)
    for number, jwk in enumerate(("{}", '{"kty": "EC", "crv": "P-256", "x": 1, "y": []}', '{"kty": "RSA", "n": "a"}')):
        await sql.execute(
            "INSERT INTO keyproxy.signing_keys VALUES ($1, $2::text::jsonb, now(), now() + interval '1 day')",
            str(number) * 43, jwk,
        )  # fmt: skip
    await live_rig.signing_keys.read()
    assert kids(live_rig.signing_keys) == [key.kid]


async def test_a_closed_cache_leaves_no_request_waiting(live_rig: Rig) -> None:
    hold = live_rig.door.hold("signing_keys")
    waiting = [
        asyncio.create_task(verified(live_rig.signing_keys, token(SigningKey.make(time.time())))) for _ in range(3)
    ]
    await asyncio.sleep(0.05)
    await live_rig.signing_keys.close()
    hold.release()
    assert set(await asyncio.wait_for(asyncio.gather(*waiting), 5)) == {Reason.STORE_UNAVAILABLE}


async def test_more_than_a_thousand_waiting_tokens_are_refused_as_overload(live_rig: Rig) -> None:
    hold = live_rig.door.hold("signing_keys")
    content = token(SigningKey.make(time.time()))
    waiting = [asyncio.create_task(verified(live_rig.signing_keys, content)) for _ in range(2_100)]
    await asyncio.sleep(0.1)
    refused = [task for task in waiting if task.done()]
    assert refused
    assert {task.result() for task in refused} == {Reason.OVERLOADED}
    hold.release()
    for task in waiting:
        assert await asyncio.wait_for(task, 5) in (Reason.OVERLOADED, Reason.KEY_INVALID)
