"""The open arrays and objects of a request's JSON, and what the names of members mean."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.requests.content_media import PartFacts
from keyproxy.ai.requests.member_scope import Scope, Slot

# What the name of a member means, wherever it stands.
NO_MEANING: Final = 0
TYPE: Final = 1
MEDIA_TYPE: Final = 2
DETAIL: Final = 3
FORMAT: Final = 4
DATA: Final = 5
URL: Final = 6
BYTES: Final = 7
SOURCE: Final = 8
INLINE: Final = 9
URL_OF_IMAGE: Final = 10
URL_OF_VIDEO: Final = 11
URL_OF_AUDIO: Final = 12
INPUT_AUDIO: Final = 13
FILE_DATA: Final = 14
REFERENCE: Final = 15
IMAGES: Final = 16
IMAGE_BLOCK: Final = 17
AUDIO_BLOCK: Final = 18
VIDEO_BLOCK: Final = 19
DOCUMENT_BLOCK: Final = 20
NAMED: Final = 21
TOOLS: Final = 22
MESSAGES: Final = 23
CONTEXT: Final = 24
PROMPT: Final = 25
ID: Final = 26

MEANINGS: Final[dict[bytes, int]] = {
    b"type": TYPE, b"media_type": MEDIA_TYPE, b"mimeType": MEDIA_TYPE, b"mime_type": MEDIA_TYPE,
    b"detail": DETAIL, b"format": FORMAT, b"data": DATA, b"url": URL, b"bytes": BYTES, b"source": SOURCE,
    b"inlineData": INLINE, b"inline_data": INLINE, b"image_url": URL_OF_IMAGE, b"video_url": URL_OF_VIDEO,
    b"audio_url": URL_OF_AUDIO, b"input_audio": INPUT_AUDIO, b"file_data": FILE_DATA, b"file_id": REFERENCE,
    b"file_url": REFERENCE, b"fileUri": REFERENCE, b"file_uri": REFERENCE, b"s3Location": REFERENCE,
    b"images": IMAGES, b"image": IMAGE_BLOCK, b"audio": AUDIO_BLOCK, b"video": VIDEO_BLOCK,
    b"document": DOCUMENT_BLOCK, b"functions": NAMED, b"response_format": NAMED, b"text": NAMED, b"tools": TOOLS,
    b"toolConfig": TOOLS, b"tool_config": TOOLS, b"messages": MESSAGES, b"input": MESSAGES, b"contents": MESSAGES,
    b"previous_response_id": CONTEXT, b"conversation": CONTEXT, b"cachedContent": CONTEXT,
    b"cached_content": CONTEXT, b"prompt": PROMPT, b"id": ID,
}  # fmt: skip


class Frame:
    """An open array or object. `meaning`, `name`: of the member that is being read; `own`: of the one it is itself.

    `counts_names`: names in it are part of the prompt. `depth`: 0 for the document. `slot`: the member that is being
    read, if it counts. `own_slot`: the one that it is the value of.
    """

    __slots__ = (
        "counts_names", "depth", "elements", "is_empty", "is_object", "meaning", "own", "own_slot", "part",
        "scope", "slot", "start",
    )  # fmt: skip

    def __init__(self, start: int, depth: int, own: int, own_slot: Slot | None, *, is_object: bool) -> None:
        self.start: Final = start
        self.depth: Final = depth
        self.own: Final = own
        self.own_slot: Final = own_slot
        self.is_object: Final = is_object
        self.scope: Scope | None = None
        self.slot: Slot | None = None
        self.meaning = NO_MEANING
        self.counts_names = False
        self.is_empty = True
        self.elements = 0
        self.part: PartFacts | None = None

    def part_facts(self) -> PartFacts:
        """What it has of a content part so far."""
        part = self.part
        if part is None:
            part = self.part = PartFacts()
        return part
