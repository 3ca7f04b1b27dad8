"""The pure state machines, moved by hand and by Hypothesis."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sidecar.limits import (
    Breaker,
    BreakerPolicy,
    Circuit,
    Cooldown,
    CooldownPolicy,
    Start,
    StartWindow,
    TokenWindow,
)

POLICY = CooldownPolicy()
T0 = 1_000_000.0


class WindowMachine(RuleBasedStateMachine):
    """Whatever is taken, sent late or given back: any 60 s hold at most `limit` starts."""

    def __init__(self) -> None:
        super().__init__()
        self.now = T0
        self.window = StartWindow(5)
        self.open: list[Start] = []
        self.sent: list[float] = []

    @rule(seconds=st.floats(0, 90))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        free_at = self.window.free_at(self.now)
        start = self.window.take(self.now)
        assert (start is None) == (free_at > self.now)
        if start is not None:
            self.open.append(start)

    @precondition(lambda self: self.open)
    @rule(delay=st.floats(0, 5))
    def send(self, delay: float) -> None:
        self.now += delay
        self.window.sent(self.open[0], self.now)
        self.sent.append(self.open.pop(0).at)

    @precondition(lambda self: self.open)
    @rule()
    def give_back(self) -> None:
        before = self.window.used(self.now)
        start = self.open.pop()
        self.window.give_back(start)
        assert self.window.used(self.now) == before - 1, "one that has not left holds its place for ever"

    @invariant()
    def never_more_than_the_limit_in_any_minute(self) -> None:
        for at in self.sent:
            assert sum(at <= other < at + 60 for other in self.sent) <= 5


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def spend(window: StartWindow, now: float) -> bool:
    """Take a start that leaves at once."""
    start = window.take(now)
    if start is not None:
        window.sent(start, now)
    return start is not None


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 4)), min_size=1, max_size=30),
    st.floats(0, 70),
    st.integers(1, 20),
)
def test_a_window_that_was_written_down_never_frees_a_start_too_early(
    bursts: list[tuple[float, int]], later: float, limit: int
) -> None:
    window, now = StartWindow(limit), T0
    for gap, count in bursts:
        now += gap
        for _ in range(count):
            spend(window, now)
    kept = StartWindow(limit)
    kept.restore([(at, count) for at, count in json.loads(json.dumps(window.tally(now)))])
    assert len(window.tally(now)) <= 60 * 4 + 2, "small however many there are"
    assert window.free_at(now) <= kept.free_at(now) <= window.free_at(now) + 0.25
    # The later look comes last: a window forgets what is over.
    assert kept.used(now + later) >= window.used(now + later)


def test_a_window_has_no_other_cap_on_bursts() -> None:
    window = StartWindow(40)
    assert all(spend(window, T0) for _ in range(40))
    assert window.take(T0 + 59.999) is None
    assert window.take(T0 + 60) is not None


@given(st.integers(0, 30))
def test_free_at_is_when_a_start_is_really_free(ahead: int) -> None:
    window = StartWindow(4)
    for second in range(4):
        spend(window, T0 + second)
    at = window.free_at(T0 + 4, ahead)
    for _ in range(ahead + 1):
        now = window.free_at(T0 + 4) if window.used(T0 + 4) >= 4 else T0 + 4
        while not spend(window, now):
            now = window.free_at(now)
    assert now == pytest.approx(at)


class TokenMachine(RuleBasedStateMachine):
    """Reserved and settled tokens never let a reservation exceed the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.now = T0
        self.window = TokenWindow(1000)
        self.held: list = []

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(amount=st.integers(0, 1500))
    def reserve(self, amount: int) -> None:
        before = self.window.used(self.now)
        held = self.window.reserve(self.now, amount)
        if held is None:
            assert before + min(amount, 1000) > 1000
            later = self.window.free_at(self.now, amount)
            assert copy.deepcopy(self.window).fits(later, amount)
        else:
            assert self.window.used(self.now) <= 1000
            self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(real=st.integers(0, 500))
    def settle(self, real: int) -> None:
        self.window.settle(self.held.pop(), real, self.now)

    @invariant()
    def sum_is_what_is_held(self) -> None:
        used = self.window.used(self.now)
        assert used == sum(held.amount for held in self.window._held)
        assert used >= 0


