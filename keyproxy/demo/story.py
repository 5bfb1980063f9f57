"""The steps of the demo: each is printed, made and checked."""

from __future__ import annotations

import asyncio
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import click

from keyproxy.auth.api_key import ENTROPY_BYTES, KeyFormat
from keyproxy.config.schema import Settings
from keyproxy.demo import authority, budget, delegation, runaway, tools
from keyproxy.demo.compute import CHAT, COMPLETIONS, JOBS, UNBOUNDED_TOKENS, Compute
from keyproxy.demo.oauth_scene import OAuthScene
from keyproxy.demo.tool_scene import ToolScene
from keyproxy.store.directory.directory import Directory, KeyWish

#: With X-Keyproxy-Key-Id.
_IDENTITY_HEADERS: Final = 5

#: A revocation takes effect everywhere within this time after its commit.
_REVOKED_SECONDS_MAX: Final = 1.0


class Stage(NamedTuple):
    """The environment of the demo. `proxies`: the addresses of all proxies."""

    settings: Settings
    compute: Compute
    proxies: Sequence[str]
    config_path: Path


class Story:
    """The demo's steps. `failures` names those that failed."""

    def __init__(self, stage: Stage, directory: Directory, session: aiohttp.ClientSession) -> None:
        self.failures: list[str] = []
        self._stage = stage
        self._settings = stage.settings
        self._directory = directory
        self._session = session
        self._url = f"http://{stage.settings.listen.address}"
        self._key = ""
        self._steps = 0

    async def play(self) -> None:
        """Run every step, and count those that fail."""
        keys = await self._provision()
        self._key = keys["alice"]["secret"]
        unknown = KeyFormat().make(secrets.token_bytes(ENTROPY_BYTES), is_test=False).reveal().decode()
        mistyped = self._key[:-1] + ("0" if self._key[-1] != "0" else "1")
        alice = {"X-Keyproxy-User": "u_alice", "X-Keyproxy-Tenant": "acme", "X-Keyproxy-Test": "false"}

        await self._step("A worker calls with alice's key", self._key, 200, sees=alice)
        await self._step("No key", None, 401, code="api_key_missing")
        await self._step(
            "A mistyped key: its checksum is wrong, so no lookup is made", mistyped, 401, code="api_key_invalid"
        )
        await self._step("A well-formed key that does not exist", unknown, 401, code="api_key_invalid")
        await self._step(
            "bob's key can read jobs but not write them", keys["bob"]["secret"], 403, code="insufficient_scope"
        )
        await self._step(
            "alice's test key: the same user, counted separately",
            keys["test"]["secret"],
            200,
            sees={**alice, "X-Keyproxy-Test": "true"},
        )
        await self._step(
            "A worker claims to be another user",
            self._key,
            200,
            sees=alice,
            extra={"X-Keyproxy-User": "u_root", "x_keyproxy_tenant": "evil", "Connection": "X-Keyproxy-User"},
        )
        await self._revocation(keys["revoked"])
        await self._budget(keys["carol"]["secret"])
        await self._runaway(keys["dave"]["secret"])
        await self._authority(keys["alice"])
        await self._delegation(keys["worker"])
        scene = ToolScene(
            self._session,
            self._url,
            self._stage.compute,
            self._stage.config_path,
            self._directory,
            self._begin,
            self._judge,
        )
        await scene.play(keys["erin"]["secret"])

    async def play_oauth(self, *, is_attended: bool) -> None:
        """Run the steps of an MCP client that connects a user. `is_attended`: a person signs in."""
        scene = OAuthScene(
            self._session,
            self._settings,
            self._stage.config_path,
            self._directory,
            self._begin,
            self._judge,
            is_attended,
        )
        self._key = await scene.play()

    def sum_up(self) -> None:
        """Print the result."""
        click.echo()
        if self.failures:
            click.echo(f"{len(self.failures)} of {self._steps} steps FAILED: {'; '.join(self.failures)}")
        else:
            click.echo(f"All {self._steps} steps passed.")

    def invite(self, *, stays: bool) -> None:
        """Print commands to try by hand, now or with the demo kept running."""
        ops = f"http://{self._settings.ops.address}"
        click.echo("\nTry it yourself:\n" if stays else "\nThe demo has ended. Without --once it keeps running:\n")
        oauth = self._settings.oauth
        if oauth.is_configured:
            commands = ("oauth grant list", "oauth session list")
            click.echo(f"  Sign in with the key {self._key}")
            click.echo(f"  claude mcp add --transport http demo {oauth.resource}")
            click.echo(f"  {oauth.issuer}/oauth/connections (in a browser: what frank has connected)")
        else:
            commands = ("approval list --state pending", "key list")
            # Not --json, which curl supports only since 2022.
            headers = f"-H 'Authorization: Api-Key {self._key}' -H 'Content-Type: application/json'"
            click.echo(f'  curl -i {self._url}{JOBS} {headers} -d \'{{"job_id": "7"}}\'')
        click.echo(f"  curl {ops}/metrics\n  curl {ops}/readyz")
        for command in commands:
            click.echo(f"  {own_command()} {command} --config {shlex.quote(str(self._stage.config_path.absolute()))}")
        if stays:
            click.echo("\nPress Ctrl-C to stop.")

    async def _provision(self) -> dict[str, dict[str, Any]]:
        click.echo("\nTenant acme, its users alice, bob, carol, dave, erin and a worker, and their keys")
        directory, week = self._directory, timedelta(days=7)
        await directory.tenants.create("acme", "Acme Ltd")
        both = ("jobs:read", "jobs:write")
        alice = await directory.users.create("u_alice", "acme", KeyWish("worker", both, expires_in=week))
        bob = await directory.users.create("u_bob", "acme", KeyWish("reports", ("jobs:read",), expires_in=week))
        await directory.plans.set("small", {"tokens_per_day": budget.BUDGET})
        carol = await directory.users.create(
            "u_carol", "acme", KeyWish("writer", ("jobs:write",), expires_in=week), plan="small"
        )
        await directory.plans.set("agent", {"tokens_per_day": runaway.BUDGET})
        dave = await directory.users.create(
            "u_dave", "acme", KeyWish("agent", ("jobs:write",), expires_in=week), plan="agent"
        )
        erin = await directory.users.create(
            "u_erin", "acme", KeyWish("assistant", (*tools.SCOPES, "agents:mint"), expires_in=week)
        )
        await directory.users.create("u_worker", "acme", None)
        service = KeyWish("service", ("jobs:write", "agents:mint"), expires_in=week, acts_for="tenant")
        keys = {
            "alice": alice["key"],
            "test": await directory.keys.issue("u_alice", KeyWish("staging", both, is_test=True, expires_in=week)),
            "revoked": await directory.keys.issue("u_alice", KeyWish("old worker", both, expires_in=week)),
            "bob": bob["key"],
            "carol": carol["key"],
            "worker": await directory.keys.issue("u_worker", service),
            "dave": dave["key"],
            "erin": erin["key"],
        }
        for key in keys.values():
            mode = "test" if key["is_test"] else "live"
            click.echo(f"  {key['user']:<8} {mode}  {key['hint']:<20} {' '.join(key['scopes'])}")
        return keys

    async def _step(
        self,
        title: str,
        key: str | None,
        status: int,
        *,
        code: str | None = None,
        sees: Mapping[str, str] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Make one call, print it and check it."""
        self._steps += 1
        headers = dict(extra or {})
        shown = [f"{name}: {value}" for name, value in headers.items()]
        if key is not None:
            headers["Authorization"] = f"Api-Key {key}"
            shown.insert(0, f"Authorization: Api-Key {key[:8]}…{key[-4:]}")
        click.echo(f"\n{self._steps}. {title}\n   > POST {JOBS}   {'   '.join(shown)}")
        received, body = await self._call(headers)
        wrong = [] if received == status else [f"status {received} instead of {status}"]
        if code is not None:
            click.echo(f"   < {received} {body.get('code')}: {body.get('detail')}")
            wrong += [] if body.get("code") == code else [f"code {body.get('code')} instead of {code}"]
        else:
            saw: Mapping[str, list[str]] = body.get("identity", {})
            click.echo(f"   < {received} the compute server received " + ", ".join(f"{n} {v}" for n, v in _brief(saw)))
            wrong += [f"{n} is {saw.get(n)}" for n, value in (sees or {}).items() if saw.get(n) != [value]]
            if body.get("identity_headers") != _IDENTITY_HEADERS:
                wrong.append(f"{body.get('identity_headers')} identity headers instead of {_IDENTITY_HEADERS}")
            if body.get("credential_seen"):
                wrong.append("the credential reached the compute server")
        self._judge(title, wrong)

    async def _revocation(self, key: Mapping[str, Any]) -> None:
        """Revoke a key during calls: how long after the commit was the last accepted call sent?"""
        title = self._begin("A key is revoked while calls run", f"{JOBS}   again and again")
        headers = {"Authorization": f"Api-Key {key['secret']}"}
        accepted: list[float] = []
        responses: dict[str, int] = {}
        stop = asyncio.Event()

        async def worker() -> None:
            while not stop.is_set():
                sent = time.monotonic()
                status, body = await self._call(headers)
                responses[str(body.get("code", status))] = responses.get(str(body.get("code", status)), 0) + 1
                if status == 200:
                    accepted.append(sent)

        workers = [asyncio.create_task(worker()) for _ in range(2)]
        await asyncio.sleep(0.3)
        revoked_at = time.monotonic()
        await self._directory.keys.revoke(key["id"], "demo")
        await asyncio.sleep(_REVOKED_SECONDS_MAX + 0.2)
        stop.set()
        await asyncio.gather(*workers)
        # Measured from the revocation request, which is slightly earlier than the commit.
        delay = max(0.0, max(accepted, default=revoked_at) - revoked_at)
        click.echo(f"   < {responses}; the last accepted call was sent at most {delay * 1000:.1f} ms after the commit")
        wrong = [] if delay <= _REVOKED_SECONDS_MAX else [f"{delay:.3f} s"]
        wrong += [] if responses.get("200") and responses.get("api_key_revoked") else [f"responses were {responses}"]
        self._judge(title, wrong)

    async def _budget(self, key: str) -> None:
        """Two proxies share one budget."""
        title = self._begin(
            f"carol may spend {budget.BUDGET} tokens a day over two proxies; each call takes {budget.TOKENS_EACH}",
            f"{COMPLETIONS}   again and again, to both",
        )
        urls = [f"http://{address}" for address in self._stage.proxies]
        responses, wrong = await budget.spend(self._session, urls, key, self._stage.compute)
        counted = ", ".join(f"{count} x {what}" for what, count in sorted(responses.items()))
        click.echo(f"   < {counted}\n   < the compute server has processed {self._stage.compute.tokens} tokens")
        self._judge(title, wrong)

    async def _runaway(self, key: str) -> None:
        """An agent without a maximum under a small budget."""
        title = self._begin(
            f"dave's agent runs away: no maximum, {UNBOUNDED_TOKENS} tokens a call, and a budget of {runaway.BUDGET}",
            f"{CHAT}   again and again",
        )
        calls, wrong = await runaway.run(self._session, self._url, key, self._stage.compute)
        for call in calls:
            outcome = call.code or f"200, capped at {call.cap} tokens"
            click.echo(f"   < {outcome}" + ("" if call.may_retry else ", x-should-retry: false"))
        self._judge(title, wrong)

    async def _authority(self, key: Mapping[str, Any]) -> None:
        """A model that needs a scope, a role that grants it, and a collection of another tenant."""
        secret, roles = key["secret"], self._directory.roles

        def request() -> Awaitable[authority.DemoResponse]:
            return authority.chat(self._session, self._url, secret)

        title = self._begin(
            f"alice's key may not use the model {authority.MODEL}", f'{CHAT}   {{"model": "{authority.MODEL}", …}}'
        )
        response = await request()
        click.echo(f"   < {response}")
        is_refused = response.code == "model_not_allowed" and authority.SCOPE in response.detail
        self._judge(title, [] if is_refused else [str(response)])

        title = self._begin(
            f"An admin gives the key the role {authority.ROLE}, which has this scope", f"{CHAT}   again and again"
        )
        await roles.set(authority.ROLE, (authority.SCOPE,))
        response, delay = await authority.after_change(
            lambda: self._directory.keys.change(key["id"], {"roles": [authority.ROLE]}), request
        )
        click.echo(
            f"   < {response.status} the compute server received Model {response.model},"
            f" at most {delay * 1000:.1f} ms after the commit"
        )
        is_allowed = response.model == authority.MODEL and delay <= authority.CHANGED_SECONDS_MAX
        self._judge(title, [] if is_allowed else [f"{response} after {delay:.3f} s"])

        title = self._begin("alice requests a collection of another tenant", f"{authority.COLLECTIONS}/globex/docs")
        response = await authority.collection(self._session, self._url, secret, "globex/docs")
        click.echo(f"   < {response}")
        self._judge(title, [] if response.code == "namespace_forbidden" else [str(response)])

    async def _delegation(self, key: Mapping[str, Any]) -> None:
        """A service key acts for two users and mints a token for an agent, which dies with the key."""
        secret, session = key["secret"], self._session
        title = self._begin(
            "A worker acts for alice and for bob with one service key",
            f"{JOBS}   {delegation.ACT_FOR}: u_alice, then u_bob",
        )
        wrong = []
        for user in ("u_alice", "u_bob"):
            status, body = await self._call(delegation.act_for(secret, user))
            saw: Mapping[str, list[str]] = body.get("identity", {})
            click.echo(f"   < {status} the compute server received " + ", ".join(f"{n} {v}" for n, v in _brief(saw)))
            if (saw.get("X-Keyproxy-User"), saw.get("X-Keyproxy-Actor")) != ([user], ["u_worker"]):
                wrong.append(f"for {user}: {body.get('code') or saw}")
        self._judge(title, wrong)

        title = self._begin(
            f"The worker gives an agent of alice a token for {delegation.BUDGET} tokens",
            f"{delegation.TOKENS_PATH}   {delegation.ACT_FOR}: u_alice   and then {COMPLETIONS}   again and again",
        )
        minted, wrong = await delegation.mint(session, self._url, secret, "u_alice")
        token = minted.get("token", "")
        click.echo(f"   < {minted.get('id')}, valid until {minted.get('expires_at')}")
        calls, more = await delegation.spend(session, self._url, token, self._stage.compute)
        click.echo(f"   < {calls}")
        self._judge(title, wrong + more)

        title = self._begin("The worker's key is revoked, and the agent's token dies with it", f"{COMPLETIONS}")
        code, delay = await delegation.until_ended(
            session, self._url, token, lambda: self._directory.keys.revoke(key["id"], "demo")
        )
        click.echo(f"   < {code}, at most {delay * 1000:.1f} ms after the commit")
        is_ended = code == "401 api_key_revoked" and delay <= delegation.ENDED_SECONDS_MAX
        self._judge(title, [] if is_ended else [f"{code} after {delay:.3f} s"])

    def _begin(self, title: str, request: str) -> str:
        """Print the title and the request of the next step. Returns the title."""
        self._steps += 1
        click.echo(f"\n{self._steps}. {title}\n   > POST {request}")
        return title

    async def _call(self, headers: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        job = {"job_id": "42", "payload": {"model": "small"}}
        async with self._session.post(self._url + JOBS, json=job, headers=headers) as response:
            return response.status, await response.json(content_type=None)

    def _judge(self, title: str, wrong: list[str]) -> None:
        if wrong:
            self.failures.append(title)
            click.echo(f"   FAILED: {'; '.join(wrong)}")
        else:
            click.echo("   ok")


def _brief(saw: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    return [(name.removeprefix("X-Keyproxy-"), "+".join(values) or "-") for name, values in saw.items()]


def own_command() -> str:
    """The command that runs keyproxy from any directory, in the environment of the shell that started the demo."""
    script = Path(sys.argv[0])
    if script.name != "keyproxy" or not script.is_file():
        return f"{shlex.quote(sys.executable)} -m keyproxy"
    found = shutil.which("keyproxy")
    return "keyproxy" if found is not None and script.samefile(found) else shlex.quote(str(script.absolute()))
