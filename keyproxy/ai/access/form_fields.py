"""The fields of a multipart form that count. RFC 7578, read strictly.

The library splits the form; what it and other parsers read differently is refused here: a second parser must not find
a boundary, a part or a name that this one does not. docs/decisions/0020 has the reasons.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

from multipart import MultipartError, MultipartSegment, PushMultipartParser

from keyproxy.ai.access.counted_names import CountedNames
from keyproxy.ai.requests.request_facts import malformed
from keyproxy.reasons import Refusal

PARTS_MAX: Final = 1_000
_PART_HEADER_BYTES_MAX: Final = 8_192
_PART_HEADERS_MAX: Final = 16
#: Eight parts with the longest headers: a few milliseconds.
_PORTION: Final = 65_536

#: RFC 2046 section 5.1.1, without the characters that some parsers treat specially outside of quotes.
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_WORD_PATTERN: Final = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_TYPE_PARAMETER: Final = re.compile(rb"[ \t]*;[ \t]*(" + _WORD_PATTERN.encode() + rb')=(?:"([^"\\]*)"|([^\s";,]+))')

#: A disposition without backslashes and control characters: parsers differ in what a backslash means. PHP takes `'` for a
#: quote too, so it stands only within double quotes, and around the language of an extended value.
_BARE_PATTERN: Final = _WORD_PATTERN.replace("'", "")
_EXTENDED_PATTERN: Final = rf"[A-Za-z0-9-]+'[A-Za-z0-9-]*'{_BARE_PATTERN}"
_PARAMETER_PATTERN: Final = (
    rf'[ \t]*;[ \t]*({_BARE_PATTERN})=("[^"\\\x00-\x1f\x7f]*"|{_EXTENDED_PATTERN}|{_BARE_PATTERN})'
)
_DISPOSITION: Final = re.compile(rf"(?i)form-data((?:{_PARAMETER_PATTERN})*)[ \t]*")
_PARAMETER: Final = re.compile(_PARAMETER_PATTERN)
#: Rack searches the whole line for `name=`, also within quotes.
_NAME_IN_VALUE: Final = re.compile(r"(?i)name[ \t]*[*0-9]*=")
_CHARSET: Final = re.compile(r"""(?i);[ \t]*charset[ \t]*=[ \t]*["']?([^"';, \t]*)""")

_CHARSET_FIELD: Final = "_charset_"
_UTF8: Final = ("utf-8", "utf8", "us-ascii", "ascii")


class FormReading:
    """A multipart form that is read in portions. `fields`: the values of the counting fields, once `advance` has returned
    True."""

    def __init__(self, content: bytes, content_type: bytes, names: CountedNames) -> None:
        """`content_type`: the header's value. Raises a Refusal (REQUEST_MALFORMED), as `advance` does."""
        self.fields: Final[dict[str, str]] = {}
        boundary = _boundary(content_type)
        delimiter = b"--" + boundary
        if not content.startswith(delimiter + b"\r\n"):
            raise _fault("does not begin with its boundary")
        end = content.rfind(delimiter) + len(delimiter)
        if content[end:] not in (b"--", b"--\r\n"):
            raise _fault("has something behind its last boundary")
        self._content: Final = content
        self._end: Final = end + 2
        self._delimiters: Final = content.count(delimiter)
        self._names: Final = names
        self._parser: Final = PushMultipartParser(
            boundary, max_header_size=_PART_HEADER_BYTES_MAX, max_header_count=_PART_HEADERS_MAX,
            max_segment_count=PARTS_MAX, strict=True,
        )  # fmt: skip
        self._at = 0
        self._parts = 0
        self._name: str | None = None
        self._value: list[bytes] = []

    def advance(self) -> bool:
        """Read the next portion; return whether it was the last."""
        stop = min(self._at + _PORTION, self._end)
        try:
            for event in self._parser.parse(self._content[self._at : stop]):
                if isinstance(event, MultipartSegment):
                    self._begin_part(event)
                elif event is None:
                    if self._name is not None:
                        self.fields[self._name] = _text(b"".join(self._value), self._name)
                elif self._name is not None:
                    self._value.append(event)
            self._at = stop
            if stop < self._end:
                return False
            self._parser.close()
        except MultipartError as error:
            raise _fault(f"is malformed: {error}") from error
        # Another occurrence is a delimiter to some parser: after a bare LF, or with something behind it.
        if self._delimiters != self._parts + 1:
            raise _fault("contains its boundary elsewhere")
        return True

    def _begin_part(self, part: MultipartSegment) -> None:
        self._parts += 1
        name, self._value = _counting_name(part, self._names), []
        if name is not None and name in self.fields:
            raise malformed(f"The field '{name}' of the form appears twice.", name)
        self._name = name


def _boundary(content_type: bytes) -> bytes:
    """The parameter `boundary`, which must occur once."""
    at = content_type.find(b";")
    found: list[bytes] = []
    while 0 <= at < len(content_type):
        match = _TYPE_PARAMETER.match(content_type, at)
        if match is None:
            if content_type[at:].strip(b" \t;"):
                raise _fault("has malformed parameters in its Content-Type")
            break
        name, value = match[1].lower(), match[2] if match[2] is not None else match[3]
        # PHP searches the whole header for the word, and others for the last `boundary=` in it.
        if name == b"boundary" and b"boundary=" not in value.lower():
            found.append(value)
        elif b"boundary" in match[0].lower():
            raise _fault("has an encoded boundary, or more than one")
        elif name.startswith(b"charset") and value.lower() not in (b"utf-8", b"utf8"):
            raise _fault("is not in UTF-8")
        at = match.end()
    if len(found) != 1 or _BOUNDARY.fullmatch(found[0]) is None:
        raise _fault("has no valid boundary, or more than one")
    return found[0]


def _counting_name(part: MultipartSegment, names: CountedNames) -> str | None:
    """The name of a part, if it counts. Any part is refused whose name some parser reads differently."""
    if sum([len(name) + len(value) + 4 for name, value in part.headerlist]) > _PART_HEADER_BYTES_MAX:
        raise _fault(f"has more than {_PART_HEADER_BYTES_MAX} bytes of headers in a part")
    if len({name.lower() for name, _ in part.headerlist}) < len(part.headerlist):
        raise _fault("repeats a header in a part")
    headers = {name.lower(): value for name, value in part.headerlist}
    parameters = _parameters(headers.get("content-disposition", ""))
    name = parameters.get("name")
    if name is None or any(key.startswith("name*") for key in parameters):
        raise _fault("has a part without a plain name")
    if name.strip().lower() == _CHARSET_FIELD:
        raise _fault(f"has a field {_CHARSET_FIELD}")
    # Some parsers decode `=?utf-8?q?…?=`.
    meant = names.meant(name) or names.meant(unquote(name))
    if "=?" in name:
        raise _fault("has an encoded name")
    if meant is None:
        return None
    if name != meant:
        raise malformed(f"The field '{meant}' of the form is in another spelling.", meant)
    if any(key.startswith("filename") for key in parameters) or "content-transfer-encoding" in headers:
        raise malformed(f"The field '{meant}' of the form must be plain text.", meant)
    charset = _CHARSET.search(headers.get("content-type", ""))
    if charset is not None and charset[1].lower() not in _UTF8:
        raise malformed(f"The field '{meant}' of the form must be in UTF-8.", meant)
    return meant


def _parameters(disposition: str) -> dict[str, str]:
    whole = _DISPOSITION.fullmatch(disposition)
    if whole is None:
        raise _fault("has a part with a malformed Content-Disposition")
    found: dict[str, str] = {}
    for match in _PARAMETER.finditer(whole[1]):
        key = match[1].lower()
        if key in found:
            raise _fault("repeats a parameter in a part")
        if _NAME_IN_VALUE.search(match[2]):
            raise _fault("has a part with a second name in a parameter")
        found[key] = match[2][1:-1] if match[2].startswith('"') else match[2]
    return found


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise malformed(f"The field '{name}' of the form must be in UTF-8.", name) from None


def _fault(what: str) -> Refusal:
    return malformed(f"The multipart form {what}.")
