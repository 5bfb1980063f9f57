"""The examples of docs/clients.md and of the package's README work as they are there."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx

from keyproxy_client import keys
from scripted_server import ScriptedServer

ROOT = Path(__file__).parents[3]


def example(page: str, containing: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    (code,) = [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if containing in one]
    return str(code)


def test_example_of_outgoing_requests_calls_for_the_user(origin: ScriptedServer, tmp_path: Path) -> None:
    module: dict[str, Any] = {"__name__": "page"}
    exec(example("docs/clients.md", "def start"), module)
    file = tmp_path / "key"
    file.write_text(keys.make())
    assert module["start"](origin.origin, file, "u_42") == {}
    (sent,) = origin.received
    assert (sent.path, sent.credentials) == ("/v1/ai/jobs", ([f"Api-Key {file.read_text()}"], ["u_42"]))


def test_example_of_the_readme_calls_for_the_user(origin: ScriptedServer, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(keys.make())
    code = example("client/README.md", "acting_as")
    exec(code.replace("https://api.example.com", origin.origin).replace("/run/secrets/keyproxy-key", str(file)), {})
    assert origin.received[0].credentials == ([f"Api-Key {file.read_text()}"], ["u_42"])


def test_application_of_the_readme_refuses_requests_without_identity() -> None:
    module: dict[str, Any] = {"__name__": "page"}
    exec(example("client/README.md", "FastAPI("), module)

    async def response() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(module["app"]), base_url="http://a") as http:
            return await http.post("/v1/ai/jobs")

    assert asyncio.run(response()).json()["code"] == "identity_missing"
