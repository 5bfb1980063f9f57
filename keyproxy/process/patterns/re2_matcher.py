"""The patterns of prompt categories, as one automaton of RE2: a text is read once, whatever the number of patterns.

RE2 is the package google-re2, an optional dependency: `keyproxy[patterns]`. It takes linear time, but a long repetition
of many characters is slow on some texts. A text that may take long is matched in a thread, so that no request waits for
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from keyproxy.ai.categories import Category, PatternMatcher
from keyproxy.reasons import Reason, Refusal

#: What the automaton may take, with its cache of states.
_MEMORY_BYTES_MAX: Final = 33_554_432

#: Shorter texts are always matched at once.
_SHORT_BYTES: Final = 8_192

#: Longer ones are matched at once if they will take no longer than this.
_QUICK_SECONDS: Final = 0.002

#: The weight of an earlier measurement at each new one: texts differ in how long they take.
_FADING: Final = 0.9

#: Texts that wait for the thread.
_WAITING_MAX: Final = 64

_INSTALL: Final = "pip install 'keyproxy[patterns]'"


class PatternError(Exception):
    """Patterns cannot be used. `problems` are complete sentences, one for each problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Re2Matcher(PatternMatcher):
    """Matches all patterns of the configuration: see the module."""

    def __init__(self, automaton: Any, names: Sequence[str]) -> None:
        """`names`: the category of each pattern of the automaton."""
        self._automaton = automaton
        self._names = names
        self._seconds_per_byte = 0.0
        self._waiting = 0
        self._turn = asyncio.Lock()

    def matching(self, text: bytes) -> tuple[str, ...]:
        """The categories with a pattern that occurs in a text, in UTF-8."""
        if len(text) < _SHORT_BYTES:
            return self._match(text)
        # The CPU time of this thread: unlike the time of day, it leaves out the time of others.
        began = time.thread_time()
        found = self._match(text)
        measured = (time.thread_time() - began) / len(text)
        self._seconds_per_byte = max(measured, self._seconds_per_byte * _FADING)
        return found

    def is_quick(self, text_bytes: int) -> bool:
        """Whether a text of this size is matched without a noticeable delay of other requests."""
        return text_bytes < _SHORT_BYTES or text_bytes * self._seconds_per_byte <= _QUICK_SECONDS

    async def matching_in_thread(self, text: bytes) -> tuple[str, ...]:
        """As `matching`; one text at a time. Raises a Refusal (OVERLOADED) if too many wait."""
        if self._waiting >= _WAITING_MAX:
            raise Refusal(Reason.OVERLOADED, f"{_WAITING_MAX} prompts wait to be matched against patterns")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._in_thread(text)
        finally:
            self._waiting -= 1

    def _match(self, text: bytes) -> tuple[str, ...]:
        found: list[int] | None = self._automaton.Match(text)
        return tuple(dict.fromkeys(self._names[index] for index in sorted(found))) if found else ()

    async def _in_thread(self, text: bytes) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[tuple[str, ...]] = loop.create_future()

        def deliver(found: tuple[str, ...]) -> None:
            if not result.done():
                result.set_result(found)

        def run() -> None:
            found = self.matching(text)
            # The loop may have been closed meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(deliver, found)

        # A daemon, unlike the threads of an executor: the process need not wait for it to exit.
        threading.Thread(target=run, name="prompt-patterns", daemon=True).start()
        return await result


def compile_patterns(categories: Sequence[Category]) -> Re2Matcher | None:
    """The matcher of all patterns; None if there are none. Raises PatternError."""
    rows = [(number, row.name, pattern) for number, row in enumerate(categories, start=1) for pattern in row.patterns]
    if not rows:
        return None
    try:
        import re2
    except ImportError as error:
        raise PatternError([f"categories[{rows[0][0]}].patterns: need google-re2: {_INSTALL}"]) from error
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY_BYTES_MAX
    automaton = re2.Set.SearchSet(options)
    wrong = []
    for number, _, pattern in rows:
        try:
            re2.compile(pattern, options)
            automaton.Add(pattern)
        except re2.error as error:
            wrong.append(f"categories[{number}].patterns: {pattern!r} is not a valid pattern of RE2: {_reason(error)}")
    if wrong:
        raise PatternError(wrong)
    try:
        automaton.Compile()
    except re2.error as error:
        raise PatternError(
            [f"categories: the patterns together need more than {_MEMORY_BYTES_MAX >> 20} MiB: shorten repetitions"]
        ) from error
    return Re2Matcher(automaton, [name for _, name, _ in rows])


def _reason(error: Exception) -> str:
    why = error.args[0] if error.args else ""
    return why.decode("utf-8", "replace") if isinstance(why, bytes) else str(why)
