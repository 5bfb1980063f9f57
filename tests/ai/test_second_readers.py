"""No request that is judged as one thing is read as another by a different server.

The readers here are written for these tests, without the product's code: they take the first or the last of equal names,
ignore case, end names at a NUL, trim them, or follow PHP's brackets.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote_plus

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.judged_request import JudgedRequest
from keyproxy.ai.access.judged_values import found_text
from keyproxy.ai.access.named_models import ModelRules
from keyproxy.ai.access.namespaces import Bind
from keyproxy.ai.access.tenant_records import TenantRecords
from keyproxy.ai.access.value_sources import parse_value_source
from keyproxy.ai.model_source import parse_model_source
from keyproxy.ai.models import Model, ModelTable
from keyproxy.http_messages import RequestFields, RequestHead, RequestLine
from keyproxy.model import Identity
from keyproxy.reasons import Refusal
from tests import fakes

Pairs = Sequence[tuple[str, Any]]
Reader = Callable[[Pairs, str], Any]

ALLOWED, RESTRICTED = "small", "big"
IDENTITY = fakes.identity(tenant="acme", scopes=frozenset())
MODELS = ModelTable([Model(ALLOWED), Model(RESTRICTED, (), frozenset({"premium"}))])


def first_wins(pairs: Pairs, name: str) -> Any:
    return next((value for key, value in pairs if key == name), None)


def last_wins(pairs: Pairs, name: str) -> Any:
    return first_wins(list(reversed(pairs)), name)


def _as(change: Callable[[str], str]) -> Reader:
    def read(pairs: Pairs, name: str) -> Any:
        return last_wins([(change(key), value) for key, value in pairs], name)

    return read


def as_php(name: str) -> str:
    """The variable that PHP makes of a name."""
    name = name.lstrip(" ").split("\0")[0]
    root, bracket, rest = name.partition("[")
    if bracket and "]" not in rest:
        root = name
    return root.translate(str.maketrans(". [", "___"))


def as_rack(name: str) -> str:
    """The parameter that Rack 2 makes of a name: the first part that is no bracket."""
    return next((part for part in re.split(r"[\[\]]", name) if part), "")


READERS: dict[str, Reader] = {
    "the first wins": first_wins,
    "the last wins": last_wins,
    "ignores case": _as(str.casefold),
    "ignores case as Go does": _as(lambda key: key.replace("\u017f", "s").replace("\u212a", "k").lower()),
    "ends names at a NUL": _as(lambda key: key.split("\0")[0]),
    "trims names": _as(str.strip),
}

#: Of queries and forms; brackets mean nothing in JSON.
FORM_READERS: dict[str, Reader] = {
    **READERS,
    "ends names at a bracket": _as(lambda key: key.split("[")[0]),
    "folds names as PHP does": _as(as_php),
    "reads brackets as Rack does": _as(as_rack),
    "drops a leading question mark": _as(lambda key: key.removeprefix("?")),
}


class NoRecords(TenantRecords):
    """A tenant that owns nothing."""

    def owns(self, kind: str, object_id: str) -> bool:
        del kind, object_id
        return False

    def lacks(self) -> bool:
        return False

    def require(self) -> None:
        pass


def is_admitted(rules: AccessRules, target: bytes, body: bytes, media_type: bytes, block: bytes = b"") -> bool:
    """Whether the product admits a request."""
    fields = RequestFields(host=b"p", host_block=b"", media_type=media_type)
    line = RequestLine(b"POST", target, target.partition(b"?")[0], 1, b"")
    head = RequestHead(line, fields, block, (), len(body))
    try:
        judged = JudgedRequest(rules, head)
        while not judged.read(head, body):
            pass
        judged.judge(IDENTITY, NoRecords())
    except Refusal:
        return False
    return True


def judging_model(source: str) -> AccessRules:
    rules = ModelRules(parse_model_source(source), MODELS, dialect=None, field=b"X-Keyproxy-Model: ")
    return AccessRules("r", model=rules)


#: Names that some reader takes for the counting one, and others.
NAMES = st.sampled_from(
    ["model", "Model", "MODEL", "mode\u0131", "model\0", "model\0x", " model", "model ", "model[]", "model[0]", "mod",
     "models", "x", "fallbacks", "messages", "engine"]
)  # fmt: skip
VALUES = st.sampled_from([ALLOWED, RESTRICTED, ALLOWED.upper(), f"{ALLOWED} ", f"{ALLOWED}\0", "", None, 1])
LISTS = st.one_of(
    VALUES,
    st.lists(st.sampled_from([ALLOWED, RESTRICTED]), max_size=2),
    st.lists(st.dictionaries(st.sampled_from(["model", "Model", ALLOWED, RESTRICTED]), VALUES, max_size=2), max_size=2),
)


def written(pairs: Pairs, *, escapes: bool) -> bytes:
    """A JSON object with these members, in this order; with escapes in its names."""
    members = []
    for name, value in pairs:
        text = "".join(f"\\u{ord(character):04x}" for character in name) if escapes else None
        members.append((f'"{text}"' if text is not None else json.dumps(name)) + ":" + json.dumps(value))
    return ("{" + ",".join(members) + "}").encode()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pairs=st.lists(st.tuples(NAMES, LISTS), max_size=4),
    escapes=st.booleans(),
    source=st.sampled_from(["model", "engine"]),
)
def test_no_json_judged_as_one_model_names_another_to_a_second_reader(pairs: Pairs, escapes: bool, source: str) -> None:
    body = written(pairs, escapes=escapes)
    if not is_admitted(judging_model(f"json:{source}"), b"/x", body, b"application/json"):
        return
    for name, reader in READERS.items():
        for place in ("model", "engine") if source == "engine" else ("model",):
            found = reader(pairs, place)
            assert found in (ALLOWED, None), f"a server that {name} reads {found!r}"
        for place in ("models", "fallbacks"):
            assert RESTRICTED not in json.dumps(reader(pairs, place)), name


QUERY_PIECES = st.sampled_from(
    ["model=small", "model=big", "Model=big", "model%00=big", "model[]=big", "+model=big", "mod%65l=big", "model=small+",
     "[model]=big", "model]=big", "?model=big", "context.window+fallbacks=big", "context_window[fallbacks=big",
     "x=1", "models=big", "models=small", "model", "model=", "x", "%4dodel=big", "model%5b%5d=big", "x=model", "=model"]
)  # fmt: skip


def query_readers(text: str) -> dict[str, Pairs]:
    """The pairs as servers split and decode a query."""
    found: dict[str, Pairs] = {}
    for name, separators in (("&", "&"), ("& and ;", "&;")):
        pieces = [text]
        for separator in separators:
            pieces = [one for piece in pieces for one in piece.split(separator)]
        parts = [piece.partition("=") for piece in pieces if piece]
        found[name] = [(unquote_plus(key), unquote_plus(value)) for key, _, value in parts]
    return found


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(QUERY_PIECES, max_size=4), separators=st.lists(st.sampled_from("&;"), min_size=4, max_size=4))
@pytest.mark.parametrize("place", ["query", "form"])
def test_no_query_or_form_judged_as_one_model_names_another(
    place: str, pieces: list[str], separators: list[str]
) -> None:
    text = "".join(piece + separator for piece, separator in zip(pieces, separators, strict=False)).rstrip("&;")
    if place == "query":
        is_let = is_admitted(judging_model("query:model"), b"/x?" + text.encode(), b"", b"")
    else:
        target = b"/x?model=small"
        is_let = is_admitted(judging_model("query:model"), target, text.encode(), b"application/x-www-form-urlencoded")
    if not is_let:
        return
    for splits, pairs in query_readers(text).items():
        for name, reader in FORM_READERS.items():
            for counted in ("model", "models", "context_window_fallbacks"):
                found = reader(pairs, counted)
                assert found in (ALLOWED, None), f"a server that splits at {splits} and {name} reads {found!r}"


def parts_of(body: bytes, boundary: bytes, *, line_end: bytes, strips: bool) -> Pairs:
    """The fields of a form, as a lenient parser finds them: at any line that begins with the boundary."""
    found = []
    for piece in (line_end + body).split(line_end + b"--" + boundary)[1:]:
        head, _, value = piece.partition(line_end * 2)
        for line in head.split(line_end):
            if b"name=" in line.lower():
                name = line[line.lower().index(b"name=") + 5 :].split(b";")[0].strip(b'" \r')
                text = value.removesuffix(line_end).decode("utf-8", "replace")
                found.append((name.decode("utf-8", "replace"), text.strip() if strips else text))
    return found


HEADER = 'Content-Disposition: form-data; name="%s"'
FORM_HEADERS = st.sampled_from(
    [HEADER % "model", HEADER % "Model", HEADER % "model[]", HEADER % "x", HEADER % "models", HEADER % "mo\\del",
     HEADER % "model" + '; filename="a"', HEADER % "x" + '; name="model"', HEADER % "x" + "; name*=utf-8''model",
     "Content-Disposition: form-data; name=model", HEADER % "=?utf-8?q?model?=", HEADER % "mo%64el", HEADER % "_charset_"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.tuples(FORM_HEADERS, st.sampled_from(["small", "big", "small\n", "a\n--b\nX", "a\r\n--b  \r\n", "--b"])),
        max_size=3,
    ),
    line_ends=st.lists(st.sampled_from(["\r\n", "\n"]), min_size=8, max_size=8),
    preamble=st.sampled_from(["", "", "", "\r\n", "x\r\n"]),
    end=st.sampled_from(["--b--\r\n", "--b--", "--b--\r\nmore", "--b--\r\n--b\r\n"]),
)
def test_no_form_judged_as_one_model_names_another(
    parts: list[tuple[str, str]], line_ends: list[str], preamble: str, end: str
) -> None:
    ends = iter(line_ends * 4)
    text = preamble
    for header, value in parts:
        text += f"--b{next(ends)}{header}{next(ends)}{next(ends)}{value}{next(ends)}"
    body = (text + end).encode()
    block = b"Content-Type: multipart/form-data; boundary=b\r\n"
    if not is_admitted(judging_model("form:model"), b"/x", body, b"multipart/form-data", block):
        return
    for line_end in (b"\r\n", b"\n"):
        for strips in (False, True):
            pairs = parts_of(body.replace(b"\r\n", line_end), b"b", line_end=line_end, strips=strips)
            for name, reader in FORM_READERS.items():
                assert reader(pairs, "model") in (ALLOWED, None), f"a parser that {name} reads another model"
                assert reader(pairs, "models") in (ALLOWED, None)


SEGMENTS = st.lists(
    st.sampled_from(
        ["acme", "globex", "..", ".", "", "docs", "acme-2", "ACME", "acme.", "a%2f", "%2e%2e", "x;y", "~", "*"]
    ),
    min_size=1,
    max_size=5,
)


def resolved(path: str) -> str:
    """The path as servers resolve it: decoded again, dot segments and empty ones removed."""
    found: list[str] = []
    for segment in unquote_plus(path.replace("+", "%2b")).split("/"):
        segment = segment.split(";")[0]
        if segment == "..":
            found = found[:-1]
        elif segment not in ("", "."):
            found.append(segment)
    return "/".join(found)


@settings(max_examples=400, deadline=None)
@given(segments=SEGMENTS, separator=st.sampled_from(["/", "/", "\\", "%2F"]))
@pytest.mark.parametrize(("rule", "text"), [("starts", "{tenant}/"), ("is", "{tenant}")])
def test_no_id_within_another_tenant_is_accepted(rule: str, text: str, segments: list[str], separator: str) -> None:
    value = separator.join(segments)
    source = parse_value_source("query:id")
    bind = Bind(source, rule, text)
    query = "".join(f"%{byte:02x}" for byte in value.encode())
    rules = AccessRules("r", binds=(bind,))
    if not is_admitted(rules, b"/x?id=" + query.encode(), b"", b""):
        return
    assert resolved(value).split("/")[0] == "acme"
    assert resolved(resolved(value)) == value


TENANTS = st.lists(st.sampled_from(["acme", "globex"]), max_size=2)


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from(["ns", "Ns", "ns\0", "x", " ns"]),
            st.one_of(st.sampled_from(["acme", "globex", None, 1]), TENANTS),
        ),
        max_size=3,
    ),
    within=st.sampled_from(["/ns", "/f/*/ns", "/a/ns"]),
    escapes=st.booleans(),
)  # fmt: skip
def test_no_bound_member_is_another_tenants_to_a_second_reader(pairs: Pairs, within: str, escapes: bool) -> None:
    inner = written(pairs, escapes=escapes)
    body = {"/ns": b"%b", "/f/*/ns": b'{"f":[{"ns":"acme"},%b]}', "/a/ns": b'{"a":%b}'}[within] % inner
    rules = AccessRules(
        "r", binds=(Bind(parse_value_source(f"json:{within}"), "is", "{tenant}", accepts_missing=True),)
    )
    if not is_admitted(rules, b"/x", body, b"application/json"):
        return
    for name, reader in READERS.items():
        found = reader(pairs, "ns")
        assert found == "acme" or (found is None and "ns" not in [key for key, _ in pairs]), name


def test_the_readers_differ_where_the_product_refuses() -> None:
    """The tests above would pass with readers that agree."""
    pairs = [("model", ALLOWED), ("model", RESTRICTED), ("Model\0", "x")]
    assert {first_wins(pairs, "model"), last_wins(pairs, "model")} == {ALLOWED, RESTRICTED}
    assert READERS["ignores case"]([("MODEL", RESTRICTED)], "model") == RESTRICTED
    assert READERS["ends names at a NUL"]([("model\0", RESTRICTED)], "model") == RESTRICTED
    assert resolved("acme/../globex/x") == "globex/x"
    assert is_admitted(judging_model("json:model"), b"/x", b'{"model":"small","models":["small"]}', b"application/json")
    assert is_admitted(judging_model("query:model"), b"/x?model=small&models=small", b"", b"")
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nsmall\r\n--b--\r\n'
    block = b"Content-Type: multipart/form-data; boundary=b\r\n"
    assert is_admitted(judging_model("form:model"), b"/x", form, b"multipart/form-data", block)


def identity_of_tenant(tenant: str) -> Identity:
    return fakes.identity(tenant=tenant)


@settings(max_examples=300, deadline=None)
@given(
    tenants=st.lists(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@|+\-]{0,6}", fullmatch=True), min_size=2, max_size=2, unique=True
    ),
    rest=st.from_regex(r"[A-Za-z0-9._:@|+~/=,!$\-]{0,8}", fullmatch=True),
    separator=st.sampled_from("/~,=!$"),
)  # fmt: skip
def test_no_value_is_accepted_for_two_tenants(tenants: list[str], rest: str, separator: str) -> None:
    bind = Bind(parse_value_source("query:id"), "starts", f"{{tenant}}{separator}")
    for owner in tenants:
        value = f"{owner}{separator}{rest}"
        accepted = [one for one in tenants if bind.holds(found_text(value), identity_of_tenant(one), NoRecords())]
        assert accepted in ([], [owner])


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("tenant_id", "tenant.id"), ("tenant_id", "tenant+id"), ("tenant_id", "tenant[id"), ("tenant_id", "+tenant.id"),
        ("tenant_id", "tenant%2Eid"), ("tenant.id", "tenant_id"), ("ns", "[ns]"), ("ns", "ns]"), ("ns", "%5Bns%5D"),
        ("ns", "]ns[x]"), ("ns", "?ns"), ("ns", "%u006Es"), ("ns", "NS"), ("ns", "ns%00"), ("ns", "ns[x"),
    ],
)  # fmt: skip
def test_no_spelling_of_a_bound_parameter_reaches_a_lenient_server(name: str, variant: str) -> None:
    rules = AccessRules("r", binds=(Bind(parse_value_source(f"query:{name}"), "is", "{tenant}"),))
    assert is_admitted(rules, f"/x?{name}=acme&z=1".encode(), b"", b"")
    for query in (f"{variant}=globex&{name}=acme", f"{name}=acme&{variant}=globex", f"{variant}=acme"):
        assert not is_admitted(rules, f"/x?{query}".encode(), b"", b"")


@pytest.mark.parametrize("form", [b"x=%b", b"model=%b", b"%b", b"%b=1", b"model=small&%b"])
@pytest.mark.parametrize("unit", [b"%41", b"a", b"+", b"%25", b"&", b";", b"&a=", b"%5B"])
def test_no_form_holds_up_other_requests(form: bytes, unit: bytes) -> None:
    body = form % (unit * (8_000_000 // len(unit)))
    begun = time.thread_time()
    is_admitted(judging_model("query:model"), b"/x?model=small", body, b"application/x-www-form-urlencoded")
    assert time.thread_time() - begun < 0.05


def test_no_bound_member_is_another_tenants_to_a_server_that_reads_untyped_bodies_as_forms() -> None:
    rules = AccessRules("r", binds=(Bind(parse_value_source("json:/filter/ns"), "is", "{tenant}"),))
    body = b'{"filter":{"ns":"acme"},"x":"%b"}'
    for pair in (b"&filter[ns]=globex&", b"&filter%5Bns%5D=globex", b"a&+filter=x"):
        assert not is_admitted(rules, b"/x", body % pair, b"")
        assert is_admitted(rules, b"/x", body % pair, b"application/json")
    assert is_admitted(rules, b"/x", body % b"a & b", b"")
