"""The content of access log lines, and which requests are logged."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import pytest

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.ai.tools.tool import Tool
from keyproxy.ai.tools.tool_call import ToolCall, ToolClaim
from keyproxy.config.schema import Log
from keyproxy.http import headers
from keyproxy.http.forwarding import TrustRule
from keyproxy.http.headers import FieldNames
from keyproxy.http.routes import ANY_ROUTE
from keyproxy.http_messages import RequestHead, RequestLine
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.recorder import REQUEST_BOUNDS, Histogram, Recorder
from keyproxy.model import COMPLETED, AgentToken, Ending, Grant, Identity, OAuthSession, Permit
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason
from keyproxy.wire.parsing.head_beginnings import refused_line
from keyproxy.wire.parsing.head_cache import RequestReader
from tests import fakes
from tests.waiting import until, wait_until

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
KEY = fakes.key(7).reveal().decode()


class Logged:
    """An access log, and the lines that it has written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self.log = AccessLog(self._file.fileno(), wall_offset=lambda: 1_700_000_000.0)
        self.log.start()

    def size(self) -> int:
        """The number of bytes written so far."""
        return self._path.stat().st_size

    def lines(self) -> list[dict[str, Any]]:
        """All of them, once the log is closed."""
        self.log.close()
        with self._file:
            self._file.seek(0)
            return [json.loads(line) for line in self._file.read().splitlines()]


@pytest.fixture
def logged(tmp_path: Path) -> Logged:
    return Logged(tmp_path / "log")


def head_of(*lines: str) -> RequestHead:
    raw = ("\r\n".join(["GET /v1/x HTTP/1.1", "Host: proxy.test", *lines]) + "\r\n\r\n").encode("latin-1")
    return RequestReader(FieldNames(), lambda _: False).read(raw, len(raw) - 4)


def ended(
    head: RequestHead | None = None,
    *,
    reason: Reason | None = None,
    detail: str = "",
    policy: str = "",
    status: int = 200,
    ending: Ending | None = None,
) -> Exchange:
    one = Exchange()
    one.head, one.request_id = head, b"r-1"
    one.reason, one.refusal_detail, one.policy = reason, detail, policy
    one.ending = ending or (COMPLETED if reason is None else Ending.REFUSED)
    one.status = status if reason is None else reason.value.status
    one.started_mono, one.ended_mono = 10.0, 10.25
    one.peer = TrustRule([]).forwarding("192.0.2.9", is_tls=False)
    return one


def row(one: Exchange) -> tuple[Exchange, str, str, str]:
    code = {COMPLETED: "ok", Ending.CUT: "cut", Ending.CLIENT_GONE: "client_gone"}.get(one.ending, "refused")
    return one, "any", "none", code if one.reason is None else one.reason.code


def line_of(logged: Logged, one: Exchange) -> dict[str, Any]:
    logged.log.write([row(one)])
    (line,) = logged.lines()
    return line


# -- the request line


def refused(raw: bytes) -> Exchange:
    """A refusal of a head that never became a request."""
    one = ended(reason=Reason.METHOD_NOT_IMPLEMENTED)
    one.refused_line = refused_line(raw, lambda text: KEY.encode() in text)
    return one


@pytest.mark.parametrize(
    ("start", "method", "path"),
    [
        ("BREW /v1/x?secret=1", "BREW", "/v1/x"),
        ("BREW /" + "x" * 600, "BREW", "/" + "x" * 511 + "…"),
        (f"BREW /{KEY}", "", ""),
        (f"BREW /x?key={KEY}", "", ""),
        (f"{KEY} /x", "", ""),
        ("BREW /../x", "BREW", ""),
    ],
)
def test_refused_head_has_its_method_and_path_and_never_a_key_or_a_query(
    logged: Logged, start: str, method: str, path: str
) -> None:
    line = line_of(logged, refused(f"{start} HTTP/1.1\r\nHost: a\r\n\r\n".encode()))
    assert (line["method"], line["path"]) == (method, path)


@pytest.mark.parametrize("path", ['/v1/"x', "/v1/%22", '/","status":500,"x":"', "/v1/ab~!$&'()*+,=:@-_;"])
def test_a_path_is_escaped_so_that_it_adds_no_member_to_its_line(logged: Logged, path: str) -> None:
    raw = f"GET {path} HTTP/1.1\r\nHost: proxy.test\r\n\r\n".encode()
    line = line_of(logged, ended(RequestReader(FieldNames(), lambda _: False).read(raw, len(raw) - 4)))
    assert (line["method"], line["path"], line["status"]) == ("GET", path, 200)


