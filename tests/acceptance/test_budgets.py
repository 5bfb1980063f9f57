"""Budgets of a running proxy: credits that take effect at once, and alerts that reach a webhook."""

from __future__ import annotations

import time

from tests.acceptance.conftest import Configure, administering, until
from tests.rawhttp import free_port
from tests.webhook_receiver import SECRET, receiving, right_signature


async def test_a_credit_admits_requests_of_a_running_proxy_within_a_second(configure: Configure, dsn: str) -> None:
    site = configure(dsn)
    key = await site.key()
    await site.run_json("plan", "set", "two", "--limit", "requests/day=2")
    await site.run_json("user", "set-plan", "u_42", "two")
    credit = ("usage", "credit", "--user", "u_42", "--limit", "requests/day", "--reason", "ticket 811")
    async with site.serving():
        assert [(await site.call(key["secret"]))[1] for _ in range(4)] == ["", "", *["quota_exhausted"] * 2]
        made = await site.run_json(*credit, "--amount", "2")
        assert (made["credited"], made["total"]) == (2, 4)
        credited_at = time.monotonic()

        async def is_admitted() -> bool:
            return (await site.call(key["secret"]))[0] == 200

        await until(is_admitted)
        assert time.monotonic() - credited_at < 2.0, "1 s, and the time of a call on a busy machine"
        assert [(await site.call(key["secret"]))[1] for _ in range(2)] == ["", "quota_exhausted"]

        async def is_settled() -> bool:
            (window,) = await site.run_json("usage", "windows", "--user", "u_42")
            figures = window["limit"], window["credited"], window["spent"], window["remaining"]
            return bool(figures == (2, 2, 4, 0))

        await until(is_settled, "the proxy reports what it has spent")
    assert len(site.upstream.requests) == 4


async def test_a_proxy_s_spending_reaches_the_webhook_of_an_admin_process(configure: Configure, dsn: str) -> None:
    port = free_port()
    async with receiving() as receiver:
        alerts = {"percentages": [50, 100], "webhook_url": receiver.url, "webhook_secret": SECRET}
        site = configure(dsn, admin={"address": f"127.0.0.1:{port}"}, alerts=alerts, ledger={"settle_seconds": 0.1})
        key = await site.key()
        await site.run_json("plan", "set", "four", "--limit", "requests/day=4")
        await site.run_json("user", "set-plan", "u_42", "four")
        async with site.serving():
            assert [(await site.call(key["secret"]))[0] for _ in range(2)] == [200, 200]
            async with administering(site, port):
                await until(lambda: len(receiver.got) == 1)
            assert [(await site.call(key["secret"]))[0] for _ in range(3)] == [200, 200, 429]
        async with administering(site, port):
            await until(lambda: len(receiver.got) == 2)
    found = [one["data"] for one in receiver.received]
    assert [(one["percentage"], one["amount"], one["tenant"], one["limit"]) for one in found] == [
        (50, 4, "acme", "requests/day"),
        (100, 4, "acme", "requests/day"),
    ]
    assert all(headers["Webhook-Signature"] == right_signature(headers, body) for headers, body in receiver.got)
