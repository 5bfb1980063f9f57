"""Estimate a response that reports no usage in its content: media, plain text, or what cannot be read."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.produced_text import media_tokens, unread_tokens
from keyproxy.ai.responses.usage_reader import ResponseUsageReader
from keyproxy.ai.text_estimate import TextEstimate


class MediaMeter(Meter):
    """For images, sounds and other binary content."""

    def __init__(self, usage: ResponseUsageReader) -> None:
        super().__init__(usage)
        self._size = 0

    @property
    def produced(self) -> int:
        return media_tokens(self._size)

    @property
    def produced_bound(self) -> int:
        return self.produced

    def feed(self, content: bytes) -> bytes:
        self._size += len(content)
        return content


class UnreadMeter(MediaMeter):
    """For text in a content coding that is not read."""

    @property
    def produced(self) -> int:
        return unread_tokens(self._size)


class TextMeter(Meter):
    """For plain text, such as a transcript."""

    def __init__(self, usage: ResponseUsageReader) -> None:
        super().__init__(usage)
        self._estimate: Final = TextEstimate()

    @property
    def produced(self) -> int:
        return self._estimate.tokens()

    @property
    def produced_bound(self) -> int:
        return self.produced

    def feed(self, content: bytes) -> bytes:
        self._estimate.add(content, continues=True)
        return content
