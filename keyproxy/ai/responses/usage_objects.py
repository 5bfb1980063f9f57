"""Read reported usage: the `usage` objects of the APIs, and the `X-Usage-Tokens` header.

Only a whole number of tokens is a report. A string, a float, a negative number or an impossibly large one is not, and
neither is an object that lacks the fields of its API: usage without a report is charged as estimated, which errs on the
safe side. 0 is a report like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from keyproxy.model import TokenUse

#: A larger number is not credible, and would overflow the sums.
TOKENS_MAX: Final = 10**12

_DIGITS_MAX: Final = 13

#: Anthropic counts tokens read from or written to its cache separately from the other input.
_ANTHROPIC_INPUT: Final = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def openai_use(usage: object) -> TokenUse | None:
    """Return the usage in a `usage` object of chat completions, completions, embeddings or responses.

    Tokens in the total but in none of its parts (hidden reasoning, for some servers) count as output.
    """
    if not isinstance(usage, Mapping):
        return None
    total, given_in, given_out = (
        usage.get("total_tokens"),
        usage.get("prompt_tokens", usage.get("input_tokens")),
        usage.get("completion_tokens", usage.get("output_tokens")),
    )
    said = [value for value in (total, given_in, given_out) if value is not None]
    if not all(is_count(value) for value in said) or (total is None and len(said) < 2):
        return None
    tokens_in = given_in or 0
    return TokenUse(tokens_in, max(given_out or 0, (total or 0) - tokens_in))


def anthropic_use(usage: object) -> TokenUse | None:
    """Return the usage in a `usage` object of Anthropic's messages. Tokens from its cache count as used."""
    if not isinstance(usage, Mapping):
        return None
    inputs = [usage.get(name) for name in _ANTHROPIC_INPUT]
    tokens_out = usage.get("output_tokens")
    if inputs[0] is None or not all(is_count(value) for value in (tokens_out, *inputs) if value is not None):
        return None
    return None if tokens_out is None else TokenUse(sum(value or 0 for value in inputs), tokens_out)


def header_use(said: bytes | None) -> TokenUse | None:
    """Return the total of a response's only `X-Usage-Tokens`, counted as output; None: it has none, or several."""
    if said is None or not said or len(said) > _DIGITS_MAX:
        return None
    total = 0
    for at in range(len(said)):
        digit = said[at] - 48
        if not 0 <= digit <= 9:
            return None
        total = 10 * total + digit
    return None if total > TOKENS_MAX else TokenUse(0, total)


def is_count(value: object) -> bool:
    """Whether this is a number of tokens. In Python `True` is an `int`, but it is no number in JSON."""
    # Checked first: the compiled build treats a value that it has narrowed to int as a number, and True as 1.
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    count: int = value
    return 0 <= count <= TOKENS_MAX
