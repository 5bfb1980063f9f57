"""The browser of the demo, whose user signs in with a key and allows what is asked."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import urljoin

import aiohttp

_FORMS = ("/oauth/login", "/oauth/consent")


class _Form(HTMLParser):
    """The form of a page: its address, and its hidden fields."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if tag == "form" and named.get("action") in _FORMS:
            self.action = named["action"]
        elif tag == "input" and named.get("type") == "hidden" and self.action:
            self.fields.setdefault(named["name"], named["value"])


async def allow(url: str, key: str) -> list[str]:
    """Open a URL, and fill in its forms until the browser is back at the client. Returns the paths of the pages."""
    seen: list[str] = []
    # Without `unsafe`, cookies of IP addresses are dropped.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        response = await session.get(url)
        while True:
            seen.append(response.url.path)
            form = _Form(await response.text())
            if not form.action:
                return seen
            fields = {**form.fields, "key": key} if form.action == _FORMS[0] else {**form.fields, "decision": "allow"}
            headers = {"Sec-Fetch-Site": "same-origin", "Origin": str(response.url.origin())}
            response = await session.post(urljoin(str(response.url), form.action), data=fields, headers=headers)
