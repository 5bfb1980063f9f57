"""The pages: no scripts, three languages, and names of others that change nothing but their own place."""

from __future__ import annotations

import ast
import base64
import dataclasses
import hashlib
import re
import string
from collections.abc import Mapping
from pathlib import Path

import pytest

from keyproxy.authorize.browser.authorization_request import AuthorizationRequest
from keyproxy.authorize.browser.pages.consent_page import ConsentForm, consent_page
from keyproxy.authorize.browser.pages.display import visible
from keyproxy.authorize.browser.pages.error_page import error_page
from keyproxy.authorize.browser.pages.error_texts import ERRORS, TITLE
from keyproxy.authorize.browser.pages.page_texts import TEXTS
from keyproxy.authorize.endpoint import PageError
from keyproxy.config.oauth.oauth_settings import LANGUAGES
from keyproxy.oauth.client import Client, ClientKind
from tests.authorize.authority import Authority
from tests.authorize.browser.browser import Browser

AUTHORIZE = Path(__file__).parents[3] / "keyproxy" / "authorize"

REQUEST = AuthorizationRequest(
    client_id="acme", redirect_uri="https://acme.example/cb", state="s", challenge="c" * 43,
    resource="https://mcp.example.com/mcp", is_test=False, scopes=("jobs:write",),
)  # fmt: skip


def consent(
    name: str = "Acme",
    redirect_uri: str = REQUEST.redirect_uri,
    kind: ClientKind = ClientKind.VALUE,
    language: str = "en",
) -> str:
    client = Client("acme", "acme", kind, name, (redirect_uri,))
    request = dataclasses.replace(REQUEST, redirect_uri=redirect_uri)
    return consent_page(ConsentForm("t", client, "u_42", ("jobs:write",), request), language).text or ""


def texts() -> Mapping[str, Mapping[str, str]]:
    return {**TEXTS, **ERRORS, "title": TITLE}


def test_every_text_exists_in_every_language_with_the_same_values() -> None:
    for name, by_language in texts().items():
        assert set(by_language) == set(LANGUAGES), name
        values = {
            frozenset(value for _, value, *_ in string.Formatter().parse(text) if value)
            for text in by_language.values()
        }
        assert len(values) == 1, name
        assert all(text.strip() for text in by_language.values()), name


def test_every_page_error_has_a_text() -> None:
    for path in AUTHORIZE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "PageError" and len(node.args) > 1:
                for name in ast.walk(node.args[1]):
                    if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.isidentifier():
                        assert name.value in ERRORS, f"{path.name}: {name.value}"


def test_names_of_others_are_shown_as_text_without_invisible_characters() -> None:
    hostile = "<script>alert(1)</script>\"'&\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH SPACE}\0\r\n{client}"
    page = consent(hostile)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp; {client}" in page
    assert not any(character in page for character in "\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH SPACE}\0")
    error = error_page(PageError(403, "subject_unlinked", values={"issuer": "<b>", "subject": "{x}"}), "en").text or ""
    assert "&lt;b&gt;" in error
    assert "{x}" in error


def test_visible_text_is_bounded() -> None:
    assert visible("a" * 300) == "a" * 199 + "…"
    assert visible("a" * 200) == "a" * 200
    assert visible("e" + "\N{COMBINING TILDE OVERLAY}" * 50) == "e" + "\N{COMBINING TILDE OVERLAY}" * 3
    assert visible("\N{ZERO WIDTH SPACE}\n") == ""


@pytest.mark.parametrize(("uri", "shown", "is_on_device"), [
    ("https://acme.example/cb", "acme.example", False),
    ("https://acme.example:8443/cb", "acme.example", False),
    ("http://127.0.0.1:1234/cb", "127.0.0.1", True),
    ("com.acme.app:/cb", "com.acme.app:", True),
])  # fmt: skip
def test_consent_shows_where_access_goes(uri: str, shown: str, is_on_device: bool) -> None:
    page = consent(redirect_uri=uri)
    assert f'<p class="host"><bdi>{shown}</bdi></p>' in page
    assert (TEXTS["loopback"]["en"] in page) is is_on_device


@pytest.mark.parametrize("kind", ClientKind)
def test_only_listed_clients_are_shown_as_verified(kind: ClientKind) -> None:
    assert ("not verified" in consent(kind=kind)) is (kind is not ClientKind.LISTED)


def test_allow_and_deny_look_alike() -> None:
    buttons = re.findall(r"<button([^>]*)>", consent())
    assert [re.sub(r'value="\w+"', "", button) for button in buttons] == [' name="decision" '] * 2


async def test_every_page_is_confined_and_runs_no_script(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    login = await browser.authorize(await browser.client())
    consent = await browser.sign_in(login, user["key"]["secret"])
    failed = await browser.sign_in(login, "wrong")
    error = await browser.authorize("unknown")
    for page in (login, consent, failed, error, await browser.get("/oauth/connections")):
        (style,) = re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert page.headers["Content-Security-Policy"] == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; frame-ancestors 'none'"
        )
        for name, value in (
            ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"), ("Content-Type", "text/html; charset=utf-8"),
        ):  # fmt: skip
            assert page.headers[name] == value
        assert "Access-Control-Allow-Origin" not in page.headers
        assert "<script" not in page.text
        assert " style=" not in page.text
        assert not re.search(r"\son\w+=", page.text)


#: `ui_locales`, Accept-Language, and the language of the pages.
PREFERENCES = [
    (None, "", "en"),
    (None, "ko-KR,ko;q=0.9,en;q=0.8", "ko"),
    (None, "en;q=0.5, ja;q=0.8", "ja"),
    (None, "ko;q=0, ja;q=nonsense, de", "en"),
    ("ja", "ko", "ja"),
    ("fr ko-KR en", "ja", "ko"),
    ("fr", "ja", "ja"),
]


async def test_pages_are_in_the_language_of_the_user(authority: Authority) -> None:
    for ui_locales, accepted, language in PREFERENCES:
        browser = Browser(authority, language=accepted)
        login = await browser.authorize(await browser.client(), ui_locales=ui_locales)
        assert f'<html lang="{language}">' in login.text
        assert TEXTS["login_button"][language] in login.text
        # So is the page after it, which the browser asks for without `ui_locales`.
        assert f'<html lang="{language}">' in (await browser.sign_in(login, "wrong")).text


async def test_use_another_account_begins_the_same_request_again(authority: Authority) -> None:
    user, other = await authority.user(), await authority.user("u_43")
    browser = Browser(authority)
    client_id = await browser.client()
    consent = await browser.sign_in(await browser.authorize(client_id), user["key"]["secret"])
    (link,) = re.findall(r'href="([^"]*)"', consent.text)
    login = await browser.get(link.replace("&amp;", "&"))
    second = await browser.sign_in(login, other["key"]["secret"])
    assert "u_43" in second.text
    assert "u_42" not in second.text
    reply = await browser.decide(second)
    assert reply.location.query["state"] == "a state & more=1"
