"""The code of docs/agents.md that verifies an assertion accepts what keyproxy signs, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import pytest
from cryptography.hazmat.primitives import serialization
from jwt import PyJWTError
from jwt.algorithms import ECAlgorithm

from keyproxy.signing.claims import AGENT_TOKEN_TYPE, ASSERTION_TYPE
from keyproxy.signing.signing_key import SigningKey

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:9090/jwks.json"
JOSE = "jose@6"

#: A new signing key is accepted within this time: the examples fetch the keys at most once per second.
NEW_KEY_SECONDS_MAX = 3.0


class RejectedError(Exception):
    """The example does not accept the token."""


class Verifier(Protocol):
    """An example in progress."""

    def claims_of(self, token: bytes) -> dict[str, Any]:
        """The claims, or RejectedError."""
        ...


def code(language: str, url: str) -> str:
    """The example in this language, with another address of the keys."""
    example: str
    (example,) = [one for one in re.findall(rf"(?ms)^```{language}\n(.*?)^```$", PAGE) if URL in one]
    return example.replace(URL, url)


class PythonExample:
    """Runs the example in Python."""

    def __init__(self, url: str) -> None:
        self._names: dict[str, Any] = {}
        exec(code("python", url), self._names)

    def claims_of(self, token: bytes) -> dict[str, Any]:
        try:
            claims: dict[str, Any] = self._names["claims_of"](token.decode())
        except PyJWTError as error:
            raise RejectedError(repr(error)) from error
        return claims


_EACH_LINE = """
import { createInterface } from "node:readline";
import { claimsOf } from "./example.mjs";
for await (const line of createInterface({ input: process.stdin })) {
  try {
    console.log(JSON.stringify({ claims: await claimsOf(line) }));
  } catch (error) {
    console.log(JSON.stringify({ rejected: error.code, unexpected: error.code ? null : String(error) }));
  }
}
"""


class JavaScriptExample:
    """Runs the example in JavaScript, in a process of Node that verifies one token per line."""

    def __init__(self, url: str, modules: Path) -> None:
        (modules / "example.mjs").write_text(code("javascript", url))
        (modules / "each_line.mjs").write_text(_EACH_LINE)
        self.process = subprocess.Popen(
            ["node", "each_line.mjs"], cwd=modules, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def claims_of(self, token: bytes) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(token + b"\n")
        answer = json.loads(self.process.stdout.readline())
        if "claims" not in answer:
            assert not answer["unexpected"], answer
            raise RejectedError(answer["rejected"])
        claims: dict[str, Any] = answer["claims"]
        return claims


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which Node finds `jose`."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm is not installed: apt-get install npm")
    directory = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", JOSE]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"npm cannot install {JOSE}: {done.stderr.strip().splitlines()[-1:]}")
    return directory


class KeyServer:
    """Serves signing keys as a JSON Web Key Set."""

    def __init__(self) -> None:
        self.keys = [SigningKey.make(time.time())]
        served = self.keys

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps({"keys": [key.public_jwk() for key in served]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/jwk-set+json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/jwks.json"


@pytest.fixture(scope="module")
def key_server() -> Iterator[KeyServer]:
    server = KeyServer()
    thread = threading.Thread(target=server.server.serve_forever)
    thread.start()
    yield server
    server.server.shutdown()
    thread.join()
    server.server.server_close()


@pytest.fixture(scope="module", params=["python", "javascript"])
def example(request: pytest.FixtureRequest, key_server: KeyServer) -> Iterator[Verifier]:
    if request.param == "python":
        yield PythonExample(key_server.url)
        return
    running = JavaScriptExample(key_server.url, request.getfixturevalue("node_modules"))
    yield running
    running.process.kill()
    running.process.communicate()


def claims(**changes: object) -> dict[str, object]:
    """Claims of an assertion. A change to None removes a claim."""
    now = int(time.time())
    content: dict[str, object] = {
        "iss": "keyproxy", "aud": "upstream", "sub": "u_42", "tenant": "acme", "scope": "jobs:write", "key_id": "key_1",
        "test": False, "act": {"sub": "u_worker", "type": "user", "key_id": "key_1"}, "iat": now, "exp": now + 60,
    }  # fmt: skip
    return {name: value for name, value in (content | changes).items() if value is not None}


def test_the_examples_accept_an_assertion_and_return_its_claims(example: Verifier, key_server: KeyServer) -> None:
    content = claims()
    assert example.claims_of(key_server.keys[0].sign(ASSERTION_TYPE, content)) == content


def test_the_examples_tolerate_a_clock_that_is_five_seconds_off(example: Verifier, key_server: KeyServer) -> None:
    now = int(time.time())
    key = key_server.keys[0]
    assert example.claims_of(key.sign(ASSERTION_TYPE, claims(exp=now - 2)))["exp"] == now - 2
    with pytest.raises(RejectedError):
        example.claims_of(key.sign(ASSERTION_TYPE, claims(exp=now - 10)))


def _of_another_key(_: SigningKey) -> bytes:
    return SigningKey.make(time.time()).sign(ASSERTION_TYPE, claims())


def _signed_by_another_key(key: SigningKey) -> bytes:
    """With the header of a genuine assertion."""
    message, _, _ = key.sign(ASSERTION_TYPE, claims()).rpartition(b".")
    other = SigningKey.make(time.time()).sign(ASSERTION_TYPE, claims())
    return message + b"." + other.rpartition(b".")[2]


def _changed(key: SigningKey) -> bytes:
    header, _, signature = key.sign(ASSERTION_TYPE, claims()).split(b".")
    return b".".join((header, _part(claims(sub="u_root")), signature))


def _without_signature(key: SigningKey) -> bytes:
    header = {"typ": ASSERTION_TYPE, "alg": "none", "kid": key.kid}
    return b".".join((_part(header), _part(claims()), b""))


def _signed_with_the_public_key_as_secret(key: SigningKey) -> bytes:
    public = ECAlgorithm(ECAlgorithm.SHA256).from_jwk(key.public_jwk())
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    secret = public.public_bytes(serialization.Encoding.PEM, form)  # type: ignore[union-attr]
    message = _part({"typ": ASSERTION_TYPE, "alg": "HS256", "kid": key.kid}) + b"." + _part(claims())
    return message + b"." + _encoded(hmac.digest(secret, message, hashlib.sha256))


def _part(content: Mapping[str, object]) -> bytes:
    return _encoded(json.dumps(content).encode())


def _encoded(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(lambda key: key.sign(AGENT_TOKEN_TYPE, claims()), id="an agent token"),
        pytest.param(lambda key: key.sign("JWT", claims()), id="another type"),
        pytest.param(lambda key: key.sign(ASSERTION_TYPE, claims(aud="keyproxy")), id="another audience"),
        pytest.param(lambda key: key.sign(ASSERTION_TYPE, claims(iss="evil")), id="another issuer"),
        pytest.param(lambda key: key.sign(ASSERTION_TYPE, claims(iat=int(time.time()) + 60)), id="of the future"),
        *(
            pytest.param(lambda key, name=name: key.sign(ASSERTION_TYPE, claims(**{name: None})), id=f"without {name}")
            for name in ("iss", "aud", "sub", "tenant", "iat")
        ),
        _of_another_key,
        _signed_by_another_key,
        _changed,
        _without_signature,
        _signed_with_the_public_key_as_secret,
        pytest.param(lambda _: b"nonsense", id="nonsense"),
    ],
)
def test_the_examples_reject_everything_else(example: Verifier, key_server: KeyServer, token: Any) -> None:
    with pytest.raises(RejectedError):
        example.claims_of(token(key_server.keys[0]))
    assert example.claims_of(key_server.keys[0].sign(ASSERTION_TYPE, claims()))


def test_the_examples_accept_a_new_signing_key_within_seconds(example: Verifier, key_server: KeyServer) -> None:
    example.claims_of(key_server.keys[0].sign(ASSERTION_TYPE, claims()))
    key_server.keys.append(SigningKey.make(time.time()))
    began = time.monotonic()
    while True:
        try:
            example.claims_of(key_server.keys[1].sign(ASSERTION_TYPE, claims()))
        except RejectedError:
            assert time.monotonic() - began < NEW_KEY_SECONDS_MAX
            time.sleep(0.1)
        else:
            return
