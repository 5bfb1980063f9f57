"""keyproxy key explain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import click

from keyproxy import clock
from keyproxy.cli.desk import Call, takes_call
from keyproxy.model import Identity
from keyproxy.problems import Problems
from keyproxy.settings import Settings
from keyproxy.store.explaining import Explanation, Question, explain_key

LIMIT_COLUMNS: Final = (
    "owner", "policy", "limit", "spent", "held", "forfeited", "remaining", "reset_seconds",
)  # fmt: skip


@click.command("explain")
@click.argument("key_id", metavar="ID")
@click.option("--method", default="POST", show_default=True, metavar="METHOD", help="Of the request.")
@click.option("--path", required=True, metavar="PATH", help="Of the request, such as /v1/ai/jobs.")
@click.option("--tokens", type=click.IntRange(min=0), metavar="N", help="What it may use: prompt and answer.")
@takes_call
def key_explain(call: Call, key_id: str, method: str, path: str, tokens: int | None) -> None:
    """Say what would become of a request with a key, and how each limit stands. Nothing is charged or sent.

    Without --tokens a request on a route that counts tokens is taken to give no maximum.

    \b
    keyproxy key explain key_… --method POST --path /v1/ai/jobs --tokens 2000
    """
    settings, question = call.settings(), Question(method, path, tokens)
    identity, told = call.run_in_store(
        lambda database: explain_key(database, key_id, question, settings, now=clock.now)
    )  # fmt: skip
    answer = _answer(identity, question, told, settings)
    if call.as_json:
        call.tell(answer, ())
        return
    limits = answer.pop("limits")
    call.tell(answer, ())
    if limits:
        click.echo()
        call.tell(limits, (*LIMIT_COLUMNS, "refuses"))


def _answer(identity: Identity, question: Question, told: Explanation, settings: Settings) -> dict[str, Any]:
    refusal, answer = told.refusal, _about(identity, question, told.route)
    if refusal is not None:
        problems = Problems(
            invalid_key_status=settings.errors.invalid_key_status, spent_status=settings.errors.spent_status
        )
        answer |= {
            "allowed": False,
            "code": refusal.reason.code,
            "status": problems.status(refusal.reason),
            "policy": None if refusal.limit is None else refusal.limit.policy.name,
            "detail": f"{refusal.reason.value.sentence} {refusal.said or refusal.detail}".rstrip(),
            "retry_after_seconds": refusal.retry_after_seconds,
        }
    return {**answer, "limits": list(told.limits)}


def _about(identity: Identity, question: Question, route: str | None) -> dict[str, Any]:
    who: Mapping[str, Any] = {
        "key": identity.key_id, "user": identity.user_id, "tenant": identity.tenant_id, "mode": identity.mode,
        "method": question.method, "path": question.path, "route": route, "allowed": True, "code": None,
        "status": None, "policy": None, "detail": None, "retry_after_seconds": None,
    }  # fmt: skip
    return dict(who)
