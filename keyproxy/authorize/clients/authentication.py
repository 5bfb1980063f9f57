"""Authenticates clients at the endpoints for tokens: RFC 6749 section 2.3, RFC 7523, RFC 8705."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote_plus

from aiohttp import web

from keyproxy.authorize.clients.client_directory import Clients
from keyproxy.authorize.clients.documents import Documents
from keyproxy.authorize.endpoint import CLIENT, PEER_CERTIFICATE
from keyproxy.model import Moment
from keyproxy.oauth.client import AuthMethod, Client, ClientKind
from keyproxy.oauth.client_refusals import ClientRefused, DocumentUnavailable, TooManyDocuments
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.signing import client_assertions
from keyproxy.signing.certificates import has_subject
from keyproxy.signing.client_assertions import ClientAssertion, VerifiedAssertion
from keyproxy.signing.compact_jwt import JwtFault
from keyproxy.signing.key_sets import KeySet, UnknownKey

#: Records the use of an assertion until it expires; False: it was used before.
UseOnce = Callable[[bytes, datetime.datetime], Awaitable[bool]]

_BASIC: Final = "basic"
_CHALLENGE: Final = 'Basic realm="keyproxy"'
_RETRY_SECONDS: Final = 60

#: The parameter with what was issued to the client, by grant type; without one, a token is revoked or introspected.
_CREDENTIALS: Final = {None: "token", "authorization_code": "code", "refresh_token": "refresh_token"}


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a request shows of its client. `secret` and `assertion`: at most one of them."""

    client_id: str
    is_basic: bool
    secret: str | None = field(default=None, repr=False)
    assertion: ClientAssertion | None = None

    def invalid(self, detail: str) -> OAuthError:
        """The error of a failed authentication, which does not reveal what failed."""
        return _invalid_client(detail, is_basic=self.is_basic)


class ClientAuthentication:
    """Authenticates clients: see the module."""

    def __init__(
        self,
        clients: Clients,
        documents: Documents,
        *,
        issuer: str,
        use_once: UseOnce,
        now: Callable[[], Moment],
        before_fetch: Callable[[web.Request], None],
    ) -> None:
        """`issuer`: the audience of assertions. `now`: the clock. `before_fetch`: see `Clients.judge`."""
        self._clients = clients
        self._documents = documents
        self._issuer = issuer
        self._use_once = use_once
        self._now = now
        self._before_fetch = before_fetch

    async def authenticate(self, form: Mapping[str, str], request: web.Request) -> Client:
        """The authenticated client, or a public one that presents its id.

        Raises OAuthError: `invalid_request` for two methods at once, `invalid_client` for an unknown or disabled client
        and for a failed authentication, `temporarily_unavailable` if its keys cannot be fetched. Raises StoreUnavailable.
        """
        shown = _shown(form, request.headers.getall("Authorization", []))
        credential = form.get(_CREDENTIALS.get(form.get("grant_type"), ""))
        digest = None if credential is None else hashlib.sha256(credential.encode("utf-8", "surrogatepass")).digest()
        try:
            client = await self._clients.presented(shown.client_id, form.get("redirect_uri"), credential=digest)
        except ClientRefused as refusal:
            raise shown.invalid(refusal.detail) from refusal
        request[CLIENT] = client.row_id
        if shown.assertion is not None:
            await self._check_assertion(client, shown, shown.assertion, lambda: self._before_fetch(request))
        else:
            _check_without_assertion(client, shown, request.get(PEER_CERTIFICATE))
        return client

    async def _check_assertion(
        self, client: Client, shown: _Shown, assertion: ClientAssertion, before_fetch: Callable[[], None]
    ) -> None:
        """Verify a sent assertion, also that of a client which need not send one."""
        try:
            verified = await self._verified(client, assertion, before_fetch)
        except (JwtFault, UnknownKey) as fault:
            raise shown.invalid(f"assertion: {fault or 'no key fits'}") from fault
        except (DocumentUnavailable, TooManyDocuments) as refusal:
            raise _temporarily_unavailable(refusal.detail) from refusal
        except ClientRefused as refusal:
            raise shown.invalid(refusal.detail) from refusal
        # The client is in the digest: ids of assertions are unique for each client only.
        digest = hashlib.sha256(f"{client.row_id} {verified.jti}".encode("utf-8", "surrogatepass")).digest()
        # The database forgets it by its own clock, which may be ahead of this one.
        expires_wall = verified.expires_wall_seconds + client_assertions.SKEW_SECONDS
        expires = datetime.datetime.fromtimestamp(expires_wall, datetime.UTC)
        if not await self._use_once(digest, expires):
            raise shown.invalid("assertion: used before")

    async def _verified(
        self, client: Client, assertion: ClientAssertion, before_fetch: Callable[[], None]
    ) -> VerifiedAssertion:
        keys = await self._documents.keys_of(client, before_fetch=before_fetch)
        try:
            return self._verify(assertion, keys)
        except UnknownKey:
            if client.kind is ClientKind.REGISTERED:
                raise
        # The client may have a new key.
        renewed = await self._documents.keys_of(client, before_fetch=before_fetch, is_renewed=True)
        return self._verify(assertion, renewed)

    def _verify(self, assertion: ClientAssertion, keys: KeySet) -> VerifiedAssertion:
        return client_assertions.verify(assertion, keys, self._issuer, self._now().wall_seconds)


