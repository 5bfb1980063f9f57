"""JSON from PostgreSQL: its numbers may have thousands of digits, more than an API response can represent."""

from __future__ import annotations

import json
import math
from typing import Any, Final

_INTEGER_MAX: Final = 2**63 - 1
_DIGITS_MAX: Final = 19


def read_json(text: str) -> Any:
    """Parse a JSON column. A number that an API response cannot represent becomes a string."""
    return json.loads(text, parse_int=_integer, parse_float=_number)


def _integer(digits: str) -> int | str:
    if len(digits.lstrip("-")) > _DIGITS_MAX:
        return digits
    number = int(digits)
    return number if abs(number) <= _INTEGER_MAX else digits


def _number(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits
