"""Text of others on our pages: names of programs, users and hosts must not change a page or deceive its reader."""

from __future__ import annotations

import html
import unicodedata
from typing import Final

from keyproxy.oauth import names, redirect_uris

_CHARACTERS_MAX: Final = 200

#: Combining marks of one character that are shown; more of them cover other lines.
_MARKS_MAX: Final = 3


def visible(text: str) -> str:
    """The text without control and bidirectional characters, on one line, of a bounded length."""
    shown: list[str] = []
    marks = 0
    for character in names.clean_name(text[: 4 * _CHARACTERS_MAX]):
        marks = marks + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        if marks <= _MARKS_MAX:
            shown.append(character)
    words = "".join(shown)
    return words if len(words) <= _CHARACTERS_MAX else words[: _CHARACTERS_MAX - 1] + "…"


def escaped(text: str) -> str:
    """The visible part of a text, for HTML content and attributes."""
    return html.escape(visible(text), quote=True)


def isolated(text: str) -> str:
    """The visible part of a text as HTML whose direction does not affect its surroundings."""
    return f"<bdi>{escaped(text)}</bdi>"


def is_on_device(redirect_uri: str) -> bool:
    """Whether a redirect URI leads to a program on the device of the browser: loopback, or a scheme of its own."""
    return redirect_uris.scheme(redirect_uri) != "https"
