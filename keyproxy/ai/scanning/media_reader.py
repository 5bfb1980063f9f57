"""Recognise the media of a request, and its references to content that the upstream has, while it is scanned."""

from __future__ import annotations

from typing import Final

import orjson

from keyproxy.ai.scanning.content_media import (
    AUDIO,
    FILE,
    IMAGE,
    PART_KINDS,
    VIDEO,
    MediaCount,
    PartFacts,
    base64_bytes,
    data_url_type,
    media_kind,
)
from keyproxy.ai.scanning.member_meanings import (
    AUDIO_BLOCK,
    BYTES,
    CONTEXT,
    DATA,
    DETAIL,
    DOCUMENT_BLOCK,
    FILE_DATA,
    FORMAT,
    ID,
    IMAGE_BLOCK,
    INLINE,
    INPUT_AUDIO,
    MEDIA_TYPE,
    PROMPT,
    REFERENCE,
    SOURCE,
    TYPE,
    URL,
    URL_OF_AUDIO,
    URL_OF_IMAGE,
    URL_OF_VIDEO,
    VIDEO_BLOCK,
)
from keyproxy.ai.scanning.open_frame import Frame
from keyproxy.ai.scanning.pending_text import PendingText
from keyproxy.mypyc_compat import mypyc_attr

_LABEL_BYTES_MAX: Final = 256
_BACKSLASH: Final = 0x5C

_URL_KINDS: Final = {URL_OF_IMAGE: IMAGE, URL_OF_VIDEO: VIDEO, URL_OF_AUDIO: AUDIO}
_BLOCK_KINDS: Final = {IMAGE_BLOCK: IMAGE, AUDIO_BLOCK: AUDIO, VIDEO_BLOCK: VIDEO, DOCUMENT_BLOCK: FILE}
#: Members that describe a medium.
_LABELS: Final = frozenset({TYPE, MEDIA_TYPE, DETAIL, FORMAT})
#: Objects whose media belong to the part around them.
_INNER: Final = frozenset({SOURCE, INPUT_AUDIO, URL_OF_IMAGE, URL_OF_VIDEO, URL_OF_AUDIO})
_ITEM_REFERENCE: Final = b"item_reference"


