"""The example of docs/identity.md works as it is there."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx

from signing import STATED

PAGE = Path(__file__).parents[3] / "docs" / "identity.md"


def test_example_of_the_page_guards_its_routes() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), module)
    headers = {f"X-Keyproxy-{name}": value for name, value in STATED.items()}

    async def by_unix_socket(scope: Any, receive: Any, send: Any) -> None:
        await module["app"]({**scope, "server": ("/run/app.sock", None)}, receive, send)

    async def responses(application: Any) -> list[tuple[int, Any]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://a") as http:
            found = [await http.get("/v1/me", headers=headers), await http.post("/v1/ai/jobs", headers=headers)]
            return [(one.status_code, one.json()) for one in found]

    assert asyncio.run(responses(by_unix_socket)) == [
        (200, {"user": "u_42", "tenant": "acme"}),
        (200, {"owner": "u_42"}),
    ]
    assert [status for status, _ in asyncio.run(responses(module["app"]))] == [401, 401]
