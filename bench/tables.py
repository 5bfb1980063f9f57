"""Tables in Markdown, as docs/performance.md has them."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table after an empty line. The first column is text, the others are figures."""
    print("\n| " + " | ".join(headings) + " |")
    print("|---" + "|--:" * (len(headings) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