@mypyc_attr(acyclic=True)
class MediaReader:
    """`count`: the media found. `reference`: the first kind of reference, empty without any."""

    __slots__ = ("_content", "_text", "count", "reference")

    def __init__(self, content: bytes, text: PendingText) -> None:
        self.count: Final = MediaCount()
        self.reference = ""
        self._content: Final = content
        self._text: Final = text

    def is_medium(self, frame: Frame, start: int, end: int) -> bool:
        """Note a string whose member has a meaning; return whether it is no text, or is not known to be one yet."""
        meaning = frame.meaning
        if meaning in _LABELS:
            self._note_label(frame.part_facts(), meaning, start, end)
            return True
        if meaning in _URL_KINDS:
            self._url(frame, _URL_KINDS[meaning], start, end)
            return True
        if meaning == DATA:
            return self._note_data(frame, start, end)
        if meaning == URL:
            return self._note_url(frame, start, end)
        if meaning == BYTES and frame.own == SOURCE:
            part = frame.part_facts()
            part.base64_bytes = max(part.base64_bytes, base64_bytes(self._content, start, end))
            return True
        if meaning == FILE_DATA:
            media_type, data = data_url_type(self._content, start, end)
            self._add(frame, media_kind(media_type, FILE), base64_bytes(self._content, data, end))
            return True
        if end > start:
            if meaning == REFERENCE:
                self.refer("file")
            elif meaning == CONTEXT and frame.depth == 0:
                self.refer("conversation")
            elif meaning == ID and frame.own == PROMPT and frame.depth == 1:
                self.refer("prompt")
        return False

    def _note_label(self, part: PartFacts, meaning: int, start: int, end: int) -> None:
        part.labels.append((start, end))
        value = self._content[start : min(end, start + _LABEL_BYTES_MAX)]
        if _BACKSLASH in value and end - start <= _LABEL_BYTES_MAX:
            value = str(orjson.loads(self._content[start - 1 : end + 1])).encode("utf-8")
        if meaning == TYPE:
            part.types += 1
            part.type = value
        elif meaning == MEDIA_TYPE:
            part.media_type = value
        elif meaning == DETAIL:
            part.details += 1
            part.is_low = part.details == 1 and value == b"low"

    def _note_data(self, frame: Frame, start: int, end: int) -> bool:
        if frame.own == INPUT_AUDIO:
            self._add(frame, AUDIO, base64_bytes(self._content, start, end))
            return True
        part = frame.part_facts()
        if part.start >= 0:
            return False
        part.start, part.end = start, end
        return True

    def _note_url(self, frame: Frame, start: int, end: int) -> bool:
        kind = _URL_KINDS.get(frame.own, 0)
        if kind:
            self._url(frame, kind, start, end)
            return True
        if frame.own == SOURCE:
            frame.part_facts().has_url = True
            return True
        return False

    def _url(self, frame: Frame, kind: int, start: int, end: int) -> None:
        media_type, data = data_url_type(self._content, start, end)
        if media_type:
            kind = media_kind(media_type, kind)
        elif kind != IMAGE:
            self.refer("url")
            return
        part = frame.part_facts()
        part.is_medium = True
        if kind == IMAGE:
            part.images += 1
        else:
            self.count.add(kind, base64_bytes(self._content, data, end))

    def _add(self, frame: Frame, kind: int, decoded_bytes: int) -> None:
        frame.part_facts().is_medium = True
        self.count.add(kind, decoded_bytes)

    def end_part(self, frame: Frame, part: PartFacts, parent: Frame | None) -> None:
        """An object that may be a medium ends. What depends on the type of the object around it is passed on."""
        outer = None
        if parent is not None and parent.is_object and frame.own in _INNER:
            outer = parent.part_facts()
        kind = PART_KINDS.get(part.type, 0) if part.types == 1 else 0
        if part.start >= 0:
            self._end_data(frame, part, kind)
        if part.images and outer is not None and not part.details:
            outer.images += part.images
        elif part.is_low:
            self.count.low_detail_images += part.images
        else:
            self.count.images += part.images
        if outer is not None:
            outer.base64_bytes = max(outer.base64_bytes, part.base64_bytes)
            outer.has_url = outer.has_url or part.has_url
            part.is_medium = part.is_medium or part.base64_bytes >= 0 or part.has_url
            outer.is_medium = outer.is_medium or part.is_medium
        elif part.base64_bytes >= 0:
            self._add(frame, kind or _BLOCK_KINDS.get(frame.own, FILE), part.base64_bytes)
        elif part.has_url and kind == IMAGE:
            self._add(frame, IMAGE, 0)
        elif part.has_url:
            self.refer("url")
        if part.type == _ITEM_REFERENCE:
            self.refer("conversation")
        if not part.is_medium:
            for start, end in part.labels:
                self._text.add(start, end)

    def _end_data(self, frame: Frame, part: PartFacts, kind: int) -> None:
        """Decide whether the string `data` of an object that ends is a medium or text."""
        size = base64_bytes(self._content, part.start, part.end)
        if frame.own == SOURCE and part.types == 1 and part.type == b"base64":
            if part.media_type:
                self._add(frame, media_kind(part.media_type, FILE), size)
            else:
                part.base64_bytes = size
        elif frame.own == INLINE:
            self._add(frame, media_kind(part.media_type, FILE), size)
        elif part.media_type and kind in (IMAGE, AUDIO):
            self._add(frame, kind, size)
        else:
            self._text.add(part.start, part.end)

    def refer(self, what: str) -> None:
        """Note a reference to content that the request does not contain."""
        self.reference = self.reference or what
