"""The cold path of a decision: fetch what is missing, decide again, a bounded number of times."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from keyproxy.model import Missing, TimeBudget
from keyproxy.reasons import Reason, Refusal


class Decision:
    """A decision that needs some values, which are missing until they are fetched. A `broken` one cannot be fetched."""

    def __init__(self, *needs: str, broken: str = "") -> None:
        self.needs, self.broken = list(needs), broken
        self.fetched: list[str] = []
        self.budgets: set[TimeBudget] = set()

    def missing(self, what: str) -> Missing:
        """The Missing of one value."""
        return Missing(what, self._fetch(what))

    def _fetch(self, what: str) -> Callable[[TimeBudget], Awaitable[None]]:
        async def fetch(budget: TimeBudget) -> None:
            self.budgets.add(budget)
            self.fetched.append(what)
            if what == self.broken:
                raise Refusal(Reason.STORE_UNAVAILABLE)

        return fetch

    def decide(self) -> str:
        """Raises Missing for the first value that was not fetched, or could not be."""
        for what in self.needs:
            if what not in self.fetched or what == self.broken:
                raise self.missing(what)
        return "decided"


async def test_every_missing_value_is_fetched_within_one_time_budget() -> None:
    decision = Decision("identity", "body", "lease")
    assert await decision.missing("identity").fetch_and_decide(decision.decide, lambda: False) == "decided"
    assert decision.fetched == ["identity", "body", "lease"]
    assert len(decision.budgets) == 1


async def test_failed_fetch_refuses_only_if_the_decision_still_needs_a_value() -> None:
    decision = Decision(broken="identity")
    assert await decision.missing("identity").fetch_and_decide(decision.decide, lambda: False) == "decided"
    decision = Decision("identity", broken="identity")
    with pytest.raises(Refusal) as caught:
        await decision.missing("identity").fetch_and_decide(decision.decide, lambda: False)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_nothing_is_decided_once_nothing_waits_for_it() -> None:
    decision = Decision()
    assert await decision.missing("identity").fetch_and_decide(decision.decide, lambda: True) is None


async def test_decision_that_never_ends_is_refused_after_12_rounds() -> None:
    decision = Decision()

    def evicted() -> str:
        raise decision.missing("identity")

    with pytest.raises(Refusal) as caught:
        await decision.missing("identity").fetch_and_decide(evicted, lambda: False)
    assert caught.value.reason is Reason.OVERLOADED
    assert len(decision.fetched) == 12
