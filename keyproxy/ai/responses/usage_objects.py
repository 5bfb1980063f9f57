"""What an upstream says was used: the `usage` objects of the APIs, and the `X-Usage-Tokens` header.

Only a whole number of tokens is a report. A string, a float, a negative number or one that no model could have used is
no report at all, and neither is an object that lacks what its API promises: what is not said is charged as estimated,
which errs on the safe side. 0 is a report like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from keyproxy.model import TokenUse

#: More than this is nobody's use; it would overflow what is added up.
TOKENS_MAX: Final = 10**12

_DIGITS_MAX: Final = 13

#: Anthropic counts what was read from or written to its cache apart from the other input.
_ANTHROPIC_INPUT: Final = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def openai_use(usage: object) -> TokenUse | None:
    """The use in a `usage` object of chat completions, completions, embeddings or responses.

    What is in the total but in none of its parts (hidden reasoning, for some servers) counts as put out.
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
    """The use in a `usage` object of Anthropic's messages. What came from its cache was used as well."""
    if not isinstance(usage, Mapping):
        return None
    inputs = [usage.get(name) for name in _ANTHROPIC_INPUT]
    tokens_out = usage.get("output_tokens")
    if inputs[0] is None or not all(is_count(value) for value in (tokens_out, *inputs) if value is not None):
        return None
    return None if tokens_out is None else TokenUse(sum(value or 0 for value in inputs), tokens_out)


def header_use(said: bytes | None) -> TokenUse | None:
    """The use in an answer's one `X-Usage-Tokens: <total>`; None: it has none, or several. A total counts as put out."""
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
    """Whether this is a number of tokens. `True` is an `int` to Python, and no number to anybody else."""
    # Asked first: what the compiled build has taken for an int is a number to it, True is 1.
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    count: int = value
    return 0 <= count <= TOKENS_MAX