def test_a_method_outside_the_known_ones_is_logged_as_sent(logged: Logged) -> None:
    one = ended()
    one.head = head_of()
    one.head.line = RequestLine(b'BREW"', b"/v1/x", b"/v1/x", 1, b'BREW" /v1/x HTTP/1.1')
    assert line_of(logged, one)["method"] == 'BREW"'


def test_lines_of_one_batch_have_times_of_their_own(logged: Logged) -> None:
    rows = []
    for started, ended_at in ((10.0, 13.0), (12.5, 13.0), (10.125, 13.25), (12.75, 13.0)):
        one = ended(head_of())
        one.started_mono, one.ended_mono = started, ended_at
        rows.append(row(one))
    logged.log.write(rows)
    assert [(line["time"], line["duration_seconds"]) for line in logged.lines()] == [
        ("2023-11-14T22:13:30.000Z", 3.0),
        ("2023-11-14T22:13:32.500Z", 0.5),
        ("2023-11-14T22:13:30.125Z", 3.125),
        ("2023-11-14T22:13:32.750Z", 0.25),
    ]


# -- calls of tools


def calling(claim: ToolClaim | None = None, **how: Any) -> Exchange:
    """A request that calls a tool."""
    one = ended(head_of(), **how)
    one.tool_call = ToolCall(Tool("call_partner", "call_partner"))
    one.tool_call.claim = claim
    return one


def test_a_line_has_the_tool_and_the_approval_that_the_call_used_or_waits_for(logged: Logged) -> None:
    waits, denied = calling(reason=Reason.APPROVAL_REQUIRED), calling(reason=Reason.APPROVAL_DENIED)
    waits.approval_id, denied.approval_id = "apr_1", "apr_2"
    used = [calling(ToolClaim(name, b"v" * 16)) for name in ("apr_1", "apr_3", "apr_1")]
    rows = [ended(head_of()), calling(), waits, denied, *used, calling()]
    logged.log.write([row(one) for one in rows])
    assert [(line["tool"], line["approval"]) for line in logged.lines()] == [
        (None, None),
        ("call_partner", None),
        ("call_partner", "apr_1"),
        ("call_partner", "apr_2"),
        ("call_partner", "apr_1"),
        ("call_partner", "apr_3"),
        ("call_partner", "apr_1"),
        ("call_partner", None),
    ]


def test_calls_of_two_tools_on_one_route_have_lines_of_their_own(logged: Logged) -> None:
    head, names = head_of(), ("search", "run_shell", "search")
    for name in names:
        one = ended(head)
        one.tool_call = ToolCall(Tool(name, name))
        logged.log.write([row(one)])
    assert [line["tool"] for line in logged.lines()] == list(names)


# -- why a request was refused


def test_a_line_has_the_reason_for_a_refusal(logged: Logged) -> None:
    line = line_of(logged, ended(reason=Reason.REQUEST_MALFORMED, detail="more than one Host"))
    assert (line["code"], line["detail"], line["policy"]) == ("request_malformed", "more than one Host", None)


def test_a_line_names_the_policy_of_the_limit_that_refused(logged: Logged) -> None:
    line = line_of(logged, ended(head_of(), reason=Reason.QUOTA_EXHAUSTED, policy="user.requests_per_day"))
    assert (line["code"], line["detail"], line["policy"]) == ("quota_exhausted", None, "user.requests_per_day")


def test_relayed_request_has_neither_policy_nor_detail(logged: Logged) -> None:
    line = line_of(logged, ended(head_of()))
    assert not {"detail", "policy"} & set(line)


@pytest.mark.parametrize(
    "detail",
    [
        f"the value {KEY} is no number",
        KEY,
        f"at {KEY[8:40]}",
        f"key={KEY}",
        f"('{KEY}',)",
        f"a\n{KEY}\n",
        "hunter22 is no number",
        "sk-proj-abcdefghijklmnopqrstuvwx is no number",
    ],
)
def test_no_detail_contains_a_key_or_a_part_of_one(logged: Logged, detail: str) -> None:
    head = head_of(f"Authorization: Api-Key {KEY}", "X-Api-Key: hunter22")
    line = line_of(logged, ended(head, reason=Reason.REQUEST_MALFORMED, detail=detail))
    assert "***" in line["detail"]
    assert not any(KEY[start : start + 24] in json.dumps(line) for start in range(len(KEY) - 24))
    assert "hunter22" not in json.dumps(line)


