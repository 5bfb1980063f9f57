"""A browser without a window: it keeps cookies, follows no redirects, and fills in the forms of pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from tests.authorize.authority import Authority, Reply, pkce

REDIRECT_URI = "https://acme.example/cb"
STATE = "a state & more=1"


@dataclass
class Form:
    """A form of a page."""

    action: str
    fields: dict[str, str] = field(default_factory=dict)
    buttons: list[tuple[str, str]] = field(default_factory=list)
    visible: list[str] = field(default_factory=list)


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form":
            assert values["method"] == "post"
            self.forms.append(Form(values["action"]))
        elif tag == "input" and values.get("type") == "hidden":
            self.forms[-1].fields[values["name"]] = values["value"]
        elif tag == "input":
            self.forms[-1].visible.append(values["name"])
        elif tag == "button" and "name" in values:
            self.forms[-1].buttons.append((values["name"], values["value"]))


def forms_of(reply: Reply) -> list[Form]:
    """The forms of a page."""
    parser = _Forms()
    parser.feed(reply.text)
    return parser.forms


@dataclass
class Browser:
    """One browser at an authorization server."""

    authority: Authority
    cookies: dict[str, str] = field(default_factory=dict)
    language: str = "en"

    async def client(self, redirect_uri: str = REDIRECT_URI, name: str = "Acme") -> str:
        """The id of a client that registers."""
        content = {"client_name": name, "redirect_uris": [redirect_uri]}
        reply = await self.authority.call("POST", "/oauth/register", content=content)
        assert reply.status == 201, reply.body
        return str(reply.json["client_id"])

    def parameters(self, client_id: str, **changed: str | None) -> dict[str, str]:
        """The parameters of an authorization request. `changed`: None removes one."""
        parameters = {
            "response_type": "code",
            "client_id": client_id,
            "redirect_uri": REDIRECT_URI,
            "state": STATE,
            "code_challenge": pkce()[1],
            "code_challenge_method": "S256",
            "resource": self.authority.resource,
            "scope": "jobs:write",
        } | changed
        return {name: value for name, value in parameters.items() if value is not None}

    async def get(self, path: str, **more: Any) -> Reply:
        """Follow a link."""
        return self._kept(await self.authority.call("GET", path, **self._with_headers(more)))

    async def authorize(self, client_id: str, **changed: str | None) -> Reply:
        """Begin an authorization."""
        return await self.get("/oauth/authorize", query=self.parameters(client_id, **changed))

    async def submit(
        self, page: Reply, button: tuple[str, str] | None = None, *, headers: Mapping[str, str] | None = None,
        **filled: str,
    ) -> Reply:  # fmt: skip
        """Submit the first form of a page that has this button."""
        (form, *_) = [form for form in forms_of(page) if button is None or button in form.buttons]
        values = form.fields | filled | ({} if button is None else {button[0]: button[1]})
        sent = {"headers": {"Sec-Fetch-Site": "same-origin"} | dict(headers or {}), "form": values}
        return self._kept(await self.authority.call("POST", form.action, **self._with_headers(sent)))

    async def sign_in(self, page: Reply, secret: str) -> Reply:
        """Enter an API key."""
        return await self.submit(page, key=secret)

    async def decide(self, page: Reply, decision: str = "allow") -> Reply:
        """Decide about a client."""
        return await self.submit(page, ("decision", decision))

    async def code(self, client_id: str, secret: str, **changed: str | None) -> str:
        """The code of a whole flow."""
        consent = await self.sign_in(await self.authorize(client_id, **changed), secret)
        reply = await self.decide(consent)
        assert reply.status == 303, reply.text
        return reply.location.query["code"]

    def _with_headers(self, more: dict[str, Any]) -> dict[str, Any]:
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        headers = {"Accept-Language": self.language} | ({"Cookie": cookie} if cookie else {})
        return more | {"headers": headers | dict(more.get("headers") or {})}

    def _kept(self, reply: Reply) -> Reply:
        for name, value in reply.cookies.items():
            if value:
                self.cookies[name] = value
            else:
                self.cookies.pop(name, None)
        return reply
