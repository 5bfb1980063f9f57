"""CPU of each phase of a request, without sockets, to locate regressions.

Prints microseconds of CPU per request, best of several rounds. Numbers are comparable within one run only. The
cost of limits is shown separately: a proxy without limits, one with windows on the key, the user and the tenant, and one
with token budgets on these as well.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple, cast

import uvloop

from keyproxy.ai.categories import Category
from keyproxy.ai.models import Model, price_of
from keyproxy.auth import authorization, credentials
from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.config import schema
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.config.tools.provider_settings import ProviderRow
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.http import headers
from keyproxy.http.headers import FieldNames
from keyproxy.http_messages import RequestHead
from keyproxy.limits.allowance import Allowance, Need
from keyproxy.limits.lease_sync import Short
from keyproxy.limits.ledger_protocol import LeaseGrant
from keyproxy.limits.plan import Limit, Plan
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.recorder import Recorder
from keyproxy.model import Missing, Moment, Permit, TimeBudget
from keyproxy.platform import clock
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.gate import Assertions
from keyproxy.ports.tenant_records import OwnedIds, PromptTemplates
from keyproxy.ports.tools import Approvals, UpstreamCredentials
from keyproxy.process.run import freeze_garbage
from keyproxy.process.terms import build_gateway, build_terms
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.identity_rows import TokenResources
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.ledger.backend import LedgerBackend
from keyproxy.store.ledger.charge_dedup import Claims, ClaimStore
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.ledger_client import LedgerClient
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.journal import UsageJournal
from keyproxy.wire.client.connection import ClientConnection
from keyproxy.wire.client.request_ids import RequestIds
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.parsing.head_cache import RequestReader, ResponseReader
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from keyproxy.wire.server import ProxyServer
from keyproxy.wire.upstream.connection import UpstreamConnection
from keyproxy.wire.upstream.pool import UpstreamPool, Upstreams

#: Short turns: on a busy machine some of many are not disturbed. Two batches of the recorder each.
_CALLS = 500
_TURNS = 10
_ROUNDS = 7

FORMAT = KeyFormat()
SECRET = FORMAT.make(bytes(32), is_test=False)
OAUTH: Final = OAuthSettings(issuer="https://mcp.example.com", resource="https://mcp.example.com/mcp")


def requests(secret: SecretKey) -> dict[str, list[bytes]]:
    """Two kinds: identical plain requests, and requests of an instrumented worker, which all differ."""
    body = b'{"max_tokens": 16, "input": "%b"}' % (b"x" * 59)
    plain = (
        b"POST /v1/ai/jobs HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: Api-Key %b\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n" % (secret.reveal(), len(body))
    )
    rich = plain + (
        b"User-Agent: python-requests/2.32\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        b"traceparent: 00-4bf92f3577b34da6a3ce929d%08x-00f067aa%08x-01\r\nX-Request-Id: 8f14%08x\r\n"
    )
    varied = [rich % (number, number, number) for number in range(0, 1_000_000_007, 1_000_003)]
    return {"plain": [plain + b"\r\n" + body], "rich": [one + b"\r\n" + body for one in varied]}


RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Sat, 21 Nov 2026 10:06:43 GMT\r\n"
    b"Content-Type: application/json\r\nContent-Length: 39\r\nX-Usage-Tokens: 17\r\n\r\n" + b"x" * 39
)


MODEL: Final = Model("gpt-4o", price=price_of(2_500_000, 10_000_000))
CODE: Final = Category("code", frozenset({"jobs:write"}))


def chat(secret: SecretKey, **members: object) -> bytes:
    """A request of an AI client. `members`: further ones of its body."""
    messages = [{"role": "user", "content": "Hello, how are you?"}]
    body = json.dumps({"model": "gpt-4o", "messages": messages, **members}).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: Api-Key %b\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (secret.reveal(), len(body), body)
    )


_CHAT_BODY: Final = json.dumps(
    {
        "id": "c", "object": "chat.completion", "model": "gpt-4o",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Fine."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 13, "completion_tokens": 9, "total_tokens": 22},
    }
).encode()  # fmt: skip
CHAT_RESPONSE: Final = RESPONSE[: RESPONSE.index(b"Content-Length")] + b"Content-Length: %d\r\n\r\n%b" % (
    len(_CHAT_BODY), _CHAT_BODY,
)  # fmt: skip


class _Templates(PromptTemplates):
    """Every prompt is a registered template."""

    def category(self, digest: bytes, tenant_id: str, now: Moment) -> str | None:
        return CODE.name


class _OneKey:
    """A database with one key or access token; its user and its tenant have the same plan."""

    is_down = False

    def __init__(self, plan: Plan | None, secret: SecretKey) -> None:
        limits = None if plan is None else json.dumps(plan.to_json())
        is_key = secret is SECRET
        self._row = {
            "digest": secret.digest(),
            "key_id": "k",
            "scopes": ["jobs:write"],
            "is_test": False,
            "can_act": False,
            "expires_wall_seconds": None,
            "is_revoked": False,
            "is_suspended": False,
            "is_disabled": False,
            "user_id": "u_42",
            "tenant_id": "acme",
            "key_pool": "k",
            "is_retiring": False,
            "key_limits": limits,
            "user_limits": limits,
            "tenant_limits": limits,
            "oauth_client": None if is_key else "cli_1",
            "resource": None if is_key else OAUTH.resource,
            "bound_to": None,
        }

    async def fetch(self, _name: str, *_arguments: object) -> list[dict[str, object]]:
        return [self._row]


def known_key(loop: asyncio.AbstractEventLoop, plan: Plan | None, secret: SecretKey = SECRET) -> IdentityCache:
    """A proxy's cache with one key or access token that stays fresh during the run."""
    database = cast("Database", _OneKey(plan, secret))
    cache = IdentityCache(
        database,
        schema.Cache(fresh_seconds=86_400.0, stale_seconds=86_400.0),
        feed=FeedState(),
        last_used=LastUsed(database),
        header_prefix="X-Keyproxy-",
        look_ups_max=1,
        now=clock.now,
        resources=TokenResources(OAUTH.resource),
    )
    try:
        cache.known(secret.digest(), clock.now())
    except Missing as missing:
        loop.run_until_complete(_fetched(missing))
    return cache


