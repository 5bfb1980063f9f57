"""Mints agent tokens: reads what the parent may grant, signs, and inserts the row under the same bounds once more.

A token is signed before its row exists, because the row has the digest of the signed text. Without a row it is worthless.
All times are the database's, which also checks the lifetime: the clock of this machine may be ahead of it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from keyproxy.auth.agent_token_format import ID_ENTROPY_BYTES, TOKEN_BYTES_MAX, make_token_id
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.minting import (
    MINT_SCOPE,
    MintedToken,
    MintParent,
    MintRequest,
    MintRules,
    malformed,
    refused,
    too_many_tokens,
)
from keyproxy.model import Moment
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.claims import AGENT_TOKEN_TYPE, actor_claim
from keyproxy.signing.signing_key import SigningKey
from keyproxy.store.postgres.database import Row, StatementRunner, StoreConflict, StoreUnavailable

#: How many requests may mint at once, including those that wait for a connection.
_MINTING_MAX: Final = 200

#: The least time for which a new token works, whatever the fraction of a second at which it is minted.
_LIFE_SECONDS_MIN: Final = 0.5


@dataclass(frozen=True, slots=True)
class _Grant:
    """What a token grants, before it is signed."""

    token_id: str
    key_id: str
    scopes: tuple[str, ...]
    issued_wall: int
    expires_wall: int


class TokenMinter(AgentTokenMint):
    """Mints agent tokens in the store. Implements the port AgentTokenMint."""

    def __init__(
        self,
        database: StatementRunner,
        *,
        rules: Callable[[], MintRules],
        signing_key: Callable[[Moment], SigningKey],
        now: Callable[[], Moment],
    ) -> None:
        """`signing_key`: the published key to sign with; it raises a Refusal if there is none."""
        self._database = database
        self._rules = rules
        self._signing_key = signing_key
        self._now = now
        self._minting = 0

    async def mint(self, parent: MintParent, request: MintRequest, *, actor: str) -> MintedToken:
        """See the port. For an operator's mint, `actor` is used only if the transaction has no actor."""
        if self._minting >= _MINTING_MAX:
            raise Refusal(Reason.OVERLOADED, f"{_MINTING_MAX} agent tokens are being minted")
        self._minting += 1
        try:
            return await self._mint(parent, request, actor)
        except StoreUnavailable as error:
            raise Refusal(Reason.STORE_UNAVAILABLE, f"minting an agent token: {error}") from error
        except StoreConflict as error:
            raise refused("The token may not be minted.", f"the store refused the row: {error}") from error
        finally:
            self._minting -= 1

    async def _mint(self, parent: MintParent, request: MintRequest, actor: str) -> MintedToken:
        rules = self._rules()
        chain = (parent.key_id, parent.token_id, parent.user_id, request.agent)
        (authority,) = await self._database.fetch("minting_authority", *chain, request.role)
        grant = _granted(parent, request, rules, authority)
        plaintext = self._signed(request, rules, authority, grant)
        if len(plaintext) > TOKEN_BYTES_MAX:
            field = "role" if request.scopes is None else "scopes"
            raise malformed(field, f"makes the token longer than {TOKEN_BYTES_MAX} bytes")
        token = SecretKey(plaintext)
        (row,) = await self._database.fetch(
            "mint_agent_token", grant.token_id, token.digest(), *chain, request.role, list(grant.scopes),
            request.audience, request.token_budget, request.request_budget, float(grant.expires_wall),
            rules.depth_max, rules.tokens_max, parent.is_operator, actor,
        )  # fmt: skip
        match row["outcome"]:
            case "minted":
                return _minted(request, authority, grant, token)
            case "full":
                raise too_many_tokens(rules.tokens_max, row["reset_seconds"])
            case "busy":
                raise Refusal(Reason.STORE_UNAVAILABLE, "minting an agent token: its key, user or agent is locked")
            case _:
                raise refused("The token may not be minted.", "a bound changed while the token was minted")

    def _signed(self, request: MintRequest, rules: MintRules, authority: Row, grant: _Grant) -> bytes:
        act = actor_claim((request.agent, *authority["agents"]), authority["actor_user_id"], grant.key_id)
        budget = {} if request.token_budget is None else {"token_budget": request.token_budget}
        claims: dict[str, object] = {
            "iss": rules.issuer,
            "aud": request.audience,
            "sub": authority["user_id"],
            "act": act,
            "client_id": grant.key_id,
            "tenant": authority["tenant_id"],
            "scope": " ".join(grant.scopes),
            **budget,
            "jti": grant.token_id,
            "iat": grant.issued_wall,
            "exp": grant.expires_wall,
        }
        return self._signing_key(self._now()).sign(AGENT_TOKEN_TYPE, claims)


