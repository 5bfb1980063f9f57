"""Random changes and requests that act: never another tenant, never a disabled user, never more than the ceilings allow.

The rules of the model are those of docs/agents.md, written in Python; the statements, the cache and the feed are real.
After each poll of the feed, a request must be decided as the tables are now.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyproxy.auth import authorization
from keyproxy.model import Identity, Route
from keyproxy.reasons import Reason, Refusal
from tests import fakes
from tests.store.conftest import MakeRig
from tests.store.harness import Rig

_ROUTE = Route("*", frozenset())
_SCOPES = ("a", "b", "c")
_ROLES = {"ra": {"a"}, "rab": {"a", "b"}, "rc": {"c"}}
_TENANTS = ("t_1", "t_2")
_USERS = ("u_1", "u_2", "u_3", "u_4")
_KEYS = (1, 2)

_EXAMPLES = int(os.environ.get("KEYPROXY_TEST_SEEDS", "4")) * 15

_SETUP = f"""
INSERT INTO keyproxy.tenants (id) SELECT unnest('{{{",".join(_TENANTS)}}}'::text[]);
INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_1', 't_1'), ('u_2', 't_1'), ('u_3', 't_2');
INSERT INTO keyproxy.roles (id, scopes) VALUES ('ra', '{{a}}'), ('rab', '{{a,b}}'), ('rc', '{{c}}');
"""


@dataclass
class _Tables:
    """What the tables contain, in the model."""

    tenants: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {tenant: {"is_disabled": False, "roles": None} for tenant in _TENANTS}
    )
    users: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            user: {"tenant": tenant, "is_disabled": False, "roles": None}
            for user, tenant in (("u_1", "t_1"), ("u_2", "t_1"), ("u_3", "t_2"))
        }
    )
    keys: dict[int, dict[str, Any]] = field(
        default_factory=lambda: {
            1: {"user": "u_1", "acts": True, "is_revoked": False, "scopes": ["a", "b"], "roles": []},
            2: {"user": "u_3", "acts": False, "is_revoked": False, "scopes": ["c"], "roles": ["rab"]},
        }
    )

    def expected(self, number: int, user: str | None) -> Reason | tuple[str, str, frozenset[str]]:
        """The refusal of a request, or its user, tenant and effective scopes."""
        key = self.keys.get(number)
        if key is None or key["user"] not in self.users:
            return Reason.KEY_INVALID
        owner = self.users[key["user"]]
        tenant = self.tenants[owner["tenant"]]
        if key["is_revoked"]:
            return Reason.KEY_REVOKED
        if owner["is_disabled"] or tenant["is_disabled"]:
            return Reason.ACCOUNT_DISABLED
        scopes = {*key["scopes"], *_of_roles(key["roles"])}
        ceilings = [owner["roles"], tenant["roles"]]
        if user is None:
            return key["user"], owner["tenant"], _within(scopes, ceilings)
        principal = self.users.get(user)
        if not key["acts"] or principal is None or principal["tenant"] != owner["tenant"] or principal["is_disabled"]:
            return Reason.DELEGATION_REFUSED
        return user, owner["tenant"], _within(scopes, [*ceilings, principal["roles"]])


def _of_roles(roles: list[str]) -> set[str]:
    return {scope for role in roles for scope in _ROLES.get(role, set())}


def _within(scopes: set[str], ceilings: list[list[str] | None]) -> frozenset[str]:
    for ceiling in ceilings:
        if ceiling is not None:
            scopes = scopes & _of_roles(ceiling)
    return frozenset(scopes)


_user, _key, _tenant = st.sampled_from(_USERS), st.sampled_from(_KEYS), st.sampled_from(_TENANTS)
_roles = st.lists(st.sampled_from([*_ROLES, "unknown"]), max_size=2, unique=True)
_ceiling = st.none() | _roles

#: One step: its kind and arguments.
_STEP = st.one_of(
    st.tuples(st.just("use"), _key, st.none() | _user),
    st.tuples(st.just("use"), _key, _user),
    st.tuples(st.just("use"), _key, _user),
    st.tuples(st.just("acts"), _key, st.booleans()),
    st.tuples(st.just("revoke"), _key, st.booleans()),
    st.tuples(st.just("owner"), _key, _user),
    st.tuples(st.just("scopes"), _key, st.lists(st.sampled_from(_SCOPES), unique=True)),
    st.tuples(st.just("key_roles"), _key, _roles),
    st.tuples(st.just("move"), _user, _tenant),
    st.tuples(st.just("disable_user"), _user, st.booleans()),
    st.tuples(st.just("disable_tenant"), _tenant, st.booleans()),
    st.tuples(st.just("user_ceiling"), _user, _ceiling),
    st.tuples(st.just("tenant_ceiling"), _tenant, _ceiling),
    st.tuples(st.just("delete_user"), _user, st.none()),
    st.tuples(st.just("create_user"), _user, _tenant),
)


class _Machine:
    """One run: every step changes the tables and the model in the same way."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.tables = _Tables()

    async def begin(self) -> None:
        await self.rig.sql.execute(
            "DELETE FROM keyproxy.api_keys; DELETE FROM keyproxy.users; DELETE FROM keyproxy.tenants;"
            "DELETE FROM keyproxy.roles;" + _SETUP
        )
        for number, key in self.tables.keys.items():
            await self.rig.sql.execute(
                "INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes, roles, acts_for)"
                " VALUES ($1, $2, $3, $4, $5, $6)",
                f"key_{number}", key["user"], fakes.key(number).digest(), key["scopes"], key["roles"],
                "tenant" if key["acts"] else "none",
            )  # fmt: skip
        await self.rig.feed.poll()

    async def step(self, kind: str, subject: Any, value: Any) -> None:
        if kind == "use":
            await self.use(subject, value)
            return
        change = getattr(self, f"_{kind}")
        await change(subject, value)
        await self.rig.feed.poll()

    async def use(self, number: int, user: str | None) -> None:
        found = await self.rig.resolve(fakes.key(number), user)
        assert self._decided(found) == self.tables.expected(number, user), (number, user, self.tables)

    def _decided(self, found: Identity | Reason) -> Reason | tuple[str, str, frozenset[str]]:
        if isinstance(found, Reason):
            return found
        try:
            authorization.admit(found, _ROUTE, self.rig.now())
        except Refusal as refusal:
            return refusal.reason
        named = dict(line.split(": ", 1) for line in found.header_block.decode().splitlines())
        assert named["X-Keyproxy-User"] == found.user_id
        assert frozenset(named["X-Keyproxy-Scope"].split()) == found.scopes
        return found.user_id, found.tenant_id, found.scopes

    async def _write(self, statement: str, *arguments: object) -> None:
        await self.rig.sql.execute(statement, *arguments)

    async def _of_key(self, column: str, number: int, value: object) -> None:
        await self._write(f"UPDATE keyproxy.api_keys SET {column} = $1 WHERE id = $2", value, f"key_{number}")

    async def _acts(self, number: int, value: bool) -> None:
        if number in self.tables.keys:
            self.tables.keys[number]["acts"] = value
            await self._of_key("acts_for", number, "tenant" if value else "none")

    async def _revoke(self, number: int, value: bool) -> None:
        if number in self.tables.keys:
            self.tables.keys[number]["is_revoked"] = value
            revoked = "now()" if value else "NULL"
            await self._write(f"UPDATE keyproxy.api_keys SET revoked_at = {revoked} WHERE id = $1", f"key_{number}")

    async def _owner(self, number: int, user: str) -> None:
        if number in self.tables.keys and user in self.tables.users:
            self.tables.keys[number]["user"] = user
            await self._of_key("user_id", number, user)

    async def _scopes(self, number: int, value: list[str]) -> None:
        if number in self.tables.keys:
            self.tables.keys[number]["scopes"] = value
            await self._of_key("scopes", number, value)

    async def _key_roles(self, number: int, value: list[str]) -> None:
        if number in self.tables.keys:
            self.tables.keys[number]["roles"] = value
            await self._of_key("roles", number, value)

    async def _move(self, user: str, tenant: str) -> None:
        if user in self.tables.users:
            self.tables.users[user]["tenant"] = tenant
            await self._write("UPDATE keyproxy.users SET tenant_id = $1 WHERE id = $2", tenant, user)

    async def _disable(self, table: str, name: str, value: bool) -> None:
        disabled = "now()" if value else "NULL"
        await self._write(f"UPDATE keyproxy.{table} SET disabled_at = {disabled} WHERE id = $1", name)

    async def _disable_user(self, user: str, value: bool) -> None:
        if user in self.tables.users:
            self.tables.users[user]["is_disabled"] = value
            await self._disable("users", user, value)

    async def _disable_tenant(self, tenant: str, value: bool) -> None:
        self.tables.tenants[tenant]["is_disabled"] = value
        await self._disable("tenants", tenant, value)

    async def _user_ceiling(self, user: str, value: list[str] | None) -> None:
        if user in self.tables.users:
            self.tables.users[user]["roles"] = value
            await self._write("UPDATE keyproxy.users SET roles = $1 WHERE id = $2", value, user)

    async def _tenant_ceiling(self, tenant: str, value: list[str] | None) -> None:
        self.tables.tenants[tenant]["roles"] = value
        await self._write("UPDATE keyproxy.tenants SET roles = $1 WHERE id = $2", value, tenant)

    async def _delete_user(self, user: str, _value: None) -> None:
        if self.tables.users.pop(user, None) is not None:
            self.tables.keys = {number: key for number, key in self.tables.keys.items() if key["user"] != user}
            await self._write("DELETE FROM keyproxy.users WHERE id = $1", user)

    async def _create_user(self, user: str, tenant: str) -> None:
        if user not in self.tables.users:
            self.tables.users[user] = {"tenant": tenant, "is_disabled": False, "roles": None}
            await self._write("INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, $2)", user, tenant)


async def test_acting_request_is_decided_as_the_tables_are_after_each_poll(make_rig: MakeRig) -> None:
    rig = await make_rig()
    loop = asyncio.get_running_loop()

    async def run(steps: list[tuple[str, Any, Any]]) -> None:
        machine = _Machine(rig)
        await machine.begin()
        for kind, subject, value in steps:
            await machine.step(kind, subject, value)
        for number in _KEYS:
            for user in (None, *_USERS):
                await machine.use(number, user)

    @settings(max_examples=_EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(_STEP, min_size=5, max_size=40))
    def search(steps: list[tuple[str, Any, Any]]) -> None:
        asyncio.run_coroutine_threadsafe(run(steps), loop).result()

    # In a thread, because the search is not asynchronous; the steps run in the loop of the rig.
    await asyncio.to_thread(search)
