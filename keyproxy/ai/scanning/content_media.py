"""Images, sounds, videos and files in a request, and references to content that the upstream has.

Media are recognised by the members of the APIs' content parts:

    image_url, video_url, audio_url, file_url   a URL, or an object with a `url`
    source                                      of type base64, url, file or text; Bedrock's has `bytes`
    inlineData, input_audio                     an object with `data`
    file_data, images                           base64, with or without `data:`

Their strings are no text. What is no medium by its type is text, so that a prompt cannot pass as a picture.
"""

from __future__ import annotations

from typing import Final

from keyproxy.mypyc_compat import mypyc_attr

#: The kinds of media.
IMAGE: Final = 1
AUDIO: Final = 2
VIDEO: Final = 3
FILE: Final = 4

_AUDIO_BYTES_A_TOKEN: Final = 250
_VIDEO_BYTES_A_TOKEN: Final = 400
_FILE_BYTES_A_TOKEN: Final = 8
_FILE_TOKENS_MIN: Final = 3_000

_KINDS: Final = {b"image": IMAGE, b"audio": AUDIO, b"video": VIDEO}

#: Part types, by how their base64 or URL counts.
PART_KINDS: Final = {
    b"image": IMAGE, b"input_image": IMAGE, b"image_url": IMAGE, b"audio": AUDIO, b"input_audio": AUDIO,
    b"video": VIDEO, b"input_video": VIDEO, b"document": FILE, b"file": FILE, b"input_file": FILE,
}  # fmt: skip

_URL_HEAD_BYTES_MAX: Final = 256


@mypyc_attr(acyclic=True)
class MediaCount:
    """The media of one request. `low_detail_images`: images that the model sees in low resolution.

    `tokens`: of the media other than images, whose estimate depends on the dialect and the model.
    """

    __slots__ = ("images", "low_detail_images", "tokens")

    def __init__(self) -> None:
        self.images = 0
        self.low_detail_images = 0
        self.tokens = 0

    def add(self, kind: int, decoded_bytes: int) -> None:
        """Count one medium that the request contains."""
        if kind == IMAGE:
            self.images += 1
        elif kind == AUDIO:
            self.tokens += -(-decoded_bytes // _AUDIO_BYTES_A_TOKEN)
        elif kind == VIDEO:
            self.tokens += -(-decoded_bytes // _VIDEO_BYTES_A_TOKEN)
        else:
            self.tokens += max(_FILE_TOKENS_MIN, -(-decoded_bytes // _FILE_BYTES_A_TOKEN))


def media_kind(media_type: bytes, otherwise: int) -> int:
    """The kind of content with this media type; `otherwise` if it has none."""
    if not media_type:
        return otherwise
    return _KINDS.get(media_type.partition(b"/")[0].strip().lower(), FILE)


def data_url_type(content: bytes, start: int, end: int) -> tuple[bytes, int]:
    """The media type of a `data:` URL and where its data starts; empty and `start` if it is another string.

    The type of a URL without one is `text/plain`. PHP and others escape slashes in JSON.
    """
    head = content[start : min(end, start + _URL_HEAD_BYTES_MAX)]
    if head[:5].lower() != b"data:":
        return b"", start
    media, comma, _ = head.partition(b",")
    if not comma:
        return b"text/plain", start
    kind = media[5:].partition(b";")[0].replace(b"\\", b"") or b"text/plain"
    return kind, start + len(media) + 1


def base64_bytes(content: bytes, start: int, end: int) -> int:
    """The decoded length of base64 in a JSON string, with escaped slashes or without."""
    length = end - start - content.count(b"\\/", start, end) - 5 * content.count(b"\\u", start, end)
    tail = content[max(start, end - 2) : end]
    padding = 2 if tail == b"==" else 1 if tail[-1:] == b"=" else 0
    return max(0, (length - padding) * 3 // 4)


@mypyc_attr(acyclic=True)
class PartFacts:
    """What an object has of a content part until it ends.

    `type`, `types`: its `type`, and how many it has. `start`, `end`: where its string `data` stands. `images`: images by
    URL, counted at the end because `detail` may follow. `has_url`: a URL whose meaning depends on the type.
    `base64_bytes`: the decoded length of content whose kind depends on the object around it; -1 without any.
    `is_medium`: it is a medium, so `labels` (where its type and formats stand) are no text.
    """

    __slots__ = (
        "base64_bytes", "details", "end", "has_url", "images", "is_low", "is_medium", "labels", "media_type", "start",
        "type", "types",
    )  # fmt: skip

    def __init__(self) -> None:
        self.type = b""
        self.types = 0
        self.media_type = b""
        self.start = -1
        self.end = -1
        self.has_url = False
        self.images = 0
        self.is_low = False
        self.details = 0
        self.base64_bytes = -1
        self.is_medium = False
        self.labels: list[tuple[int, int]] = []
