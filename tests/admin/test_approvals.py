"""Operators decide on calls and grant consents: by the command line, from the database or the API, and by the API."""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Any

import pytest

from keyproxy.ai.tools.tool_call import ToolClaim
from keyproxy.config.schema import Cache
from keyproxy.config.tools.tool_settings import ApprovalSettings, ToolRow, consent_warnings
from keyproxy.model import TimeBudget
from keyproxy.platform import clock
from keyproxy.ports.tools import ApprovalRequest
from keyproxy.reasons import Refusal
from keyproxy.store.approvals.approval_store import ApprovalStore
from keyproxy.store.approvals.consent_cache import ConsentCache
from keyproxy.store.identities.cache import FeedState
from tests import fakes
from tests.admin.conftest import Api
from tests.admin.test_commands import Run, run

__all__ = ["run"]

BY = pytest.mark.parametrize("by", ["database", "api"])


async def claim(
    api: Api, call: str = "pay 100", *, kind: str = "human", user: str = "u_1", tenant: str = "acme"
) -> ToolClaim | Refusal:
    """What a proxy gets for this call."""
    consents = ConsentCache(api.database, api.database, Cache(), feed=FeedState(), now=clock.now)
    store = ApprovalStore(api.database, api.database, consents, clock.now, rules=ApprovalSettings())
    summary = json.dumps({"tool": "pay", "arguments": {"call": call, "evil": "\x1b[2J\u202e"}}).encode()
    asked = ApprovalRequest(
        hashlib.sha256(call.encode()).digest(), fakes.identity(user, tenant), "pay", kind, summary, "192.0.2.1"
    )
    try:
        return await store.claim(asked, TimeBudget())
    except Refusal as refusal:
        return refusal


async def requested(api: Api, call: str = "pay 100", **more: str) -> str:
    """The id of a new, pending approval."""
    refusal = await claim(api, call, **more)
    assert isinstance(refusal, Refusal)
    assert refusal.members is not None
    return str(refusal.members["approval_id"])


async def state_of(api: Api, call: str = "pay 100", **more: str) -> str:
    got = await claim(api, call, **more)
    if isinstance(got, ToolClaim):
        return "used"
    assert got.members is not None
    return str(got.members["approval_state"])


@BY
async def test_approved_call_can_be_made_once(run: Run, api: Api, by: str) -> None:
    await api.user()
    approval = await requested(api)
    listed = await run("approval", "list", "--state", "pending", "--user", "u_1", "--tenant", "acme", "--json", by=by)
    assert [row["id"] for row in json.loads(listed.out)] == [approval]
    approved = await run("approval", "approve", approval, "--reason", "order 4711", "--json", by=by)
    assert approved.status == 0
    content = json.loads(approved.out)
    assert (content["state"], content["reason"], content["kind"]) == ("approved", "order 4711", "human")
    again = await run("approval", "approve", approval, "--json", by=by)
    assert json.loads(again.out) == content
    assert await state_of(api) == "used"
    assert await state_of(api) == "pending"
    late = await run("approval", "approve", approval, by=by)
    assert (late.status, late.out) == (1, "")
    assert "used" in late.err


@BY
async def test_denied_call_is_refused_and_an_approval_is_withdrawn(run: Run, api: Api, by: str) -> None:
    await api.user()
    approval = await requested(api)
    assert (await run("approval", "approve", approval, by=by)).status == 0
    denied = await run("approval", "deny", approval, "--reason", "no", "--json", by=by)
    assert json.loads(denied.out)["state"] == "denied"
    assert await state_of(api) == "denied"
    assert (await run("approval", "deny", approval, by=by)).status == 0
    refused = await run("approval", "approve", approval, by=by)
    assert (refused.status, refused.out) == (1, "")


@BY
async def test_approver_sees_the_call_without_control_characters(run: Run, api: Api, by: str) -> None:
    await api.user()
    shown = await run("approval", "show", await requested(api), by=by)
    assert shown.status == 0
    assert '"call": "pay 100"' in shown.out
    assert "\x1b" not in shown.out
    assert "\u202e" not in shown.out
    assert "\\u202e" in shown.out
    raw = json.loads((await run("approval", "show", await requested(api), "--json", by=by)).out)
    assert raw["summary"]["arguments"]["call"] == "pay 100"
    assert raw["summary"]["key_hint"] is None
    table = await run("approval", "list", by=by)
    assert "pending" in table.out
    assert (await run("approval", "show", "apr_x", by=by)).status == 1
    assert (await run("approval", "list", "--state", "nothing", by=by)).status == 2


