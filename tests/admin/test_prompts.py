"""Prompt templates are registered, listed and removed: the same from the database and through the admin API."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest

from keyproxy.cli import main
from keyproxy.cli.remote.admin_client import AdminClient
from keyproxy.cli.remote.remote_directory import RemoteDirectory
from keyproxy.store.directory.directory import Conflict, Invalid, NotFound
from keyproxy.store.directory.interface import DirectoryOperations
from tests.admin.conftest import FILE_TOKEN, Api

ONE, TWO = "01" * 32, "ab" * 32


@pytest.fixture(params=["database", "api"])
async def operations(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[DirectoryOperations]:
    """Each implementation of the port."""
    if request.param == "database":
        yield api.directory
        return
    async with AdminClient(api.url, FILE_TOKEN) as client:
        yield RemoteDirectory(client)


async def test_a_prompt_is_registered_changed_listed_and_removed(operations: DirectoryOperations, api: Api) -> None:
    await api.user("u_1")
    made = await operations.prompts.register(TWO.upper(), "code", name="Coder")
    assert (made["digest"], made["category"], made["name"], made["tenant"]) == (TWO, "code", "Coder", None)
    assert made["created"]
    changed = await operations.prompts.register(TWO, "chat")
    assert (changed["category"], changed["name"], changed["created"]) == ("chat", "Coder", False)
    assert (await operations.prompts.register(TWO, "chat", name=""))["name"] == ""
    await operations.prompts.register(ONE, "code", tenant_id="acme")
    first = await operations.prompts.list_page(None, 1)
    assert [(one["digest"], one["tenant"]) for one in first.items] == [(ONE, "acme")]
    rest = await operations.prompts.list_page(first.next, 500)
    assert [one["digest"] for one in rest.items] == [TWO]
    assert rest.next is None
    assert await operations.prompts.remove(ONE) == {"digest": ONE, "deleted": True}
    with pytest.raises(NotFound):
        await operations.prompts.remove(ONE)


async def test_a_digest_of_another_tenant_is_a_conflict(operations: DirectoryOperations, api: Api) -> None:
    await api.user("u_1", "acme")
    await api.user("u_2", "other")
    await operations.prompts.register(ONE, "code", tenant_id="acme")
    await operations.prompts.register(TWO, "code")
    for digest, tenant in ((ONE, "other"), (ONE, None), (TWO, "acme")):
        with pytest.raises(Conflict):
            await operations.prompts.register(digest, "chat", tenant_id=tenant)
    page = await operations.prompts.list_page(None, 10)
    assert [(one["category"], one["tenant"]) for one in page.items] == [("code", "acme"), ("code", None)]


async def test_invalid_prompts_are_refused(operations: DirectoryOperations) -> None:
    for digest, category in ((ONE, "Code"), (ONE, "a b"), (ONE, ""), (ONE[:-1], "code"), ("x" * 64, "code")):
        with pytest.raises(Invalid):
            await operations.prompts.register(digest, category)
    with pytest.raises(NotFound):
        await operations.prompts.register(ONE, "code", tenant_id="nowhere")
    with pytest.raises(NotFound):
        await operations.prompts.remove("nothing")


async def test_more_than_10_000_templates_are_a_conflict(api: Api, sql: asyncpg.Connection[asyncpg.Record]) -> None:
    await api.directory.prompts.register(ONE, "code")
    await sql.execute(
        "INSERT INTO keyproxy.prompt_templates"
        " SELECT sha256(number::text::bytea), 'code' FROM generate_series(1, 9999) AS number"
    )
    with pytest.raises(Conflict):
        await api.directory.prompts.register(TWO, "code")
    await api.directory.prompts.register(ONE, "chat")


async def test_the_api_registers_with_put_and_names_what_is_wrong(api: Api) -> None:
    path = f"/v1/prompts/{ONE}"
    made = await api.call("PUT", path, {"category": "code", "name": "Coder"})
    assert (made.status, made.headers["Location"]) == (201, path)
    assert made.json["warnings"] == [
        "no row of [[categories]] has the name 'code': prompts with this category are refused"
    ]
    again = await api.call("PUT", path, {"category": "code"})
    assert (again.status, again.json["name"], again.headers["ETag"]) == (200, "Coder", made.headers["ETag"])
    assert (await api.call("GET", path)).json["category"] == "code"
    await api.user("u_1", "acme")
    assert (await api.call("PUT", path, {"category": "code", "tenant": "acme"})).code == "conflict"
    assert (await api.call("PUT", "/v1/prompts/00", {"category": "code"})).code == "invalid"
    assert (await api.call("PUT", path, {"category": "Code"})).code == "invalid"
    assert (await api.call("PUT", path, {})).code == "invalid"
    assert (await api.call("GET", "/v1/prompts/00")).code == "not_found"
    removed = await api.call("DELETE", path)
    assert (removed.status, removed.json) == (200, {"digest": ONE, "deleted": True})
    assert (await api.call("DELETE", path)).code == "not_found"


@pytest.mark.parametrize(
    ("scopes", "tenant", "read", "write"),
    [
        (["keys:read"], None, "", "insufficient_scope"),
        (["access:write"], None, "insufficient_scope", ""),
        (["admin:write"], "acme", "tenant_bound", "tenant_bound"),
        (["access:write", "keys:read"], "acme", "tenant_bound", "tenant_bound"),
    ],
)
async def test_prompts_need_their_scopes_and_an_unbound_token(
    api: Api, scopes: list[str], tenant: str | None, read: str, write: str
) -> None:
    await api.user("u_1", "acme")
    token = await api.token(*scopes, tenant=tenant)
    for method, path, body, code in (
        ("PUT", f"/v1/prompts/{ONE}", {"category": "code"}, write),
        ("GET", "/v1/prompts", None, read),
        ("GET", f"/v1/prompts/{TWO}", None, read or "not_found"),
        ("DELETE", f"/v1/prompts/{TWO}", None, write or "not_found"),
    ):
        assert (await api.call(method, path, body, token=token)).code == code, (method, path)


async def test_every_change_of_a_template_is_in_the_audit_log_with_its_actor(
    operations: DirectoryOperations, api: Api
) -> None:
    await operations.prompts.register(ONE, "code")
    await operations.prompts.register(ONE, "code")
    await operations.prompts.register(ONE, "chat")
    await operations.prompts.remove(ONE)
    rows = (await api.done("GET", "/v1/audit?entity=template"))["items"]
    assert [(row["action"], row["entity_id"], row["changed"]) for row in rows] == [
        ("delete", ONE, []),
        ("update", ONE, ["category"]),
        ("insert", ONE, []),
    ]
    assert len({row["actor"] for row in rows}) == 1


# -- commands


class Printed(NamedTuple):
    """A command's exit status and output."""

    status: int
    out: str
    err: str


