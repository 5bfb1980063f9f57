"""A browser between a client program, the authorization server and an identity provider."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from keyproxy.oauth.client_ids import encode_value_id
from tests.authorize.authority import Authority, Reply, pkce

REDIRECT_URI = "http://127.0.0.1:7777/callback"
CLIENT_ID = encode_value_id([REDIRECT_URI], "Acme")


@dataclass
class Browser:
    """One browser with its cookies. The user of it signs in to the program Acme."""

    authority: Authority
    cookies: dict[str, str] = field(default_factory=dict)

    async def call(self, method: str, path: str, **request: Any) -> Reply:
        """Send one request with the cookies, and keep those of the response."""
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        reply = await self.authority.call(method, path, headers=headers, **request)
        self.cookies.update(reply.cookies)
        return reply

    async def begin(self, **query: str) -> Reply:
        """Begin to authorize the program: a redirect to the identity provider."""
        wanted = {
            "response_type": "code", "client_id": CLIENT_ID, "redirect_uri": REDIRECT_URI, "state": "s1",
            "code_challenge": pkce()[1], "code_challenge_method": "S256", "scope": "jobs:write",
        }  # fmt: skip
        return await self.call("GET", "/oauth/authorize", query=wanted | query)

    async def return_with(
        self, location: str, *, code: str = "code-1", changed: Mapping[str, str | None] | None = None
    ) -> Reply:
        """Return from the provider at `location` with a code. `changed`: parameters; None removes one."""
        asked = query(location)
        issuer = self.authority.context.settings.oauth_login.issuer
        response = {"code": code, "state": asked["state"], "iss": issuer, **(changed or {})}
        sent = {name: value for name, value in response.items() if value is not None}
        return await self.call("GET", "/oauth/callback", query=sent)

    async def decide(self, page: Reply, decision: str = "allow") -> Reply:
        """Decide on the page for consent."""
        assert page.status == 200, page.text
        found = re.search(r'name="ticket" value="([^"]+)"', page.text)
        assert found is not None
        return await self.call("POST", "/oauth/consent", form={"ticket": found[1], "decision": decision})

    async def exchange(self, consented: Reply) -> Reply:
        """Exchange the code at the token endpoint, as the program does."""
        assert consented.status == 303, consented.text
        form = {
            "grant_type": "authorization_code", "code": consented.location.query["code"], "client_id": CLIENT_ID,
            "redirect_uri": REDIRECT_URI, "code_verifier": pkce()[0],
        }  # fmt: skip
        return await self.authority.call("POST", "/oauth/token", form=form)

    def other(self) -> Browser:
        """Another browser."""
        return dataclasses.replace(self, cookies={})


def query(location: str) -> Mapping[str, str]:
    """The query of a URL."""
    return {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}