@BY
async def test_approval_of_kind_consent_can_grant_a_consent(run: Run, api: Api, by: str) -> None:
    await api.user()
    approval = await requested(api, kind="consent")
    done = await run("approval", "approve", approval, "--consent-for", "30d", "--json", by=by)
    consent = json.loads(done.out)["consent"]
    assert (consent["user"], consent["tool"], consent["agent"]) == ("u_1", "pay", None)
    listed = await run("consent", "list", "--user", "u_1", "--state", "live", "--tool", "pay", "--json", by=by)
    assert [row["id"] for row in json.loads(listed.out)] == [consent["id"]]
    other = await requested(api, "pay 200")
    refused = await run("approval", "approve", other, "--consent-for", "30d", by=by)
    assert (refused.status, refused.out) == (1, "")
    assert await state_of(api, "pay 200") == "pending"


@BY
async def test_consent_is_granted_listed_and_revoked(run: Run, api: Api, by: str) -> None:
    await api.user()
    granted = await run(
        "consent", "grant", "--user", "u_1", "--tool", "crm.update", "--agent", "crawler", "--expires-in", "30d",
        "--json", by=by,
    )  # fmt: skip
    consent = json.loads(granted.out)
    assert (consent["state"], consent["agent"], consent["tool"]) == ("live", "crawler", "crm.update")
    assert "crm.update" in (await run("consent", "list", "--tenant", "acme", by=by)).out
    revoked = await run("consent", "revoke", consent["id"], "--json", by=by)
    assert json.loads(revoked.out)["state"] == "revoked"
    assert json.loads((await run("consent", "list", "--state", "live", "--json", by=by)).out) == []
    for arguments, status in (
        (("consent", "grant", "--user", "u_none", "--tool", "x", "--expires-in", "1d"), 1),
        (("consent", "grant", "--user", "u_1", "--tool", "a b", "--expires-in", "1d"), 1),
        (("consent", "grant", "--user", "u_1", "--tool", "x", "--expires-in", "367d"), 1),
        (("consent", "grant", "--user", "u_1", "--tool", "x", "--agent", "a b", "--expires-in", "1d"), 2),
        (("consent", "grant", "--user", "u_1", "--tool", "x"), 2),
        (("consent", "revoke", "cns_x"), 1),
    ):
        refused = await run(*arguments, by=by)
        assert (refused.status, refused.out) == (status, ""), arguments


@BY
async def test_consent_without_effect_is_granted_with_a_warning(run: Run, api: Api, by: str) -> None:
    await api.user()
    granted = await run("consent", "grant", "--user", "u_1", "--tool", "crm.updat", "--expires-in", "1d", by=by)
    assert granted.status == 0
    assert "warning: no row of [[tools]] has the name 'crm.updat': the consent has no effect" in granted.err


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("crm.update", None),
        ("pay", "the tool 'pay' has approval = 'human': the consent has no effect"),
        ("search", "the tool 'search' has approval = 'none': the consent has no effect"),
        ("update_contact", "no row of [[tools]] has the name 'update_contact': the consent has no effect"),
    ],
)
def test_consent_has_an_effect_only_on_tools_of_kind_consent(name: str, warning: str | None) -> None:
    tools = [
        ToolRow("crm.update", mcp="update_contact", approval="consent"),
        ToolRow("pay", approval="human"),
        ToolRow("search"),
    ]
    assert consent_warnings(tools, name) == ([] if warning is None else [warning])


async def test_lists_print_all_pages_the_same_with_and_without_the_api(run: Run, api: Api) -> None:
    for number in range(30):
        await api.user(f"u_{number}", f"t_{number % 2}")
        for call in range(20):
            await requested(api, f"{number} {call}", user=f"u_{number}", tenant=f"t_{number % 2}")
    direct, remote = await run("approval", "list", "--json"), await run("approval", "list", "--json", by="api")
    assert direct.out == remote.out
    assert len(json.loads(direct.out)) == 600


# -- the API: scopes, tenants, repetitions


