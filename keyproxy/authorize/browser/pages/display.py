"""Text of others on our pages: names of programs, users and hosts must not change a page or deceive its reader."""

from __future__ import annotations

import html
import unicodedata
from typing import Final
from urllib.parse import urlsplit

_CHARACTERS_MAX: Final = 200

#: Control, format (which includes those that change the direction of text), surrogate, private and unassigned characters.
_INVISIBLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

#: Combining marks of one character that are shown; more of them cover other lines.
_MARKS_MAX: Final = 3


def visible(text: str) -> str:
    """The text without control and bidirectional characters, on one line, of a bounded length."""
    shown: list[str] = []
    marks = 0
    for character in text[: 4 * _CHARACTERS_MAX]:
        category = unicodedata.category(character)
        if category in _INVISIBLE:
            character = " " if character in "\t\n\r\u2028\u2029" else ""
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if character and marks <= _MARKS_MAX:
            shown.append(character)
    words = " ".join("".join(shown).split())
    return words if len(words) <= _CHARACTERS_MAX else words[: _CHARACTERS_MAX - 1] + "…"


def escaped(text: str) -> str:
    """The visible part of a text, for HTML content and attributes."""
    return html.escape(visible(text), quote=True)


def isolated(text: str) -> str:
    """The visible part of a text as HTML whose direction does not affect its surroundings."""
    return f"<bdi>{escaped(text)}</bdi>"


def destination(redirect_uri: str) -> str:
    """Where a redirect URI leads, in the form that a person can judge: the host, or the scheme of a program's own."""
    parts = urlsplit(redirect_uri)
    if parts.scheme not in ("http", "https"):
        return f"{parts.scheme}:"
    return parts.hostname or ""


def is_loopback(redirect_uri: str) -> bool:
    """Whether a redirect URI leads to a program on the device of the browser."""
    return urlsplit(redirect_uri).scheme == "http"
