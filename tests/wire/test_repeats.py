"""`Idempotency-Key` on the wire: a retried request is charged once, and no other request passes for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from keyproxy.config.token_settings import Tokens
from keyproxy.limits.plan import Plan
from keyproxy.platform import clock
from keyproxy.store.ledger.charge_dedup import Claims
from tests import fakes
from tests.rawhttp import OK, Message, Upstream
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_limits import CHAT, JSON, STREAM, answer, chunk, delta, limited, spent

KEY = "Idempotency-Key: 8e03978e-40d5-43dd-bc93-6894a57f9324"
OTHER = "Idempotency-Key: another"


def job(*lines: str, body: bytes = b'{"job": 7}', **about: Any) -> bytes:
    return request("POST", "/v1/ai/jobs", *(lines or (KEY,)), body=body, **about)


def chat(**more: Any) -> bytes:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}).encode()
    return request("POST", CHAT, "Content-Type: application/json", KEY, body=body)


async def sent(wire: Wire, *requests: bytes) -> list[int]:
    """Their statuses, one after the other on one connection."""
    statuses = []
    async with wire.client() as client:
        for one in requests:
            await client.send(one)
            statuses.append((await client.answer()).status)
    return statuses


async def settled(wire: Wire, measure: str = "requests_per_day") -> int:
    """What is spent once every claim is settled."""
    await wire.claims.tell()
    return spent(wire, measure)[0]


async def test_a_retried_request_is_forwarded_again_and_charged_once(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=9))
    assert await sent(wire, job(), job(), job()) == [200] * 3
    assert [one.all("Idempotency-Key") for one in wire.upstream.requests] == [[KEY.partition(": ")[2]]] * 3
    assert await settled(wire) == 1
    assert wire.claims.counts == {"repeats": 2, "unasked": 0}
    assert await sent(wire, job()) == [200]
    assert await settled(wire) == 1


async def test_one_key_with_different_requests_is_charged_for_each_of_them(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=20))
    different = [
        job(),
        job(body=b'{"job": 8}'),
        job(body=b""),
        request("PUT", "/v1/ai/jobs", KEY, body=b'{"job": 7}'),
        request("POST", "/v1/ai/jobs?again", KEY, body=b'{"job": 7}'),
        job(OTHER),
    ]
    assert await sent(wire, *different, *different) == [200] * 12
    assert await settled(wire) == 6


async def test_requests_with_an_invalid_key_or_two_keys_are_charged_each_time(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=20))
    insane = [job("X-None: 1"), job(KEY, KEY), job("Idempotency-Key: a b"), job("Idempotency-Key: " + "a" * 256)]
    assert await sent(wire, *insane, *insane) == [200] * 8
    assert await settled(wire) == 8
    assert not wire.charges.charges


async def test_another_user_and_the_other_mode_are_charged_for_themselves(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=9))
    who = [("u_1", False), ("u_2", False), ("u_1", True)]
    for number, (user, is_test) in enumerate(who, 2):
        identity = fakes.identity(user, is_test=is_test, plan=Plan(requests_per_day=9))
        wire.identities.add(fakes.key(number, is_test=is_test), identity)
    keys = [fakes.key(number, is_test=is_test).reveal() for number, (_, is_test) in enumerate(who, 2)]
    assert await sent(wire, *(job(key=key) for key in keys for _ in range(2))) == [200] * 6
    await wire.claims.tell()
    assert spent_by(wire) == {("u_1", False): 1, ("u_2", False): 1, ("u_1", True): 1}


def spent_by(wire: Wire) -> dict[tuple[str, bool], int]:
    wire.ledger._sync(clock.monotonic())
    rows = wire.ledger.reference.windows.items()
    return {(window.pool.owner, window.pool.is_test): row.spent for (window, _), row in rows if row.spent}


async def test_all_keys_of_a_user_are_recognised_as_one(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=9))
    wire.identities.add(fakes.key(2), fakes.identity(plan=Plan(requests_per_day=9)))
    assert await sent(wire, job(), job(key=fakes.key(2).reveal())) == [200, 200]
    assert await settled(wire) == 1


async def test_a_body_in_pieces_and_in_chunks_is_recognised(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=9))
    head, _, body = job().partition(b"\r\n\r\n")
    chunked = request("POST", "/v1/ai/jobs", KEY, "Transfer-Encoding: chunked") + chunk(body[:3]) + chunk(body[3:])
    async with wire.client() as client:
        for pieces in ([head + b"\r\n\r\n", body[:4], body[4:]], [chunked, b"0\r\n\r\n"]):
            for piece in pieces:
                await client.send(piece)
                await asyncio.sleep(0.02)
            assert (await client.answer()).status == 200
    assert [one.body for one in wire.upstream.requests] == [body, body]
    assert await settled(wire) == 1


async def test_a_request_with_an_incomplete_body_is_charged_like_any_other(start: Start) -> None:
    async def hasty(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        return False

    wire = await limited(start, Plan(requests_per_day=9), Upstream(hasty, reads_bodies=False))
    head, _, _ = job(body=b"x" * 50_000).partition(b"\r\n\r\n")
    for _ in range(2):
        async with wire.client() as client:
            await client.send(head + b"\r\n\r\n" + b"x" * 10)
            assert (await client.answer()).status == 200
    assert await settled(wire) == 2
    assert not wire.charges.charges


async def test_a_request_that_never_reached_the_upstream_is_not_a_first_attempt(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=9))
    await wire.upstream.stop()
    assert await sent(wire, job()) == [502]
    assert await settled(wire) == 0
    assert not wire.charges.charges


async def test_slots_go_back_when_a_request_ends_and_not_when_it_is_settled(start: Start) -> None:
    wire = await limited(start, Plan(concurrency=1))
    wire.charges.answers = False
    assert await sent(wire, job(), job(), job()) == [200] * 3


# -- tokens


async def test_a_repeat_is_charged_only_the_tokens_beyond_the_first_attempt(start: Start) -> None:
    used = iter((12, 12, 20, 15))

    async def grows(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        body = json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": next(used) - 5}}).encode()
        writer.write(JSON % (len(body), body))
        return True

    wire = await limited(start, Plan(tokens_per_day=10_000, requests_per_day=10), Upstream(grows))
    for expected in (12, 12, 20, 20):
        assert await sent(wire, chat(max_tokens=50)) == [200]
        assert await settled(wire, "tokens_per_day") == expected
    assert await settled(wire) == 1


async def test_a_retry_after_a_disconnect_in_mid_stream_is_charged_the_larger_attempt(start: Start) -> None:
    goes_on = asyncio.Event()

    async def streams(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(STREAM + b"".join(chunk(delta("word ")) for _ in range(10)))
        while not goes_on.is_set() and not writer.is_closing():
            writer.write(chunk(b": still there\n\n"))
            await writer.drain()
            await asyncio.sleep(0.02)
        if goes_on.is_set():
            usage = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":200}}\n\n'
            writer.write(chunk(usage) + b"0\r\n\r\n")
        return goes_on.is_set()

    wire = await limited(start, Plan(tokens_per_day=10_000, requests_per_day=10), Upstream(streams))
    async with wire.client() as client:
        await client.send(chat(stream=True, max_tokens=500))
        while b"word" not in await client.reader.read(65_536):
            pass
    while not wire.claims.pending and not wire.ledger.settled:
        await asyncio.sleep(0.01)
    assert 10 <= await settled(wire, "tokens_per_day") < 100
    goes_on.set()
    assert await sent(wire, chat(stream=True, max_tokens=500)) == [200]
    assert await settled(wire, "tokens_per_day") == 205
    assert await settled(wire) == 1


# -- a window that is spent


async def test_only_a_repeat_is_admitted_when_the_quota_is_spent(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=1))
    assert await sent(wire, job(), job(), job(OTHER), job("X-None: 1"), job(body=b"{}"), job()) == [
        200,
        200,
        429,
        429,
        429,
        200,
    ]
    assert await settled(wire) == 1
    assert wire.ledger.reference.windows


async def test_a_repeat_is_held_to_the_rate_and_to_concurrency(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=1, rate=0.01, burst=2))
    assert await sent(wire, job(), job(), job()) == [200, 200, 429]
    assert await settled(wire) == 1


async def test_a_repeat_that_comes_in_pieces_is_recognised_before_it_is_refused(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=1))
    assert await sent(wire, job()) == [200]
    head, _, body = job().partition(b"\r\n\r\n")
    async with wire.client() as client:
        for piece in (head + b"\r\nExpect: 100-continue\r\n\r\n", body[:4], body[4:]):
            await client.send(piece)
            if piece is not body[4:]:
                await asyncio.sleep(0.02)
        assert (await client.answer()).status == 100
        assert (await client.answer()).status == 200
    assert wire.upstream.requests[-1].body == body


async def test_a_body_too_large_to_be_held_is_refused_as_it_would_be_without_a_key(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=1))
    assert await sent(wire, job()) == [200]
    announced = request("POST", "/v1/ai/jobs", KEY, f"Content-Length: {Tokens().body_bytes_max + 1}")
    chunked = request("POST", "/v1/ai/jobs", KEY, "Transfer-Encoding: chunked")
    piece = chunk(b"x" * (1 << 20))
    for head, pieces in ((announced, 0), (chunked, Tokens().body_bytes_max // (1 << 20) + 1)):
        async with wire.client() as client:
            await client.send(head)
            for _ in range(pieces):
                await client.send(piece)
            refused = await client.answer()
        assert json.loads(refused.body)["code"] == "quota_exhausted"
        assert refused.one("Retry-After")


async def test_buffered_bodies_share_bounded_memory_and_release_it_when_over(
    start: Start,
) -> None:
    wire = await limited(start, Plan(requests_per_day=1))
    assert await sent(wire, job()) == [200]
    room = wire.server.room
    room.bytes_max = 820_000
    head = request("POST", "/v1/ai/jobs", KEY, "Content-Length: 200000")
    async with wire.client() as first, wire.client() as second:
        await first.send(head + b"x" * 150_000)
        await until(lambda: room.held_bytes == 150_000, "there is room for the first alone")
        await second.send(head + b"x" * 160_000)
        refused = await second.answer()
        content = json.loads(refused.body)
        assert (refused.status, content["code"], content["reason"]) == (429, "concurrency_limited", "body_memory")
        await until(lambda: room.held_bytes == 150_000, "there is room for the first alone")
        await first.send(b"x" * 50_000)
        assert json.loads((await first.answer()).body)["code"] == "quota_exhausted"
        assert room.held_bytes == 0
        await first.send(head + b"x" * 150_000)
        await until(lambda: room.held_bytes == 150_000, "there is room for the first alone")
    # The client has left.
    await until(lambda: room.held_bytes == 0, "all have left")


async def test_an_unavailable_claim_lookup_is_503_and_never_a_spent_quota(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=1))
    assert await sent(wire, job()) == [200]
    await wire.claims.tell()
    wire.charges.answers = False
    async with wire.client() as client:
        await client.send(job())
        refused = await client.answer()
    assert (refused.status, json.loads(refused.body)["code"]) == (503, "ledger_unavailable")
    assert await sent(wire, job("X-None: 1")) == [429]
    wire.charges.answers = True
    assert await sent(wire, job()) == [200]


async def test_a_repeat_needs_no_tokens_that_it_has_paid_and_all_that_it_may_use_beyond_them(start: Start) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 900}
    wire = await limited(start, Plan(tokens_per_day=1_000), answer({"usage": usage}))
    assert await sent(wire, chat(max_tokens=900)) == [200]
    charged = await settled(wire, "tokens_per_day")
    assert await sent(wire, chat(max_tokens=900), chat(max_tokens=901)) == [200, 429]
    assert await settled(wire, "tokens_per_day") == charged


async def test_an_aborted_attempt_does_not_pay_for_a_complete_one(start: Start) -> None:
    async def endless(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(STREAM + b"".join(chunk(delta("word ")) for _ in range(10)))
        while not writer.is_closing():
            writer.write(chunk(b": still there\n\n"))
            await writer.drain()
            await asyncio.sleep(0.02)
        return False

    wire = await limited(start, Plan(tokens_per_day=1_000), Upstream(endless))
    async with wire.client() as client, wire.client() as other:
        await client.send(chat(stream=True, max_tokens=500))
        while b"word" not in await client.reader.read(65_536):
            pass
        client.writer.close()
        while not wire.claims.pending and not wire.ledger.settled:
            await asyncio.sleep(0.01)
        assert 10 <= await settled(wire, "tokens_per_day") < 100
        # Another one holds most of the rest: less is left than this one may use beyond what it was charged.
        await other.send(chat(stream=True, max_tokens=600))
        while b"word" not in await other.reader.read(65_536):
            pass
        assert await sent(wire, chat(stream=True, max_tokens=500)) == [429]


# -- losses


async def test_claims_without_a_lookup_are_charged_when_the_proxy_ends(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=9))
    wire.charges.answers = False
    assert await sent(wire, job(), job()) == [200, 200]
    await wire.claims.close()
    assert spent(wire, "requests_per_day")[0] == 2
    assert wire.claims.counts == {"repeats": 0, "unasked": 2}
    # What ends after that is charged as well.
    assert await sent(wire, job()) == [200]
    assert spent(wire, "requests_per_day")[0] == 3


async def test_a_lost_reply_charges_nothing_twice(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=9))
    wire.charges.loses_answers = 2
    assert await sent(wire, job(), job(), job(OTHER)) == [200] * 3
    while wire.claims.pending:
        await asyncio.sleep(0.01)
    assert spent(wire, "requests_per_day")[0] == 2


async def test_a_repeat_on_another_proxy_is_recognised(start: Start) -> None:
    one, other = [await limited(start, Plan(requests_per_day=9)) for _ in range(2)]
    assert isinstance(other.claims, Claims)
    other.claims._store = one.charges
    assert await sent(one, job()) + await sent(other, job()) == [200, 200]
    assert await settled(one) + await settled(other) == 1
