"""The cost of acting for users, of agent tokens, and of assertions, beside a plain key.

Run as `python -m bench.delegation`, with the Python of either build. First the CPU of whole requests in one process
without sockets; then, over a real PostgreSQL, the memory of the pairs of key and user that a proxy caches.
`python -m bench --delegation` measures the same requests over sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import asyncpg
import uvloop

from bench.cache import digest, fill
from bench.load import rss_mib
from bench.phases import FORMAT, WINDOWS_AND_TOKENS, Bench, grant, timed
from bench.site import machine
from keyproxy.auth.api_key import SecretKey
from keyproxy.config import schema
from keyproxy.config.delegation_settings import AccessSettings
from keyproxy.model import KeyDigest, Missing, Moment, TimeBudget
from keyproxy.platform import clock
from keyproxy.process.run import freeze_garbage
from keyproxy.reasons import Refusal
from keyproxy.signing.assertions import AssertionSigner, SignatureCount
from keyproxy.signing.claims import AGENT_TOKEN_TYPE, actor_claim
from keyproxy.signing.signing_key import SigningKey, VerifyingKey
from keyproxy.signing.token_check import AcceptedTokens, SignedToken
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.identities.unknown_credentials import TokenVerifier
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import Database
from keyproxy.store.store import Store

#: Kinds of requests, and the route that counts tokens.
_PLAIN: Final = "plain key"
_WITH_BUDGETS: Final = "agent token, two budgets"
_COUNTED: Final = ", tokens counted"

_USERS: Final = 1_000
_BATCH: Final = 1_000
_SELF = [int(Path("/proc/self").resolve().name)]

SECRET: Final = FORMAT.make(bytes(32), is_test=False)
SIGNING_KEY: Final = SigningKey.make(time.time())
ACCEPTED: Final = AcceptedTokens("keyproxy", "keyproxy")


def agent_token(number: int, key: SigningKey = SIGNING_KEY) -> SecretKey:
    """A token of four scopes."""
    now = int(time.time())
    claims = {
        "iss": "keyproxy", "aud": "keyproxy", "sub": "u_42", "act": actor_claim(["crawler"], None, "k"),
        "client_id": "k", "tenant": "acme", "scope": "data:read data:write jobs:read jobs:write",
        "token_budget": 10_000, "jti": f"agt_{number:022}", "iat": now, "exp": now + 900,
    }  # fmt: skip
    return SecretKey(key.sign(AGENT_TOKEN_TYPE, claims))


TOKEN: Final = agent_token(0)

#: A token with a budget of requests and one of tokens.
BUDGETED: Final = agent_token(1)
_BUDGET: Final = 10**9

#: Keys of as many users.
KEYS: Final = [FORMAT.make(number.to_bytes(32, "big"), is_test=False) for number in range(1, _USERS + 1)]


class _Rows:
    """A database with a key that acts for every user, further keys, and two agent tokens. Only one of them has limits."""

    is_down = False

    def __init__(self) -> None:
        self._owners = {key.digest(): f"u_{number}" for number, key in enumerate(KEYS)}

    async def fetch(self, name: str, *arguments: Any) -> list[dict[str, object]]:
        row: dict[str, object] = {
            "key_id": "k", "scopes": ["jobs:write"], "key_scopes": ["jobs:write"], "is_test": False, "can_act": True,
            "may_act": True, "expires_wall_seconds": None, "is_revoked": False, "is_suspended": False,
            "is_disabled": False,
            "owner_id": "u_worker", "user_id": "u_worker", "tenant_id": "acme", "key_pool": "k",
            "is_retiring": False, "key_limits": None, "user_limits": None, "tenant_limits": None, "oauth_client": None,
        }  # fmt: skip
        if name == "acting_identities":
            pairs = zip(*arguments, strict=True)
            return [row | {"digest": pair[0], "acting_for": pair[1]} for pair in pairs]
        if name == "agent_token_identities":
            return [row | _token_row(one) for one in arguments[0]]
        owners = [(one, self._owners.get(one, "u_worker")) for one in arguments[0]]
        return [row | {"digest": one, "key_id": f"key_of_{owner}", "user_id": owner} for one, owner in owners]


def _token_row(digest: KeyDigest) -> dict[str, object]:
    budget = _BUDGET if digest == BUDGETED.digest() else None
    step = {
        "token": "agt_0", "agent": "crawler", "scopes": ["jobs:write"], "ceiling": None, "limits": None,
        "token_budget": budget, "request_budget": budget,
    }  # fmt: skip
    return {
        "digest": digest, "token_id": "agt_0", "actor_user_id": None, "depth": 0, "is_intact": True,
        "user_id": "u_42", "owner_id": "u_42", "chain": json.dumps([step]),
        "expires_wall_seconds": time.time() + 86_400.0,
    }  # fmt: skip


class _AllGenuine:
    """Accepts every token."""

    def verify(self, token: bytes, now: Moment) -> None:
        """Raise no refusal."""


def warm_cache(loop: asyncio.AbstractEventLoop) -> IdentityCache:
    """A proxy's cache that knows the key, its pairs, and the token, and keeps them fresh during the run."""
    database = cast("Database", _Rows())
    verifier: TokenVerifier = _AllGenuine()
    cache = IdentityCache(
        database,
        schema.Cache(fresh_seconds=86_400.0, stale_seconds=86_400.0),
        feed=FeedState(),
        last_used=LastUsed(database),
        header_prefix="X-Keyproxy-",
        look_ups_max=1,
        now=clock.now,
        verifier=verifier,
    )
    for key in (SECRET, *KEYS):
        _fetch(loop, partial(cache.known, key.digest(), clock.now()))
    for number in range(_USERS):
        _fetch(loop, partial(cache.acting, SECRET.digest(), f"u_{number}", clock.now()))
    for token in (TOKEN, BUDGETED):
        try:
            cache.known(token.digest(), clock.now())
        except Missing as missing:
            loop.run_until_complete(cache.fetching(token, missing).fetch_missing(TimeBudget()))
    return cache


