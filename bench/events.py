"""The compute server of the metered regime: responds to every request with a stream of events, as LLM servers do.

Run as `python -m bench.events PORT`. Each event is written separately, in its own turn of the loop; the
second to last contains the usage.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

import uvloop

EVENTS = 200

_WORDS = ("The", " cost", " of", " a", " token", " is", " what", " its", " events", " weigh")
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


def _event(**content: object) -> bytes:
    common = {"id": "chatcmpl-8f14e45fceea167a5a36dedd", "object": "chat.completion.chunk", "model": "m"}
    data = b"data: %b\n\n" % json.dumps(common | content).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


_PRODUCED = [
    _event(choices=[{"index": 0, "delta": {"content": _WORDS[number % len(_WORDS)]}, "finish_reason": None}])
    for number in range(EVENTS)
]
_USED = _event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": EVENTS, "total_tokens": EVENTS + 9})
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length is not None else b""
            writer.write(_HEAD)
            for event in _PRODUCED:
                writer.write(event)
                await asyncio.sleep(0)
            # Usage is sent only on request, as LLM servers do.
            writer.write(_USED + _DONE if b"include_usage" in body else _DONE)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _main(port: int) -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1])))
