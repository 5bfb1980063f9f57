"""The models that a list of alternatives names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from keyproxy.ai.scanning.member_scope import ALTERNATIVES, folded
from keyproxy.reasons import Reason, Refusal

_MODEL: Final = "model"

#: Longer lists are refused.
_BYTES_MAX: Final = 65_536
NAMES_MAX: Final = 64


def named_in(raw: bytes, member: str) -> list[str]:
    """The names of models in a JSON value: `null`, a string, or a list of strings, of objects with a `model`, or of
    objects from a name to a list of names. Raises a Refusal (REQUEST_MALFORMED) for another shape.

    Not read by orjson: of members with equal names it keeps the last one, and another server the first.
    """
    if len(raw) > _BYTES_MAX:
        raise _malformed(f"'{member}' is too long.", member)
    # Python refuses to read an integer of more than 4,300 digits. No number names a model.
    return _named(json.loads(raw, object_pairs_hook=lambda pairs: _members(pairs, member), parse_int=float), member)


def _members(pairs: Sequence[tuple[str, Any]], member: str) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len({folded(name) for name in names}) < len(names) or any(
        folded(name) == _MODEL and name != _MODEL for name in names
    ):
        raise _malformed(f"'{member}' has a name twice or in another spelling.", member)
    return dict(pairs)


def _named(value: Any, member: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    found: list[str] = []
    for element in value if isinstance(value, list) else [False]:
        if isinstance(element, str):
            found.append(element)
        elif isinstance(element, dict) and isinstance(element.get(_MODEL), str):
            if any(name in ALTERNATIVES or (value and _is_names(value)) for name, value in element.items()):
                # A server may take it for an object from names to lists of names.
                raise _malformed(f"'{member}' has an object with a model and a list of names.", member)
            found.append(element[_MODEL])
        elif isinstance(element, dict) and element and all(_is_names(names) for names in element.values()):
            for key, names in element.items():
                found += [key, *names]
        else:
            raise _malformed(f"'{member}' must be a list of models.", member)
    return found


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _malformed(message: str, field: str) -> Refusal:
    return Refusal(Reason.REQUEST_MALFORMED, message, caller_text=message, replaces_sentence=True, field=field)
