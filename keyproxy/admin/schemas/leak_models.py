"""Responses about agent tokens and leaked keys, as the models that generate the OpenAPI document."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from keyproxy.admin.schemas.field_types import Time
from keyproxy.admin.schemas.response_models import Key, ResponseModel


class AgentTokenShown(ResponseModel):
    """An agent token; its plaintext is not stored. `actor`: the owner of `key`, if that was acting for the user."""

    id: str
    agent: str
    user: str
    tenant: str
    key: Annotated[str, Field(description="The key that it, or its first ancestor, was cut from.")]
    actor: str | None
    parent: Annotated[str | None, Field(description="The token that it was cut from; null: a key.")]
    scopes: list[str]
    token_budget: int | None
    request_budget: int | None
    audience: str
    is_test: bool
    depth: int
    created_at: Time
    expires_at: Time
    revoked_at: Time | None
    revoke_reason: str | None


class Leak(ResponseModel):
    """Whether the key or token exists, whether it was working until now, its owner, and which of them it is."""

    known: bool
    revoked_now: bool
    tenant: str | None
    user: str | None
    key: Key | None
    agent_token: Annotated[AgentTokenShown | None, Field(description="Omitted for anything else.")] = None
    session: Annotated[str, Field(description="Of an OAuth token: the session, which has ended; else omitted.")] = ""
    client: Annotated[str, Field(description="Of an OAuth token or a client secret: the client; else omitted.")] = ""


class LeakedKey(ResponseModel):
    """A key, token or secret that was found in a text. `revoked_now`: it was not revoked before.

    The secret of an OAuth client is not revoked: create another client, then delete this one.
    """

    key: Annotated[
        str, Field(description="The key; of an `agent_token`, the one that it was cut from; omitted for OAuth.")
    ] = ""
    agent_token: Annotated[str, Field(description="The agent token that was found; else omitted.")] = ""
    session: Annotated[str, Field(description="Of an OAuth token: the session, which has ended; else omitted.")] = ""
    client: Annotated[str, Field(description="Of an OAuth token or a client secret: the client; else omitted.")] = ""
    user: Annotated[str | None, Field(description="null: the secret of a client that is no service.")]
    tenant: str | None
    revoked_now: bool


class LeaksFound(ResponseModel):
    """The keys and tokens in a text, now revoked; how many are incomplete or mistyped, and how many unknown."""

    found: list[LeakedKey]
    incomplete: int
    unknown: int
