"""The identity headers: set by this proxy only, and stripped from what clients send.

A request goes upstream with the identity's precomputed header lines. They are appended after the client's fields were
filtered, so no field, repetition or Connection option of the client can replace, duplicate or remove them. Every field
of the client under the configured prefix is dropped, in any spelling: `headers.FieldNames` classifies it as RESERVED,
and `wire.parsing` does not forward such a line. One of them has a meaning: Act-For names the user that a key acts for. It
must be obeyed or refused, never ignored, so it is recognised in any spelling too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

#: The name of the Act-For header after the prefix, in canonical form.
ACT_FOR: Final = b"act-for"


def is_reserved(canonical_name: bytes, canonical_prefix: bytes) -> bool:
    """Whether a client's field of this name is stripped. Both in canonical form."""
    return canonical_name.startswith(canonical_prefix)


def identity_block(prefix: str, values: Iterable[tuple[str, str]]) -> bytes:
    """Identity headers as bytes: `values` are (name without prefix, value). Raises ValueError for an unsafe value."""
    lines = []
    for name, value in values:
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(f"{name}: not printable ASCII, or surrounded by spaces")
        lines.append(f"{prefix}{name}: {value}\r\n")
    return "".join(lines).encode("ascii")