def has_credential(form: Mapping[str, str]) -> bool:
    """Whether a form authenticates a client."""
    return "client_secret" in form or "client_assertion" in form


def two_methods() -> OAuthError:
    """The error for a request that authenticates itself in two ways. RFC 6749 section 2.3."""
    return OAuthError("invalid_request", "Use one method of client authentication.")


def _shown(form: Mapping[str, str], authorizations: Sequence[str]) -> _Shown:
    """What a request shows of its client. Raises OAuthError."""
    secret, text = form.get("client_secret"), form.get("client_assertion")
    if len(authorizations) + (secret is not None) + (text is not None) > 1:
        raise two_methods()
    basic = _basic(authorizations[0]) if authorizations else None
    assertion = None if text is None else _assertion(text, form.get("client_assertion_type"))
    client_id = form.get("client_id")
    if basic is not None:
        if client_id not in (None, basic[0]):
            raise OAuthError("invalid_request", "The request names two clients.")
        client_id = basic[0]
    if assertion is not None:
        if client_id not in (None, assertion.client_id):
            raise _invalid_client("assertion: `sub` is not the client id of the request", is_basic=False)
        client_id = assertion.client_id
    if client_id is None:
        raise _invalid_client("the request names no client", is_basic=False)
    return _Shown(client_id, basic is not None, secret if basic is None else basic[1], assertion)


def _basic(authorization: str) -> tuple[str, str]:
    """The client id and secret of a Basic header, RFC 6749 section 2.3.1: both are form-encoded."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != _BASIC:
        raise _invalid_client(f"Authorization has another scheme than {_BASIC}", is_basic=True)
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
    except ValueError:
        raise _invalid_client("malformed Basic header", is_basic=True) from None
    client_id, colon, secret = text.partition(":")
    if not colon or not client_id:
        raise _invalid_client("malformed Basic header", is_basic=True)
    return unquote_plus(client_id), unquote_plus(secret)


def _assertion(text: str, assertion_type: str | None) -> ClientAssertion:
    if assertion_type != client_assertions.ASSERTION_TYPE:
        raise _invalid_client("client_assertion_type is missing or not supported", is_basic=False)
    try:
        return client_assertions.parse(text)
    except JwtFault as fault:
        raise _invalid_client(f"assertion: {fault}", is_basic=False) from fault


def _check_without_assertion(client: Client, shown: _Shown, certificate: bytes | None) -> None:
    """Check the authentication of a client that sends no assertion. Raises OAuthError."""
    match client.auth_method:
        case AuthMethod.NONE:
            # Programs keep a secret that another server issued for this id. It is worth nothing here, and harmless.
            if client.kind is ClientKind.REGISTERED and shown.secret is not None:
                raise shown.invalid("the client has no secret")
        case AuthMethod.CLIENT_SECRET:
            digest = hashlib.sha256((shown.secret or "").encode("utf-8", "surrogatepass")).digest()
            if client.secret_digest is None or not hmac.compare_digest(digest, client.secret_digest):
                raise shown.invalid("wrong secret")
        case AuthMethod.PRIVATE_KEY_JWT:
            raise shown.invalid("no assertion")
        case AuthMethod.TLS_CLIENT_AUTH:
            if shown.secret is not None:
                raise two_methods()
            if client.tls_subject is None or certificate is None or not has_subject(certificate, client.tls_subject):
                raise shown.invalid("no certificate with the registered subject")


def challenges(*, is_basic: bool) -> Mapping[str, str] | None:
    """The header fields of `invalid_client`. RFC 6749 section 5.2 requires one after an attempt by Authorization."""
    return {"WWW-Authenticate": _CHALLENGE} if is_basic else None


def _invalid_client(detail: str, *, is_basic: bool) -> OAuthError:
    return OAuthError(
        "invalid_client",
        "The client is unknown, or its authentication failed.",
        status=401,
        detail=detail,
        headers=challenges(is_basic=is_basic),
    )


def _temporarily_unavailable(detail: str) -> OAuthError:
    return OAuthError(
        "temporarily_unavailable",
        "The keys of the client cannot be fetched now.",
        status=503,
        detail=detail,
        headers={"Retry-After": str(_RETRY_SECONDS)},
    )
