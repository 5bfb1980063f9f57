"""Where a route reads a value of a request: in its path, query, headers or JSON."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from keyproxy.ai.dialects.endpoint import EACH, MemberPath

PATH: Final = "path"
QUERY: Final = "query"
HEADER: Final = "header"
JSON: Final = "json"

_PARAMETER_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_ESCAPE: Final = re.compile(r"~(?![01])")
_POINTER_MEMBERS_MAX: Final = 16
_MEMBER_CHARACTERS_MAX: Final = 64


class ValueSource(NamedTuple):
    """`kind`: one of the above. `name`: of the placeholder, the parameter or the header (in lower case). `pointer`: of
    JSON, the names of nested members; EACH is every element of an array. `text`: as configured."""

    text: str
    kind: str
    name: str = ""
    pointer: MemberPath = ()


def parse_value_source(text: str) -> ValueSource:
    """Read `path:NAME`, `query:NAME`, `header:NAME` or `json:/a/*/b`. Raises ValueError, whose text is the fault."""
    kind, _, name = text.partition(":")
    if kind == JSON:
        return ValueSource(text, JSON, pointer=_pointer(name))
    if kind not in (PATH, QUERY, HEADER):
        raise ValueError(f"{text!r} must be path:NAME, query:NAME, header:NAME or json:/a/*/b")
    if not (_FIELD_NAME if kind == HEADER else _PARAMETER_NAME).fullmatch(name):
        raise ValueError(f"{name!r} is not a valid name in {kind}:NAME")
    return ValueSource(text, kind, name.lower() if kind == HEADER else name)


def _pointer(text: str) -> MemberPath:
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not a JSON pointer: it must begin with '/'")
    members = text[1:].split("/")
    if len(members) > _POINTER_MEMBERS_MAX:
        raise ValueError(f"{text!r} has more than {_POINTER_MEMBERS_MAX} members")
    for member in members:
        if not 1 <= len(member) <= _MEMBER_CHARACTERS_MAX or _ESCAPE.search(member):
            raise ValueError(f"{text!r} is not a JSON pointer: {member!r} is not the name of a member")
    if members[-1] == EACH and len(members) == 1:
        raise ValueError(f"{text!r} selects no member")
    return tuple([member if member == EACH else member.replace("~1", "/").replace("~0", "~") for member in members])


def path_value(placeholder: re.Pattern[bytes], path: bytes) -> str | None:
    """The value at a placeholder, the first group of the pattern, decoded once. `path`: as sent."""
    match = placeholder.fullmatch(path)
    return None if match is None else unquote_to_bytes(match[1]).decode("utf-8", "replace")
