"""What keyproxy-client knows of keyproxy: the two distributions share no code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.auth import names
from keyproxy.http.discovery.challenges import Challenges
from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.reasons import Reason, Refusal

_CLIENT = Path(__file__).parents[2] / "client" / "keyproxy_client"
_REPEATED = [reason for reason in Reason if reason.value.status in (429, 503)]


def _module(path: str) -> ModuleType:
    """A module of the client, which the environment of keyproxy does not install."""
    spec = importlib.util.spec_from_file_location(f"client_{Path(path).stem}", _CLIENT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repetition() -> ModuleType:
    """keyproxy_client.outgoing.repetition."""
    return _module("outgoing/repetition.py")


def test_client_waits_for_exactly_the_refusals_before_the_upstream(repetition: ModuleType) -> None:
    assert {reason.code for reason in _REPEATED} == repetition.CODES


@pytest.mark.parametrize("shape", ["problem", "openai", "anthropic", "ollama", "bedrock"])
def test_client_recognises_refusals(repetition: ModuleType, shape: str) -> None:
    for reason in Reason:
        response = ErrorRenderer().render(Refusal(reason, retry_after_seconds=3), "req_1", shape)
        assert repetition.is_refusal(response.body) is (reason in _REPEATED)
        wait = repetition.Repetitions(5.0).wait_seconds(response.status, {**_fields(response.fields)}.get)
        assert wait == (3.0 if reason in _REPEATED else None)


@pytest.mark.parametrize("metadata_url", ["", "https://api.example.com/.well-known/oauth-protected-resource"])
def test_client_recognises_the_challenge_for_another_key(repetition: ModuleType, metadata_url: str) -> None:
    renderer = ErrorRenderer(challenges=Challenges(metadata_url, ["jobs:write"]))
    for reason in (Reason.KEY_REVOKED, Reason.KEY_EXPIRED, Reason.KEY_INVALID):
        response = renderer.render(Refusal(reason), "req_1")
        assert repetition.Repetitions(5.0).may_renew(response.status, _fields(response.fields).get)


def _fields(block: bytes) -> dict[str, str]:
    """The header fields of a response, as HTTP clients join them."""
    found: dict[str, str] = {"content-length": "100"}
    for line in block.decode("ascii").splitlines():
        name, _, value = line.partition(": ")
        found[name.lower()] = f"{found[name.lower()]}, {value}" if name.lower() in found else value
    return found


@given(st.text("aZ09._:@|+-/ é,\n", max_size=6) | st.from_regex(r"[A-Za-z0-9]{1,129}", fullmatch=True))
def test_client_and_proxy_accept_the_same_names(text: str) -> None:
    client = _NAMES
    for check in ("is_id", "is_scope", "is_agent"):
        assert getattr(client, check)(text) is getattr(names, check)(text)


_NAMES = _module("names.py")
