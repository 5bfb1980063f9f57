"""A browser and its user: they sign in by a key, decide, and follow redirects within the authorization server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from html.parser import HTMLParser
from urllib.parse import urljoin

import aiohttp
from yarl import URL

ALLOW = "allow"
DENY = "deny"


class Form(HTMLParser):
    """The first form of a page: where it leads, and the values of its hidden fields."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if tag == "form" and not self.action:
            self.action = named["action"]
        elif tag == "input" and named.get("type") == "hidden":
            self.fields.setdefault(named["name"], named["value"])


class UserAgent:
    """One browser. `key`: what the user enters to sign in."""

    def __init__(self, session: aiohttp.ClientSession, key: str) -> None:
        self.session = session
        self._key = key

    async def decide(self, url: str, decision: str = ALLOW) -> str:
        """Open an authorization URL, sign in and decide. Returns the URL of the client that the browser is sent to."""
        page_url, page = await self._page(await self.session.get(URL(url, encoded=True), allow_redirects=False))
        login = Form(page)
        signed_in = await self._post(page_url, login, {"key": self._key})
        page_url, page = await self._page(signed_in)
        decided = await self._post(page_url, Form(page), {"decision": decision})
        assert decided.status == 303, await decided.text()
        return decided.headers["Location"]

    async def _post(self, page_url: str, form: Form, fields: Mapping[str, str]) -> aiohttp.ClientResponse:
        url = urljoin(page_url, form.action)
        headers = {"Sec-Fetch-Site": "same-origin", "Origin": str(URL(page_url).origin())}
        return await self.session.post(url, data={**form.fields, **fields}, headers=headers, allow_redirects=False)

    async def _page(self, response: aiohttp.ClientResponse) -> tuple[str, str]:
        text = await response.text()
        assert response.status == 200, (response.status, response.headers, text)
        return str(response.url), text


@contextlib.asynccontextmanager
async def browsing(key: str, address: str = "") -> AsyncIterator[UserAgent]:
    """A browser without cookies. `address`: what a trusted proxy names as its address."""
    headers = {"X-Forwarded-For": address} if address else {}
    # Cookies of IP addresses are kept too.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True), headers=headers) as session:
        yield UserAgent(session, key)
