"""The hashes of djangorestframework-api-key that keyproxy can verify."""

from __future__ import annotations

import re
from typing import Final

_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,32}")
_SHA512 = re.compile(r"sha512\$\$[0-9a-f]{128}")
_PBKDF2 = re.compile(r"pbkdf2_sha256\$([0-9]{1,7})\$[!-#%-~]{1,64}\$[A-Za-z0-9+/]{43}=")

#: As in keyproxy, which refuses to compute more.
_ROUNDS_MAX: Final = 3_000_000


def why_unusable(prefix: str, hashed_key: str) -> str | None:
    """The reason keyproxy could not verify a key by this prefix and hash; None if it can."""
    if not _PREFIX.fullmatch(prefix):
        return "the prefix must be 1 to 32 letters, digits, _ and -"
    match = _PBKDF2.fullmatch(hashed_key)
    if match is not None and 1 <= int(match[1]) <= _ROUNDS_MAX:
        return None
    if _SHA512.fullmatch(hashed_key):
        return None
    return "hashed_key is neither sha512$$… nor pbkdf2_sha256$…$…$…"
