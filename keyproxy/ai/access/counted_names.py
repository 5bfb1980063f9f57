"""The names that count in a query, a form or headers, and the spellings that some servers take for them.

A name counts where its route looks for it. Servers differ in which of two equal names they read, and some ignore case,
end a name at a NUL or a bracket, or trim it. PHP takes `a.b`, `a b` and `a[b` for `a_b`, Rack and Express `[a]` for `a`,
URLSearchParams `?a` for `a`, ASP.NET `%u0061` for `a`. So a counting name occurs once, in one spelling, or the
request is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote_to_bytes

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.scanning.member_scope import folded
from keyproxy.reasons import Refusal

#: A query or form with a judged value in it is short, and so are its names and the values that count.
PAIRS_MAX: Final = 1_000
_NAME_BYTES_MAX: Final = 512
_VALUE_BYTES_MAX: Final = 4_096

_BRACKETS: Final = re.compile(r"[\[\]]")
_UNDERSCORES: Final = str.maketrans(". [", "___")
_CODE_UNIT: Final = re.compile(rb"%[uU]00([0-9A-Fa-f]{2})")


class CountedNames:
    """The counting names of one place."""

    __slots__ = ("_folded", "exact")

    def __init__(self, names: Iterable[str]) -> None:
        self.exact: Final = frozenset(names)
        self._folded: Final = {_variant(name): name for name in sorted(self.exact)}

    def __bool__(self) -> bool:
        return bool(self.exact)

    def meant(self, name: str) -> str | None:
        """The counting name that some server takes `name` for; None if it counts nowhere."""
        if name in self.exact:
            return name
        root = _BRACKETS.split(name.lstrip("[]? \t\r\n\f\v"), maxsplit=1)[0]
        return self._folded.get(_variant(root)) or self._folded.get(_variant(name))

    def meant_by(self, raw: bytes) -> str | None:
        """As `meant`, for a name that need not be UTF-8: some servers leave out the bytes that are not."""
        return self.meant(raw.decode("utf-8", "ignore"))


def counted_pairs(raw: bytes, names: CountedNames, place: str) -> dict[str, str]:
    """The values of the counting names in a query, or in a form of the same format, decoded once.

    Most servers separate pairs at `&`, some at `;` too. A pair that only some of them see is refused if its name counts:
    they would read different values. Raises a Refusal (REQUEST_MALFORMED).
    """
    found: dict[str, str] = {}
    if raw.count(b"&") + raw.count(b";") >= PAIRS_MAX:
        raise malformed(f"The {place} has more than {PAIRS_MAX} parameters.")
    for piece in raw.split(b"&"):
        pairs = piece.split(b";")
        for pair in pairs:
            raw_name, _, raw_value = pair.partition(b"=")
            if len(raw_name) > _NAME_BYTES_MAX:
                raise malformed(f"The {place} has a name of more than {_NAME_BYTES_MAX} bytes.")
            decoded = _decoded(_CODE_UNIT.sub(rb"%\1", raw_name))
            meant = names.meant_by(decoded)
            if meant is None:
                continue
            if len(pairs) > 1:
                raise malformed(f"The parameter '{meant}' of the {place} is next to a ';'.", meant)
            if meant in found or decoded != meant.encode("utf-8") or _CODE_UNIT.search(raw_name):
                raise _repeated(f"parameter '{meant}' of the {place}", meant)
            if len(raw_value) > _VALUE_BYTES_MAX:
                raise malformed(f"The parameter '{meant}' of the {place} is too long.", meant)
            found[meant] = _decoded(raw_value).decode("utf-8", "replace")
    return found


def counted_headers(block: bytes, names: CountedNames) -> dict[str, str]:
    """The values of the counting headers among header lines. `names`: in lower case.

    Servers that pass headers to CGI programs take `_`, and some `.`, for `-`. Raises a Refusal (REQUEST_MALFORMED).
    """
    found: dict[str, str] = {}
    for line in block.split(b"\r\n"):
        raw_name, _, raw_value = line.partition(b":")
        name = raw_name.decode("latin-1").lower()
        meant = name.replace("_", "-").replace(".", "-")
        if meant not in names.exact:
            continue
        if meant in found or name != meant:
            raise _repeated(f"header '{meant}'", meant)
        found[meant] = raw_value.strip(b" \t").decode("latin-1")
    return found


def _repeated(what: str, name: str) -> Refusal:
    return malformed(f"The {what} appears twice or in another spelling.", name)


def _variant(name: str) -> str:
    return folded(name).translate(_UNDERSCORES)


def _decoded(raw: bytes) -> bytes:
    return unquote_to_bytes(raw.replace(b"+", b" "))
