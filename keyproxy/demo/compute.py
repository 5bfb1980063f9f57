"""The compute server of the demo: returns the identity that it received, and counts the tokens that it processed.

It is an MCP server as well, whose tools return the call that they received.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import orjson
from aiohttp import web

from keyproxy.platform import sockets

JOBS: Final = "/v1/ai/jobs"
COMPLETIONS: Final = "/v1/ai/completions"
MCP_PATH: Final = "/mcp"
CHAT: Final = "/v1/chat/completions"
IDENTITY: Final = ("X-Keyproxy-User", "X-Keyproxy-Tenant", "X-Keyproxy-Scope", "X-Keyproxy-Test")

#: Further identity headers, of requests that have an actor or an agent.
DELEGATION: Final = ("X-Keyproxy-Actor", "X-Keyproxy-Agent")

#: The tools of the MCP server.
TOOL_NAMES: Final = ("search", "update_contact", "call_partner", "run_shell")

#: What each prompt of the demo has.
PROMPT_TOKENS: Final = 9

#: What a model generates if nothing bounds it.
UNBOUNDED_TOKENS: Final = 50_000


class Compute:
    """A running compute server."""

    def __init__(self) -> None:
        self.address = ""
        #: Processed tokens, by its own count.
        self.completions = self.tokens = 0
        #: The tools that it has executed, in order.
        self.executed: list[str] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Compute]:
        """Listen on a free port."""
        application = web.Application()
        application.router.add_post(JOBS, self._job)
        application.router.add_post(COMPLETIONS, self._completion)
        application.router.add_post(CHAT, self._completion)
        application.router.add_post(MCP_PATH, self._message)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        sock = sockets.bind("127.0.0.1:0")
        self.address = sockets.address_of(sock)
        await web.SockSite(runner, sock).start()
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _job(self, request: web.Request) -> web.Response:
        content = await request.json()
        identity = {name: request.headers.getall(name, []) for name in IDENTITY}
        identity |= {name: request.headers.getall(name) for name in DELEGATION if name in request.headers}
        spellings = [name for name in request.headers if name.lower().replace("_", "-").startswith("x-keyproxy-")]
        response = {
            "job_id": content.get("job_id"),
            "identity": identity,
            "identity_headers": len(spellings),
            "credential_seen": "Authorization" in request.headers or "X-Api-Key" in request.headers,
        }
        return web.Response(body=orjson.dumps(response), content_type="application/json")

    async def _completion(self, request: web.Request) -> web.Response:
        """A model that generates all that it may, and reports it."""
        content = await request.json()
        maximum = content.get("max_completion_tokens", content.get("max_tokens", UNBOUNDED_TOKENS))
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": maximum}
        self.completions += 1
        self.tokens += sum(usage.values())
        model = request.headers.get("X-Keyproxy-Model")
        answer = {"model": model, "choices": [{"text": "…", "finish_reason": "length"}], "usage": usage}
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    async def _message(self, request: web.Request) -> web.Response:
        """An MCP server without sessions: https://modelcontextprotocol.io/specification/2025-11-25/basic/transports"""
        message = await request.json()
        if "id" not in message:
            return web.Response(status=202)
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
        match message["method"]:
            case "initialize":
                version = message["params"]["protocolVersion"]
                server = {"name": "demo", "version": "1"}
                reply["result"] = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server}
            case "tools/list":
                schema = {"type": "object"}
                reply["result"] = {"tools": [{"name": name, "inputSchema": schema} for name in TOOL_NAMES]}
            case "tools/call":
                received = {
                    "tool": request.headers.get("X-Keyproxy-Tool"),
                    "approval": request.headers.get("X-Keyproxy-Approval"),
                    "agent": request.headers.get("X-Keyproxy-Agent"),
                    "user": request.headers.get("X-Keyproxy-User"),
                    "arguments": message["params"]["arguments"],
                }
                self.executed.append(message["params"]["name"])
                text = orjson.dumps(received).decode()
                reply["result"] = {"content": [{"type": "text", "text": text}], "structuredContent": received}
            case method:
                reply["error"] = {"code": -32601, "message": f"there is no method {method}"}
        return web.Response(body=orjson.dumps(reply), content_type="application/json")
