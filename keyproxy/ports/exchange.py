"""One request and its response, as the gateway and the recorder see it."""

from __future__ import annotations

from collections.abc import Callable

from keyproxy.ai.access.judged_request import JudgedRequest
from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.ai.requests.inflation import ContentMemory
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.ai.tools.mcp_message import McpReading
from keyproxy.ai.tools.tool_call import ToolCall
from keyproxy.ai.tools.tool_list_filter import ToolListFilter
from keyproxy.auth.minting import MintRequest
from keyproxy.http.forwarding import Forwarding
from keyproxy.http.idempotency_key import Fingerprint
from keyproxy.http.own_response import OwnResponse
from keyproxy.http_messages import RequestHead, RequestLine
from keyproxy.limits.allowance import Hold
from keyproxy.model import COMPLETED, Ending, Identity, KeyDigest, Permit, Route
from keyproxy.ports.tools import UpstreamCredential
from keyproxy.reasons import Reason, Refusal


class Exchange:
    """One request and its response, as the gateway and the recorder see it. Times are `clock` seconds, 0.0: never.

    Initial values are class attributes, so that making an exchange writes only those that differ.
    """

    #: The request; None if its head could not be read.
    head: RequestHead | None = None

    #: For the log, without a head: what is known of the request line. Its path is empty if it is not a valid one.
    refused_line: RequestLine | None = None
    request_id: bytes = b""

    #: The digest of the request's key, once it was found.
    digest: KeyDigest | None = None

    #: The identity behind the key, once it is resolved; also for a request that is then refused.
    identity: Identity | None = None

    #: The matched route, once the identity is resolved; a public one, which needs none, at once.
    route: Route | None = None

    permit: Permit | None = None

    #: The reason for a refusal, the detail for the log, and the policy and why it refuses if a limit was exceeded.
    reason: Reason | None = None
    refusal_detail: str = ""
    policy: str = ""
    limit_reason: str = ""

    #: Provides the address of the client.
    peer: Forwarding | None = None
    ending: Ending = COMPLETED
    status: int = 0
    started_mono: float = 0.0

    #: When the request was sent upstream; when minting began, if the agent token exists. Such a request is charged.
    sent_mono: float = 0.0

    #: Waiting time before the request was sent: for the client's body, and for a connection to the upstream.
    body_wait_seconds: float = 0.0
    connection_wait_seconds: float = 0.0
    responded_mono: float = 0.0
    ended_mono: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    is_over: bool = False

    #: Whether the upstream has the whole request, as far as is known: once a metered exchange has ended early.
    was_sent_whole: bool = False

    #: On metered routes: what the request reserves, and the meter of its response.
    metered: MeteredRequest | None = None
    meter: Meter | None = None

    #: On routes that judge models, categories or namespaces: the values that the request is judged by.
    judged: JudgedRequest | None = None

    #: What it holds of limits of concurrency before it has a permit.
    slots: Hold | None = None

    #: The tokens charged, once the exchange has ended, and whether they are estimated.
    token_use: TokenUse | None = None
    is_estimated: bool = False

    #: The model in records: the name of a configured one, else as sent; empty if none was read. And the price charged.
    model: str = ""
    cost_micros: int = 0

    #: The categories of the prompt with their sources, once the request is judged by them; None: it is not.
    categories: tuple[tuple[str, str], ...] | None = None

    #: The fingerprint for recognising retries, for requests under limits with an Idempotency-Key.
    fingerprint: Fingerprint | None = None

    #: The part of the request's body that has arrived and is not sent yet, and whether the body has arrived completely.
    body: bytes = b""
    is_complete: bool = True

    #: Header lines that go upstream in place of the client's; None: the client's.
    block: bytes | None = None

    #: On routes of tools: the call, once the tool is known; and on those with a provider: the credential that is sent.
    tool_call: ToolCall | None = None
    upstream_credential: UpstreamCredential | None = None

    #: The approval that a refused call waits for, or that was denied; empty: none.
    approval_id: str = ""

    #: On MCP routes: the message, and its id as JSON text, once it was read; empty: unknown, or a notification.
    mcp: McpReading | None = None
    rpc_id: bytes = b""

    #: What removes tools from the response to `tools/list`.
    tool_list: ToolListFilter | None = None

    #: Whether it is admitted to mint an agent token, and what it asks for, once its body was read.
    is_minting: bool = False
    mint_request: MintRequest | None = None

    async def whole_body(self, otherwise: Refusal | None = None, *, bytes_max: int | None = None) -> None:
        """Wait until the body is complete, or the exchange is over.

        `otherwise`: the refusal if it is too large; `bytes_max`: the largest body, None: the configured bound.
        """
        raise NotImplementedError

    async def in_turns(self, advance: Callable[[], bool]) -> None:
        """Call this repeatedly until it returns True or the exchange is over, and yield to other work between calls.

        Only one exchange runs at a time, so that many of them delay other requests no longer than one does; users take
        turns, so that many requests of one user do not starve those of others.
        """
        raise NotImplementedError

    def content_memory(self) -> ContentMemory:
        """The memory of the inflated body, which the metered request releases."""
        raise NotImplementedError

    def forward(self, permit: Permit) -> None:
        """Send the request upstream and relay the response."""
        raise NotImplementedError

    def serve(self, permit: Permit) -> None:
        """Wait for `respond` or `refuse` instead of an upstream. The exchange lasts until then, even without a client."""
        raise NotImplementedError

    def respond(self, response: OwnResponse) -> None:
        """Send the response of a request that the proxy serves itself."""
        raise NotImplementedError

    def extend(self, permit: Permit) -> None:
        """Continue with a permit that has a larger hold."""
        raise NotImplementedError

    def pause_stream(self) -> None:
        """Stop reading the response until `extend` or `end_stream`."""
        raise NotImplementedError

    def refuse(self, refusal: Refusal) -> None:
        """Respond with a refusal. If a response has begun already, abort it so that the client can detect this."""
        raise NotImplementedError

    def end_stream(self, refusal: Refusal) -> None:
        """End an event stream in flight with an error event, so that the client learns the reason."""
        raise NotImplementedError
