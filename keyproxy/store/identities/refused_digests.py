"""Digests that are known to be refused, each for a fixed time: a bounded table of the newest."""

from __future__ import annotations

import collections
from typing import Final

from keyproxy.model import KeyDigest
from keyproxy.reasons import Reason, Refusal

_NO_ROW: Final = "the store has no such key"

#: How many expired digests an addition removes: more than it adds, and few enough not to delay other requests.
_REMOVED_MAX: Final = 4


class _Verdict:
    """Why a digest is refused, the detail for the log, and until when, in monotonic seconds."""

    __slots__ = ("detail", "reason", "until")

    def __init__(self, reason: Reason, detail: str, until: float) -> None:
        self.reason = reason
        self.detail = detail
        self.until = until


class RefusedDigests:
    """Digests with the reason for refusing them. Full: the oldest is removed.

    All are kept equally long, so the first one expires first. An ordered dictionary finds it in constant time, however
    many were removed before it; a plain one does not, so a flood of unknown keys would make each addition slow.
    """

    __slots__ = ("_entries_max", "_seconds", "_verdicts")

    def __init__(self, entries_max: int, seconds: float) -> None:
        self._entries_max = entries_max
        self._seconds = seconds
        self._verdicts: collections.OrderedDict[KeyDigest, _Verdict] = collections.OrderedDict()

    def count(self, mono: float) -> int:
        """How many there are."""
        self._expire(mono, len(self._verdicts))
        return len(self._verdicts)

    def has(self, digest: KeyDigest, mono: float) -> bool:
        """Whether the digest is known to be refused."""
        verdict = self._verdicts.get(digest)
        return verdict is not None and mono < verdict.until

    def refusal(self, digest: KeyDigest, mono: float) -> Refusal | None:
        """The refusal of a digest; None if it has to be looked up."""
        verdict = self._verdicts.get(digest)
        if verdict is None or mono >= verdict.until:
            return None
        return Refusal(verdict.reason, verdict.detail)

    def add(
        self, digest: KeyDigest, mono: float, *, reason: Reason = Reason.KEY_INVALID, detail: str = _NO_ROW
    ) -> None:
        """Refuse a digest from now on, by default because the store has no row with it."""
        verdicts = self._verdicts
        verdicts.pop(digest, None)
        self._expire(mono, _REMOVED_MAX)
        if len(verdicts) >= self._entries_max:
            verdicts.popitem(last=False)
        verdicts[digest] = _Verdict(reason, detail, mono + self._seconds)

    def discard(self, digest: KeyDigest) -> None:
        """Look the digest up again."""
        if self._verdicts:
            self._verdicts.pop(digest, None)

    def clear(self) -> None:
        """Look all digests up again."""
        self._verdicts.clear()

    def _expire(self, mono: float, removed_max: int) -> None:
        verdicts = self._verdicts
        for _ in range(removed_max):
            first = next(iter(verdicts.values()), None)
            if first is None or mono < first.until:
                return
            verdicts.popitem(last=False)
