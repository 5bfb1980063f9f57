"""What an answer says was used, read from its bytes as they pass. Sans-IO: fed with content, asked for the use.

A meter is made for one answer when its head is there (`answer`). It is fed with the content as it comes, whatever the
boundaries, and gives back what goes on to the client: the same bytes, except that a stream is passed on in whole events,
and that a usage chunk which the client did not ask for is left out. It never raises: an answer that cannot be read has
said nothing, and that is charged as estimated.
"""

from __future__ import annotations

from keyproxy.model import TokenUse


class Meter:
    """Passes everything on and knows what it was told when it was made: for answers that report in the head, or nowhere.

    `is_stream`: server-sent events, so that an event of ours may end it. `tokens_in`: the tokens of the prompt, as soon
    as they are known.
    """

    is_stream = False
    tokens_in: int | None = None

    def __init__(self, said: TokenUse | None = None) -> None:
        self._said = said
        #: What is the use if the answer does not say.
        self.unsaid: TokenUse | None = None

    @property
    def use(self) -> TokenUse | None:
        """What the answer has said was used; None: nothing, or nothing that can be believed.

        Whole answers have said it when `finish` was called. A stream may say it again and again; the last counts.
        """
        return self.unsaid if self._said is None else self._said

    @property
    def produced(self) -> int:
        """About how many tokens a stream has brought until now: for one that ends before it says so. 0 if it is none."""
        return 0

    @property
    def produced_bound(self) -> int:
        """More tokens than this a stream has not shown until now: a token is a byte at least. 0 if it is none."""
        return 0

    def feed(self, content: bytes) -> bytes:
        """The next content of the answer; returns what goes on to the client now."""
        return content

    def finish(self) -> bytes:
        """The answer is complete; returns what was still held back."""
        return b""

    def cut(self, event: bytes) -> bytes:
        """End the stream here: what has to be sent so that the client hears this event last. No more may be fed.

        Raises ValueError if it is no stream.
        """
        raise ValueError(f"an answer that is no stream cannot end with {len(event)} bytes of an event")
