"""Calls that need an approval, over two real proxies, one PostgreSQL and faults.

G1: executions <= approvals. G2: what runs has the approved digest. G3: no refusal and no unreachable upstream burns an
approval. `make crash` runs the storm longer: KEYPROXY_TEST_CRASH_SECONDS.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.store.directory.directory import Actor, ApprovalFilter, Conflict, Directory
from keyproxy.store.postgres.database import Database
from tests.acceptance.conftest import Configure, Site, until
from tests.acceptance.fleet import Fleet, beside
from tests.rawhttp import OK, Message, Upstream
from tests.store.harness import Relay

SECONDS = float(os.environ.get("KEYPROXY_TEST_CRASH_SECONDS", "8"))

TOOLS = [
    {"name": "pay", "approval": "human"},
    {"name": "update", "approval": "consent"},
    {"name": "shell", "approval": "admin"},
]
ROUTES = [
    {"match": "POST /pay", "tool": "pay"},
    {"match": "POST /update", "tool": "update"},
    {"match": "* /mcp", "protocol": "mcp"},
    {"match": "* /{rest...}", "name": "any"},
]


@dataclass
class Stage:
    """Two proxies, each with its own way to the database, and an approver."""

    fleet: Fleet
    site: Site
    directory: Directory
    sql: asyncpg.Connection
    session: aiohttp.ClientSession
    secret: str
    #: How often each call was approved.
    approved: collections.Counter[str] = field(default_factory=collections.Counter)

    async def call(self, name: str, proxy: int = 0, *, path: str = "/pay", timeout: float = 30.0) -> tuple[int, Any]:
        """Make the call of this name. The status is 0 without a response."""
        url = f"http://127.0.0.1:{self.fleet.sites[proxy].proxy_port}{path}"
        arguments = {"call": name}
        params = {"name": "pay", "arguments": arguments}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        body = json.dumps(message if path == "/mcp" else arguments)
        headers = {"X-Api-Key": self.secret, "Content-Type": "application/json"}
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self.session.post(url, data=body.encode(), headers=headers, timeout=limit) as response:
                content = json.loads(await response.read() or b"{}")
                return response.status, content.get("error", {}).get("data", content)
        except (aiohttp.ClientError, TimeoutError):
            return 0, {}

    async def code(self, name: str, proxy: int = 0, *, path: str = "/pay") -> str:
        status, content = await self.call(name, proxy, path=path)
        return str(content.get("code", status))

    async def approve(self) -> int:
        """Approve everything that is pending. Returns how many calls."""
        pending = await self.directory.approvals.list_page(None, 500, ApprovalFilter(state="pending"))
        count = 0
        for approval in pending.items:
            # Counted before: the approval may be used before its row is returned.
            name = approval["summary"]["arguments"]["call"]
            self.approved[name] += 1
            try:
                await self.directory.approvals.approve(approval["id"])
            except Conflict:
                self.approved[name] -= 1
            else:
                count += 1
        return count

    async def request_and_approve(self, name: str, proxy: int = 0, *, path: str = "/pay") -> None:
        assert await self.code(name, proxy, path=path) == "approval_required"
        assert await self.approve() == 1

    def executed(self) -> collections.Counter[str]:
        """How often the upstream has begun each call."""
        return executed(self.site.upstream)

    async def states(self) -> list[str]:
        rows = await self.sql.fetch("SELECT state FROM keyproxy.approvals ORDER BY created_at, id")
        return [row["state"] for row in rows]


def executed(upstream: Upstream) -> collections.Counter[str]:
    """How often the upstream has received each call."""
    names = [_name(seen) for seen in upstream.requests if seen.start.split(" ")[1] in ("/pay", "/mcp", "/update")]
    return collections.Counter(names)


def _name(seen: Message) -> str:
    content = json.loads(seen.body)
    return str(content.get("params", {"arguments": content})["arguments"]["call"])


@pytest.fixture
async def stage(configure: Configure, dsn: str) -> AsyncIterator[Stage]:
    """Two running proxies, a user with a key, and nothing approved."""
    async with contextlib.AsyncExitStack() as stack:
        site = configure(
            dsn, routes=ROUTES, tools=TOOLS, store={"statement_timeout_seconds": 1.0}, approvals={"pending_max": 1000},
            ledger={"lease_seconds": 2.0},
        )  # fmt: skip
        secret = (await site.key())["secret"]
        sql = await asyncpg.connect(dsn)
        stack.push_async_callback(sql.close)
        sites, relays = [], []
        for _ in range(2):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp"))
            Path(directory).chmod(0o755)
            relay = Relay(Path(directory), dsn)
            await relay.mend()
            stack.push_async_callback(relay.cut)
            sites.append(beside(site, relay.dsn))
            relays.append(relay)
        fleet = Fleet(sites, relays, secret)
        stack.push_async_callback(fleet.close)
        await asyncio.gather(*(fleet.start(number) for number in range(2)))
        database = Database(dsn, pool_size_max=2, statement_timeout_seconds=10.0)
        await database.open()
        stack.push_async_callback(database.close)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        directory_of = Directory(database, KeyFormat(), Actor("test", "local"))
        yield Stage(fleet, site, directory_of, sql, session, secret)


@pytest.mark.parametrize("path", ["/pay", "/mcp"])
async def test_g1_concurrent_requests_for_one_approval_execute_the_call_once(stage: Stage, path: str) -> None:
    await stage.request_and_approve("a", path=path)
    got = await asyncio.gather(*(stage.call("a", number % 2, path=path) for number in range(40)))
    statuses = collections.Counter(status for status, _ in got)
    assert statuses == {200: 1, 403: 39}
    assert {content["code"] for status, content in got if status == 403} == {"approval_required"}
    assert len({content["approval_id"] for status, content in got if status == 403}) == 1
    assert stage.executed() == {"a": 1}
    assert sorted(await stage.states()) == ["pending", "used"]


async def test_g1_lost_reply_to_a_claim_sends_nothing_and_the_approval_is_given_back(stage: Stage) -> None:
    await stage.request_and_approve("a")
    stage.fleet.relays[0].loses_replies = True
    status, content = await stage.call("a")
    assert (status, content["code"]) == (503, "approvals_unavailable")
    assert not stage.executed()
    stage.fleet.relays[0].loses_replies = False
    # A committed claim is given back; one that was not has left the approval unused. Either way one request uses it.
    await until(lambda: _is_approved(stage), "the approval is given back", seconds=20.0)
    assert await stage.code("a", 1) == "200"
    assert await stage.code("a", 1) == "approval_required"
    assert stage.executed() == {"a": 1}


async def _is_approved(stage: Stage) -> bool:
    return "approved" in await stage.states()


async def test_g1_proxy_killed_after_a_claim_burns_the_approval_and_executes_nothing(stage: Stage) -> None:
    await stage.request_and_approve("a")
    # The reply to the claim does not arrive before the proxy is killed.
    reading = stage.fleet.relays[0]
    reading.holds_replies = True
    calling = asyncio.create_task(stage.call("a"))
    await until(lambda: _is_used(stage), "the claim is committed")
    await stage.fleet.kill(0)
    assert (await calling)[0] == 0
    reading.holds_replies = False
    await stage.fleet.start(0)
    assert not stage.executed()
    assert await stage.code("a") == "approval_required"
    assert await stage.approve() == 1
    assert await stage.code("a") == "200"
    assert stage.executed() == {"a": 1}


async def _is_used(stage: Stage) -> bool:
    return "used" in await stage.states()


async def test_g2_another_call_or_caller_does_not_use_the_approval(stage: Stage) -> None:
    await stage.request_and_approve("a")
    assert await stage.code("b", 1) == "approval_required"
    other = (await stage.site.key("u_43"))["secret"]
    same_user = (await stage.site.key("u_42"))["secret"]
    own, approvals = stage.secret, set()
    for secret in (other, same_user):
        stage.secret = secret
        status, content = await stage.call("a", 1)
        assert (status, content["code"]) == (403, "approval_required")
        approvals.add(content["approval_id"])
    assert len(approvals) == 2
    assert not stage.executed()
    stage.secret = own
    assert await stage.code("a", 1) == "200"
    assert stage.executed() == {"a": 1}


@pytest.mark.parametrize("path", ["/pay", "/mcp"])
async def test_g3_unreachable_upstream_burns_no_approval(stage: Stage, path: str) -> None:
    await stage.request_and_approve("a", path=path)
    port = stage.site.upstream.port
    await stage.site.upstream.stop()
    for proxy in (0, 1, 0):
        assert await stage.code("a", proxy, path=path) == "upstream_unreachable"
        await until(lambda: _is_approved(stage), "the approval is given back")
    async with Upstream(port=port).serving() as upstream:
        assert await stage.code("a", 1, path=path) == "200"
        assert executed(upstream) == {"a": 1}
    assert await stage.code("a", path=path) == "approval_required"


async def test_g3_limits_that_refuse_burn_no_approval(stage: Stage) -> None:
    await stage.request_and_approve("a")
    await stage.sql.execute("""INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{"requests_per_day": 0}')""")
    await stage.sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
    for proxy in (0, 1):
        # Once the plan is known.
        await until(lambda proxy=proxy: _other_is(stage, proxy, "quota_exhausted"))  # type: ignore[misc]
        assert await stage.code("a", proxy) == "quota_exhausted"
        assert await stage.code("b", proxy) == "quota_exhausted"
    assert await stage.states() == ["approved"]
    await stage.sql.execute("UPDATE keyproxy.users SET plan_id = NULL")
    await until(lambda: _other_is(stage, 0, "200"))
    assert await stage.code("a") == "200"
    assert stage.executed() == {"a": 1}
    assert await stage.states() == ["used"]


