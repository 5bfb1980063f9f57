"""Fakes of ports, for tests of the layers above or beside them. Each passes its port's suite in contracts.py."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.ai.model_source import ModelSource
from keyproxy.ai.models import ModelTable
from keyproxy.ai.requests.request_reading import BodyBounds
from keyproxy.ai.reservation import TokenRules
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.ai.route_rules import RouteRules
from keyproxy.ai.tools.tool_call import ToolClaim
from keyproxy.auth import credentials, minting
from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.auth.authorization import refused_delegation
from keyproxy.auth.minting import MintedToken, MintParent, MintRequest, MintRules
from keyproxy.auth.names import is_id
from keyproxy.http import identity_headers
from keyproxy.http.headers import FieldNames
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.lease_sync import LeaseSync, Short
from keyproxy.limits.lease_table import LeaseTable
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import NEVER, AgentToken, Ending, Identity, KeyDigest, Missing, Moment, TimeBudget
from keyproxy.platform import clock
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.gate import Recorder
from keyproxy.ports.identities import Identities
from keyproxy.ports.ledger import Ledger
from keyproxy.ports.tenant_records import OwnedIds, PromptTemplates
from keyproxy.ports.tools import ApprovalRequest, Approvals, UpstreamCredential, UpstreamCredentials
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.head_cache import RequestReader
from tests.reference_ledger import ReferenceLedger

FORMAT = KeyFormat()

_Decided = TypeVar("_Decided")


def holds_key(target: bytes) -> bool:
    """Whether a request target contains a key."""
    return credentials.holds_key(target, FORMAT)


def key(number: int = 0, *, is_test: bool = False) -> SecretKey:
    """A well-formed key, the same for the same number."""
    return FORMAT.make(number.to_bytes(32, "big"), is_test=is_test)


def identity(
    user: str = "u_42",
    tenant: str = "acme",
    *,
    scopes: frozenset[str] = frozenset({"jobs:write"}),
    is_test: bool = False,
    expires_wall_seconds: float = NEVER,
    standing: Reason | None = None,
    plan: Plan | None = None,
) -> Identity:
    """An identity with its header block."""
    values = (
        ("User", user),
        ("Tenant", tenant),
        ("Scope", " ".join(sorted(scopes))),
        ("Test", "true" if is_test else "false"),
        ("Key-Id", f"key_of_{user}"),
    )
    block = identity_headers.identity_block("X-Keyproxy-", values)
    allowance = None if plan is None else Allowance(((Pool("user", user, is_test), plan),))
    return Identity(f"key_of_{user}", user, tenant, scopes, is_test, expires_wall_seconds, standing, block, allowance)


def acting_identity(own: Identity, user: str) -> Identity:
    """The identity of a key that acts for a user of its tenant."""
    values = (
        ("User", user),
        ("Tenant", own.tenant_id),
        ("Scope", " ".join(sorted(own.scopes))),
        ("Test", "true" if own.is_test else "false"),
        ("Key-Id", own.key_id),
        ("Actor", own.user_id),
    )
    block = identity_headers.identity_block("X-Keyproxy-", values)
    return dataclasses.replace(own, user_id=user, actor_user_id=own.user_id, header_block=block, can_act=True)


_CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: p\r\n\r\n"


def metered_request(*, output: int = 4_096, cap: int = 0) -> MeteredRequest:
    """A request of the OpenAI dialect that was read, with this output reserved."""
    head = RequestReader(FieldNames(), lambda _: False).read(_CHAT, len(_CHAT) - 4)
    rules = RouteRules(
        "chat", DIALECTS["openai"], tokens=TokenRules(), bounds=BodyBounds(), models=ModelTable(),
        source=ModelSource(""),
    )  # fmt: skip
    one = MeteredRequest(rules, head)
    one.output, one.cap = output, cap
    return one


class FakeIdentities(Identities):
    """Identities in memory. A `slow` digest is missing until it was fetched; `is_down` refuses unknown keys.

    A key acts for the users that were added for it. One that was added for none may not act.
    """

    def __init__(self) -> None:
        self.table: dict[KeyDigest, Identity] = {}
        self.acting_for: dict[tuple[KeyDigest, str], Identity] = {}
        self.slow: set[KeyDigest] = set()
        self.is_down = False
        self.brought = 0
        self.may_bring = asyncio.Event()
        self.may_bring.set()

    def add(self, secret: SecretKey, who: Identity) -> None:
        """Resolve this key to this identity."""
        self.table[secret.digest()] = who

    def let_act(self, secret: SecretKey, user: str) -> Identity:
        """Let this key, which was added before, act for a user of its tenant."""
        digest = secret.digest()
        self.table[digest] = dataclasses.replace(self.table[digest], can_act=True)
        made = self.acting_for[digest, user] = acting_identity(self.table[digest], user)
        return made

    def known(self, digest: KeyDigest, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """See the port."""
        if digest in self.slow:
            raise Missing("identity", lambda _patience: self._bring(digest))
        if digest in self.table:
            return self.table[digest]
        if self.is_down:
            raise Refusal(Reason.STORE_UNAVAILABLE)
        raise Refusal(Reason.KEY_INVALID, "unknown")

    def acting(self, digest: KeyDigest, user_id: str, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """See the port."""
        own = self.known(digest, now, is_first_lookup=is_first_lookup)
        found = self.acting_for.get((digest, user_id))
        if found is None and self.is_down and own.can_act and is_id(user_id):
            raise Refusal(Reason.STORE_UNAVAILABLE)
        return refused_delegation(own) if found is None else found

    def reviewed(self, digest: KeyDigest, before: Identity, now: Moment) -> Identity:
        """See the port."""
        if before.actor_user_id is None or before.agent_token is not None:
            return self.known(digest, now, is_first_lookup=False)
        return self.acting(digest, before.user_id, now, is_first_lookup=False)

    def fetching(self, key: SecretKey, missing: Missing) -> Missing:
        """See the port."""
        del key
        return missing

    async def _bring(self, digest: KeyDigest) -> None:
        await self.may_bring.wait()
        self.brought += 1
        if self.is_down:
            raise Refusal(Reason.STORE_UNAVAILABLE)
        self.slow.discard(digest)


class FakeUpstreamCredentials(UpstreamCredentials):
    """Credentials in memory: those of each provider, the newest first. `slow` ones are missing until they were fetched.

    `refused`: the credentials that the upstream has refused, in order.
    """

    def __init__(self) -> None:
        self.table: dict[str, list[UpstreamCredential]] = {}
        self.slow: set[str] = set()
        self.asked: list[tuple[str, str, bool]] = []
        self.refused: list[UpstreamCredential] = []

    def choose(
        self, provider: str, tenant_id: str, now: Moment, *, is_test: bool, is_first_lookup: bool = True
    ) -> UpstreamCredential:
        """See the port."""
        self.asked.append((provider, tenant_id, is_test))
        if provider in self.slow:

            async def fetch(_patience: object) -> None:
                self.slow.discard(provider)

            raise Missing("provider keys", fetch)
        found = self.table.get(provider, [])
        for credential in found:
            if credential.refused_until_mono_seconds <= now.mono_seconds:
                return credential
        if not found:
            raise Refusal(Reason.UPSTREAM_CREDENTIAL_UNAVAILABLE, f"no secret of {provider}")
        return found[0]

    def was_refused(self, credential: UpstreamCredential, now_mono: float) -> None:
        """See the port."""
        self.refused.append(credential)
        credential.refused_until_mono_seconds = now_mono + 60.0


class FakeMint(AgentTokenMint):
    """Mints in memory, from the parents in `parents`, by their key or token. Mints wait for `may_mint`.

    `is_down`: the store cannot be reached. `defect`: raised instead of a result.
    """

    def __init__(self, rules: MintRules) -> None:
        self.rules = rules
        self.parents: dict[str, Identity] = {}
        self.minted: list[MintedToken] = []
        self.live: collections.Counter[str] = collections.Counter()
        self.calls: list[tuple[MintParent, MintRequest, str]] = []
        self.is_down = False
        self.defect: Exception | None = None
        self.may_mint = asyncio.Event()
        self.may_mint.set()

    async def mint(self, parent: MintParent, request: MintRequest, *, actor: str) -> MintedToken:
        """See the port."""
        self.calls.append((parent, request, actor))
        await self.may_mint.wait()
        if self.defect is not None:
            raise self.defect
        if self.is_down:
            raise Refusal(Reason.STORE_UNAVAILABLE)
        who = self.parents.get(parent.token_id or parent.key_id)
        of_role = {"reader": ("data:read",)}.get(request.role or "", ())
        if who is None or "agents:mint" not in who.scopes:
            raise minting.refused("The credential may not mint.", "no parent")
        minting.check_authority(who, request, self.rules, clock.now())
        scopes = tuple(sorted(who.scopes.intersection(of_role))) if request.scopes is None else request.scopes
        if not scopes:
            raise minting.refused("The token would have no scopes.", "no scopes")
        if self.live[parent.key_id] >= self.rules.tokens_max:
            raise minting.too_many_tokens(self.rules.tokens_max, 61.0)
        return self._minted(parent, who, request, scopes)

    def _minted(self, parent: MintParent, who: Identity, request: MintRequest, scopes: tuple[str, ...]) -> MintedToken:
        number, above = len(self.minted), who.agent_token
        ttl_seconds = self.rules.ttl_seconds_max if request.ttl_seconds is None else request.ttl_seconds
        expires = min(float(int(clock.now().wall_seconds) + ttl_seconds), who.expires_wall_seconds)
        depth = 0 if above is None else above.depth + 1
        token = MintedToken(
            f"agt_{number:022d}", SecretKey(b"eyJ.e30.%d" % number), request.agent, parent.user_id or who.user_id,
            who.tenant_id, scopes, request.token_budget, request.request_budget, request.audience, who.is_test, depth,
            expires,
        )  # fmt: skip
        agents = (request.agent, *(() if above is None else above.agents))
        self.minted.append(token)
        self.live[parent.key_id] += 1
        self.parents[token.id] = dataclasses.replace(
            who,
            user_id=token.user_id,
            scopes=frozenset(scopes),
            expires_wall_seconds=expires,
            agent_token=AgentToken(token.id, agents, depth, request.token_budget, request.request_budget),
        )
        return token


class FakeOwnedIds(OwnedIds):
    """Ownership in memory. Ids in `slow` are missing until they were fetched; `is_down` refuses those that were not."""

    def __init__(self) -> None:
        self.table: dict[tuple[str, str], str] = {}
        self.slow: set[tuple[str, str]] = set()
        self.is_down = False
        self.brought = 0

    def add(self, kind: str, object_id: str, tenant: str, *, is_slow: bool = False) -> None:
        """Let this tenant own this id."""
        self.table[kind, object_id] = tenant
        if is_slow:
            self.slow.add((kind, object_id))

    def is_owned(
        self, kind: str, id: str, tenant_id: str, now: Moment, *, is_first_lookup: bool = True  # noqa: A002 - the port
    ) -> bool:  # fmt: skip
        """See the port."""
        if (kind, id) in self.slow:
            if self.is_down:
                raise Refusal(Reason.STORE_UNAVAILABLE)
            raise Missing("ownership", lambda _patience: self._bring(kind, id))
        return self.table.get((kind, id)) == tenant_id

    async def _bring(self, kind: str, object_id: str) -> None:
        self.brought += 1
        if self.is_down:
            raise Refusal(Reason.STORE_UNAVAILABLE)
        self.slow.discard((kind, object_id))


class FakeLedger(Ledger):
    """A lease table and the reference ledger, which replies immediately. Not `answers`: it is unavailable.

    Requests wait for `may_reply` before they take anything.
    """

    def __init__(self) -> None:
        self.reference = ReferenceLedger(time.time, lease_seconds=1000.0)
        self.lease_sync = LeaseSync(lambda: None)
        self.table = LeaseTable(self.lease_sync)
        self.answers = True
        self.may_reply = asyncio.Event()
        self.may_reply.set()
        self.settled: list[tuple[Hold, bool, int]] = []
        self._serial = 0

    def take(self, allowance: Allowance, now: Moment, need: Need | None = None, *, may_be_paid: bool = False) -> Hold:
        """See the port."""
        del may_be_paid
        if not self.may_reply.is_set():
            raise Missing("leases", lambda _patience: self._wait())
        return self._settled_by(lambda: self.table.take(allowance, now.mono_seconds, need), now)

    async def _wait(self) -> None:
        await self.may_reply.wait()

    def check(
        self, allowance: Allowance, now: Moment, need: Need, paid: int | None = None, *,
        asks: bool, may_be_paid: bool = False,
    ) -> None:  # fmt: skip
        """See the port."""
        del may_be_paid
        if asks:
            self._settled_by(lambda: self.table.check(allowance, now.mono_seconds, need, paid), now)
            return
        with contextlib.suppress(Short):
            self.table.check(allowance, now.mono_seconds, need, paid)

    def take_slots(self, allowance: Allowance, now: Moment, need: Need) -> Hold | None:
        """See the port."""
        return self.table.take_slots(allowance, now.mono_seconds, need)

    def per_request(self, allowance: Allowance, now: Moment, need: Need) -> tuple[int | None, int | None]:
        """See the port."""
        return self.table.per_request(allowance, now.mono_seconds, need)

    def trim(self, hold: Hold, tokens: int, spend: int) -> Hold:
        """See the port."""
        return self.table.trim(hold, tokens, spend)

    def take_again(self, allowance: Allowance, now: Moment, need: Need | None, paid: int) -> Hold:
        """See the port."""
        return self._settled_by(lambda: self.table.take_again(allowance, now.mono_seconds, need, paid), now)

    def _settled_by(self, decide: Callable[[], _Decided], now: Moment) -> _Decided:
        """The result of a decision, after as many round trips as it needs."""
        for _ in range(4):
            try:
                return decide()
            except Short as short:
                if not self.answers:
                    raise Refusal(Reason.LEDGER_UNAVAILABLE) from None
                last = short
                self.lease_sync.request(short)
                self._sync(now.mono_seconds)
        self.lease_sync.mark_exhausted(last, now.mono_seconds)
        return decide()

    def extend(self, hold: Hold, tokens: int, spend: int = 0) -> Hold:
        """See the port."""
        now = Moment(time.time(), time.monotonic())
        return self._settled_by(lambda: self.table.extend(hold, tokens, now.mono_seconds, spend), now)

    def release(self, hold: Hold) -> Hold:
        """See the port."""
        return self.table.release(hold)

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, spend: int = 0, is_repeat: bool = False) -> None:
        """See the port."""
        self.settled.append((hold, was_sent, tokens))
        self.table.settle(hold, was_sent=was_sent, tokens=tokens, spend=spend, is_repeat=is_repeat)

    def _sync(self, mono: float) -> None:
        self.lease_sync.gather(mono)
        lines = self.lease_sync.lines(mono, 1_000)
        self._serial += 1
        replies = self.reference.sync("fake", self._serial, lines)
        assert replies is not None
        self.lease_sync.apply(lines, replies, mono, valid_seconds=1000.0)


class FakeApprovals(Approvals):
    """Approvals and consents in memory. Consents in `slow` are missing until they were fetched; `is_down` refuses all.

    A call without an approval is added to `pending`; `approve` approves it for one use.
    """

    def __init__(self) -> None:
        self.consents: set[tuple[str, str]] = set()
        self.slow: set[tuple[str, str]] = set()
        self.pending: dict[bytes, ApprovalRequest] = {}
        self.approved: set[bytes] = set()
        self.claims: dict[bytes, bytes] = {}
        self.is_down = False
        self._number = 0

    def has_consent(self, identity: Identity, tool: str, now: Moment, *, is_first_lookup: bool = True) -> bool:
        """See the port."""
        subject = (identity.user_id, tool)
        if subject in self.slow:
            if self.is_down:
                raise Refusal(Reason.APPROVALS_UNAVAILABLE)
            raise Missing("consents", lambda _patience: self._bring(subject))
        return subject in self.consents

    async def _bring(self, subject: tuple[str, str]) -> None:
        if self.is_down:
            raise Refusal(Reason.APPROVALS_UNAVAILABLE)
        self.slow.discard(subject)

    def approve(self) -> None:
        """Approve all pending calls."""
        self.approved |= set(self.pending)
        self.pending.clear()

    async def claim(self, request: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        """See the port."""
        if self.is_down:
            raise Refusal(Reason.APPROVALS_UNAVAILABLE)
        if request.digest not in self.approved:
            self.pending[request.digest] = request
            state = {"approval_id": "apr_pending", "approval_state": "pending"}
            raise Refusal(Reason.APPROVAL_REQUIRED, members=state)
        self.approved.discard(request.digest)
        self._number += 1
        value = self._number.to_bytes(16, "big")
        self.claims[value] = request.digest
        return ToolClaim(f"apr_{self._number:022d}", value)

    def give_back(self, claim: ToolClaim) -> None:
        """See the port."""
        digest = self.claims.pop(claim.value, None)
        if digest is not None:
            self.approved.add(digest)


class FakePromptTemplates(PromptTemplates):
    """Templates in memory. Before `is_loaded`, and once `is_too_old`, none can be looked up."""

    def __init__(self) -> None:
        self.table: dict[bytes, tuple[str, str | None]] = {}
        self.is_loaded = True
        self.is_too_old = False

    def register(self, digest: bytes, category: str, tenant_id: str | None = None) -> None:
        """Register a digest, for one tenant or for all."""
        self.table[digest] = (category, tenant_id)

    def category(self, digest: bytes, tenant_id: str, now: Moment) -> str | None:
        """See the port."""
        if not self.is_loaded or self.is_too_old:
            raise Refusal(Reason.STORE_UNAVAILABLE)
        category, owner = self.table.get(digest, (None, None))
        return category if owner in (None, tenant_id) else None


@dataclass(frozen=True)
class Recorded:
    """The record of one exchange."""

    method: bytes
    path: bytes
    route: str | None
    status: int
    reason: Reason | None
    detail: str
    ending: Ending
    user: str | None
    bytes_in: int
    bytes_out: int
    policy: str
    client: bytes
    #: From its head to its first byte upstream, and how much of that it waited for its body and for a connection.
    before_sent_seconds: float
    body_wait_seconds: float
    connection_wait_seconds: float
    model: str
    use: TokenUse | None
    is_estimated: bool
    cost_micros: int
    tokens_reserved: int
    output_cap: int
    limit_reason: str
    categories: tuple[tuple[str, str], ...] | None
    act_for: bytes | None = None

    @property
    def overhead_seconds(self) -> float:
        """Our own time before it was sent."""
        return self.before_sent_seconds - self.body_wait_seconds - self.connection_wait_seconds


@dataclass
class FakeRecorder(Recorder):
    """Keeps all records."""

    seen: list[Recorded] = field(default_factory=list)

    def record(self, exchange: Exchange) -> None:
        """See the port."""
        head = exchange.head
        line = exchange.refused_line if head is None else head.line
        self.seen.append(
            Recorded(
                b"" if line is None else line.method,
                b"" if line is None else line.path,
                None if exchange.route is None else exchange.route.name,
                exchange.status,
                exchange.reason,
                exchange.refusal_detail,
                exchange.ending,
                None if exchange.identity is None else exchange.identity.user_id,
                exchange.bytes_in,
                exchange.bytes_out,
                exchange.policy,
                b"" if exchange.peer is None else exchange.peer.recorded_address(head),
                exchange.sent_mono - exchange.started_mono if exchange.sent_mono else 0.0,
                exchange.body_wait_seconds,
                exchange.connection_wait_seconds,
                exchange.model,
                exchange.token_use,
                exchange.is_estimated,
                exchange.cost_micros,
                0 if exchange.metered is None else exchange.metered.tokens_reserved,
                0 if exchange.metered is None else exchange.metered.cap,
                exchange.limit_reason,
                exchange.categories,
                None if head is None else head.act_for,
            )
        )
