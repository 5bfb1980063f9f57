"""Rows of files passed to a command: CSV with a header line, JSON lines, or a JSON array.

A file in another format is an error that names the line. Guessing would issue no key, or the wrong one, and report
success.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from keyproxy.cli.output import Failure

Rows = list[tuple[str, Mapping[str, Any]]]

_FILE_BYTES_MAX: Final = 1 << 30
_FIELD_CHARACTERS_MAX: Final = 1 << 20
_SHOWN_MAX: Final = 8
_NAME = re.compile(r"[A-Za-z][A-Za-z _-]{0,29}")
_OTHER_SEPARATORS: Final = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_rows(path: Path, *, needs: Sequence[Sequence[str]], beside: Sequence[str] = ()) -> Rows:
    """Read every row of a file with its place, `FILE:line`; `-` is stdin. Raises Failure.

    `needs`: groups of columns; the header must name one group in full. `beside`: columns that it must also name.
    """
    name, text = _text_of(path)
    if not text.strip():
        raise Failure(f"{name}:1: the file is empty: it needs a header line, or JSON")
    start = text.lstrip()[:1]
    if start in "[{":
        rows = [(f"{name}:{number}", row) for number, row in _json_rows(name, text)]
    else:
        rows = [(f"{name}:{number}", row) for number, row in _csv_rows(name, text, needs, beside)]
    if not rows:
        raise Failure(f"{name}:1: there are no rows" + ("" if start in "[{" else " below the header line"))
    return rows


def read_owners(path: Path) -> dict[str, str]:
    """Read the owner of each key from CSV lines `prefix or name,user`. Raises Failure."""
    name, text = _text_of(path)
    owners: dict[str, str] = {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for line in reader:
            if not any(cell.strip() for cell in line):
                continue
            if len(line) != 2 or not all(cell.strip() for cell in line):
                raise Failure(f"{name}:{reader.line_num}: expected lines of `prefix or name,user`")
            owners[line[0].strip()] = line[1].strip()
    except csv.Error as error:
        raise Failure(f"{name}:{reader.line_num}: this is not valid CSV: {error}") from error
    if not owners:
        raise Failure(f"{name}:1: the file is empty: expected lines of `prefix or name,user`")
    return owners


def _text_of(path: Path) -> tuple[str, str]:
    """(the name of a file for messages, its content)."""
    name = "stdin" if str(path) == "-" else str(path)
    try:
        raw = sys.stdin.buffer.read(_FILE_BYTES_MAX) if name == "stdin" else path.read_bytes()
        return name, raw.decode("utf-8-sig")
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise Failure(f"{name}:{line}: this is not UTF-8 text, so it is neither CSV nor JSON") from error


def _json_rows(name: str, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    is_array = text.lstrip().startswith("[")
    documents = [(1, text)] if is_array else [*enumerate(text.split("\n"), start=1)]
    for number, document in documents:
        if not document.strip():
            continue
        try:
            found = orjson.loads(document)
        except orjson.JSONDecodeError as error:
            line = error.lineno if is_array else number
            raise Failure(f"{name}:{line}: this is not valid JSON: {error.msg}") from error
        for place, item in enumerate(found, start=1) if is_array else [(number, found)]:
            if not isinstance(item, dict):
                raise Failure(f"{name}:{place}: this is not a JSON object")
            # Django's dumpdata puts the columns into `fields`; its `pk` contains a hash and is not a valid key id.
            columns = item.get("fields", item) if is_array else item
            if not isinstance(columns, dict):
                raise Failure(f"{name}:{place}: `fields` is not a JSON object")
            yield place, columns


def _csv_rows(
    name: str, text: str, needs: Sequence[Sequence[str]], beside: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(_FIELD_CHARACTERS_MAX)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for line in reader:
            if not any(cell.strip() for cell in line):
                continue
            if not header:
                header = [column.strip() for column in line]
                _check_header(f"{name}:{reader.line_num}", header, needs, beside)
                continue
            if len(line) != len(header):
                raise Failure(
                    f"{name}:{reader.line_num}: the row has {len(line)} fields, but the header line has {len(header)}"
                )
            yield reader.line_num, {column: value for column, value in zip(header, line, strict=True) if column}
    except csv.Error as error:
        raise Failure(f"{name}:{reader.line_num}: this is not valid CSV: {error}") from error


def _check_header(place: str, header: Sequence[str], needs: Sequence[Sequence[str]], beside: Sequence[str]) -> None:
    twice = [column for column in header if column and header.count(column) > 1]
    if twice:
        raise Failure(f"{place}: the header line names {twice[0]!r} twice")
    missing = [column for column in beside if column not in header]
    if any(set(group) <= set(header) for group in needs) and not missing:
        return
    wanted = " or ".join(" and ".join(f"`{column}`" for column in group) for group in needs)
    wanted = f"`{missing[0]}`" if missing else wanted
    if len(header) == 1:
        separator = next((sign for sign in _OTHER_SEPARATORS if sign in header[0]), None)
        if separator is not None:
            raise Failure(f"{place}: the header line is separated by {_OTHER_SEPARATORS[separator]}; use commas")
    # Without a header line these are values, and may be secrets: only what looks like a name is shown.
    shown = ", ".join(repr(column) if _NAME.fullmatch(column) else "…" for column in header[:_SHOWN_MAX])
    more = ", …" if len(header) > _SHOWN_MAX else ""
    raise Failure(f"{place}: the header line has no column {wanted}; it has {shown}{more}")
