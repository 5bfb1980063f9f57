"""Minting agent tokens: what a request asks for, which requests are valid, and what is refused without the store.

Pure. The store decides on the rest (`ports.agent_token_mint`): roles, agents, bounds of the rows of that moment.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from keyproxy import limit_state
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.names import is_agent, is_role, is_scope
from keyproxy.http_messages import RequestHead
from keyproxy.limit_state import LimitState
from keyproxy.limits.calendar_windows import civil_date
from keyproxy.model import Identity, Moment
from keyproxy.reasons import LimitReason, Reason, Refusal

#: The scope that a caller needs to mint.
MINT_SCOPE: Final = "agents:mint"

BODY_BYTES_MAX: Final = 16_384
BUDGET_MAX: Final = 10**15

#: The policy that a refusal names when a root key has as many live tokens as it may have.
TOKENS_POLICY: Final = "key.agent_tokens"
TOKENS_UNIT: Final = "agent-tokens"

#: The wait for a live token to end, if its end is unknown.
_RETRY_SECONDS: Final = 60

_AGENT: Final = "agent"
_ROLE: Final = "role"
_SCOPES: Final = "scopes"
_TOKEN_BUDGET: Final = "token_budget"  # noqa: S105 - the name of a member
_REQUEST_BUDGET: Final = "request_budget"
_TTL_SECONDS: Final = "ttl_seconds"
_AUDIENCE: Final = "audience"
_MEMBERS: Final = (_AGENT, _ROLE, _SCOPES, _TOKEN_BUDGET, _REQUEST_BUDGET, _TTL_SECONDS, _AUDIENCE)


#: The name of an unknown member that a response may repeat. No key looks like this.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z]{1,16}(?:[_-][A-Za-z]{1,16}){0,3}")

#: A longer integer is beyond every bound.
_INTEGER_CHARACTERS_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class MintRequest:
    """A valid request for an agent token. Exactly one of `role` and `scopes` is set.

    None: of a budget, there is none; of `ttl_seconds`, the maximum, cut to the parent's remaining life.
    """

    agent: str
    role: str | None
    scopes: tuple[str, ...] | None
    token_budget: int | None
    request_budget: int | None
    ttl_seconds: int | None
    audience: str


@dataclass(frozen=True, slots=True)
class MintRules:
    """The configured bounds of agent tokens. `audiences`: the first is the default.

    `depth_max`: how deep tokens may be minted from tokens; `tokens_max`: live tokens per root key.
    """

    audiences: tuple[str, ...]
    ttl_seconds_max: int
    depth_max: int
    tokens_max: int
    issuer: str


@dataclass(frozen=True, slots=True)
class MintParent:
    """The credential that a token is cut from.

    `key_id`: the key; of an agent token its root key. `token_id`: the agent token, None for a key. `user_id`: the user
    that the key acts for; None: the key's owner, or the user of the agent token. `is_operator`: the request comes from
    the admin API or the CLI, and needs no `agents:mint`.
    """

    key_id: str
    token_id: str | None
    user_id: str | None
    is_operator: bool


@dataclass(frozen=True, slots=True)
class MintedToken:
    """A token that exists. Its plaintext is in `token` and nowhere else."""

    id: str
    token: SecretKey = field(repr=False)
    agent: str
    user_id: str
    tenant_id: str
    scopes: tuple[str, ...]
    token_budget: int | None
    request_budget: int | None
    audience: str
    is_test: bool
    depth: int
    expires_wall_seconds: float

    def to_json(self) -> dict[str, object]:
        """The content of the response to the owner, with the token."""
        return {
            "id": self.id,
            "token": self.token.reveal().decode("ascii"),
            "agent": self.agent,
            "user": self.user_id,
            "tenant": self.tenant_id,
            "scopes": list(self.scopes),
            "token_budget": self.token_budget,
            "request_budget": self.request_budget,
            "audience": self.audience,
            "is_test": self.is_test,
            "depth": self.depth,
            "expires_at": _utc_text(self.expires_wall_seconds),
        }


def parent_of(identity: Identity) -> MintParent:
    """The parent of the tokens that this identity mints."""
    token = identity.agent_token
    acts = token is None and identity.actor_user_id is not None
    return MintParent(
        identity.key_id,
        None if token is None else token.token_id,
        identity.user_id if acts else None,
        is_operator=False,
    )


def actor_of(identity: Identity) -> str:
    """The actor of a mint in the audit log."""
    token = identity.agent_token
    return f"key:{identity.key_id}" if token is None else f"agent_token:{token.token_id}"


def parse_mint_request(body: bytes, rules: MintRules) -> MintRequest:
    """Parse the body of a request. Raises a Refusal (REQUEST_MALFORMED) that names the member at fault."""
    content = _read(body)
    for name in content:
        if name not in _MEMBERS:
            shown = f"'{name}' is not a known member" if _PLAIN_NAME.fullmatch(name) else "A member is unknown"
            raise _malformed(f"{shown}; known members: {', '.join(_MEMBERS)}.", "unknown member")
    role, scopes = _role(content.get(_ROLE)), _scopes(content.get(_SCOPES))
    if (role is None) == (scopes is None):
        raise _malformed("The body must have exactly one of 'role' and 'scopes'.", field=_ROLE)
    return MintRequest(
        agent=_agent(content.get(_AGENT)),
        role=role,
        scopes=scopes,
        token_budget=_integer(content, _TOKEN_BUDGET, 0, BUDGET_MAX),
        request_budget=_integer(content, _REQUEST_BUDGET, 0, BUDGET_MAX),
        ttl_seconds=_integer(content, _TTL_SECONDS, 1, rules.ttl_seconds_max),
        audience=_audience(content.get(_AUDIENCE), rules),
    )


def check_parent(identity: Identity) -> None:
    """Refuse a credential that may not mint at all, whatever its scopes. Raises a Refusal.

    An OAuth access token may not: its user has consented to one client, and its session may end at any time.
    """
    if identity.oauth is not None:
        raise refused("An OAuth access token cannot mint agent tokens. Use an API key.", "an access token as parent")


def check_authority(identity: Identity, request: MintRequest, rules: MintRules, now: Moment) -> None:
    """Refuse what exceeds the authority of the parent, as far as its identity shows. Raises a Refusal."""
    parent = identity.agent_token
    if request.scopes is not None:
        if not request.scopes:
            raise refused("The token would have no scopes.", "no scopes", field=_SCOPES)
        for scope in request.scopes:
            if scope not in identity.scopes:
                text = f"'scopes' has '{scope}', which the credential lacks."
                raise refused(text, "scope beyond the parent", field=_SCOPES)
    if request.ttl_seconds is not None and int(now.wall_seconds) + request.ttl_seconds > identity.expires_wall_seconds:
        raise refused("The token would outlive the credential.", "expiry beyond the parent", field=_TTL_SECONDS)
    if parent is None:
        return
    if parent.depth >= rules.depth_max:
        raise refused("No more tokens may be minted from this agent token.", f"depth {parent.depth}")
    for name, asked, bound in (
        (_TOKEN_BUDGET, request.token_budget, parent.token_budget),
        (_REQUEST_BUDGET, request.request_budget, parent.request_budget),
    ):
        if asked is not None and bound is not None and asked > bound:
            raise refused(f"'{name}' exceeds that of the credential.", f"{name} beyond the parent", field=name)


def check_head(head: RequestHead) -> None:
    """Refuse a request whose body cannot be a request for a token, before the body has arrived. Raises a Refusal.

    The declared type does not matter: nothing but the proxy reads this body, and what is not JSON is refused anyway.
    """
    if head.content_length > BODY_BYTES_MAX:
        raise too_large()
    if any(coding != b"identity" for coding in head.fields.codings):
        raise _malformed("The body must not be compressed.", "Content-Encoding")
    if not head.fields.has_clear_type:
        raise _malformed("The body must be JSON in UTF-8; Content-Type names another charset.", "Content-Type")


def refused(text: str, detail: str, *, field: str | None = None) -> Refusal:
    """The refusal of a token that exceeds the authority of its parent. `text`: for the caller; `detail`: for the log."""
    return Refusal(Reason.DELEGATION_REFUSED, detail, caller_text=text, replaces_sentence=True, field=field)


def too_many_tokens(tokens_max: int, reset_seconds: float | None = None) -> Refusal:
    """The refusal of a token beyond the number of live tokens. `reset_seconds`: until the first of them expires."""
    limit = LimitState(limit_state.policy(TOKENS_POLICY, tokens_max, None, TOKENS_UNIT), 0, reset_seconds)
    return Refusal(
        Reason.QUOTA_EXHAUSTED,
        caller_text="The key has as many live agent tokens as it may have. Wait until one expires, or revoke one.",
        replaces_sentence=True,
        # Tokens end by themselves, unlike what is spent of a budget.
        retry_after_seconds=_RETRY_SECONDS if reset_seconds is None else max(1, math.ceil(reset_seconds)),
        limit=limit,
        limit_reason=LimitReason.SPENT,
    )


def too_large() -> Refusal:
    """The refusal of a body that is longer than any valid request."""
    return Refusal(Reason.BODY_TOO_LARGE, caller_text=f"On this route the maximum is {BODY_BYTES_MAX} bytes.")


def malformed(field: str, text: str) -> Refusal:
    """The refusal of a request because of one member. `text`: what is wrong with it, as a sentence about it."""
    return _malformed(f"'{field}' {text}.", field=field)


def _read(body: bytes) -> dict[str, Any]:
    """The members of the one JSON object. Raises a Refusal."""
    if len(body) > BODY_BYTES_MAX:
        raise too_large()
    try:
        content = json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_parse_integer
        )
    except (ValueError, RecursionError):
        # The parser's own text quotes nothing, but positions do not help either: the body is short.
        raise _malformed("The body must be one JSON object in UTF-8.", "not JSON") from None
    if not isinstance(content, dict):
        raise _malformed("The body must be one JSON object.", "not an object")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        if twice in _MEMBERS:
            raise malformed(twice, "is given more than once")
        raise _malformed("A member is given more than once.", "duplicate member")
    return content


def _no_constant(_name: str) -> NoReturn:
    raise ValueError("not JSON")


def _parse_integer(text: str) -> int | float:
    return float("inf") if len(text) > _INTEGER_CHARACTERS_MAX else int(text)


def _agent(value: object) -> str:
    if value is None:
        raise malformed(_AGENT, "is required")
    if not isinstance(value, str) or not is_agent(value):
        raise malformed(_AGENT, "must be up to 64 letters, digits and . _ -, and start with a letter or digit")
    return value


def _role(value: object) -> str | None:
    if value is not None and not (isinstance(value, str) and is_role(value)):
        raise malformed(_ROLE, "must be the name of a role")
    return value if isinstance(value, str) else None


def _scopes(value: object) -> tuple[str, ...] | None:
    """The scopes without repetitions, in their order."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise malformed(_SCOPES, "must be an array of scopes")
    scopes: dict[str, None] = {}
    for scope in value:
        if not isinstance(scope, str) or not is_scope(scope):
            raise malformed(_SCOPES, "must be an array of scopes such as 'jobs:write', without wildcards")
        scopes[scope] = None
    return tuple(scopes)


