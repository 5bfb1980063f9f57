"""Budgets: limits without a period, of an agent token. They are spent once, and never replenished."""

from __future__ import annotations

from keyproxy.limits.plan import LIMIT_MAX, REQUESTS, TOKENS, TOTAL, Limit, Plan


def budget_plan(token_budget: int | None, request_budget: int | None) -> Plan:
    """The limits of a token with these budgets. None: no limit; 0 refuses every request.

    The table takes 10**15, which is read as the largest number of a limit. Raises InvalidPlanError below 0.
    """
    budgets = ((REQUESTS, request_budget), (TOKENS, token_budget))
    return Plan([Limit(measure, TOTAL, min(amount, LIMIT_MAX)) for measure, amount in budgets if amount is not None])
