"""What the names of members mean for the media, texts and references of a request, wherever they stand."""

from __future__ import annotations

from typing import Final

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
