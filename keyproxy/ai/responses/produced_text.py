"""Estimate what a stream has produced, from the texts of its events.

Reading a stream must cost next to nothing, and most streams end with a report. So texts are only collected, and
estimated when the collection is long or the estimate is asked for; `bound` is known without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keyproxy.ai.text_estimate import QUARTERS, SEPARATOR, json_text, pieces_quarters

#: Binary and base64 media: so many bytes are a token.
MEDIA_BYTES_A_TOKEN: Final = 800

#: The members of a document or an event with an image or a sound in base64.
MEDIA_MEMBERS: Final = ("audio", "b64_json", "data", "partial_image_b64")

#: Content that could not be read is taken for text: so many bytes are a token in most languages and code.
_UNREAD_BYTES_A_TOKEN: Final = 4

_COLLECTED_BYTES_MAX: Final = 8_192
_BETWEEN: Final = SEPARATOR + SEPARATOR


def media_tokens(size: int) -> int:
    """The estimate of so many bytes of media."""
    return -(-size // MEDIA_BYTES_A_TOKEN)


def unread_tokens(size: int) -> int:
    """The estimate of so many bytes that could not be read."""
    return -(-size // _UNREAD_BYTES_A_TOKEN)


def base64_bytes(characters: int) -> int:
    """The number of bytes in so many characters of base64, without padding."""
    return 3 * characters // 4


class ProducedText:
    """The output of a stream so far: what was reported last, and the texts since then, each at least one token."""

    def __init__(self) -> None:
        self._reported = 0
        self._quarters = 0
        self._media_characters = 0
        self._unread_bytes = 0
        self._collected: list[bytes] = []
        self._collected_bytes = 0

    def add(self, texts: Sequence[bytes]) -> None:
        """Add texts as they stand in JSON, none of them empty."""
        if texts:
            joined = texts[0] if len(texts) == 1 else _BETWEEN.join(texts)
            self._collected.append(joined)
            self._collected_bytes += len(joined)
            if self._collected_bytes > _COLLECTED_BYTES_MAX:
                self._estimate()

    def add_media(self, characters: int) -> None:
        """Add so many characters of base64."""
        self._media_characters += characters

    def add_unread(self, size: int) -> None:
        """Add so many bytes that could not be read."""
        self._unread_bytes += size

    def report(self, tokens: int) -> None:
        """So many tokens are reported for everything until now."""
        self._reported = tokens
        self._quarters = self._media_characters = self._unread_bytes = self._collected_bytes = 0
        self._collected.clear()

    @property
    def tokens(self) -> int:
        """The estimate."""
        self._estimate()
        return self._known()

    @property
    def bound(self) -> int:
        """At least the estimate, which is not made for it: 16 letters of alternating case, the densest text, are 17."""
        return self._known() + self._collected_bytes + self._collected_bytes // 16

    def _known(self) -> int:
        media = media_tokens(base64_bytes(self._media_characters))
        return self._reported - (-self._quarters // QUARTERS) + media + unread_tokens(self._unread_bytes)

    def _estimate(self) -> None:
        if self._collected:
            pieces = json_text(SEPARATOR + _BETWEEN.join(self._collected) + SEPARATOR)
            self._quarters += pieces_quarters(pieces)
            self._collected_bytes = 0
            self._collected.clear()