async def _code_is(stage: Stage, proxy: int, code: str) -> bool:
    return await stage.code("a", proxy) == code


async def _other_is(stage: Stage, proxy: int, code: str) -> bool:
    return await stage.code("x", proxy, path="/other") == code


async def test_approval_whose_upstream_fails_after_a_byte_was_sent_is_used(stage: Stage) -> None:
    async def closes(*_: object) -> bool:
        return False

    stage.site.upstream.answering = closes
    await stage.request_and_approve("a")
    assert await stage.code("a") == "upstream_unreachable"
    assert stage.executed() == {"a": 1}
    assert await stage.code("a", 1) == "approval_required"


async def test_store_without_response_refuses_calls_and_others_are_served(stage: Stage) -> None:
    await stage.request_and_approve("a")
    assert await stage.code("x", path="/other") == "200"
    await stage.fleet.relays[0].cut()
    status, content = await stage.call("a")
    assert (status, content["code"]) == (503, "approvals_unavailable")
    assert await stage.code("x", path="/other") == "200"
    await stage.fleet.relays[0].mend()
    await until(lambda: _code_is(stage, 0, "200"))
    assert stage.executed() == {"a": 1}


async def test_consent_counts_and_ends_within_a_second_on_every_proxy(stage: Stage) -> None:
    assert await stage.code("u", path="/update") == "approval_required"
    consent = await stage.site.run_json("consent", "grant", "--user", "u_42", "--tool", "update", "--expires-in", "1d")
    for proxy in (0, 1):
        await until(lambda proxy=proxy: _update_is(stage, proxy, "200"), seconds=1.0)  # type: ignore[misc]
    await stage.site.run_json("consent", "revoke", consent["id"])
    for proxy in (0, 1):
        await until(lambda proxy=proxy: _update_is(stage, proxy, "approval_required"), seconds=1.0)  # type: ignore[misc]


