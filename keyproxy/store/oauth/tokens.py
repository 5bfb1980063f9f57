"""Issues, refreshes and revokes OAuth tokens. Each request is one transaction, so that an outage consumes nothing.

Codes and refresh tokens are locked before they are judged: a code through its own row, refresh tokens through that of
their session. So of two requests at once, one is judged after the other's changes. All times are the database's.
"""

from __future__ import annotations

import collections
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, TypeAlias

from keyproxy.auth.api_key import ENTROPY_BYTES, KeyFormat
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth.client import Client
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.directory.entities import random_digits
from keyproxy.store.oauth import token_rules
from keyproxy.store.oauth.refresh_verdict import RefreshUse, RefreshVerdict, judge_refresh
from keyproxy.store.oauth.token_values import (
    AccessTokenState,
    CodeExchange,
    IssuedTokens,
    RefreshExchange,
    ServiceRequest,
    TokenReader,
)
from keyproxy.store.oauth.transactions import ORIGIN, in_transaction
from keyproxy.store.postgres.database import Row, StatementRunner, StoreConflict, Transaction

#: How many access tokens of a session that have not expired may exist; the oldest is deleted for a new one.
SESSION_TOKENS_MAX: Final = 64
SERVICE_TOKENS_MAX: Final = 10_000

_REUSE_ACTOR: Final = "oauth:reuse"

#: How the names of constraints end that require the row of another table.
_REFERENCE: Final = "_fkey"

_DAY_SECONDS: Final = 86_400.0
_ID_DIGITS: Final = 22


class _SessionEnded(NamedTuple):
    """A token that was used before has ended its session. The request is refused once that is committed."""

    why: str


@dataclass(frozen=True, slots=True)
class _Issue:
    """The tokens to issue. `row`: the judged code, token or grant. `follows`: the digest of the used refresh token."""

    row: Row
    session_id: str
    scopes: tuple[str, ...]
    bound_to: bytes | None
    follows: bytes | None = None
    is_service: bool = False


_Outcome: TypeAlias = IssuedTokens | _SessionEnded


