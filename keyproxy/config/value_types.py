"""The keys of settings and the types of their values, which come from TOML or from the text of environment variables."""

from __future__ import annotations

import json
import re
from dataclasses import field
from typing import Any, Final, NamedTuple, TypeAlias

from keyproxy.config.value_checks import Check

#: A list of strings, or in place of it one string; an empty one is an empty list.
OneOrMany: TypeAlias = list[str]

#: Far beyond every bound, and exact as a float.
_NUMBER_MAX: Final = 10**15
_DIGITS_MAX: Final = 18
_TOO_LARGE: Final = "is too large a number: it must be less than 10^15"


def setting(default: Any, check: Check | None = None, *, secret: bool = False) -> Any:
    """A field of a settings dataclass. `secret`: its value is masked, and may be read from a file named by `_file`."""
    metadata = {"check": check, "secret": secret}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Fault(NamedTuple):
    """What is wrong with a value, as a predicate."""

    sentence: str


def checked(value: object, wanted: object, check: Check | None, *, is_text: bool) -> object:
    """The value in the type of its key (parsed from text, if it came from the environment), or its fault."""
    typed = _typed(value, str(wanted), is_text=is_text)
    if isinstance(typed, Fault):
        return typed
    sentence = check(typed) if check is not None else None
    return typed if sentence is None else Fault(sentence)


def _typed(value: object, wanted: str, *, is_text: bool) -> object:
    text = value if is_text and isinstance(value, str) else None
    match wanted:
        case "str":
            return value if isinstance(value, str) else Fault("must be a string")
        case "bool":
            if text is not None:
                value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
            return value if isinstance(value, bool) else Fault("must be true or false")
        case "int":
            if text is not None and re.fullmatch(r"-?[0-9]+", text):
                # Check the length first: Python refuses to parse thousands of digits.
                value = int(text) if len(text) <= _DIGITS_MAX else _NUMBER_MAX
            if not isinstance(value, int) or isinstance(value, bool):
                return Fault("must be a whole number")
            return value if abs(value) < _NUMBER_MAX else Fault(_TOO_LARGE)
        case "float":
            if text is not None and re.fullmatch(r"-?[0-9]+(\.[0-9]{1,9})?", text):
                value = float(text)
            if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
                return Fault("must be a number")
            return float(value) if abs(value) < _NUMBER_MAX else Fault(_TOO_LARGE)
        case "bool | str | float":
            return _switch(value, text)
        case "list[str]":
            if text is not None:
                value = [item.strip() for item in text.split(",") if item.strip()]
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return value
            return Fault("must be a list of strings")
        case "list[dict[str, str]]":
            if isinstance(value, list) and all(_is_texts(item) for item in value):
                return value
            return Fault("must be a list of inline tables of strings")
        case "dict[str, str]":
            if text is not None:
                value = _json(text)
            return value if _is_texts(value) else Fault("must be a table of strings")
        case "OneOrMany":
            listed = ([value] if value else []) if isinstance(value, str) else value
            return _typed(listed, "list[str]", is_text=False)
        case "list[int]":
            return _whole_numbers(value if text is None else text.split(","), is_text=is_text)
    raise AssertionError(f"no reader for type {wanted}")


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _switch(value: object, text: str | None) -> object:
    """True, false, a number or a word. `text`: its form in the environment."""
    if text is None:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    for wanted in ("bool", "float"):
        typed = _typed(text, wanted, is_text=True)
        if not isinstance(typed, Fault):
            return typed
    return text


def _whole_numbers(value: object, *, is_text: bool) -> list[int] | Fault:
    found: list[int] = []
    for item in value if isinstance(value, list) else [None]:
        number = _typed(item.strip() if isinstance(item, str) else item, "int", is_text=is_text)
        if not isinstance(number, int):
            return Fault("must be a list of whole numbers")
        found.append(number)
    return found
