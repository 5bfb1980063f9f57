"""PKCE, RFC 7636, with S256 alone."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from typing import Final

METHOD: Final = "S256"

_CHALLENGE: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_VERIFIER: Final = re.compile(r"[A-Za-z0-9._~-]{43,128}")


def challenge_of(text: str) -> bytes | None:
    """The 32 bytes of a code challenge, None if it is not the base64url text of 32 bytes."""
    if _CHALLENGE.fullmatch(text) is None:
        return None
    content = base64.urlsafe_b64decode(text + "=")
    # Stray bits at the end: no verifier has this challenge.
    return content if base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii") == text else None


def is_verifier(text: str) -> bool:
    """Whether a code verifier has the form of RFC 7636 section 4.1."""
    return _VERIFIER.fullmatch(text) is not None


def verifies(verifier: str, challenge: bytes) -> bool:
    """Whether a verifier is that of the challenge."""
    if not is_verifier(verifier):
        return False
    return hmac.compare_digest(hashlib.sha256(verifier.encode("ascii")).digest(), challenge)