class TokenStore:
    """Codes, refresh tokens and access tokens in the store: see the module. `rules` may change.

    All methods raise StoreUnavailable; those that issue tokens raise OAuthError.
    """

    def __init__(
        self,
        database: StatementRunner,
        rules: OAuthSettings,
        key_format: KeyFormat,
        *,
        now: Callable[[], datetime] | None = None,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
        issued: collections.Counter[str] | None = None,
        ended: collections.Counter[str] | None = None,
    ) -> None:
        """`now`: a clock in place of the database's. `issued`: counts the requests that get tokens, by grant type.

        `ended`: counts the sessions that end here, by reason: `reuse`, `replay`, `revoked` or `disabled`.
        """
        self.rules = rules
        self._issued_counts = collections.Counter() if issued is None else issued
        self._ended_counts = collections.Counter() if ended is None else ended
        self._database = database
        self._format = key_format
        self._now = now
        self._entropy = entropy

    async def redeem(self, client: Client, shown: CodeExchange) -> IssuedTokens:
        """Open the session of an authorization code. A code that was redeemed before ends its session instead."""
        return await self._issued("authorization_code", client, lambda begun: self._redeem(begun, client, shown))

    async def refresh(self, client: Client, shown: RefreshExchange) -> IssuedTokens:
        """Issue the successors of a refresh token, or end its session if the token appears to be stolen."""
        return await self._issued("refresh_token", client, lambda begun: self._refresh(begun, client, shown))

    async def client_credentials(self, client: Client, wish: ServiceRequest) -> IssuedTokens:
        """Issue an access token of the grant that a client has to itself."""
        return await self._issued("client_credentials", client, lambda begun: self._serve(begun, client, wish))

    async def revoke(self, client: Client, token: bytes) -> str | None:
        """Revoke a token, a refresh token with its session. Its user; None if the client has no such token."""
        is_refresh = self._format.may_be_refresh_token(token)
        if not is_refresh and not self._format.may_be_access_token(token):
            return None
        name = "revoke_refresh_token" if is_refresh else "revoke_access_token"

        async def revoking(begun: Transaction) -> Row | None:
            return await begun.fetch_row(name, hashlib.sha256(token).digest(), client.row_id)

        row = await in_transaction(self._database, _actor(client), revoking)
        if row is None:
            return None
        self._ended_counts["revoked"] += is_refresh
        user: str = row["user_id"]
        return user

    async def introspect(self, token: bytes, reader: TokenReader) -> AccessTokenState | None:
        """The state of an access token that the reader may see and that works now."""
        if not self._format.may_be_access_token(token):
            return None
        resources = [self.rules.resource, self.rules.test_resource]
        digest = hashlib.sha256(token).digest()
        rows = await self._database.fetch(
            "oauth_access_token", digest, self._moment(), resources, reader.client_row, reader.tenant_id
        )
        return token_rules.access_token_state(rows[0]) if rows else None

    async def use_assertion(self, digest: bytes, expires_at: datetime) -> bool:
        """Record the use of a client assertion. False: it was used before."""
        return bool(await self._database.fetch("use_oauth_assertion", digest, expires_at))

    async def _issued(
        self, grant_type: str, client: Client, work: Callable[[Transaction], Awaitable[_Outcome]]
    ) -> IssuedTokens:
        try:
            outcome = await in_transaction(self._database, _actor(client), work)
        except StoreConflict as error:
            if not error.constraint.endswith(_REFERENCE):
                raise
            # What the new rows refer to was deleted meanwhile, such as the grant or the key.
            raise token_rules.invalid_grant("The grant does not exist any more.", str(error)) from error
        if isinstance(outcome, _SessionEnded):
            self._ended_counts[outcome.why] += 1
            raise token_rules.invalid_grant("The token was used before.", f"{outcome.why}: the session is ended")
        self._issued_counts[grant_type] += 1
        return outcome

    async def _redeem(self, begun: Transaction, client: Client, shown: CodeExchange) -> _Outcome:
        row = None
        if await begun.fetch_row("hold_oauth_code", shown.digest) is not None:
            row = await begun.fetch_row("oauth_code", shown.digest, self._moment())
        if row is None:
            raise token_rules.invalid_grant("The code is unknown.", "unknown code")
        if token_rules.is_replay(row, shown):
            return await self._end(begun, row["session_id"], "replay")
        token_rules.check_code(row, client, shown, self.rules)
        session_id = f"ses_{random_digits(_ID_DIGITS)}"
        life_seconds = self.rules.session_days * _DAY_SECONDS
        await begun.fetch("redeem_oauth_code", shown.digest, session_id, row["now"], life_seconds)
        scopes = token_rules.granted_scopes(row, None)
        return await self._issue(begun, _Issue(row, session_id, scopes, shown.bound_to))

    async def _refresh(self, begun: Transaction, client: Client, shown: RefreshExchange) -> _Outcome:
        row = None
        grace = self.rules.refresh_grace_seconds
        if await begun.fetch_row("hold_refreshed_session", shown.digest) is not None:
            row = await begun.fetch_row("oauth_refresh", shown.digest, self._moment(), float(grace))
        if row is None:
            raise token_rules.invalid_grant("The refresh token is unknown.", "unknown refresh token")
        token_rules.check_refresh(row, client)
        verdict = judge_refresh(
            RefreshUse(
                is_replaced=row["is_replaced"],
                is_used=row["is_used"],
                is_past_grace=row["is_past_grace"],
                successors=row["successors"],
                has_used_successor=row["has_used_successor"],
            ),
            grace_seconds=grace,
        )
        if verdict is RefreshVerdict.REUSE:
            return await self._end(begun, row["session_id"], "reuse")
        if row["is_disabled"]:
            # Its row stays, for when the account is enabled again; the client ends it: it discards its tokens now.
            self._ended_counts["disabled"] += 1
        token_rules.check_refresh_request(row, shown, self.rules)
        if verdict is RefreshVerdict.TOO_MANY:
            raise OAuthError(
                "temporarily_unavailable",
                "The refresh token has been used too often.",
                status=429,
                headers={"Retry-After": "1"},
            )
        scopes = token_rules.granted_scopes(row, shown.scopes)
        if verdict is not RefreshVerdict.REPEAT:
            await begun.fetch("use_refresh_token", shown.digest, row["session_id"], row["now"])
        issue = _Issue(row, row["session_id"], scopes, shown.bound_to, follows=shown.digest)
        return await self._issue(begun, issue)

    async def _serve(self, begun: Transaction, client: Client, wish: ServiceRequest) -> _Outcome:
        wanted = token_rules.wanted_resource(wish.resource, self.rules)
        held = await begun.fetch_row("hold_service_grant", client.row_id, wanted, self.rules.resource)
        if held is None:
            has_one = await begun.fetch_row("has_service_grant", client.row_id)
            raise token_rules.no_service_grant(has_one=has_one is not None and has_one["has_one"])
        row = await begun.fetch_row("service_grant", held["id"], self._moment())
        if row is None:
            raise token_rules.no_service_grant(has_one=False)
        token_rules.check_account(row)
        token_rules.check_resource(row, wish.resource, self.rules)
        scopes = token_rules.service_scopes(row, wish.scopes)
        session_id: str | None = row["session_id"]
        life_seconds = self.rules.session_days * _DAY_SECONDS
        if session_id is None:
            session_id = f"ses_{random_digits(_ID_DIGITS)}"
            values = (session_id, client.presented_as, row["grant_scopes"], row["now"], life_seconds)
            await begun.fetch("open_service_session", row["grant_id"], *values)
        else:
            await begun.fetch("keep_service_session", session_id, row["grant_scopes"], row["now"], life_seconds)
        return await self._issue(begun, _Issue(row, session_id, scopes, wish.bound_to, is_service=True))

    async def _issue(self, begun: Transaction, issue: _Issue) -> IssuedTokens:
        access = self._format.make_access_token(self._entropy(ENTROPY_BYTES))
        refresh = None if issue.is_service else self._format.make_refresh_token(self._entropy(ENTROPY_BYTES))
        row = await begun.fetch_row(
            "issue_oauth_tokens", issue.session_id, access.digest(), list(issue.scopes), issue.row["now"],
            float(self.rules.access_token_seconds), issue.bound_to, None if refresh is None else refresh.digest(),
            issue.follows, self.rules.refresh_idle_days * _DAY_SECONDS,
            SERVICE_TOKENS_MAX if issue.is_service else SESSION_TOKENS_MAX,
        )  # fmt: skip
        if row is None:
            raise token_rules.invalid_grant("The session has ended.", "the session was deleted")
        return IssuedTokens(
            access_token=access,
            refresh_token=refresh,
            expires_in=row["expires_in"],
            scopes=issue.scopes,
            session_id=issue.session_id,
            user_id=issue.row["user_id"],
        )

    @staticmethod
    async def _end(begun: Transaction, session_id: str | None, why: str) -> _SessionEnded:
        await begun.fetch("say_who_acts", _REUSE_ACTOR, ORIGIN)
        await begun.fetch("end_oauth_session", session_id)
        return _SessionEnded(why)

    def _moment(self) -> datetime | None:
        return None if self._now is None else self._now()


def _actor(client: Client) -> str:
    return f"client:{client.row_id}"
