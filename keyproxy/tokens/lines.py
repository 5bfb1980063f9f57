"""Look up fields in the header lines of a judged head, which are kept as bytes and in no table."""

from __future__ import annotations


def lower_values(block: bytes, *names: bytes) -> list[list[bytes]]:
    """The values of the fields with these names, in lower case, in the order they stand; a list for each name.

    `block`: whole lines, as in a RequestHead or a ResponseHead. `names`: in lower case.
    """
    lines = b"\n" + block.lower()
    return [_values(lines, b"\n%b:" % name) for name in names]


def _values(lines: bytes, start: bytes) -> list[bytes]:
    found = []
    at = lines.find(start)
    while at >= 0:
        end = lines.find(b"\n", at + 1)
        found.append(lines[at + len(start) : end].strip(b" \t\r"))
        at = lines.find(start, at + 1)
    return found
