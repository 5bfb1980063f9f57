"""Webhooks according to Standard Webhooks 1.0.0: valid URLs and secrets, and the signature of a message.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

The signature covers the id, the time of the attempt and the body, so that a receiver can reject altered, replayed and
duplicate messages.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

_PREFIX: Final = "whsec_"
_KEY_BYTES_MIN: Final = 24
_KEY_BYTES_MAX: Final = 64


class InvalidSecretError(ValueError):
    """An invalid webhook secret. The text names the fault, not the secret."""


def key_of(secret: str) -> bytes:
    """The signing key, 24 to 64 bytes, from `whsec_` and its base64. Raises InvalidSecretError."""
    if not secret.startswith(_PREFIX):
        raise InvalidSecretError(
            f"must be {_PREFIX} followed by the base64 of {_KEY_BYTES_MIN} to {_KEY_BYTES_MAX} bytes"
        )
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidSecretError(f"must have valid base64 after {_PREFIX}") from error
    if not _KEY_BYTES_MIN <= len(key) <= _KEY_BYTES_MAX:
        raise InvalidSecretError(f"must encode {_KEY_BYTES_MIN} to {_KEY_BYTES_MAX} bytes, not {len(key)}")
    return key


def headers(key: bytes, message_id: str, wall_seconds: int, body: bytes) -> dict[str, str]:
    """The headers of a signed message. `wall_seconds`: Unix time of this attempt."""
    signed = f"{message_id}.{wall_seconds}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode("ascii")
    return {
        "Webhook-Id": message_id,
        "Webhook-Timestamp": str(wall_seconds),
        "Webhook-Signature": f"v1,{signature}",
    }


def url_problem(url: str) -> str | None:
    """The fault of a webhook URL, or None. It must be https, or http to this host only."""
    if not re.fullmatch(r"[!-~]+", url):
        return "contains a space or another character that is invalid in a URL"
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not is_whole:
        return "must be 'https://host[:port]/path'"
    if parts.username is not None or parts.password is not None:
        return "must not contain a user name or password: receivers verify the signature"
    if parts.scheme == "http" and not _is_here(parts.hostname or ""):
        return "must be https:// unless it leads to this host: messages contain details of keys and their owners"
    return None


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
