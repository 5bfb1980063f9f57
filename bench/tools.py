"""The cost of tools, consents, MCP messages, credentials of providers, and the client's address, beside a plain request.

Run as `python -m bench.tools`, with the Python of either build: the CPU of whole requests in one process without
sockets. Figures are comparable within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import orjson
import uvloop

from bench.phases import SECRET, Bench, Calling, known_key, timed
from bench.site import machine
from keyproxy.ai.tools.tool import CONSENT, MCP
from keyproxy.config import schema
from keyproxy.config.tools.provider_settings import ProviderRow
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.model import Identity, Missing, Moment, TimeBudget
from keyproxy.platform import clock
from keyproxy.ports.tools import Approvals, UpstreamCredential
from keyproxy.process.providers.provider_credentials import Provider, ProviderCredentials, StoredCredentials
from keyproxy.process.providers.secret_file import SecretFile
from keyproxy.process.run import freeze_garbage
from keyproxy.store.approvals.consent_cache import ConsentCache
from keyproxy.store.identities.cache import FeedState
from keyproxy.store.postgres.database import Database
from keyproxy.store.provider_keys.credential_header import CredentialHeader

_REQUESTS: Final = 1_000

#: The message of a call, of this size.
_MESSAGE_BYTES: Final = 300

_TOOLS: Final = (
    ToolRow("search", scopes=["jobs:write"]),
    ToolRow("update", scopes=["jobs:write"], approval=CONSENT),
)
_ROUTES: Final = (
    schema.RouteRow("POST /v1/other", ["jobs:write"]),
    schema.RouteRow("POST /v1/search", ["jobs:write"], tool="search"),
    schema.RouteRow("POST /v1/update", ["jobs:write"], tool="update"),
    schema.RouteRow("POST /v1/chat", ["jobs:write"], provider="openai"),
    schema.RouteRow("* /mcp", ["jobs:write"], protocol=MCP),
)


class _Consents:
    """A database in which the user has consented to the tool."""

    is_down = False

    async def fetch(self, _name: str, users: Sequence[str]) -> list[dict[str, object]]:
        return [{"user_id": user, "consents": json.dumps([["update", None, 4e9]])} for user in users]


class _ConsentsOnly(Approvals):
    """The consents of a proxy, without approvals."""

    def __init__(self) -> None:
        database = cast("Database", _Consents())
        cache = schema.Cache(fresh_seconds=86_400.0, stale_seconds=86_400.0)
        self._consents = ConsentCache(database, database, cache, feed=FeedState(), now=clock.now)

    def has_consent(self, identity: Identity, tool: str, now: Moment, *, is_first_lookup: bool = True) -> bool:
        return self._consents.has_consent(identity, tool, now, is_first_lookup=is_first_lookup)


class _NothingStored(StoredCredentials):
    """A store without provider keys."""

    def find(self, provider: str, tenant_id: str, now: Moment, *, is_test: bool) -> UpstreamCredential | None:
        return None

    def since_wall(self, provider: str) -> float:
        return 0.0


def request(path: str, number: int, *, body: bytes = b"{}", lines: bytes = b"") -> bytes:
    """A request of an instrumented worker: each differs from the others."""
    return (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: Api-Key %b\r\n%bContent-Type: application/json\r\n"
        b"User-Agent: python-requests/2.32\r\nAccept: */*\r\nX-Request-Id: 8f14%08x\r\nContent-Length: %d\r\n\r\n%b"
    ) % (path.encode(), SECRET.reveal(), lines, number, len(body), body)


def message(number: int) -> bytes:
    """The call of a tool by MCP."""
    params: dict[str, Any] = {"name": "search", "arguments": {"query": ""}}
    call = {"jsonrpc": "2.0", "id": 100_000 + number, "method": "tools/call", "params": params}
    params["arguments"]["query"] = "x" * (_MESSAGE_BYTES - len(orjson.dumps(call)))
    return orjson.dumps(call)


def requests() -> dict[str, list[bytes]]:
    """The kinds of requests, of which none equals another."""
    numbers = range(_REQUESTS)
    forwarded = [b"X-Forwarded-For: 192.0.2.%d, 198.51.100.%d\r\n" % (n % 250, n // 4 % 250) for n in numbers]
    return {
        "plain": [request("/v1/other", n) for n in numbers],
        "plain, 300 bytes": [request("/v1/other", n, body=message(n)) for n in numbers],
        "tool route": [request("/v1/search", n) for n in numbers],
        "tool route, consent": [request("/v1/update", n) for n in numbers],
        "MCP call, 300 bytes": [request("/mcp", n, body=message(n)) for n in numbers],
        "credential of a provider": [request("/v1/chat", n) for n in numbers],
        "X-Forwarded-For, changing": [request("/v1/other", n, lines=forwarded[n]) for n in numbers],
    }


def costs(loop: asyncio.AbstractEventLoop, null: int, secret_file: Path, rounds: int) -> None:
    """Print the table."""
    header = CredentialHeader("openai", "Authorization", "Bearer {secret}")
    file = SecretFile(str(secret_file), "providers.openai", header)
    file.file.load()
    provider = Provider(is_stored=False, live_file=file, test_file=None)
    credentials = ProviderCredentials({"openai": provider}, _NothingStored(), lends_live=True, failures={"openai": 0})
    approvals = _ConsentsOnly()
    calling = Calling(
        routes=_ROUTES, tools=_TOOLS, providers=(ProviderRow("openai", secret_file=str(secret_file)),),
        approvals=approvals, credentials=credentials,
    )  # fmt: skip
    identities = known_key(loop, None)
    none = Bench(loop, null, identities=identities, calling=Calling(routes=_ROUTES[:1]))
    bench = Bench(loop, null, identities=identities, calling=calling)
    trusting = Bench(loop, null, identities=identities, calling=calling._replace(trusted_proxies=("127.0.0.1",)))
    try:
        approvals.has_consent(bench.identity, "update", clock.now())
    except Missing as missing:
        loop.run_until_complete(missing.fetch_missing(TimeBudget()))
    freeze_garbage()  # as a worker does
    kinds = requests()
    calls = {"plain, no tools configured": _one(none, kinds["plain"])}
    calls |= {name: _one(bench, raws) for name, raws in kinds.items()}
    for name in ("plain", "X-Forwarded-For, changing"):
        calls[f"{name}, from a trusted peer"] = _one(trusting, kinds[name])
    taken = timed(calls, none, bench, trusting, rounds=rounds)
    print("\na request                                   µs    added")
    for name, cost in taken.items():
        base = taken["plain, 300 bytes"] if name.startswith("MCP") else taken["plain"]
        print(f"  {name:<40} {cost:7.2f} {cost - base:8.2f}")
    for one in (none, bench, trusting):
        one.close()


def _one(bench: Bench, raws: Sequence[bytes]) -> Callable[[], None]:
    following = itertools.cycle(raws).__next__
    return partial(_send, bench, following)


def _send(bench: Bench, following: Callable[[], bytes]) -> None:
    bench.whole(following())


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of requests; the best one counts")
    options = parser.parse_args(arguments)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory, open("/dev/null", "wb") as null:  # noqa: PTH123
        secret_file = Path(directory) / "openai"
        secret_file.write_text("sk-bench")
        costs(uvloop.new_event_loop(), null.fileno(), secret_file, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
