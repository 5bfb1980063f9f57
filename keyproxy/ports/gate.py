"""The ports from the wire to the gateway, the recorder and the signer of identities."""

from __future__ import annotations

from keyproxy.ai.responses.meter import Meter
from keyproxy.http_messages import ResponseHead
from keyproxy.model import Identity
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.tools import UpstreamCredential


@mypyc_attr(allow_interpreted_subclasses=True)
class Assertions:
    """Signs the identities of forwarded requests. `number` is that of no other one in this process, and not 0."""

    number: int

    def sign(self, identity: Identity, now_mono: float) -> None:
        """Replace the identity's assertion by a new one. Raises a Refusal if there is no key to sign with."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Gate:
    """Decides on requests, and reserves and settles what they use."""

    def begin(self, exchange: Exchange) -> None:
        """Decide on a request. Calls the exchange's `forward`, `serve` or `refuse`, now or later. Raises no Refusal."""
        raise NotImplementedError

    def review(self, exchange: Exchange) -> None:
        """Recheck an exchange in flight: `refuse` it if its key is no longer valid for it."""
        raise NotImplementedError

    #: How long the rest of a response is read for its usage after the client has left.
    usage_wait_seconds: float = 0.0

    def meter(self, exchange: Exchange, response: ResponseHead) -> Meter | None:
        """The meter that reads the response to a request on a metered route; None for one that uses no tokens."""
        raise NotImplementedError

    def credential_refused(self, exchange: Exchange, credential: UpstreamCredential, now_mono: float) -> None:
        """The upstream has responded with 401 to a request with this credential."""
        raise NotImplementedError

    def watch(self, exchange: Exchange) -> None:
        """After progress of a metered stream: ensure that its hold suffices."""
        raise NotImplementedError

    def settle(self, exchange: Exchange) -> None:
        """When an exchange with a permit, slots or a tool call has ended: charge or release what it holds. Once."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Recorder:
    """Counts and logs exchanges."""

    def record(self, exchange: Exchange) -> None:
        """Record an exchange that has ended. Never waits. Called exactly once for every exchange, even a refused one."""
        raise NotImplementedError
