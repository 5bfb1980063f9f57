"""The tokens that a request used."""

from __future__ import annotations

from typing import Final

from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(acyclic=True)
class TokenUse:
    """The tokens of a request; `total` is charged. `cached` and `cache_write` are parts of the input."""

    __slots__ = ("cache_write", "cached", "reasoning", "tokens_in", "tokens_out", "total")

    def __init__(
        self, tokens_in: int, tokens_out: int, *, cached: int = 0, cache_write: int = 0, reasoning: int = 0
    ) -> None:
        self.tokens_in: Final = tokens_in
        self.tokens_out: Final = tokens_out
        self.total: Final = tokens_in + tokens_out
        self.cached: Final = cached
        self.cache_write: Final = cache_write
        self.reasoning: Final = reasoning

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, TokenUse) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"TokenUse{self._values()}"

    def _values(self) -> tuple[int, int, int, int, int]:
        return self.tokens_in, self.tokens_out, self.cached, self.cache_write, self.reasoning