def _fetch(loop: asyncio.AbstractEventLoop, look_up: Callable[[], object]) -> None:
    try:
        look_up()
    except Missing as missing:
        loop.run_until_complete(missing.fetch_missing(TimeBudget()))


def request(credential: bytes, act_for: bytes = b"", number: int = 0) -> bytes:
    """A request of an instrumented worker: each differs from the others."""
    body = b'{"max_tokens": 16, "payload": {"text": "%b"}}' % (b"x" * 50)
    return (
        b"POST /v1/ai/jobs HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: %b\r\n%b"
        b"Content-Type: application/json\r\nUser-Agent: python-requests/2.32\r\nAccept: */*\r\n"
        b"X-Request-Id: 8f14%08x\r\nContent-Length: %d\r\n\r\n%b"
    ) % (credential, b"X-Keyproxy-Act-For: %b\r\n" % act_for if act_for else b"", number, len(body), body)


def requests() -> dict[str, list[bytes]]:
    """The kinds of requests, 1,000 of each."""
    key = b"Api-Key " + SECRET.reveal()
    token, budgeted = b"Bearer " + TOKEN.reveal(), b"Bearer " + BUDGETED.reveal()
    return {
        _PLAIN: [request(key, number=number) for number in range(_USERS)],
        "1,000 plain keys": [request(b"Api-Key " + one.reveal(), number=number) for number, one in enumerate(KEYS)],
        "acting for one user": [request(key, b"u_1", number) for number in range(_USERS)],
        "acting for 1,000 users": [request(key, b"u_%d" % number, number) for number in range(_USERS)],
        "agent token": [request(token, number=number) for number in range(_USERS)],
        _WITH_BUDGETS: [request(budgeted, number=number) for number in range(_USERS)],
    }


def costs_of_requests(loop: asyncio.AbstractEventLoop, null: int, rounds: int) -> None:
    """Print the table of whole requests: without and with an assertion, and on a route that counts tokens."""
    signer = AssertionSigner(
        1, AccessSettings(assertion=True, assertion_ttl_seconds=300), header_prefix="X-Keyproxy-",
        key=lambda _now: SIGNING_KEY, now=clock.now, count=SignatureCount(),
    )  # fmt: skip
    cache = warm_cache(loop)
    plain = Bench(loop, null, identities=cache)
    signed = Bench(loop, null, identities=cache, assertions=signer)
    counted = Bench(loop, null, WINDOWS_AND_TOKENS, identities=cache)
    budgets = cache.known(BUDGETED.digest(), clock.now()).allowance
    assert budgets is not None
    freeze_garbage()  # as a worker does
    kinds = requests()
    benches = {"": plain, ", assertion": signed}
    calls = {kind + suffix: _one(bench, raws) for kind, raws in kinds.items() for suffix, bench in benches.items()}
    calls |= {kind + _COUNTED: _one(counted, kinds[kind]) for kind in (_PLAIN, _WITH_BUDGETS)}
    for bench in (plain, signed, counted):
        grant(bench.ledger.conversation, budgets)
    taken = timed(calls, plain, signed, counted, rounds=rounds)
    print("\na request                                   µs    added")
    for name, cost in taken.items():
        base = taken[_PLAIN + _COUNTED] if name.endswith(_COUNTED) else taken[_PLAIN]
        print(f"  {name:<40} {cost:7.2f} {cost - base:8.2f}")
    for bench in (plain, signed, counted):
        bench.close()