async def test_each_scope_allows_what_it_names(api: Api) -> None:
    await api.user()
    plain, special = await requested(api), await requested(api, "shell", kind="admin")
    read, write, admin = [await api.token(f"approvals:{right}") for right in ("read", "write", "admin")]
    consent = {"user": "u_1", "tool": "pay", "expires_in_seconds": 60}

    async def codes(method: str, path: str, content: object = None) -> list[str]:
        tokens = (read, write, admin, await api.token("keys:write"))
        replies = [await api.call(method, path, content, token=token) for token in tokens]
        return [reply.code or str(reply.status) for reply in replies]

    no = "insufficient_scope"
    assert await codes("GET", "/v1/approvals") == ["200", no, no, no]
    assert await codes("GET", f"/v1/approvals/{plain}") == ["200", no, no, no]
    assert await codes("GET", "/v1/consents") == ["200", no, no, no]
    assert await codes("POST", f"/v1/approvals/{special}/approve") == [no, no, "200", no]
    assert await codes("POST", f"/v1/approvals/{special}/deny") == [no, no, "200", no]
    assert await codes("POST", f"/v1/approvals/{plain}/approve") == [no, "200", "200", no]
    assert await codes("POST", f"/v1/approvals/{plain}/deny", {"reason": "x"}) == [no, "200", "200", no]
    assert await codes("POST", "/v1/consents", consent) == [no, "201", "201", no]
    challenge = (await api.call("POST", f"/v1/approvals/{special}/approve", token=write)).headers["WWW-Authenticate"]
    assert 'scope="approvals:admin"' in challenge


async def test_token_of_a_tenant_sees_and_decides_only_calls_of_its_tenant_and_none_of_kind_admin(api: Api) -> None:
    await api.user()
    await api.user("u_2", "other")
    mine = await requested(api)
    foreign = await requested(api, "theirs", user="u_2", tenant="other")
    special = await requested(api, "shell", kind="admin")
    token = await api.token("approvals:read", "approvals:admin", tenant="acme")
    listed = (await api.done("GET", "/v1/approvals", token=token))["items"]
    assert {row["id"] for row in listed} == {mine, special}
    assert (await api.done("GET", "/v1/approvals?tenant=other", token=token))["items"] == []
    for path in (f"/v1/approvals/{foreign}", f"/v1/approvals/{foreign}/approve", f"/v1/approvals/{foreign}/deny"):
        method = "GET" if path.endswith(foreign) else "POST"
        assert (await api.call(method, path, token=token)).status == 404
    for decision in ("approve", "deny"):
        refused = await api.call("POST", f"/v1/approvals/{special}/{decision}", token=token)
        assert (refused.status, refused.code) == (403, "tenant_bound")
    assert (await api.done("POST", f"/v1/approvals/{mine}/approve", token=token))["state"] == "approved"
    grant = {"user": "u_2", "tool": "pay", "expires_in_seconds": 60}
    assert (await api.call("POST", "/v1/consents", grant, token=token)).status == 404
    assert await state_of(api, "theirs", user="u_2", tenant="other") == "pending"


async def test_repeated_decision_changes_nothing_and_the_other_one_conflicts(api: Api) -> None:
    await api.user()
    approval = await requested(api)
    sent = {"Idempotency-Key": secrets.token_hex(8)}
    first = await api.call("POST", f"/v1/approvals/{approval}/approve", {"reason": "ok"}, headers=sent)
    replayed = await api.call("POST", f"/v1/approvals/{approval}/approve", {"reason": "ok"}, headers=sent)
    assert (replayed.json, replayed.headers["Idempotency-Replayed"]) == (first.json, "true")
    again = await api.call("POST", f"/v1/approvals/{approval}/approve", {"reason": "another"})
    assert (again.status, again.json) == (200, first.json)
    assert await state_of(api) == "used"
    conflict = await api.call("POST", f"/v1/approvals/{approval}/deny")
    assert (conflict.status, conflict.code) == (409, "conflict")
    rows = await api.audit(entity="approval", entity_id=approval)
    assert [(row["action"], row["after"]["state"]) for row in rows] == [
        ("update", "used"), ("update", "approved"), ("insert", "pending"),
    ]  # fmt: skip
    assert all("summary" not in row["after"] and "claim" not in row["after"] for row in rows)


@pytest.mark.parametrize(
    "content",
    [
        {"user": "u_1", "tool": "pay"}, {"user": "u_1", "tool": "p y", "expires_in_seconds": 1},
        {"user": "u_1", "tool": "pay", "expires_in_seconds": 0},
        {"user": "u_1", "tool": "pay", "expires_in_seconds": 31622401},
        {"user": "u_1", "tool": "pay", "expires_in_seconds": 60, "agent": "a b"},
        {"tool": "pay", "expires_in_seconds": 60},
    ],
    ids=range(6),
)  # fmt: skip
async def test_invalid_consents_are_refused(api: Api, content: dict[str, Any]) -> None:
    await api.user()
    refused = await api.call("POST", "/v1/consents", content)
    assert (refused.status, refused.code) == (422, "invalid")
