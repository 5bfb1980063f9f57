"""Runs the cases that pages of the documentation show: their configuration, commands, requests and responses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.acceptance.conftest import ROOT, STUCK_SECONDS, Site, until
from tests.rawhttp import Message

_SECTION = re.compile(r"(?m)^## (.*)$")
_CONFIGURATION = re.compile(r"(?ms)^```toml\n(.*?)^```$")
_FENCED = re.compile(r"(?ms)^```\w*\n.*?^```$")
_BLOCK = re.compile(r"(?m)(?:^    .*\n)+")
_USER = re.compile(r"keyproxy (?:user create|key issue --user) u_(\w+)")
_ISSUED = re.compile(r"\b(kp_live_\w+|key_\w+)")

#: Takes the place of the directory of secrets in configurations and commands.
_SECRETS: Final = "/run/secrets"

#: The beginning of a block that writes the secrets of the configuration, before the proxy starts.
_WRITES_SECRET: Final = "printf "


class Case(NamedTuple):
    """One section: its configuration, and its blocks of commands and exchanges, in order."""

    configuration: str
    blocks: Sequence[str]


def cases(name: str) -> Iterator[tuple[str, Case]]:
    """Every section of a page of the documentation that has a configuration and an exchange, by its heading."""
    _, *parts = _SECTION.split((ROOT / "docs" / name).read_text(encoding="utf-8"))
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        configuration = _CONFIGURATION.findall(text)
        blocks = [re.sub("(?m)^    ", "", block) for block in _BLOCK.findall(_FENCED.sub("", text))]
        if configuration and any(block.startswith(">") for block in blocks):
            yield heading, Case("\n".join(configuration), blocks)


class Exchange(NamedTuple):
    """The lines of an exchange, by direction."""

    sent: Sequence[str]
    forwarded: Sequence[str]
    received: Sequence[str]

    @classmethod
    def of(cls, block: str) -> Exchange:
        """Split a block of the page."""
        lines = block.splitlines()
        assert all(line[:2] in ("> ", "= ", "< ") for line in lines), block
        return cls(*([line[2:] for line in lines if line[0] == mark] for mark in ">=<"))

    def request(self) -> bytes:
        """The bytes that the client sends."""
        start, *rest = self.sent
        fields = [line for line in rest if not line.startswith("{")]
        body = "".join(line for line in rest if line.startswith("{")).encode()
        fields += ["Host: p", *(["Content-Type: application/json"] if body else []), f"Content-Length: {len(body)}"]
        return "\r\n".join([f"{start} HTTP/1.1", *fields, "", ""]).encode() + body


class Play:
    """A case in progress. `values`: what its variables stand for."""

    def __init__(self, site: Site, directory: Path) -> None:
        self._site = site
        self._directory = directory
        self._values: dict[str, str] = {}

    async def block(self, block: str) -> None:
        """Run one block of the page."""
        if block.startswith(">"):
            await self._exchange(Exchange.of(self._filled(block)))
            return
        printed = ""
        for line in block.splitlines():
            if line.startswith("    "):
                assert " ".join(line.split()) in [" ".join(one.split()) for one in printed.splitlines()], printed
            else:
                printed = await self._command(self._filled(line))

    def _filled(self, text: str) -> str:
        return re.sub(r"\$([A-Z_]+)", lambda name: self._values[name[1]], text)

    async def _command(self, line: str) -> str:
        """Run a command in a shell; it must succeed. Keeps the key that it issues."""
        process = await asyncio.create_subprocess_exec(
            "sh",
            "-c",
            line,
            cwd=self._directory,
            env=self._site.environment
            | {"KEYPROXY_CONFIG": str(self._site.config), "PATH": f"{self._directory}:/usr/bin:/bin"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(STUCK_SECONDS):
            out, err = await process.communicate()
        assert process.returncode == 0, (line, err)
        if user := _USER.match(line):
            for issued in _ISSUED.findall(out.decode()):
                self._values[user[1].upper() + ("_ID" if issued.startswith("key_") else "")] = issued
        return out.decode()

    async def _exchange(self, exchange: Exchange) -> None:
        """Repeat an exchange until it is as shown, since commands take effect within a second. Fails if it differs."""
        faults: list[str] = []

        async def is_as_shown() -> bool:
            faults[:] = await self._faults(exchange)
            return not faults

        try:
            await until(is_as_shown, seconds=20.0)
        except AssertionError:
            pytest.fail(f"{exchange.sent}: {faults}")

    async def _faults(self, exchange: Exchange) -> list[str]:
        """What differs from the page."""
        upstream = self._site.upstream
        before = len(upstream.requests)
        async with self._site.client() as client:
            await client.send(exchange.request())
            response = await client.answer(method=exchange.sent[0].partition(" ")[0])
        status, *lines = exchange.received
        fields = [line for line in lines if not line.startswith(("{", " "))]
        body = "".join(line for line in lines if line not in fields)
        faults = [f"{response.status} instead of {status}"] if str(response.status) != status else []
        faults += [f"not received: {line}" for line in fields if not has_line(response, line)]
        if not exchange.forwarded and response.one("WWW-Authenticate") and not fields:
            faults.append("there is a challenge")
        content = _content(response)
        if body:
            content.pop("request_id", None)
            if not is_as_shown(content, json.loads(body)):
                faults.append(f"received {json.dumps(content)}")
        if not faults:
            self._keep(content)
        return faults + forwarding_faults(upstream.requests[before:], exchange)

    def _keep(self, content: dict[str, Any]) -> None:
        """Keep the token, and the id of the approval, that a response has."""
        if "token" in content:
            self._values |= {"TOKEN": content["token"], "TOKEN_ID": content["id"]}
        problem = content.get("error", {}).get("data", {}) if "jsonrpc" in content else content
        if "approval_id" in problem:
            self._values["APPROVAL"] = problem["approval_id"]


def _content(response: Message) -> dict[str, Any]:
    try:
        content = json.loads(response.body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def forwarding_faults(requests: Sequence[Message], exchange: Exchange) -> list[str]:
    """How the forwarded requests differ from the page. If it shows no identity, none may be forwarded."""
    if not exchange.forwarded:
        return ["it was forwarded"] if requests else []
    if len(requests) != 1:
        return [f"it was forwarded {len(requests)} times"]
    (request,) = requests
    faults = [f"not forwarded: {line}" for line in exchange.forwarded if not has_line(request, line)]
    if request.one("Authorization") is not None and not any(line.startswith("Auth") for line in exchange.forwarded):
        faults.append("the key was forwarded")
    identity = [name for name, _ in request.headers if name.startswith("X-Keyproxy-")]
    if identity and not any(line.startswith("X-Keyproxy-") for line in exchange.forwarded):
        faults.append(f"an identity was forwarded: {identity}")
    return faults


def is_as_shown(content: Any, shown: Any) -> bool:
    """Whether JSON content is as shown. A shown text that ends with an ellipsis stands for all that begin like it."""
    if isinstance(shown, dict):
        return shown.keys() == content.keys() and all(is_as_shown(content[name], shown[name]) for name in shown)
    if isinstance(shown, str) and shown.endswith("…"):
        return isinstance(content, str) and content.startswith(shown[:-1])
    return bool(content == shown)


def has_line(message: Message, line: str) -> bool:
    """Whether a message has a start line or a header line."""
    name, colon, value = line.partition(": ")
    return message.all(name) == [value] if colon else message.start == f"{line} HTTP/1.1"


async def play(case: Case, site: Site, directory: Path) -> None:
    """Serve the configuration of a case, and run its commands and exchanges. `directory`: where the commands run."""
    directory.mkdir()
    # It takes the place of `keyproxy` on the path, so that the commands run as printed and with this test's sources.
    program = directory / "keyproxy"
    assert site.commands is not None
    program.write_text(site.commands.program)
    program.chmod(0o755)
    configuration, *blocks = (text.replace(_SECRETS, str(directory)) for text in (case.configuration, *case.blocks))
    site.config.write_text(f"{site.config.read_text()}\n{configuration}")
    performance = Play(site, directory)
    if blocks[0].startswith(_WRITES_SECRET) and str(directory) in blocks[0]:
        await performance.block(blocks.pop(0))
    async with site.serving() as process:
        await site.until_ready(process)
        for block in blocks:
            await performance.block(block)
