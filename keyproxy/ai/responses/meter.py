"""Read the usage that a response reports from its bytes as they pass. Sans-IO.

A meter is created for one response when its head has arrived (`select_meter`). It takes the content as it arrives, with
any boundaries, and returns the bytes for the client: the same bytes, except that a stream is passed on in whole events,
and that a usage chunk is left out if the client did not request it. It never raises: a response that cannot be read
counts as one without a report, and is charged as estimated.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.responses.usage_objects import UsageReport
from keyproxy.ai.responses.usage_reader import ResponseUsageReader
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(acyclic=True)
class ResponseUse:
    """What is known of a response's usage: the input of its charge.

    `report`: the usage reported last. `is_final`: the report counts everything, rather than what was produced until
    then. `reported_input`: may precede the report. `produced`: the estimated output so far; the
    reported one, and what came after it. `is_finished`: the model has produced everything. `model`: as the response
    names it.
    """

    __slots__ = ("is_final", "is_finished", "model", "produced", "report", "reported_input")

    def __init__(
        self,
        report: UsageReport | None = None,
        *,
        reported_input: UsageReport | None = None,
        produced: int = 0,
        is_final: bool = True,
        is_finished: bool = True,
        model: str | None = None,
    ) -> None:
        self.report: Final = report
        self.is_final: Final = is_final and report is not None
        self.reported_input: Final = report if reported_input is None else reported_input
        self.produced: Final = produced
        self.is_finished: Final = is_finished
        self.model: Final = model

    def __repr__(self) -> str:
        return (
            f"ResponseUse({self.report}, reported_input={self.reported_input}, produced={self.produced},"
            f" is_final={self.is_final}, is_finished={self.is_finished}, model={self.model!r})"
        )


class Meter:
    """Passes everything on; its usage is known at creation: for responses that report it in the head, or not at all.

    `format`: the framing of a stream, which an event of ours can end; None if it is no stream, or is compressed.
    """

    def __init__(self, usage: ResponseUsageReader) -> None:
        self.usage: Final = usage
        self.format: StreamFormat | None = None

    @property
    def is_stream(self) -> bool:
        """Whether `cut` can end the response."""
        return self.format is not None

    @property
    def report(self) -> UsageReport | None:
        """The usage that the response reported; None if there is no credible report.

        Complete responses have reported it when `finish` is called. A stream may report it repeatedly; the last counts.
        """
        return self.usage.report

    @property
    def tokens_in(self) -> int | None:
        """The reported input, as soon as it is known."""
        known = self.usage.reported_input
        return None if known is None else known.tokens_in

    @property
    def is_finished(self) -> bool:
        """Whether the model has finished: reading on may find the report, and nothing more is produced."""
        return self.usage.is_finished

    @property
    def is_reported(self) -> bool:
        """Whether the report counts everything."""
        return self.usage.is_final

    @property
    def produced(self) -> int:
        """Estimate the output so far, in case the response does not report it."""
        return 0

    @property
    def produced_bound(self) -> int:
        """At least `produced`, and cheap: for the check, after every event, whether a stream nears its reservation."""
        return 0

    def result(self) -> ResponseUse:
        """What is known now. After `finish`, of all the response; before, of an aborted one."""
        usage = self.usage
        return ResponseUse(
            usage.report,
            reported_input=usage.reported_input,
            produced=0 if usage.is_final else self.produced,
            is_final=usage.is_final,
            is_finished=usage.is_finished,
            model=usage.model,
        )

    def feed(self, content: bytes) -> bytes:
        """Read the next content of the response; return the bytes for the client."""
        return content

    def finish(self) -> bytes:
        """End the response; return what was still held back."""
        return b""

    def cut(self, event: bytes, *, exception: str = "") -> bytes:
        """End the stream here: return the bytes that make this event the client's last. Nothing may be fed after it.

        `event`: of server-sent events, a whole event; in other formats the JSON of the error, which gets their framing,
        in AWS's with this type of `exception`. Raises ValueError if it is no stream.
        """
        raise ValueError(f"a response that is no stream cannot end with {len(event)} bytes of an event {exception}")
