"""Values that pass through another party unread: encrypted with a key that is derived from a secret of this server.

The `state` of a login passes through the identity provider, its logs and the history of the browser. What a client has
requested is not theirs to know.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES: Final = 12
_PURPOSE: Final = b"keyproxy state"
_CHARACTERS_MAX: Final = 65_536
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+")


class StateSealer:
    """Encrypts texts with the first secret, and decrypts with all of them."""

    def __init__(self, secrets: Sequence[bytes], entropy: Callable[[int], bytes]) -> None:
        """`secrets`: the current one, and the previous one during a rotation. `entropy`: returns random bytes."""
        self._ciphers: Final = tuple(AESGCM(hmac.digest(secret, _PURPOSE, "sha256")) for secret in secrets)
        self._entropy = entropy

    def seal(self, text: str) -> str:
        """Encrypt an ASCII text. Compressed first: base64 in base64 would be a third longer."""
        nonce = self._entropy(_NONCE_BYTES)
        sealed = nonce + self._ciphers[0].encrypt(nonce, zlib.compress(text.encode("ascii")), None)
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode("ascii")

    def open(self, sealed: str) -> str | None:
        """Decrypt what `seal` has returned. None: it is altered, or its secret has been replaced."""
        if len(sealed) > _CHARACTERS_MAX or _BASE64URL.fullmatch(sealed) is None:
            return None
        try:
            content = base64.urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4))
        except binascii.Error:
            return None
        nonce, encrypted = content[:_NONCE_BYTES], content[_NONCE_BYTES:]
        for cipher in self._ciphers:
            try:
                return zlib.decompress(cipher.decrypt(nonce, encrypted, None)).decode("ascii")
            except (InvalidTag, ValueError):
                continue
        return None
