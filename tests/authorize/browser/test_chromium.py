"""The pages in a real browser: cookies, redirects and policies as browsers apply them, and what axe-core finds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from yarl import URL

from tests.authorize.authority import Authority
from tests.authorize.browser.browser import Browser
from tests.npm_packages import installed

SCRIPT = Path(__file__).parent / "chromium" / "look.mjs"
PACKAGES = {"playwright-core": "1.65.1", "axe-core": "4.14.1"}

#: The narrowest width that pages must fit.
WIDTH = 320


async def looked(authority: Authority) -> list[dict[str, Any]]:
    """What the script has printed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    packages = installed(PACKAGES)
    user, browser = await authority.user(), Browser(authority)
    query = urlencode(browser.parameters(await browser.client(name="Acme 프로그램")))
    pictures = os.environ.get("KEYPROXY_TEST_PICTURES")
    process = await asyncio.create_subprocess_exec(
        "node", str(SCRIPT), chromium, f"{authority.url}/oauth/authorize?{query}", f"{authority.url}/oauth/connections",
        user["key"]["secret"], *([pictures] if pictures else []),
        cwd=packages, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode() + out.decode()
    return [json.loads(line) for line in out.splitlines()]


async def test_browser_signs_in_and_pages_meet_wcag_in_both_schemes(authority: Authority) -> None:
    lines = await looked(authority)
    pages = [line for line in lines if "page" in line]
    assert [page["page"] for page in pages[::2]] == ["login", "failed-login", "consent", "connections", "error"]
    for page in pages:
        assert page["found"] == [], page["page"]
        assert page["width"] <= WIDTH, page["page"]
        assert page["lang"] == "ko"
    (allow, deny) = next(line["buttons"] for line in lines if "buttons" in line)
    assert allow == deny, "Allow and Deny look equal"
    arrived = URL(next(line["arrived"] for line in lines if "arrived" in line))
    assert (arrived.host, sorted(arrived.query)) == ("acme.example", ["code", "iss", "state"])
    assert [text for text in lines[-1]["blocked"] if "Content Security Policy" in text or "Refused" in text] == []