async def _fetched(missing: Missing) -> None:
    await missing.fetch_missing(TimeBudget())


class _Transport:
    """Discards bytes."""

    def __init__(self) -> None:
        self.written = 0
        self._socket, self._other_end = socket.socketpair()

    def write(self, data: bytes) -> None:
        self.written += 1

    def get_extra_info(self, name: str) -> object:
        return ("127.0.0.1", 40000) if name == "peername" else self._socket if name == "socket" else None

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        raise AssertionError("the exchange was not clean")

    close = pause_reading = resume_reading = abort


#: The plan of the key, its user and its tenant. None of the limits is reached.
_MANY: Final = 10**9
WINDOWS_AND_TOKENS: Final = Plan(
    requests_per_day=_MANY,
    requests_per_month=_MANY,
    tokens_per_request=10_000,
    tokens_per_day=_MANY,
    tokens_per_month=_MANY,
)
PLANS: Final[dict[str, Plan | None]] = {
    "no limits": None,
    "windows": Plan(requests_per_day=_MANY, requests_per_month=_MANY),
    "windows, tokens": WINDOWS_AND_TOKENS,
}
#: For the chat: money too.
PRICED: Final = Plan([*WINDOWS_AND_TOKENS.limits, Limit("spend", "day", _MANY), Limit("spend", "month", _MANY)])
NEED: Final = Need(106, 106, 1_000, 1_000)


def grant(client: LedgerClient, limits: Allowance) -> None:
    """Lease everything to this process for longer than the run."""
    for _ in range(2):
        now = clock.monotonic()
        try:
            client.lease_table.check(limits, now, NEED)
        except Short as short:
            client.lease_sync.request(short)
            lines = client.lease_sync.lines(now, 1_000)
            replies = [LeaseGrant(line.lease, 0, _MANY, 0, _MANY, 86_400.0, 0.0, False) for line in lines]
            client.lease_sync.apply(lines, replies, now, valid_seconds=86_400.0)


class Calling(NamedTuple):
    """Further routes, and what their tools and providers need."""

    routes: tuple[schema.RouteRow, ...] = ()
    tools: tuple[ToolRow, ...] = ()
    providers: tuple[ProviderRow, ...] = ()
    approvals: Approvals = Approvals()
    credentials: UpstreamCredentials = UpstreamCredentials()
    trusted_proxies: tuple[str, ...] = ()


