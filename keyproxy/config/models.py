"""The rows of `[[models]]`: read from the configuration into the values that requests are priced by."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final

from keyproxy.ai.models import Model, price_of
from keyproxy.auth.names import is_scope

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@~+-]{0,127}")

_PRICES: Final = (
    "input_micros_per_million", "output_micros_per_million", "cached_input_micros_per_million",
    "cache_write_micros_per_million", "reasoning_micros_per_million",
)  # fmt: skip
_COUNTS: Final = ("output_tokens_max", "context_tokens_max", "image_tokens")
_LISTS: Final = ("aliases", "scopes")

#: The keys of a row, in the order of the example.
MODEL_KEYS: Final = ("name", *_LISTS, *_PRICES, *_COUNTS, "reasoning")

_PRICE_MAX: Final = 10**12
_COUNT_MAX: Final = 10**12
MODELS_MAX: Final = 1_000
_LIST_MAX: Final = 64


def read_models(rows: object) -> tuple[tuple[Model, ...], list[str]]:
    """Return the models, and a sentence for each fault."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return (), ["models: must be an array of tables, [[models]]"]
    if len(rows) > MODELS_MAX:
        return (), [f"models: has {len(rows)} rows; at most {MODELS_MAX} are allowed"]
    wrong: list[str] = []
    models: list[Model] = []
    for number, row in enumerate(rows, start=1):
        faults = _faults(row)
        wrong += [f"models[{number}].{fault}" for fault in faults]
        if not faults:
            models.append(_model(row))
    return tuple(models), [*wrong, *_repeated(rows)]


def _faults(row: dict[str, Any]) -> list[str]:
    found = []
    for key in row:
        if key not in MODEL_KEYS:
            close = difflib.get_close_matches(key, MODEL_KEYS, n=1, cutoff=0.5)
            found.append(f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else ""))
    name = row.get("name")
    if not isinstance(name, str) or not _is_name(name):
        found.append("name: must be 1 to 128 letters, digits and . _ : / @ ~ + -, beginning with a letter or digit")
    for key, is_valid in (("aliases", _is_name), ("scopes", is_scope)):
        value = row.get(key, [])
        is_list = isinstance(value, list) and len(value) <= _LIST_MAX
        if not is_list or not all(isinstance(one, str) and is_valid(one) for one in value):
            found.append(f"{key}: must be a list of at most {_LIST_MAX} names")
    for keys, most, hint in ((_PRICES, _PRICE_MAX, ""), (_COUNTS, _COUNT_MAX, "; 0 if it is unknown")):
        bad = [key for key in keys if key in row and not _is_count(row[key], most)]
        found += [f"{key}: must be a whole number from 0 to 10^12{hint}" for key in bad]
    if not isinstance(row.get("reasoning", False), bool):
        found.append("reasoning: must be true or false")
    return [*found, *_incomplete_prices(row)]


def _incomplete_prices(row: dict[str, Any]) -> list[str]:
    missing = [key for key in _PRICES[:2] if key not in row]
    given = [key for key in _PRICES if key in row]
    if not missing or not given:
        return []
    return [f"{missing[0]}: is required with {given[0]}"]


def _repeated(rows: list[dict[str, Any]]) -> list[str]:
    """The names and aliases that are used twice."""
    first: dict[str, int] = {}
    found = []
    for number, row in enumerate(rows, start=1):
        aliases = row.get("aliases", [])
        for name in [row.get("name"), *(aliases if isinstance(aliases, list) else [])]:
            if not isinstance(name, str):
                continue
            if name in first:
                found.append(f"models[{number}]: {name!r} is already a name or alias of models[{first[name]}]")
            first.setdefault(name, number)
    return found


def _model(row: dict[str, Any]) -> Model:
    input_price, output_price, cached, written, reasoning = (row.get(key) for key in _PRICES)
    return Model(
        name=row["name"],
        aliases=tuple(row.get("aliases", [])),
        scopes=frozenset(row.get("scopes", [])),
        price=price_of(input_price, output_price, cached_input=cached, cache_write=written, reasoning=reasoning),
        output_tokens_max=row.get("output_tokens_max", 0),
        context_tokens_max=row.get("context_tokens_max", 0),
        image_tokens=row.get("image_tokens", 0),
        reasons=row.get("reasoning", False),
    )


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
