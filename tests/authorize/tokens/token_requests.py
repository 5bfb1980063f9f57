"""Requests for tokens over HTTP: a code of a public client, and a service with a secret."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from keyproxy.auth.api_key import KeyFormat
from keyproxy.oauth.client import row_id
from tests.authorize.authority import Authority, Reply
from tests.store.harness import Sql
from tests.store.oauth_rows import CLIENT_ID, add_code, add_grant

VERIFIER = "v" * 43
REDIRECT_URI = "https://acme.example/cb"
WORKER = "worker"
SECRET = KeyFormat().make_client_secret(bytes(32))

Form = dict[str, str]


async def new_code(sql: Sql, number: int = 1, **changes: Any) -> str:
    """Insert a code, and its grant if it is missing. Return the code."""
    code = f"{number:043d}"
    inserted = await add_code(sql, number, **changes)
    await sql.execute(
        "UPDATE keyproxy.oauth_codes SET digest = $2, challenge = $3 WHERE digest = $1",
        inserted, hashlib.sha256(code.encode()).digest(), hashlib.sha256(VERIFIER.encode()).digest(),
    )  # fmt: skip
    return code


async def add_service(sql: Sql, client_id: str = WORKER, number: int = 9, **changes: Any) -> None:
    """Insert a client with a secret, and a grant to itself."""
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, name, auth_method, secret_digest)"
        " VALUES ($1, $2, 'registered', 'Worker', 'client_secret', $3)",
        row_id(client_id), client_id, SECRET.digest(),
    )  # fmt: skip
    await add_grant(sql, number, client_id=client_id, is_service=True, **changes)


def code_form(code: str, /, **changes: str) -> Form:
    """The form that redeems a code, with changes; an empty value leaves the parameter out."""
    form = {
        "grant_type": "authorization_code", "code": code, "code_verifier": VERIFIER, "client_id": CLIENT_ID,
        "redirect_uri": REDIRECT_URI,
    }  # fmt: skip
    return {name: value for name, value in (form | changes).items() if value}


def refresh_form(reply: Reply, **changes: str) -> Form:
    """The form that uses the refresh token of a reply."""
    form = {"grant_type": "refresh_token", "refresh_token": reply.json["refresh_token"], "client_id": CLIENT_ID}
    return form | changes


def basic(client_id: str = WORKER, secret: str | None = None) -> dict[str, str]:
    """The header of a client that authenticates with a secret."""
    shown = SECRET.reveal().decode() if secret is None else secret
    return {"Authorization": "Basic " + base64.b64encode(f"{client_id}:{shown}".encode()).decode()}


async def token(authority: Authority, form: Form, **changes: Any) -> Reply:
    """One request to the token endpoint."""
    return await authority.call("POST", "/oauth/token", form=form, **changes)
