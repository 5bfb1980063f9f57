"""Messages of AWS's event streams (application/vnd.amazon.eventstream).

    total length  headers' length  CRC of these two  headers  payload  CRC of everything before
    4 bytes       4                4                                    4

All numbers are big-endian, CRCs are CRC-32. A header is the length of its name (1 byte), the name, a type (1 byte) and
a value; a string (type 7) is preceded by its length in 2 bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Final

PRELUDE_BYTES: Final = 12

#: By the specification, a payload has up to 24 MiB and the headers up to 128 KiB.
MESSAGE_BYTES_MAX: Final = 25_296_896

_CRC_BYTES: Final = 4
_HEADERS_BYTES_MAX: Final = 131_072
_PRELUDE: Final = struct.Struct("!III")
_CRC: Final = struct.Struct("!I")
_LENGTH: Final = struct.Struct("!H")
_STRING: Final = 7
#: The sizes of the values of each type; the length of the others precedes them.
_VALUE_BYTES: Final = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}


class FrameError(Exception):
    """Bytes that are no message of an event stream."""


def message_bytes(prelude: bytes | bytearray) -> int:
    """Return the length of the message that begins with this prelude. Raises FrameError."""
    total, headers, crc = _PRELUDE.unpack_from(prelude)
    if zlib.crc32(prelude[: PRELUDE_BYTES - _CRC_BYTES]) != crc:
        raise FrameError("the prelude does not match its CRC")
    least = PRELUDE_BYTES + headers + _CRC_BYTES
    if headers > _HEADERS_BYTES_MAX or not least <= total <= MESSAGE_BYTES_MAX:
        raise FrameError("the lengths do not fit together")
    size: int = total
    return size


def read_message(message: bytes) -> tuple[dict[str, str], bytes]:
    """Return the string headers and the payload of a whole message. Raises FrameError."""
    end = len(message) - _CRC_BYTES
    if zlib.crc32(message[:end]) != _CRC.unpack_from(message, end)[0]:
        raise FrameError("the message does not match its CRC")
    payload = PRELUDE_BYTES + int.from_bytes(message[4:8], "big")
    return _headers(message[PRELUDE_BYTES:payload]), message[payload:end]


def make_message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return a message with string headers."""
    block = b"".join(
        [
            b"%c%b%c%b%b" % (len(name), name.encode(), _STRING, _LENGTH.pack(len(value.encode())), value.encode())
            for name, value in headers.items()
        ]
    )
    lengths = struct.pack("!II", PRELUDE_BYTES + len(block) + len(payload) + _CRC_BYTES, len(block))
    message = lengths + _CRC.pack(zlib.crc32(lengths)) + block + payload
    return message + _CRC.pack(zlib.crc32(message))


def _headers(block: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    try:
        while at < len(block):
            name = block[at + 1 : at + 1 + block[at]]
            at += 1 + len(name)
            kind = block[at]
            at += 1
            size = _VALUE_BYTES.get(kind, -1)
            if size < 0:
                if kind not in (6, _STRING):
                    raise FrameError(f"a header is of the unknown type {kind}")
                size = int(_LENGTH.unpack_from(block, at)[0])
                at += _LENGTH.size
            value = block[at : at + size]
            if len(value) < size:
                raise FrameError("a header is incomplete")
            at += size
            if kind == _STRING:
                found[name.decode()] = value.decode()
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise FrameError("the headers are malformed") from error
    return found
