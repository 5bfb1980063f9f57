"""Encryption of keys at rest. The ciphertext is bound to the user and the key whose row it belongs to.

Without that, ciphertext copied from the row of one user to that of another would let the other's tasks call with the key.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.settings import settings
from keyproxy_client.missing_extra import missing_extra

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet


class CredentialUnusable(Exception):
    """A sealed credential cannot be opened, or its content belongs to another row. The text shows no part of it."""


@sensitive_variables()
def seal(user_pk: object, key_id: str, secret: str) -> bytes:
    """The ciphertext of a key's secret, under the first Fernet key."""
    content = json.dumps({"user": str(user_pk), "key": key_id, "secret": secret})
    return _cipher(_secret_keys()).encrypt(content.encode("utf-8"))


@sensitive_variables()
def unseal(sealed: bytes | memoryview, user_pk: object, key_id: str) -> str:
    """The secret in the row of this user and key. Raises CredentialUnusable."""
    content = _open(bytes(sealed), key_id)
    if content.get("user") != str(user_pk) or content.get("key") != key_id:
        raise CredentialUnusable(f"the sealed content of credential {key_id} belongs to another user or key")
    return str(content["secret"])


@sensitive_variables()
def resealed(sealed: bytes | memoryview, key_id: str) -> bytes | None:
    """The same content under the first Fernet key; None if it is already. Raises CredentialUnusable."""
    token, keys = bytes(sealed), _secret_keys()
    from cryptography.fernet import InvalidToken

    try:
        _cipher(keys[:1]).decrypt(token)
    except InvalidToken:
        try:
            return _cipher(keys).rotate(token)
        except InvalidToken as error:
            raise _unreadable(key_id) from error
    return None


def _open(token: bytes, key_id: str) -> dict[str, Any]:
    cipher = _cipher(_secret_keys())
    from cryptography.fernet import InvalidToken

    try:
        content = json.loads(cipher.decrypt(token))
    except (InvalidToken, ValueError) as error:
        raise _unreadable(key_id) from error
    if not isinstance(content, dict) or not isinstance(content.get("secret"), str):
        raise _unreadable(key_id)
    return content


def _unreadable(key_id: str) -> CredentialUnusable:
    return CredentialUnusable(f"credential {key_id} cannot be decrypted by any of KEYPROXY['SECRET_KEYS']")


def _secret_keys() -> tuple[str, ...]:
    try:
        keys = settings().read_secret_keys()
    except OSError as error:
        raise CredentialUnusable(f"KEYPROXY['SECRET_KEYS_FILE'] cannot be read: {error.strerror}") from error
    if not keys:
        raise CredentialUnusable("KEYPROXY['SECRET_KEYS'] has no key")
    return keys


def _cipher(keys: Sequence[str]) -> MultiFernet:
    try:
        return _cipher_of(tuple(keys))
    except ValueError as error:
        raise CredentialUnusable("KEYPROXY['SECRET_KEYS'] has a value that is not a Fernet key") from error


@functools.lru_cache(maxsize=4)
def _cipher_of(keys: tuple[str, ...]) -> MultiFernet:
    try:
        from cryptography.fernet import Fernet, MultiFernet
    except ImportError as error:
        raise missing_extra("sealed", error) from error
    return MultiFernet([Fernet(key) for key in keys])
