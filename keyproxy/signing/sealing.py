"""Sealed secrets: AES-256-GCM with keys that the operator keeps in a file, never in the database.

A sealed secret is one version byte, a random 96-bit nonce, the ciphertext and the 128-bit tag. It is bound to its place
by the additional data: provider, tenant, mode and id of the row. So a row that is copied to another tenant does not open.

With random nonces a key may seal 2^32 secrets (NIST SP 800-38D section 8.3), far more than rows exist.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Final, NamedTuple, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_VERSION: Final = b"\x01"
_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32
_KID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEYS_MAX: Final = 1_000


class KeyFileError(ValueError):
    """The content of a key file is invalid. The text is the reason, and quotes nothing of it."""


class CannotOpen(Exception):
    """A sealed secret does not open. The text is the reason."""


class SealedPlace(NamedTuple):
    """The row that a sealed secret belongs to. `tenant_id` None: it is shared by all tenants."""

    provider: str
    tenant_id: str | None
    is_test: bool
    row_id: str

    def additional_data(self) -> bytes:
        """The four fields with `|` between them. Unambiguous: only a tenant's id can contain one."""
        mode = "test" if self.is_test else "live"
        return f"{self.provider}|{self.tenant_id or ''}|{mode}|{self.row_id}".encode()


class SealingKeys:
    """The keys of a file, by name. The first one seals, all of them open."""

    __slots__ = ("_ciphers", "first")

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Raises KeyFileError without any key, and for one that does not have 32 bytes."""
        if not keys:
            raise KeyFileError("contains no key")
        if any(len(key) != _KEY_BYTES for key in keys.values()):
            raise KeyFileError("a key does not have 32 bytes")
        self._ciphers: Final = {kid: AESGCM(key) for kid, key in keys.items()}
        #: The name of the key that seals.
        self.first: Final = next(iter(keys))

    @classmethod
    def parse(cls, text: str) -> SealingKeys:
        """The keys of a file: lines `kid:base64 of 32 bytes`; empty lines and those that begin with # are ignored.

        Raises KeyFileError.
        """
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            kid, colon, encoded = line.strip().partition(":")
            if not colon or not _KID.fullmatch(kid):
                raise KeyFileError(f"line {number} is not `kid:base64 of 32 bytes`")
            try:
                key = base64.b64decode(encoded.strip(), validate=True)
            except (binascii.Error, ValueError):
                key = b""
            if len(key) != _KEY_BYTES:
                raise KeyFileError(f"line {number}: the key is not the base64 of 32 bytes")
            if kid in keys:
                raise KeyFileError(f"line {number}: the name of the key is used on an earlier line")
            keys[kid] = key
            if len(keys) > _KEYS_MAX:
                raise KeyFileError(f"contains more than {_KEYS_MAX} keys")
        return cls(keys)

    def seal(self, secret: bytes, place: SealedPlace) -> bytes:
        """Seal a secret for this row with the first key."""
        nonce = os.urandom(_NONCE_BYTES)
        return _VERSION + nonce + self._ciphers[self.first].encrypt(nonce, secret, place.additional_data())

    def open(self, sealed: bytes, kid: str, place: SealedPlace) -> bytes:
        """The secret that was sealed with the key `kid` for this row. Raises CannotOpen."""
        cipher = self._ciphers.get(kid)
        if cipher is None:
            raise CannotOpen(f"the key file has no key {kid!r}")
        if sealed[:1] != _VERSION:
            raise CannotOpen("sealed in an unknown format")
        nonce, ciphertext = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            return cipher.decrypt(nonce, ciphertext, place.additional_data())
        except (InvalidTag, ValueError):
            # Without the cause, whose traceback might hold the key in a local variable of a debugger's report.
            raise CannotOpen(f"it does not open with the key {kid!r}: changed, or copied from another row") from None

    def __repr__(self) -> str:
        return f"SealingKeys({', '.join(self._ciphers)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("sealing keys cannot be pickled or copied")
