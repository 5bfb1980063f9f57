"""Names of clients, which come from strangers: shown on pages and written to tables."""

from __future__ import annotations

import unicodedata
from typing import Final

from keyproxy.oauth.client import NAME_CHARACTERS_MAX

#: Control, format (bidirectional overrides, zero-width characters, tags), surrogate and private-use characters, and
#: separators of lines and paragraphs: what is shown would not be what is stored.
_UNWANTED: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})

#: Of a name, before anything is removed. Normalization takes quadratic time: seconds for the marks that fit a request.
_READ_CHARACTERS_MAX: Final = 4 * NAME_CHARACTERS_MAX


def clean_name(text: str) -> str:
    """The name without control and bidirectional characters and without repeated spaces; NFC, as shown on pages.

    Only the first 800 characters are read.
    """
    spaced = (" " if character.isspace() else character for character in text[:_READ_CHARACTERS_MAX])
    kept = "".join(one for one in spaced if unicodedata.category(one) not in _UNWANTED)
    return unicodedata.normalize("NFC", " ".join(kept.split()))


def is_too_long(name: str) -> bool:
    """Whether a name exceeds the bound of its column."""
    return len(name) > NAME_CHARACTERS_MAX