async def _update_is(stage: Stage, proxy: int, code: str) -> bool:
    return await stage.code("u", proxy, path="/update") == code


async def test_person_approves_by_the_command_line(stage: Stage) -> None:
    status, content = await stage.call("a")
    assert (status, content["approval_state"]) == (403, "pending")
    (listed,) = await stage.site.run_json("approval", "list", "--state", "pending")
    assert listed["id"] == content["approval_id"]
    assert listed["summary"]["arguments"] == {"call": "a"}
    assert listed["summary"]["key_hint"].startswith("kp_live_")
    assert listed["expires_at"] == content["approval_expires_at"]
    await stage.site.run_json("approval", "approve", listed["id"], "--reason", "looks right")
    assert await stage.code("a", 1) == "200"
    (sent,) = [seen for seen in stage.site.upstream.requests if seen.start.startswith("POST /pay")]
    assert (sent.one("X-Keyproxy-Tool"), sent.one("X-Keyproxy-Approval")) == ("pay", listed["id"])
    await stage.call("b")
    (listed,) = await stage.site.run_json("approval", "list", "--state", "pending")
    await stage.site.run_json("approval", "deny", listed["id"])
    assert await stage.code("b", 1) == "approval_denied"


# -- the storm


async def test_g1_g3_executions_never_exceed_approvals_in_a_storm_of_faults(stage: Stage) -> None:
    """Callers repeat calls on both proxies while an approver approves, and everything fails in turn."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    storm = Storm(stage, random.Random(seed))
    await storm.run(SECONDS)
    print(f"approved {stage.approved.total()}, executed {storm.executions.total()}, answers {dict(storm.answers)}")
    assert storm.answers["200"] > 0
    assert storm.answers["200"] <= storm.executions.total()
    await storm.settle()


class Storm:
    """Load and faults. The upstream counts what it receives, also before it fails."""

    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self._stage = stage
        self._dice = dice
        self.answers: collections.Counter[str] = collections.Counter()
        self.executions: collections.Counter[str] = collections.Counter()
        self._fails = False
        self._ends = 0.0

    async def run(self, seconds: float) -> None:
        """Run for a time. Checks G1 at each execution."""
        stage = self._stage
        stage.site.upstream.answering = self._answer
        self._ends = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(self._repeat(number))
            group.create_task(self._decide())
            group.create_task(self._fail())

    @property
    def _goes_on(self) -> bool:
        return asyncio.get_running_loop().time() < self._ends

    async def _answer(self, seen: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        name = _name(seen)
        self.executions[name] += 1
        assert self.executions[name] <= self._stage.approved[name], f"{name} was executed without an approval"
        if self._fails and self._dice.random() < 0.5:
            return False
        writer.write(OK)
        return True

    async def _repeat(self, number: int) -> None:
        while self._goes_on:
            name, proxy = f"call {number % 4}", self._dice.randrange(2)
            path = "/mcp" if number % 4 == 3 else "/pay"
            status, content = await self._stage.call(
                name, proxy, path=path, timeout=self._dice.choice((0.02, 2.0, 8.0))
            )
            self.answers[str(content.get("code", status))] += 1
            if status in (0, 403, 502, 503):
                await asyncio.sleep(self._dice.random() * 0.05)

    async def _decide(self) -> None:
        while self._goes_on:
            await asyncio.sleep(self._dice.random() * 0.1)
            await self._stage.approve()

    async def _fail(self) -> None:
        dice = self._dice
        faults = [
            self._kill,
            self._lose_replies,
            self._cut_connections,
            self._stop_upstream,
            self._close_early,
            self._limit,
        ]
        while self._goes_on:
            await dice.choice(faults)(dice.randrange(2))
            await asyncio.sleep(dice.random() * 0.3)

    async def _kill(self, number: int) -> None:
        await self._stage.fleet.kill(number)
        await self._stage.fleet.start(number)

    async def _lose_replies(self, number: int) -> None:
        relay = self._stage.fleet.relays[number]
        relay.loses_replies = True
        await asyncio.sleep(self._dice.random() * 0.5)
        relay.loses_replies = False

    async def _cut_connections(self, number: int) -> None:
        for _ in range(10):
            self._stage.fleet.relays[number].cut_connections()
            await asyncio.sleep(0.02)

    async def _stop_upstream(self, _number: int) -> None:
        upstream = self._stage.site.upstream
        await upstream.stop()
        await asyncio.sleep(self._dice.random() * 0.5)
        await upstream.start_again()

    async def _close_early(self, _number: int) -> None:
        self._fails = True
        await asyncio.sleep(self._dice.random() * 0.5)
        self._fails = False

    async def _limit(self, _number: int) -> None:
        sql = self._stage.sql
        await sql.execute(
            """INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{"concurrency": 1, "rate": 20.0}')
               ON CONFLICT DO NOTHING"""
        )
        await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
        await asyncio.sleep(self._dice.random())
        await sql.execute("UPDATE keyproxy.users SET plan_id = NULL")

    async def settle(self) -> None:
        """Without faults every call works again, and what was not used is usable."""
        stage = self._stage
        for number in range(4):
            name, path = f"call {number}", "/mcp" if number == 3 else "/pay"

            async def works(name: str = name, path: str = path) -> bool:
                await stage.approve()
                return await stage.code(name, 1, path=path) == "200"

            await until(works, f"{name} works")
        assert all(self.executions[name] <= stage.approved[name] for name in self.executions)