def test_a_detail_is_one_line_of_bounded_length_whatever_it_is_made_of(logged: Logged) -> None:
    line = line_of(logged, ended(reason=Reason.STORE_UNAVAILABLE, detail="\udcff\n" + "no " * 1_000))
    assert len(line["detail"]) <= 257
    assert line["detail"].startswith("\\udcff\nno no")


# -- the identity

TOKEN = AgentToken("agt_0123456789abcdefghijAB", ("crawler", "planner"), 1)


@pytest.mark.parametrize(
    ("identity", "fields"),
    [
        (fakes.identity(), [None, None, None]),
        (dataclasses.replace(fakes.identity(), actor_user_id="u_worker"), ["u_worker", None, None]),
        (dataclasses.replace(fakes.identity(), agent_token=TOKEN), [None, "crawler", TOKEN.token_id]),
        (
            dataclasses.replace(fakes.identity(), actor_user_id="u_worker", agent_token=TOKEN),
            ["u_worker", "crawler", TOKEN.token_id],
        ),
    ],
)
@pytest.mark.parametrize("reason", [None, Reason.SCOPE_INSUFFICIENT, Reason.KEY_REVOKED])
def test_a_line_names_the_actor_the_agent_and_its_token_also_of_a_refused_request(
    logged: Logged, identity: Identity, fields: list[str | None], reason: Reason | None
) -> None:
    one = ended(head_of(), reason=reason)
    one.identity = identity
    line = line_of(logged, one)
    names = list(line)
    assert [(name, line[name]) for name in names[names.index("tenant") : names.index("mode")]] == [
        ("tenant", "acme"), ("user", "u_42"), ("key_id", "key_of_u_42"),
        *zip(("actor", "agent", "token_id"), fields, strict=True),
    ]  # fmt: skip


def test_a_request_without_an_identity_has_neither_actor_nor_agent(logged: Logged) -> None:
    line = line_of(logged, ended(head_of(), reason=Reason.KEY_INVALID))
    assert [line[name] for name in ("key_id", "actor", "agent", "token_id")] == [None] * 4


