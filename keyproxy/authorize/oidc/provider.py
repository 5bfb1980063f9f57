"""The OpenID provider as this process knows it: metadata and keys, read at the start and hourly; the exchange of codes.

An outage of the provider ends no process: the last metadata and keys stay in use, and logins fail until it responds.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote_plus

import orjson

from keyproxy.authorize.oidc.provider_http import PROVIDER_SECONDS, ProviderHttp
from keyproxy.authorize.oidc.provider_metadata import ProviderMetadata, ProviderUnavailable, discovery_url
from keyproxy.config.oauth.oauth_settings import OAuthLogin
from keyproxy.model import Moment
from keyproxy.signing import id_tokens
from keyproxy.signing.compact_jwt import CompactJwt, JwtFault
from keyproxy.signing.id_tokens import ExpectedLogin
from keyproxy.signing.key_sets import KeySet, UnknownKey

_log = logging.getLogger(__name__)

_REFRESH_SECONDS: Final = 3_600.0
_RETRY_SECONDS: Final = 30.0

#: Logins that find no metadata request them again, but not more often than this.
_PAUSE_SECONDS: Final = 1.0

#: An unknown key leads to one request for the keys in this time, so that forged tokens cannot cause many.
_UNKNOWN_KEY_SECONDS: Final = 30.0

_ERROR_CODE: Final = re.compile(r"[a-z_]{1,64}")


class LoginFault(Exception):
    """The provider refuses a code, or its id_token is invalid. The text is for the operator."""


class IdentityProvider:
    """One OpenID provider under one configuration: see the module."""

    def __init__(
        self,
        login: OAuthLogin,
        client_secret: str | None,
        redirect_uri: str,
        *,
        now: Callable[[], Moment],
        seconds_max: float = PROVIDER_SECONDS,
    ) -> None:
        """`client_secret` None: a public client. `redirect_uri`: that of the callback. Raises TlsError."""
        self._login = login
        self._client_secret = client_secret
        self._redirect_uri = redirect_uri
        self._now = now
        self._seconds_max = seconds_max
        self._http = ProviderHttp(login.issuer, login.ca_file, seconds_max)
        self._metadata: ProviderMetadata | None = None
        self._keys = KeySet({"keys": []})
        self._refreshing = asyncio.Lock()
        self._fetching_keys = asyncio.Lock()
        self._refreshed_mono = self._unknown_key_mono = float("-inf")
        self._is_failing = False

    async def run(self) -> None:
        """Refresh metadata and keys until cancelled."""
        while True:
            try:
                await self.refresh()
            except ProviderUnavailable:
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                await asyncio.sleep(_REFRESH_SECONDS)

    async def metadata(self) -> ProviderMetadata:
        """The metadata. If there are none yet, they are requested. Raises ProviderUnavailable."""
        if self._metadata is None:
            async with self._refreshing:
                is_paused = self._now().mono_seconds - self._refreshed_mono < _PAUSE_SECONDS
                if self._metadata is None and not is_paused:
                    await self._fetch()
        if self._metadata is None:
            raise ProviderUnavailable("the provider has not responded to discovery yet")
        return self._metadata

    async def claims(self, code: str, response_issuer: str | None, *, verifier: str, nonce: str) -> Mapping[str, Any]:
        """Exchange a code, and return the claims of the id_token. Raises ProviderUnavailable or LoginFault.

        `response_issuer`: `iss` of the response with the code. All other tokens are discarded: they give access to the
        provider, which nothing here uses.
        """
        try:
            async with asyncio.timeout(self._seconds_max):
                metadata = await self.metadata()
                self._check_issuer(metadata, response_issuer)
                token = id_tokens.parse(await self._id_token(metadata, code, verifier))
                expected = ExpectedLogin(self._login.issuer, self._login.client_id, nonce)
                return await self._verified(metadata, token, expected)
        except JwtFault as fault:
            raise LoginFault(f"the id_token is invalid: {fault}") from None
        except TimeoutError:
            raise ProviderUnavailable(f"no login within {self._seconds_max:g} s") from None

    def _check_issuer(self, metadata: ProviderMetadata, response_issuer: str | None) -> None:
        """Prevent that the code of another provider is sent to this one. RFC 9207 section 2.4."""
        if response_issuer is None and not metadata.sends_issuer:
            return
        if response_issuer != self._login.issuer:
            raise LoginFault("`iss` of the response is missing, or is another issuer")

    async def _id_token(self, metadata: ProviderMetadata, code: str, verifier: str) -> str:
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "code_verifier": verifier,
        }
        headers = {}
        client_id, secret = self._login.client_id, self._client_secret
        if secret is not None and metadata.takes_basic:
            # Each part is form-urlencoded first, RFC 6749 section 2.3.1.
            pair = f"{quote_plus(client_id)}:{quote_plus(secret)}".encode("ascii")
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode('ascii')}"
        else:
            form["client_id"] = client_id
            if secret is not None:
                form["client_secret"] = secret
        is_accepted, body = await self._http.post(metadata.token_endpoint, form, headers)
        content = _members(body)
        if not is_accepted:
            raise LoginFault(f"the provider refuses the code with {error_code(content.get('error'))}")
        token = content.get("id_token")
        if not isinstance(token, str):
            raise LoginFault("the response of the provider has no id_token; oauth.login.scopes must contain openid")
        return token

    async def _verified(
        self, metadata: ProviderMetadata, token: CompactJwt, expected: ExpectedLogin
    ) -> Mapping[str, Any]:
        keys = self._keys
        try:
            return id_tokens.verified_claims(token, keys, expected, self._now().wall_seconds)
        except UnknownKey:
            keys = await self._keys_after(keys, metadata)
        try:
            return id_tokens.verified_claims(token, keys, expected, self._now().wall_seconds)
        except UnknownKey:
            raise LoginFault("the provider publishes no key for the id_token") from None

    async def _keys_after(self, keys: KeySet, metadata: ProviderMetadata) -> KeySet:
        """The keys after `keys`, which lack one. At most one request in a time, which concurrent logins share."""
        async with self._fetching_keys:
            now_mono = self._now().mono_seconds
            if self._keys is keys and now_mono - self._unknown_key_mono >= _UNKNOWN_KEY_SECONDS:
                self._unknown_key_mono = now_mono
                self._keys = await self._fetched_keys(metadata)
        return self._keys

    async def refresh(self) -> None:
        """Request metadata and keys now. Raises ProviderUnavailable, and keeps those that are known."""
        async with self._refreshing:
            await self._fetch()

    async def _fetch(self) -> None:
        """Request metadata and keys. An outage is logged once."""
        self._refreshed_mono = self._now().mono_seconds
        try:
            async with asyncio.timeout(self._seconds_max):
                metadata = await self._fetched_metadata()
                keys = await self._fetched_keys(metadata)
        except (ProviderUnavailable, TimeoutError) as error:
            if not self._is_failing:
                why = str(error) or "timeout"
                _log.warning("cannot read the metadata of the identity provider, will retry: %s", why)
            self._is_failing = True
            raise ProviderUnavailable(str(error) or f"no metadata within {self._seconds_max:g} s") from error
        if self._is_failing:
            _log.info("the identity provider responds again")
        self._is_failing = False
        self._metadata, self._keys = metadata, keys

    async def _fetched_metadata(self) -> ProviderMetadata:
        return ProviderMetadata.parse(await self._http.get(discovery_url(self._login.issuer)), self._login.issuer)

    async def _fetched_keys(self, metadata: ProviderMetadata) -> KeySet:
        try:
            return KeySet.parse(await self._http.get(metadata.jwks_uri))
        except JwtFault as fault:
            raise ProviderUnavailable(f"{metadata.jwks_uri}: {fault}") from None

    def __repr__(self) -> str:
        return f"IdentityProvider({self._login.issuer!r}, is_known={self._metadata is not None}, {self._keys!r})"


def _members(body: bytes) -> Mapping[str, Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def error_code(value: object) -> str:
    """An error code of the provider for the log; any other text may quote the request."""
    return value if isinstance(value, str) and _ERROR_CODE.fullmatch(value) else "no error code"
