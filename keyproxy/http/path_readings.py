"""What lenient servers make of a path: percent-decoded or not, repeated slashes merged or not, `;parameters` removed or
not, in every combination.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote_to_bytes

_PARAMETERS = re.compile(rb";[^/]*")
_SLASHES = re.compile(rb"/{2,}")
_ENCODED_SLASH = re.compile(rb"%2f", re.IGNORECASE)
_TWICE_ENCODED_SLASH: Final = b"%252F"

_PERCENT: Final = 0x25
_SEMICOLON: Final = 0x3B

#: Segments that a server removes, or that lead elsewhere.
_UNSTABLE: Final = (b"", b".", b"..")


def is_folded_by_some(path: bytes) -> bool:
    """Whether any server reads the path differently from how it was sent."""
    # A byte as an integer is looked for in a quarter of the time that `find` takes; `any` would make a generator.
    return _PERCENT in path or path.find(b"//") >= 0 or _SEMICOLON in path


def has_encoded_slash(path: bytes) -> bool:
    """Whether the path has `%2F`."""
    return _PERCENT in path and _ENCODED_SLASH.search(path) is not None


def readings(path: bytes) -> set[bytes]:
    """Every reading of a path without `%2F`."""
    return _folded({path}, unquote_to_bytes)


def readings_that_keep(path: bytes) -> set[bytes]:
    """Every reading of a path by servers that leave `%2F` as it is."""
    return _folded({path}, _decoded_but_slashes)


def readings_that_split(path: bytes) -> set[bytes]:
    """Every reading of a path by servers that take `%2F` for a slash."""
    return _folded({_ENCODED_SLASH.sub(b"/", one) for one in (path, _PARAMETERS.sub(b"", path))}, unquote_to_bytes)


def all_readings(path: bytes) -> set[bytes]:
    """Every reading of a path, with `%2F` or without."""
    if not is_folded_by_some(path):
        return {path}
    return readings_that_keep(path) | readings_that_split(path) if has_encoded_slash(path) else readings(path)


def has_unstable_segment(value: bytes) -> bool:
    """Whether a value, percent-decoded once, has an empty or dot segment, also one followed by a `;parameter`."""
    return any(segment.partition(b";")[0] in _UNSTABLE for segment in unquote_to_bytes(value).split(b"/"))


def _folded(paths: set[bytes], decoded: Callable[[bytes], bytes]) -> set[bytes]:
    found = paths | {_PARAMETERS.sub(b"", one) for one in paths}
    found |= {decoded(one) for one in found}
    found |= {_PARAMETERS.sub(b"", one) for one in found}
    return found | {_SLASHES.sub(b"/", one) for one in found}


def _decoded_but_slashes(path: bytes) -> bytes:
    return unquote_to_bytes(_ENCODED_SLASH.sub(_TWICE_ENCODED_SLASH, path))