# -- the client of a request


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.9", [], "192.0.2.9"),
        ("192.0.2.9", ["198.51.100.7"], "192.0.2.9"),  # not trusted: its claim is ignored
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.7"], "198.51.100.7"),  # the left one may be invented
        ("10.0.0.1", ["1.1.1.1, 198.51.100.7, 10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["1.1.1.1", "198.51.100.7", "10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7,"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7:4711"], "198.51.100.7"),
        ("10.0.0.1", ["2001:DB8:0::1"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("10.0.0.1", ["fe80::1%eth0"], "fe80::1"),
        ("10.0.0.1", ["[fe80::1%eth0]:4711"], "fe80::1"),
        ("10.0.0.1", ["[::ffff:198.51.100.7]:4711"], "198.51.100.7"),
        ("10.0.0.1", ["[2001:db8::1"], "10.0.0.1"),
        ("10.0.0.1", ["2001:db8::1]"], "10.0.0.1"),
        ("10.0.0.1", ["[198.51.100.7]"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.07"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7, 10.0.0.2,, 10.0.0.3"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.7, unknown, 10.0.0.3"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.7", "10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["10.0.0.4, 10.0.0.3"], "10.0.0.4"),
        ("198.51.100.9", ["198.51.100.7"], "198.51.100.9"),
        ("", ["malformed"], None),
        ("10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ['"198.51.100.7"'], "10.0.0.1"),
        ("10.0.0.1", ["999.1.1.1"], "10.0.0.1"),
        ("10.0.0.1", [KEY], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("fe80::1%eth0", [], "fe80::1"),
        ("", [], None),
        ("", ["198.51.100.7"], "198.51.100.7"),
    ],
)
def test_client_is_the_rightmost_untrusted_address(
    logged: Logged, peer: str, forwarded: list[str], client: str | None
) -> None:
    one = ended(head_of(*(f"X-Forwarded-For: {value}" for value in forwarded)))
    one.peer = TrustRule(["10.0.0.0/8", "unix"]).forwarding(peer, is_tls=False)
    assert line_of(logged, one)["client"] == client


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("198.51.100.7", "198.51.100.0/24"),
        ("::ffff:198.51.100.7", "198.51.100.0/24"),
        ("2001:db8:1:2::7", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/48"),
        ("", None),
    ],
)
def test_log_has_only_the_network_of_a_client_if_so_configured(
    logged: Logged, address: str, network: str | None
) -> None:
    one = ended()
    one.peer = TrustRule([], recorded="network").forwarding(address, is_tls=False)
    assert line_of(logged, one)["client"] == network


@pytest.mark.parametrize(("recorded", "client"), [("network", "198.51.100.0/24"), ("none", None)])
def test_setting_of_recorded_addresses_applies_behind_a_proxy_too(
    logged: Logged, recorded: str, client: str | None
) -> None:
    one = ended(head_of("X-Forwarded-For: 198.51.100.7"))
    one.peer = TrustRule(["10.0.0.1"], recorded=recorded).forwarding("10.0.0.1", is_tls=False)
    assert line_of(logged, one)["client"] == client


def test_log_has_no_client_address_if_so_configured(logged: Logged) -> None:
    one = ended()
    one.peer = TrustRule([], recorded="none").forwarding("198.51.100.7", is_tls=False)
    assert line_of(logged, one)["client"] is None


def test_client_of_an_unparsable_request_is_the_peer(logged: Logged) -> None:
    assert line_of(logged, ended(reason=Reason.REQUEST_MALFORMED))["client"] == "192.0.2.9"


def test_hop_cache_is_bounded() -> None:
    rule = TrustRule(["10.0.0.0/8"])
    forwarding = rule.forwarding("10.0.0.1", is_tls=False)
    for number in range(5_000):
        address = f"198.51.{number // 250}.{number % 250}"
        assert forwarding.recorded_address(head_of(f"X-Forwarded-For: {address}")) == address.encode()


@pytest.mark.parametrize(
    ("lines", "trace"),
    [
        ([f"traceparent: 00-{TRACE}-{PARENT}-01"], TRACE),
        ([f"Traceparent: 00-{TRACE}-{PARENT}-00"], TRACE),
        ([f"TRACEPARENT:\t00-{TRACE}-{PARENT}-ff  "], TRACE),
        (["Accept: a", f"X-Traceparent: 00-{'1' * 32}-{PARENT}-01", f"traceparent: 00-{TRACE}-{PARENT}-01"], TRACE),
        ([f"traceparent: cc-{TRACE}-{PARENT}-01-what-the-future-holds"], TRACE),
        ([f"traceparent: 00-{TRACE}-{PARENT}-01-more"], None),
        ([f"traceparent: ff-{TRACE}-{PARENT}-01"], None),
        ([f"traceparent: 00-{'0' * 32}-{PARENT}-01"], None),
        ([f"traceparent: 00-{TRACE}-{'0' * 16}-01"], None),
        ([f"traceparent: 00-{TRACE.upper()}-{PARENT}-01"], None),
        ([f"traceparent: 00-{TRACE[:-1]}-{PARENT}-01"], None),
        ([f"traceparent: 00-{TRACE}-{PARENT}-1"], None),
        ([f"traceparent: 00-{TRACE}-{PARENT}"], None),
        (["traceparent:"], None),
        ([f"traceparent: {KEY}"], None),
        ([f"X-Traceparent: 00-{TRACE}-{PARENT}-01"], None),
        ([f"traceparent: 00-{TRACE}-{PARENT}-01", f"traceparent: 00-{'1' * 32}-{PARENT}-01"], None),
        ([], None),
    ],
)
def test_the_trace_id_is_that_of_a_valid_traceparent_and_none_is_invented(
    logged: Logged, lines: list[str], trace: str | None
) -> None:
    assert line_of(logged, ended(head_of(*lines)))["trace_id"] == trace


def test_a_trace_id_is_found_wherever_its_line_stands() -> None:
    line = f"traceparent: 00-{TRACE}-{PARENT}-01\r\n"
    for block in (line, f"Accept: a\r\n{line}", f"{line}Accept: a\r\n", f"Accept: traceparent: x\r\n{line}"):
        assert headers.trace_id(block.encode()) == TRACE.encode()


# -- which requests have a line


@pytest.mark.parametrize(
    ("access", "share"), [(True, 1.0), (False, 1.0), ("all", 1.0), ("refusals", 0.0), (0.01, 0.01), (1.0, 1.0)]
)
def test_the_setting_selects_the_fraction_of_successes_to_log(access: Any, share: float) -> None:
    assert Log(access=access).success_share == share


def mixed() -> list[Exchange]:
    """Every kind of end."""
    return [
        ended(head_of(), reason=Reason.RATE_LIMITED),
        ended(head_of(), status=500),
        ended(head_of(), ending=Ending.CUT),
        ended(head_of(), status=499, ending=Ending.CLIENT_GONE),
        ended(head_of()),
        ended(head_of(), status=404),
    ]


def test_refusals_mode_logs_only_refusals_and_failures(logged: Logged) -> None:
    logged.log.success_share = 0.0
    logged.log.write([row(one) for one in mixed()])
    logged.log.write([row(ended(head_of()))])
    assert [(line["code"], line["status"]) for line in logged.lines()] == [
        ("rate_limited", 429),
        ("ok", 500),
        ("cut", 200),
        ("client_gone", 499),
    ]


def test_every_refusal_and_the_configured_fraction_of_successes_are_logged(logged: Logged) -> None:
    logged.log.success_share = 0.25
    one, refused = row(ended(head_of())), row(ended(head_of(), reason=Reason.KEY_INVALID))
    logged.log.write([one, refused] * 40)
    for _ in range(100):
        logged.log.write([one] * 100)
    lines = logged.lines()
    written = sum(line["code"] == "ok" for line in lines)
    assert sum(line["code"] == "api_key_invalid" for line in lines) == 40
    # Of 10,040; six standard deviations either way.
    assert 2_510 - 261 < written < 2_510 + 261


# -- metered requests


def test_a_metered_request_is_logged_with_its_model_tokens_and_cost(logged: Logged) -> None:
    one = ended(head_of())
    one.metered, one.model, one.is_estimated, one.cost_micros = fakes.metered_request(cap=4_096), "gpt-4o", True, 123
    one.token_use = TokenUse(100, 50, cached=60, reasoning=30)
    line = line_of(logged, one)
    names = (
        "model", "tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "tokens_reserved", "output_cap",
        "cost_micros", "estimated",
    )  # fmt: skip
    assert [line[name] for name in names] == ["gpt-4o", 100, 50, 60, 30, 4_096, 4_096, 123, True]


def test_a_metered_request_that_was_not_forwarded_has_no_tokens_and_the_reason(logged: Logged) -> None:
    one = ended(head_of(), reason=Reason.TOKEN_BUDGET_EXHAUSTED, policy="user.tokens_per_day")
    one.metered, one.limit_reason = fakes.metered_request(), "held"
    line = line_of(logged, one)
    assert (line["model"], line["tokens_in"], line["output_cap"], line["cost_micros"]) == (None, None, None, 0)
    assert (line["policy"], line["reason"]) == ("user.tokens_per_day", "held")
    assert line["tokens_reserved"] is None


def test_a_metered_request_that_failed_after_its_reservation_is_logged_with_it(logged: Logged) -> None:
    one = ended(head_of(), reason=Reason.UPSTREAM_UNREACHABLE)
    one.metered = fakes.metered_request()
    one.permit = Permit(Grant(fakes.identity(), ANY_ROUTE))
    line = line_of(logged, one)
    assert (line["tokens_in"], line["tokens_reserved"], line["cost_micros"], line["estimated"]) == (
        None,
        4_096,
        0,
        False,
    )


def test_requests_alike_but_for_their_model_are_logged_with_their_own(logged: Logged) -> None:
    head, rows = head_of(), []
    for name in ("gpt-4o", "", "other", "gpt-4o"):
        one = ended(head)
        one.metered, one.model = fakes.metered_request(), name
        rows.append(row(one))
    logged.log.write([*rows, row(ended(head))])
    lines = logged.lines()
    assert [line["model"] for line in lines[:4]] == ["gpt-4o", None, "other", "gpt-4o"]
    assert lines[4]["model"] is None
    assert "tokens_in" not in lines[4]


@pytest.mark.parametrize(
    ("categories", "logged_as"),
    [
        (None, None),
        ((("code", "route"),), ["code"]),
        ((("code", "template"), ("chat", "route"), ("code", "pattern")), ["chat", "code"]),
    ],
)
def test_a_judged_request_is_logged_with_its_categories_and_any_other_with_null(
    logged: Logged, categories: tuple[tuple[str, str], ...] | None, logged_as: list[str] | None
) -> None:
    one = ended(head_of())
    one.categories = categories
    assert line_of(logged, one)["category"] == logged_as


def test_requests_of_other_routes_are_logged_without_these(logged: Logged) -> None:
    assert "tokens_in" not in line_of(logged, ended(head_of()))


def test_a_line_names_grant_and_client_of_an_oauth_token_and_is_unchanged_without(logged: Logged) -> None:
    one, other = ended(head_of()), ended(head_of())
    one.identity = dataclasses.replace(fakes.identity(), key_id="ses_1", oauth=OAuthSession("gra_1", "cli_1"))
    other.identity = fakes.identity()
    logged.log.write([row(one), row(other)])
    with_token, with_key = logged.lines()
    assert (with_token["key_id"], with_token["grant"], with_token["oauth_client"]) == ("ses_1", "gra_1", "cli_1")
    assert with_token.keys() - with_key.keys() == {"grant", "oauth_client"}


# -- when lines are written


def test_lines_are_written_at_a_flush_and_none_is_lost_without_one(logged: Logged) -> None:
    for status in (201, 202):
        one = ended(head_of(), status=status)
        logged.log.write([row(one)])
    assert logged.size() == 0
    logged.log.flush()
    wait_until(lambda: logged.size() > 0, "the lines are written")
    logged.log.write([row(ended(head_of(), status=203))])
    assert [line["status"] for line in logged.lines()] == [201, 202, 203]


def test_many_lines_are_written_without_a_flush(logged: Logged) -> None:
    rows = [row(ended(head_of()))] * 100
    for _ in range(10):
        logged.log.write(rows)
    wait_until(lambda: logged.size() > 100_000, "most lines are written")
    assert len(logged.lines()) == 1_000


async def test_a_recorder_has_each_line_written_soon_and_all_at_its_end(logged: Logged) -> None:
    recorder = Recorder(logged.log)
    recorder.start(asyncio.get_running_loop())
    recorder.record(ended(head_of()))
    await until(lambda: logged.size() > 0, "the line is written")
    recorder.record(ended(head_of()))
    recorder.close()
    assert len(logged.lines()) == 2


async def test_requests_that_ended_before_a_change_of_the_log_are_logged(logged: Logged) -> None:
    recorder = Recorder(logged.log)
    recorder.record(ended(head_of()))
    recorder.log_to(None)
    recorder.record(ended(head_of()))
    recorder.close()
    wait_until(lambda: logged.size() > 0, "the line is written")
    assert len(logged.lines()) == 1


# -- counts


def test_a_batch_is_counted_by_what_its_exchanges_have_in_common() -> None:
    recorder = Recorder(None)
    live, test = fakes.identity(), fakes.identity(is_test=True)
    kinds: list[tuple[Identity | None, int, Reason | None]] = [
        (live, 200, None), (live, 200, None), (test, 200, None), (live, 200, None), (live, 404, None), (None, 401, None),
        (None, 401, Reason.KEY_INVALID), (live, 200, None),
    ]  # fmt: skip
    for identity, status, reason in kinds:
        one = ended(head_of(), status=status, reason=reason)
        one.identity, one.route = identity, None if identity is None else ANY_ROUTE
        recorder.record(one)
    counted = {(cell.route, cell.mode, cell.status, cell.code, cell.outcome): cell.count for cell in recorder.cells()}
    assert counted == {
        ("any", "live", 200, "ok", "ok"): 4,
        ("any", "test", 200, "ok", "ok"): 1,
        ("any", "live", 404, "ok", "ok"): 1,
        ("none", "none", 401, "ok", "ok"): 1,
        ("none", "none", 401, "api_key_invalid", "refused"): 1,
    }


@pytest.mark.parametrize("number", [0, 1, 40])
def test_an_observation_is_counted_below_the_first_bound_that_it_does_not_exceed(number: int) -> None:
    values = [0.0, 0.001, 0.0011, 0.0025, 5.0, 300.0, 300.1, -1.0] * number
    together, singly = Histogram(REQUEST_BOUNDS), Histogram(REQUEST_BOUNDS)
    together.observe_all([*values])
    for value in values:
        singly.observe(value)
    counts = [
        sum(below < value <= bound for value in values) for below, bound in pairwise([-inf, *REQUEST_BOUNDS, inf])
    ]
    assert together.counts == singly.counts == counts
    assert together.total == pytest.approx(singly.total)
