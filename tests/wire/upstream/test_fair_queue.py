"""How the places of a pool are shared between users, against a plain model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from keyproxy.model import Owner
from keyproxy.wire.upstream.fair_queue import Turns

USERS: list[Owner] = [("acme", f"u_{number}", mode) for number in range(3) for mode in ("live", "test")]


class Sharing(RuleBasedStateMachine):
    """A pool of places that are taken, waited for and given back in any order."""

    waiting = Bundle("waiting")

    @initialize(places=st.integers(1, 20), per_user_max=st.sampled_from([0, 0, 1, 2, 5, 100]))
    def begin(self, places: int, per_user_max: int) -> None:
        self.turns: Turns[int] = Turns(places, per_user_max)
        self.places = places
        self.per_user_max = per_user_max
        self.held: list[Owner] = []
        self.queue: dict[int, Owner] = {}
        self.serial = 0
        self.now = 0.0

    @rule(user=st.sampled_from(USERS), seconds=st.floats(0, 5))
    def take_or_wait(self, user: Owner, seconds: float) -> None:
        self.now += seconds
        may_take = self.turns.may_take(user, self.now)
        if len(self.held) < self.places:
            assert self.turns.try_take(user, self.now) == may_take
            if may_take:
                self.held.append(user)
                return
        self.serial += 1
        is_queued = self.turns.wait(user, self.serial, self.now)
        assert is_queued == (len(self.queue) < 16 * self.places)
        if is_queued:
            self.queue[self.serial] = user

    @precondition(lambda self: self.held)
    @rule(data=st.data(), seconds=st.floats(0, 5))
    def give_back(self, data: st.DataObject, seconds: float) -> None:
        self.now += seconds
        user = data.draw(st.sampled_from(self.held))
        self.held.remove(user)
        self.turns.give_back(user)

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.queue)))
        self.turns.leave(one)
        del self.queue[one]

    @precondition(lambda self: len(self.held) < self.places)
    @rule()
    def next(self) -> None:
        below = {user for user in self.queue.values() if self.held.count(user) < self.turns.share}
        found = self.turns.next(self.now)
        assert (found is not None) or not below, "a place is free, a user below its share waits, and gets none"
        if found is None:
            return
        one, user = found
        assert self.queue.pop(one) == user
        assert not below or user in below
        assert all(one < other for other, whose in self.queue.items() if whose == user), "the eldest of a user is first"
        self.held.append(user)
        self.turns.take(user, self.now)

    @invariant()
    def nobody_exceeds_the_cap(self) -> None:
        if not hasattr(self, "turns"):
            return
        for user in USERS:
            assert self.turns.held(user) == self.held.count(user) <= self.turns.cap
            assert self.turns.waits(user) == (user in self.queue.values())
        assert self.turns.cap == (min(self.places, self.per_user_max) or self.places)
        assert self.turns.over_share() == {
            user: self.held.count(user) - self.turns.share
            for user in set(self.held)
            if self.held.count(user) > self.turns.share
        }

    @invariant()
    def nothing_is_kept_of_users_who_are_gone(self) -> None:
        if hasattr(self, "turns"):
            assert len(self.turns) == len(self.queue)
            assert self.turns.users() == len(set(self.held) | set(self.queue.values()))
            assert self.turns.first() == min(self.queue, default=None)

    @invariant()
    def what_starves_is_counted_up_to_a_share(self) -> None:
        if hasattr(self, "turns"):
            expected = sum(
                min(max(0, self.turns.share - self.held.count(user)), list(self.queue.values()).count(user))
                for user in set(self.queue.values())
            )
            assert self.turns.starved(self.now, 10**9) == expected
            assert self.turns.starved(self.now, 2) == min(2, expected)
            assert self.turns.starved(-1.0, 10**9) == 0


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(places=st.integers(1, 300), others=st.integers(1, 3))
def test_waiting_users_get_a_share_of_the_released_places(places: int, others: int) -> None:
    turns: Turns[str] = Turns(places)
    for _ in range(places):
        turns.take(USERS[0], 0.0)
    for number in range(places):
        turns.wait(USERS[0], f"mine {number}", 0.0)
        for other in range(1, others + 1):
            turns.wait(USERS[other], f"{other} {number}", 0.0)
    for _ in range(places):
        turns.give_back(USERS[0])
        found = turns.next(0.0)
        if found is not None:
            turns.take(found[1], 0.0)
    assert turns.held(USERS[0]) <= max(turns.share, places - others * turns.share)
    shares = [turns.held(USERS[other]) for other in range(1, others + 1)]
    assert max(shares) - min(shares) <= 1


def test_after_others_had_to_wait_a_place_is_spared_for_the_next_of_their_requests() -> None:
    turns: Turns[str] = Turns(4)
    one, other = USERS[0], USERS[2]
    for _ in range(4):
        assert turns.may_take(one, 0.0)
        turns.take(one, 0.0)
    turns.wait(other, "first", 1.0)
    turns.give_back(one)
    assert turns.next(2.0) == ("first", other)
    turns.take(other, 2.0)
    turns.give_back(other)
    turns.wait(one, "mine", 2.0)
    assert not turns.may_take(one, 2.0)
    assert turns.next(2.0) is None
    assert turns.may_take(other, 2.0)
    # No other user has requested one for a while: the user may have all places again.
    assert turns.next(20.0) == ("mine", one)


def test_a_queue_that_is_full_of_one_user_s_requests_has_room_for_another_s() -> None:
    turns: Turns[str] = Turns(1)
    for number in range(16):
        assert turns.wait(USERS[0], f"mine {number}", 0.0)
    assert turns.last_of_most(USERS[0]) is None
    for number in range(8):
        assert not turns.wait(USERS[2], f"theirs {number}", 0.0)
        last = turns.last_of_most(USERS[2])
        assert last == f"mine {15 - number}"
        turns.leave(last)
        assert turns.wait(USERS[2], f"theirs {number}", 0.0)
    assert turns.last_of_most(USERS[2]) is None


def test_test_requests_of_a_user_do_not_count_as_its_live_ones() -> None:
    turns: Turns[str] = Turns(4, 1)
    turns.take(("acme", "u_1", "live"), 0.0)
    assert not turns.may_take(("acme", "u_1", "live"), 0.0)
    assert turns.may_take(("acme", "u_1", "test"), 0.0)