class Bench:
    """A proxy without sockets, whose requests are under one of PLANS."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        null: int,
        plan: Plan | None = None,
        *,
        dialect: str = "header",
        judges: tuple[str, ...] = (),
        identities: IdentityCache | None = None,
        assertions: Assertions | None = None,
        calling: Calling | None = None,
        oauth: OAuthSettings | None = None,
        secret: SecretKey = SECRET,
    ) -> None:
        """`judges`: of `model` and `category`, what the chat's route judges. `identities`: that know the key.

        `oauth`: with which access tokens are accepted. `secret`: the key, or an access token.
        """
        calling = calling or Calling()
        self.names = FieldNames()
        identities = identities or known_key(loop, plan, secret)
        self.identity = identities.known(secret.digest(), clock.now())
        self.limits = self.identity.allowance
        tokens = "none" if plan is None or plan.limit("tokens/day") is None else dialect
        rows = (
            schema.RouteRow("POST /v1/ai/jobs", ["jobs:write"], tokens=tokens),
            schema.RouteRow(
                "POST /v1/chat/completions", ["jobs:write"], tokens=tokens,
                model="json:model" if "model" in judges else "",
                prompt="openai" if "category" in judges else "", category=["template"] if "category" in judges else [],
            ),
            *calling.routes,
        )  # fmt: skip
        settings = schema.Settings(
            listen=schema.Listen(trusted_proxies=[*calling.trusted_proxies]), routes=rows, models=(MODEL,),
            categories=(CODE,), tools=calling.tools, providers=calling.providers, oauth=oauth or OAuthSettings(),
        )  # fmt: skip
        self.routes = settings.route_table()
        # None of them is started, so that no database or ledger is contacted.
        self.ledger = Ledger(cast("LedgerBackend", None), schema.LedgerSettings(), clock.now)
        claims = Claims(cast("ClaimStore", None), self.ledger, schema.LedgerSettings(), clock.now)
        self.usage = UsageJournal(cast("Database", None), schema.Usage(), clock.now, settle_seconds=1.0)
        if self.limits is not None:
            grant(self.ledger.conversation, self.limits)
        self.log = AccessLog(null, wall_offset=clock.wall_offset)
        self.log.start()
        self.recorder = Recorder(self.log, lambda rows: self.usage.take(rows))
        self.gateway = build_gateway(
            settings, self.routes, identities=identities, owned_ids=OwnedIds(), templates=_Templates(),
            ledger=self.ledger, claims=claims, approvals=calling.approvals, mint=AgentTokenMint(),
            now=clock.now, upstream_credentials=calling.credentials,
        )  # fmt: skip
        deadlines = Deadlines(loop, clock.monotonic)
        pool = UpstreamPool(
            "http://127.0.0.1:9",
            schema.Upstream(),
            ResponseReader(self.names),
            deadlines,
            clock=clock.monotonic,
            loop=loop,
        )
        self.upstream = UpstreamConnection(pool, loop)
        self.upstream.connection_made(cast("asyncio.Transport", _Transport()))
        pool.release(self.upstream, clock.monotonic())
        self.server = ProxyServer(
            build_terms(settings, self.routes, self.gateway, Upstreams(pool), tls=None, assertions=assertions),
            recorder=self.recorder,
            deadlines=deadlines,
            clock=clock.monotonic,
            loop=loop,
            request_ids=RequestIds(b"bench"),
        )
        self.client = ClientConnection(self.server)
        self.client.connection_made(cast("asyncio.Transport", _Transport()))

    def whole(self, request: bytes, response: bytes = RESPONSE) -> None:
        """One request and its response."""
        self.client.data_received(request)
        self.upstream.data_received(response)

    def take_and_settle(self) -> None:
        """Reserve and settle the limits of one request."""
        if self.limits is not None:
            self.ledger.settle(
                self.ledger.take(self.limits, clock.now(), NEED), was_sent=True, tokens=NEED.tokens_least
            )

    def close(self) -> None:
        """End the thread that writes the log."""
        self.log.close()

    def forget(self) -> None:
        """Discard the collected usage, as if it had been written."""
        self.recorder.count_pending()
        self.usage = UsageJournal(cast("Database", None), schema.Usage(), clock.now, settle_seconds=1.0)


def phases(bench: Bench, raws: Sequence[bytes]) -> dict[str, Callable[[], object]]:
    """Each phase as a separate call, on the previous phase's results."""
    reader, responses = (
        RequestReader(bench.names, partial(credentials.holds_key, key_format=FORMAT)),
        ResponseReader(bench.names),
    )
    head_bytes = raws[0][: raws[0].index(b"\r\n\r\n") + 4]
    response_bytes = RESPONSE[: RESPONSE.index(b"\r\n\r\n") + 4]
    end, response_end = len(head_bytes) - 4, len(response_bytes) - 4
    other_head, other_response = (one.replace(b"Length: ", b"Length: 1") for one in (head_bytes, response_bytes))
    for _ in range(LEARNT_AFTER + 1):
        head, response = reader.read(head_bytes, end), responses.read(response_bytes, response_end)
    now = clock.now()
    route = bench.routes.match(head.line.method, head.line.path)
    permit = Permit(authorization.admit(bench.identity, route, now))
    forwarding = bench.server.trust.forwarding("127.0.0.1", is_tls=False)
    next_raw = itertools.cycle(raws).__next__
    return {
        "(an empty call)": lambda: None,
        "1 read": lambda: reader.read_alike(other_head, head, len(other_head)),
        "1 read, repeated bytes": lambda: reader.read_alike(head_bytes, head, len(head_bytes)),
        "2 present": lambda: present(head),
        "4 admit": lambda: authorization.admit(
            bench.identity, bench.routes.match(head.line.method, head.line.path), now
        ),
        "6 dress": lambda: headers.build_upstream_head(
            head, head.block, permit, request_id=b"0123456789", forwarding=forwarding, host=b"u"
        ),
        "7 read response": lambda: responses.read_alike(other_response, response),
        "7 repeated bytes": lambda: responses.read_alike(response_bytes, response),
        "the whole": lambda: bench.whole(next_raw()),
    }