def _granted(parent: MintParent, request: MintRequest, rules: MintRules, authority: Row) -> _Grant:
    """What the token grants. Raises a Refusal if that exceeds what its parent may grant, or is nothing."""
    if authority["refusal"] is not None:
        raise refused("The credential may not mint a token for this user and agent.", authority["refusal"])
    if not parent.is_operator and MINT_SCOPE not in authority["held"]:
        raise refused("The credential may not mint tokens.", f"the parent does not hold {MINT_SCOPE}")
    if len(authority["agents"]) > rules.depth_max:
        raise refused("No more tokens may be minted from this agent token.", f"depth {len(authority['agents'])}")
    for name, wanted in (("token_budget", request.token_budget), ("request_budget", request.request_budget)):
        bound = authority[name]
        if wanted is not None and bound is not None and wanted > bound:
            raise refused(f"'{name}' exceeds that of the credential.", f"{name} beyond the parent", field=name)
    scopes = _scopes(request, authority)
    issued = math.floor(authority["server_seconds"])
    token_id = make_token_id(secrets.token_bytes(ID_ENTROPY_BYTES))
    return _Grant(token_id, parent.key_id, scopes, issued, _end(request, rules, authority, issued))


def _scopes(request: MintRequest, authority: Row) -> tuple[str, ...]:
    grantable = frozenset(authority["grantable"])
    if request.scopes is not None:
        if not request.scopes:
            raise refused("The token would have no scopes.", "no scopes", field="scopes")
        for scope in request.scopes:
            if scope not in grantable:
                text = f"'scopes' has '{scope}', which the credential or the agent lacks."
                raise refused(text, "scope beyond the parent", field="scopes")
        return request.scopes
    of_role: list[str] | None = authority["role_scopes"]
    scopes = tuple(sorted(grantable.intersection(of_role or ())))
    if not scopes:
        detail = "there is no such role" if of_role is None else "the credential or the agent has none of its scopes"
        raise refused("'role' grants no scope that the credential may grant.", detail, field="role")
    return scopes


def _end(request: MintRequest, rules: MintRules, authority: Row, issued: int) -> int:
    """When the token expires, Unix time in whole seconds."""
    parent_ends: float | None = authority["expires_wall_seconds"]
    ends = issued + (rules.ttl_seconds_max if request.ttl_seconds is None else request.ttl_seconds)
    # A token of one second that is minted late in a second would end before its row exists.
    server_seconds: float = authority["server_seconds"]
    ends = max(ends, math.ceil(server_seconds + _LIFE_SECONDS_MIN))
    if parent_ends is None or ends <= parent_ends:
        return ends
    remaining = math.floor(parent_ends)
    if request.ttl_seconds is not None or remaining <= server_seconds:
        raise refused("The token would outlive the credential.", "expiry beyond the parent", field="ttl_seconds")
    return remaining


def _minted(request: MintRequest, authority: Row, grant: _Grant, token: SecretKey) -> MintedToken:
    return MintedToken(
        id=grant.token_id,
        token=token,
        agent=request.agent,
        user_id=authority["user_id"],
        tenant_id=authority["tenant_id"],
        scopes=grant.scopes,
        token_budget=request.token_budget,
        request_budget=request.request_budget,
        audience=request.audience,
        is_test=authority["is_test"],
        depth=len(authority["agents"]),
        expires_wall_seconds=float(grant.expires_wall),
    )
