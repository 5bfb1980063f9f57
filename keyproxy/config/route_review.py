"""Review the route table: rows that never match, and keys that no row accepts.

Neither is an error, but both are nearly always mistakes, which show only when a request is admitted or refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from keyproxy.config.schema import RouteRow


def shadowed(routes: Sequence[RouteRow]) -> list[str]:
    """Return one sentence for each route that an earlier one shadows completely."""
    found = []
    for number, row in enumerate(routes, start=1):
        for earlier_number, earlier in enumerate(routes[: number - 1], start=1):
            if _covers(earlier.match, row.match):
                found.append(
                    f"routes[{number}]: {row.match!r} never matches, because routes[{earlier_number}] {earlier.match!r}"
                    " precedes it and matches the same requests; move the narrower one up"
                )
                break
    return found


def scope_warnings(routes: Sequence[RouteRow], scopes: Collection[str]) -> list[str]:
    """Warnings about a key's scopes under these routes: a misspelled scope, or a key that every route refuses."""
    if not routes:
        return []
    required = {scope for row in routes for scope in row.scopes}
    unknown = [f"no route requires the scope {scope!r}" for scope in scopes if scope not in required]
    if unknown or any(set(row.scopes) <= set(scopes) for row in routes):
        return unknown
    if not scopes:
        return ["the key has no scopes and every route requires one: all its requests will be refused"]
    return ["no route accepts a key with only these scopes: all its requests will be refused"]


def _covers(wide: str, narrow: str) -> bool:
    """Whether the first pattern matches every request that the second one matches."""
    wide_method, _, wide_path = wide.partition(" ")
    narrow_method, _, narrow_path = narrow.partition(" ")
    if wide_method not in ("*", narrow_method):
        return False
    wide_segments, narrow_segments = wide_path.split("/")[1:], narrow_path.split("/")[1:]
    for place, segment in enumerate(wide_segments):
        if place >= len(narrow_segments):
            return False
        if _is_rest(segment):
            return True
        other = narrow_segments[place]
        if _is_rest(other) or (_is_placeholder(segment) and not other):
            return False
        if not _is_placeholder(segment) and segment != other:
            return False
    return len(wide_segments) == len(narrow_segments)


def _is_placeholder(segment: str) -> bool:
    return segment.startswith("{")


def _is_rest(segment: str) -> bool:
    return segment.endswith("...}")
