"""Read the usage that a response reports from its bytes as they pass. Sans-IO.

A meter is created for one response when its head has arrived (`select_meter`). It takes the content as it arrives, with
any boundaries, and returns the bytes for the client: the same bytes, except that a stream is passed on in whole events,
and that a usage chunk is left out if the client did not request it. It never raises: a response that cannot be read
counts as one without a report, and is charged as estimated.
"""

from __future__ import annotations

from keyproxy.model import TokenUse


class Meter:
    """Passes everything on; its usage is known at creation: for responses that report it in the head, or not at all.

    `is_stream`: server-sent events, which an event of ours can end. `tokens_in`: the tokens of the prompt, as soon as
    they are known.
    """

    is_stream = False
    tokens_in: int | None = None

    def __init__(self, said: TokenUse | None = None) -> None:
        self._said = said
        #: The usage if the response reports none.
        self.unsaid: TokenUse | None = None

    @property
    def use(self) -> TokenUse | None:
        """The usage that the response reported; None if there is no credible report.

        Complete responses have reported it when `finish` is called. A stream may report it repeatedly; the last counts.
        """
        return self.unsaid if self._said is None else self._said

    @property
    def produced(self) -> int:
        """Estimate a stream's tokens so far, in case it ends before it reports its usage. 0 if it is no stream."""
        return 0

    @property
    def produced_bound(self) -> int:
        """An upper bound of a stream's tokens so far: a token is at least one byte. 0 if it is no stream."""
        return 0

    def feed(self, content: bytes) -> bytes:
        """Read the next content of the response; return the bytes for the client."""
        return content

    def finish(self) -> bytes:
        """End the response; return what was still held back."""
        return b""

    def cut(self, event: bytes) -> bytes:
        """End the stream here: return the bytes that make this event the client's last. Nothing may be fed after it.

        Raises ValueError if it is no stream.
        """
        raise ValueError(f"a response that is no stream cannot end with {len(event)} bytes of an event")