TestTokens = TokenMachine.TestCase
TestTokens.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_ladder_climbs_over_expiry_to_its_cap() -> None:
    ladder, now, lengths = Cooldown(), T0, []
    for _ in range(7):
        ladder = ladder.hit(now, now, POLICY)
        lengths.append(ladder.until - now)
        now = ladder.until + 1
    assert lengths == [30, 60, 120, 240, 480, 600, 600]


@given(st.integers(2, 50))
def test_many_429s_of_one_moment_raise_once(count: int) -> None:
    ladder = Cooldown()
    for number in range(count):
        ladder = ladder.hit(T0, T0 + 0.01 * number, POLICY)
    assert (ladder.level, ladder.until) == (1, T0 + 30)


class LadderMachine(RuleBasedStateMachine):
    """No event but time ever shortens a deadline, and only a new episode climbs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = T0
        self.ladder = Cooldown()

    @rule(seconds=st.floats(0, 700))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(age=st.floats(0, 120), wait=st.none() | st.floats(0, 5000))
    def hit(self, age: float, wait: float | None) -> None:
        before = self.ladder.settled(self.now, POLICY)
        self.ladder = self.ladder.hit(self.now - age, self.now, POLICY, wait)
        assert self.ladder.until >= before.until
        assert self.ladder.level - before.level in (0, 1)
        assert self.ladder.until <= max(before.until, self.now + POLICY.cap)
        if self.now - age < before.until and before.level:
            assert self.ladder.level == before.level

    @rule(age=st.floats(0, 60))
    def success(self, age: float) -> None:
        before = self.ladder
        self.ladder = self.ladder.success(self.now - age, self.now)
        assert (self.ladder.level, self.ladder.until) == (before.level, before.until)

    @invariant()
    def level_never_negative(self) -> None:
        assert self.ladder.settled(self.now, POLICY).level >= 0


TestLadder = LadderMachine.TestCase
TestLadder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_ladder_steps_down_only_after_sustained_success() -> None:
    ladder = Cooldown().hit(T0, T0, POLICY).hit(T0 + 31, T0 + 31, POLICY)
    assert ladder.settled(T0 + 9999, POLICY).level == 2, "silence is no success"
    ladder = ladder.success(T0 + 100, T0 + 100)
    assert ladder.settled(T0 + 699, POLICY).level == 2
    assert ladder.settled(T0 + 700, POLICY).level == 1
    assert ladder.settled(T0 + 1300, POLICY).level == 0


def test_a_longer_retry_after_wins_and_is_capped() -> None:
    assert Cooldown().hit(T0, T0, POLICY, 45).until == T0 + 45
    assert Cooldown().hit(T0, T0, POLICY, 5).until == T0 + 30
    assert Cooldown().hit(T0, T0, POLICY, 99_999).until == T0 + 600


def test_a_breaker_opens_grows_and_closes_through_one_leased_probe() -> None:
    breaker = Breaker(BreakerPolicy(base=15, lease=60))
    assert not any(breaker.failure(T0, T0 + n) for n in range(4))
    assert breaker.failure(T0, T0 + 4)
    assert breaker.state(T0 + 5) is Circuit.OPEN
    later = T0 + 20
    assert breaker.lease(later)
    assert breaker.refuses(later), "one probe at a time"
    assert not breaker.refuses(later + 61), "a lost probe does not close the door for ever"
    assert breaker.failure(later, later)
    assert breaker.until == later + 30
    breaker.success(later + 31, later + 31)
    assert breaker.state(later + 31) is Circuit.CLOSED


def test_few_samples_or_a_low_ratio_eject_nobody() -> None:
    breaker = Breaker(BreakerPolicy(min_samples=5, ratio=0.5))
    assert not breaker.failure(T0, T0)
    for _ in range(20):
        breaker.success(T0, T0 + 1)
    assert not any(breaker.failure(T0, T0 + 2) for _ in range(5))