def _one(bench: Bench, raws: Sequence[bytes]) -> Callable[[], None]:
    following = itertools.cycle(raws).__next__
    return lambda: bench.whole(following())


def costs_of_signatures() -> None:
    """Print the costs of signing and of verifying, which no request with a cached identity has."""
    key = VerifyingKey(SIGNING_KEY.public_jwk(), kid=SIGNING_KEY.kid, ends_wall=SIGNING_KEY.ends_wall_seconds)
    genuine, forged = TOKEN.reveal(), agent_token(0, SigningKey.make(time.time())).reveal()
    header = genuine.partition(b".")[0]
    forged = header + b"." + forged.partition(b".")[2]
    mangled = b"eyJhbGciOiJub25lIn0." + genuine.partition(b".")[2]
    calls: dict[str, Callable[[], object]] = {
        "sign a token": lambda: agent_token(1),
        "verify a genuine token": lambda: _verified(genuine, key),
        "refuse a forged signature": lambda: _verified(forged, key),
        "refuse another header": lambda: _verified(mangled, key),
        "digest of a token": lambda: hashlib.sha256(genuine).digest(),
        "digest of a key": lambda: hashlib.sha256(SECRET.reveal()).digest(),
    }
    print(f"\na token of {len(genuine)} bytes                   µs")
    for name, cost in timed(calls).items():
        print(f"  {name:<34} {cost:7.2f}")


def _verified(token: bytes, key: VerifyingKey) -> bool:
    try:
        SignedToken.parse(token).check(key, ACCEPTED, time.time())
    except Refusal:
        return False
    return True


async def memory_of_pairs(dsn: str, pairs: int) -> None:
    """Print the memory of pairs of one key with its users, and the time of a lookup."""
    await fill(dsn, pairs)
    connection = await asyncpg.connect(dsn)
    await connection.execute("UPDATE keyproxy.users SET tenant_id = 'tenant_0'")
    await connection.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant' WHERE user_id = 'user_0'")
    await connection.close()
    store = Store(
        schema.StoreSettings(), schema.Cache(fresh_seconds=600.0), schema.LedgerSettings(), schema.Usage(), dsn=dsn,
        header_prefix="X-Keyproxy-", now=clock.now,
    )  # fmt: skip
    await store.open()
    while not store.feed.is_current():
        await asyncio.sleep(0.01)
    key = digest("key", 0)
    await _look_up(store, key, range(1))
    before, began = rss_mib(_SELF), time.process_time()
    for start in range(0, pairs, _BATCH):
        await _look_up(store, key, range(start, min(start + _BATCH, pairs)))
    grown, worked = rss_mib(_SELF) - before, time.process_time() - began
    cached = store.identities.sizes()["acting"]
    print(
        f"\n{cached} pairs of one key cached: {grown * 1048576 / pairs:.0f} bytes of memory and"
        f" {worked / pairs * 1e6:.0f} µs of CPU per pair"
    )
    await store.close()


async def _look_up(store: Store, key: KeyDigest, users: range) -> None:
    """Load these pairs into the cache, as many at a time as may wait."""

    async def one(user: str) -> None:
        try:
            store.identities.acting(key, user, clock.now())
        except Missing as missing:
            await missing.fetch_missing()

    await asyncio.gather(*(one(f"user_{number}") for number in users))


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.delegation", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000, help="0: do not measure their memory")
    parser.add_argument("--rounds", type=int, default=7, help="of requests; the best one counts")
    options = parser.parse_args(arguments)
    print(machine())
    with open("/dev/null", "wb") as null:  # noqa: PTH123
        costs_of_requests(uvloop.new_event_loop(), null.fileno(), options.rounds)
    costs_of_signatures()
    if options.pairs:
        with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory:
            server = embedded_postgres.start(Path(directory) / "pg", {"fsync": "off"})
            try:
                uvloop.run(migrations.migrate(server.dsn()))
                uvloop.run(memory_of_pairs(server.dsn(), options.pairs))
            finally:
                server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