def _integer(content: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value: object = content.get(name)
    if value is None:
        return None
    # True is an int in Python, and 1.0 a number in JSON: neither is an integer here.
    if type(value) is not int or not least <= value <= most:
        given = f", not {value}" if type(value) is int else ""
        raise malformed(name, f"must be an integer of at least {least} and at most {most}{given}")
    return value


def _audience(value: object, rules: MintRules) -> str:
    if value is None:
        return rules.audiences[0]
    if not isinstance(value, str) or value not in rules.audiences:
        raise malformed(_AUDIENCE, f"must be one of the configured audiences: {', '.join(rules.audiences)}")
    return value


def _malformed(text: str, detail: str = "", *, field: str | None = None) -> Refusal:
    detail = detail or f"body: {field}"
    return Refusal(Reason.REQUEST_MALFORMED, detail, caller_text=text, replaces_sentence=True, field=field)


def _utc_text(wall_seconds: float) -> str:
    """A whole second as RFC 3339 in UTC."""
    day, second = divmod(int(wall_seconds), 86_400)
    year, month, of_month = civil_date(day)
    hour, minute = divmod(second // 60, 60)
    return f"{year:04d}-{month:02d}-{of_month:02d}T{hour:02d}:{minute:02d}:{second % 60:02d}Z"