Run = Callable[..., Any]


@pytest.fixture
def run(api: Api, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`await run(*arguments, by="database" or "api")`: a command, in this process."""
    config, nothing = tmp_path / "keyproxy.toml", tmp_path / "nothing.toml"
    config.write_text(f'[store]\ndsn = {json.dumps(dsn)}\n[[categories]]\nname = "code"\n')
    nothing.write_text('[store]\ndsn = "postgresql://nowhere.invalid/x"\n')
    monkeypatch.setenv("KEYPROXY_ADMIN_TOKEN", FILE_TOKEN)

    async def running(*arguments: str, by: str = "database") -> Printed:
        where = ["--config", str(config)]
        if by == "api":
            where = ["--config", str(nothing), "--admin-url", api.url]
        status = await asyncio.to_thread(main, [*arguments, *where])
        return Printed(status, *capsys.readouterr())

    return running


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


BODY = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "instructions": "A",
}


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ("Be brief.", ["FILE"], digest("Be brief.")),
        ("Be brief.\n", ["FILE"], digest("Be brief.\n")),
        ("", ["FILE"], digest()),
        ("\u00e9\u20ac", ["FILE"], digest("\u00e9\u20ac")),
        (json.dumps(BODY), ["--body", "FILE", "--prompt", "openai"], digest("Be brief.", "A")),
        ('{"messages": [], "system": "S"}', ["--body", "FILE", "--prompt", "anthropic"], digest("S")),
        ('{"system_instruction": {"parts": {"text": "S"}}}', ["--body", "FILE", "--prompt", "gemini"], digest("S")),
        ("", ["--stored", "pmpt_1", "--version", "2"], digest("\0pmpt_1:2")),
    ],
)
async def test_each_form_of_input_gives_the_digest_of_the_request(
    run: Run, tmp_path: Path, content: str, arguments: list[str], expected: str
) -> None:
    file = tmp_path / "input"
    file.write_text(content, encoding="utf-8", newline="")
    named = [str(file) if argument == "FILE" else argument for argument in arguments]
    printed = await run("prompt", "digest", *named, "--json")
    assert (printed.status, json.loads(printed.out)) == (0, {"digest": expected})
    assert ("newline" in printed.err) is content.endswith("\n")
    assert (await run("prompt", "digest", *named)).out == f"{expected}\n"
    for by in ("database", "api"):
        registered = await run("prompt", "register", *named, "--category", "code", "--json", by=by)
        assert registered.status == 0, registered.err
        assert json.loads(registered.out)["digest"] == expected
    listed = await run("prompt", "list", "--json")
    assert [one["digest"] for one in json.loads(listed.out)] == [expected]


async def test_a_digest_is_registered_and_removed_by_itself(run: Run) -> None:
    assert (await run("prompt", "register", "--digest", ONE.upper(), "--category", "code", "--name", "N")).status == 0
    for by in ("database", "api"):
        (shown,) = json.loads((await run("prompt", "list", "--json", by=by)).out)
        assert (shown["digest"], shown["category"], shown["name"], shown["tenant"]) == (ONE, "code", "N", None)
        assert json.loads((await run("prompt", "show", ONE, "--json", by=by)).out) == shown
    conflict = await run("prompt", "register", "--digest", ONE, "--category", "code", "--tenant", "acme")
    assert conflict.status == 1
    assert len(conflict.err.splitlines()) == 1
    assert (await run("prompt", "remove", ONE, "--json")).out == f'{{"digest":"{ONE}","deleted":true}}\n'
    assert (await run("prompt", "remove", ONE, "--yes", by="api")).status == 1


async def test_a_category_that_is_not_configured_causes_a_warning(run: Run) -> None:
    for by in ("database", "api"):
        assert "warning" in (await run("prompt", "register", "--digest", ONE, "--category", "other", by=by)).err
    assert "warning" not in (await run("prompt", "register", "--digest", ONE, "--category", "code")).err


@pytest.mark.parametrize(
    ("content", "arguments", "status"),
    [
        ("a", [], 2),
        ("a", ["FILE", "--digest", ONE], 2),
        ("{}", ["--body", "FILE"], 2),
        ("a", ["FILE", "--prompt", "openai"], 2),
        ("a", ["--stored", "p"], 2),
        ("a", ["--version", "1"], 2),
        ("a", ["--stored", "p:1", "--version", "1"], 2),
        ("a", ["--digest", "00"], 2),
        ("a\0b", ["FILE"], 1),
        ("[]", ["--body", "FILE", "--prompt", "openai"], 1),
        ("{", ["--body", "FILE", "--prompt", "openai"], 1),
        ('{"instructions": "a", "instructions": "b"}', ["--body", "FILE", "--prompt", "openai"], 1),
        ('{"instructions": 7}', ["--body", "FILE", "--prompt", "openai"], 1),
        ('{"prompt": {"id": "p"}}', ["--body", "FILE", "--prompt", "openai"], 1),
        ('{"instructions": "a\\u0000"}', ["--body", "FILE", "--prompt", "openai"], 1),
        ('{"systemInstruction": "a", "system_instruction": "a"}', ["--body", "FILE", "--prompt", "gemini"], 1),
    ],
)
async def test_what_cannot_be_registered_is_refused_with_its_reason(
    run: Run, tmp_path: Path, content: str, arguments: list[str], status: int
) -> None:
    file = tmp_path / "input"
    file.write_text(content, encoding="utf-8")
    named = [str(file) if argument == "FILE" else argument for argument in arguments]
    printed = await run("prompt", "register", *named, "--category", "code")
    assert (printed.status, printed.out) == (status, "")
    assert printed.err
    if status == 1:
        assert len(printed.err.splitlines()) == 1
    assert json.loads((await run("prompt", "list", "--json")).out) == []


async def test_a_prompt_is_read_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Be brief.")))
    assert (await run("prompt", "digest", "-")).out == f"{digest('Be brief.')}\n"
