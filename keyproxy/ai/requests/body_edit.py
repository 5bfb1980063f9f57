"""Change a request's body: insert the output cap and request a stream's usage.

All other bytes stay as the client sent them. Serialising the document again would change numbers beyond a double's
range, the escapes in strings, and the order of duplicate names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keyproxy.ai.dialects.endpoint import DialectEndpoint, MemberPath
from keyproxy.ai.scanning.request_parts import RequestParts

_INCLUDE_USAGE: Final[MemberPath] = ("stream_options", "include_usage")

#: Smaller content is copied in slices, which is faster than views.
_COPIED_BYTES_MAX: Final = 65_536

#: Replaces the bytes from the first place to the second with others.
Edit = tuple[int, int, bytes]


def cap_member(endpoint: DialectEndpoint, cap_field: str) -> MemberPath:
    """The member to insert a cap into: `cap_field`, if it is one of the endpoint's maximums, else the first of them."""
    for path in endpoint.maximums:
        if cap_field and path[-1] == cap_field:
            return path
    return endpoint.maximums[0]


def edits_of(parts: RequestParts, *, cap: tuple[MemberPath, int] | None, adds_usage: bool) -> list[Edit]:
    """The edits of a JSON object, in the order of their places.

    `cap`: the member and its value. `adds_usage`: set `stream_options.include_usage`.
    """
    edits: list[Edit] = []
    inserted: list[bytes] = []
    for path, value in _changes(cap, adds_usage=adds_usage):
        edit = _edit(parts, path, value)
        if edit is None:
            inserted.append(_nested(path, value))
        else:
            edits.append(edit)
    if inserted:
        at = parts.opening + 1
        comma = b"" if "" in parts.empty else b","
        edits.append((at, at, b",".join(inserted) + comma))
    return sorted(edits) if len(edits) > 1 else edits


def edited(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Return the content with the edits. A long one is copied once."""
    if len(content) > _COPIED_BYTES_MAX:
        return b"".join(pieces(content, edits))
    found: list[bytes] = []
    at = 0
    for start, end, new in edits:
        found.append(content[at:start])
        found.append(new)
        at = end
    found.append(content[at:])
    return b"".join(found)


def pieces(content: bytes, edits: Sequence[Edit]) -> list[memoryview]:
    """Return the parts of the content with the edits, without a copy."""
    view = memoryview(content)
    found: list[memoryview] = []
    at = 0
    for start, end, new in edits:
        found += [view[at:start], memoryview(new)]
        at = end
    found.append(view[at:])
    return [piece for piece in found if len(piece)]


def _changes(cap: tuple[MemberPath, int] | None, *, adds_usage: bool) -> list[tuple[MemberPath, bytes]]:
    changes: list[tuple[MemberPath, bytes]] = []
    if adds_usage:
        changes.append((_INCLUDE_USAGE, b"true"))
    if cap is not None:
        changes.append((cap[0], b"%d" % cap[1]))
    return changes


def _edit(parts: RequestParts, path: MemberPath, value: bytes) -> Edit | None:
    """The edit that sets a member which is there, or whose object is; None if neither is."""
    for length in range(len(path), 0, -1):
        name = ".".join(path[:length])
        span = parts.spans.get(name)
        if span is None:
            continue
        start, end = span
        if length == len(path):
            return (start, end, value)
        if not isinstance(parts.values[name], dict):  # null
            return (start, end, b"{%b}" % _nested(path[length:], value))
        comma = b"" if name in parts.empty else b","
        return (start + 1, start + 1, _nested(path[length:], value) + comma)
    return None


def _nested(path: MemberPath, value: bytes) -> bytes:
    """A member with its value, as it stands in an object."""
    for name in reversed(path[1:]):
        value = b'{"%b":%b}' % (name.encode(), value)
    return b'"%b":%b' % (path[0].encode(), value)
