"""Find out whether a client that has closed its sending side still reads: only a write reveals that.

A client that has closed the connection entirely responds to the write with a reset, and the abandoned exchange ends. To a
client that still reads, the bytes are the beginning of every response, or a comment that it ignores.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ports import Exchange
from keyproxy.wire.responses.response_writer import ResponseWriter

#: A comment line, and an empty event, which is not dispatched. HTML standard, section 9.2.6.
_COMMENT: Final = b":\n\n"


def probe(exchange: Exchange, response: ResponseWriter) -> None:
    """Write something, if the response allows it now."""
    meter = exchange.meter
    if meter is not None and meter.takes_comments and response.is_chunked:
        response.write(_COMMENT, is_last=False)
    else:
        response.begin_status_line()
