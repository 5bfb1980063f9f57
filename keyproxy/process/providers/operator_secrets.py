"""Handles provider secrets on behalf of operators, in the admin process and in commands: seals them and checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import aiohttp

from keyproxy.config.schema import Settings
from keyproxy.config.tools.provider_settings import ProviderRow
from keyproxy.signing.sealing import CannotOpen, KeyFileError, SealedPlace, SealingKeys
from keyproxy.store.directory.directory import Conflict, Entity, Invalid
from keyproxy.store.directory.provider_keys.provider_keys import SealedSecret, SecretHandler
from keyproxy.store.provider_keys.credential_header import CredentialHeader, hint, read_secret
from keyproxy.wire.tls import upstream_context

#: How long the upstream may take to respond to a check.
_CHECK_SECONDS: Final = 10.0

_UNAUTHORIZED: Final = 401


class OperatorSecrets(SecretHandler):
    """Handles secrets under one configuration. Each operation reads the key file, so that a new key seals at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def seal(self, provider: str, tenant_id: str | None, row_id: str, secret: str, *, is_test: bool) -> SealedSecret:
        self._row(provider)
        content = _secret(secret)
        keys = self._keys()
        place = SealedPlace(provider, tenant_id, is_test, row_id)
        return SealedSecret(keys.first, keys.seal(content, place), hint(content))

    def newest_key(self) -> str:
        return self._keys().first

    def reseal(self, key: Entity, sealed: bytes) -> SealedSecret | None:
        place = SealedPlace(key["provider"], key["tenant"], key["is_test"], key["id"])
        keys = self._keys()
        try:
            secret = keys.open(sealed, key["sealed_with"], place)
        except CannotOpen:
            return None
        return SealedSecret(keys.first, keys.seal(secret, place), key["hint"])

    async def check(self, provider: str, secret: str, *, is_test: bool) -> int:
        row, upstream = self._row(provider), self._settings.upstream
        url = (is_test and upstream.test_url) or upstream.url
        try:
            fields = CredentialHeader(row.name, row.header, row.format).fields(_secret(secret))
        except ValueError as error:
            raise Conflict(f"provider {provider!r} is not configured correctly: {error}") from None
        is_socket = url.startswith("unix:")
        try:
            connector = (
                aiohttp.UnixConnector(url.removeprefix("unix:"))
                if is_socket
                else aiohttp.TCPConnector(ssl=upstream_context(upstream) or True)
            )
            timeout = aiohttp.ClientTimeout(total=_CHECK_SECONDS)
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get(
                    "http://upstream/" if is_socket else url, headers=fields, allow_redirects=False
                ) as response,
            ):
                status = response.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            # "Could not ask" is not a refusal, but no reason to store it either. The error may quote a header.
            why = type(error).__name__
            raise Conflict(
                f"the upstream did not respond to a request with the secret ({why}): nothing was stored"
            ) from None
        if status == _UNAUTHORIZED:
            raise Invalid("the upstream responded with 401 to a request with the secret: nothing was stored")
        return status

    def _row(self, provider: str) -> ProviderRow:
        for row in self._settings.providers:
            if row.name == provider and row.sealed:
                return row
        raise Invalid(f"no provider {provider!r} with sealed = true is configured")

    def _keys(self) -> SealingKeys:
        path = self._settings.secrets.key_file
        if not path:
            raise Conflict("secrets.key_file is not set: no key seals or opens provider keys")
        try:
            return SealingKeys.parse(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise Conflict(f"secrets.key_file: {path} cannot be read: {why}") from None
        except KeyFileError as error:
            raise Conflict(f"secrets.key_file: {path}: {error}") from None


def _secret(text: str) -> bytes:
    try:
        return read_secret(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise Invalid(str(error)) from None