def present(head: RequestHead) -> None:
    """As on a connection that has not sent this key before."""
    head.digest = None
    credentials.digest(head, FORMAT)


def timed(calls: Mapping[str, Callable[[], object]], *benches: Bench, rounds: int = _ROUNDS) -> dict[str, float]:
    """Microseconds of CPU for one call of each: the best of the turns that all take in each round."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for _, (name, call) in itertools.product(range(_TURNS), calls.items()):
            started = time.process_time()
            for _ in range(_CALLS):
                call()
            best[name] = min(best[name], (time.process_time() - started) / _CALLS * 1e6)
        for bench in benches:
            bench.forget()
    return best


def recording(bench: Bench, raw: bytes) -> float:
    """Microseconds of CPU to count, log and note the usage of one request that has ended."""
    pending: list[Exchange] = bench.recorder._pending  # noqa: SLF001
    bench.whole(raw)
    many = [pending[-1]] * 200

    def count() -> None:
        bench.recorder._pending = list(many)  # noqa: SLF001
        bench.recorder.count_pending()

    best = math.inf
    for _ in range(_ROUNDS):
        started = time.process_time()
        for _ in range(20):
            count()
        best = min(best, (time.process_time() - started) / 20 / len(many) * 1e6)
        bench.forget()
    return best


def main() -> None:
    """Print the tables."""
    loop = uvloop.new_event_loop()
    with open("/dev/null", "wb") as null:  # noqa: PTH123
        benches = {name: Bench(loop, null.fileno(), plan) for name, plan in PLANS.items()}
        freeze_garbage()  # as a worker does
        bench = benches["no limits"]
        for kind, raws in requests(SECRET).items():
            print(f"\n{kind} request, {len(raws[0])} bytes                µs")
            for name, taken in timed(phases(bench, raws), bench).items():
                print(f"  {name:<32} {taken:8.2f}")
            print(f"  {'of it: 10 record':<32} {recording(bench, raws[0]):8.2f}")
        raw = requests(SECRET)["plain"][0]
        wholes = timed({name: partial(one.whole, raw) for name, one in benches.items()}, *benches.values())
        takes = timed({name: one.take_and_settle for name, one in benches.items()})
        print("\nlimits of key, user and tenant      µs    added   of it: 5, 9 take and settle")
        for name, taken in wholes.items():
            print(f"  {name:<28} {taken:8.2f} {taken - wholes['no limits']:8.2f} {takes[name]:8.2f}")
        chats = {
            "no limits": Bench(loop, null.fileno()),
            "windows, tokens": Bench(loop, null.fileno(), PLANS["windows, tokens"], dialect="openai"),
            "windows, tokens, price": Bench(loop, null.fileno(), PRICED, dialect="openai"),
            "as the last, model judged": Bench(loop, null.fileno(), PRICED, dialect="openai", judges=("model",)),
            "model and category judged": Bench(
                loop, null.fileno(), PRICED, dialect="openai", judges=("model", "category")
            ),
        }
        for kind, members in (("with a maximum", {"max_completion_tokens": 50}), ("without a maximum", {})):
            asking = chat(SECRET, **members)
            wholes = timed(
                {name: partial(one.whole, asking, CHAT_RESPONSE) for name, one in chats.items()}, *chats.values()
            )
            print(f"\na chat completion {kind:<18} µs    added")
            for name, taken in wholes.items():
                print(f"  {name:<28} {taken:8.2f} {taken - wholes['no limits']:8.2f}")
        for one in (*benches.values(), *chats.values()):
            one.close()


if __name__ == "__main__":
    main()
