"""Look up fields in the header lines of a judged head, which are kept as bytes and in no table.

`block`: whole lines, as in a RequestHead or a ResponseHead. `start`: how a line of that name begins, in lower case and
with the end of the line before it: `b"\\naccept-encoding:"`.
"""

from __future__ import annotations


def field_values(block: bytes, start: bytes) -> list[bytes]:
    """The values of the fields with this name, in lower case, in the order they stand."""
    lines = b"\n" + block.lower()
    found = []
    at = lines.find(start)
    while at >= 0:
        end = lines.find(b"\n", at + 1)
        found.append(lines[at + len(start) : end].strip(b" \t\r"))
        at = lines.find(start, end)
    return found


def without_field(block: bytes, start: bytes) -> bytes:
    """The same lines but for the fields with this name."""
    lines = b"\n" + block.lower()
    at = lines.rfind(start)
    while at >= 0:
        block = block[:at] + block[block.index(b"\n", at) + 1 :]
        at = lines.rfind(start, 0, at)
    return block
