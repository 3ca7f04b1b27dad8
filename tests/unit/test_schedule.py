"""When what is looked at again."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from reconciler.model import Mode, Policy, Resource, ResourceId
from reconciler.schedule import Schedule
from tests.unit.support import rid, wrapper

OFTEN, SELDOM = rid("node-1/wrapper/often"), rid("node-1/wrapper/seldom")


def declared(**intervals: float | None) -> dict[ResourceId, Resource]:
    """Resources of node-1 by name, with an interval each."""
    found = [
        wrapper(f"node-1/wrapper/{name}", policy=Policy(interval=value)) for name, value in intervals.items()
    ]
    return {resource.id: resource for resource in found}


def seen(resources: Mapping[ResourceId, Resource], at: float = 0.0, **retries: float) -> Schedule:
    """After a pass over everything at that time."""
    made = Schedule(300.0)
    waiting = {rid(f"node-1/wrapper/{name}"): when for name, when in retries.items()}
    made.seen(resources, resources.values(), at, waiting)
    return made


def test_first_pass_is_due_at_once_and_over_everything() -> None:
    """Nothing is known yet."""
    assert Schedule(300.0).rested(0.0) == frozenset()


def test_what_declares_no_interval_is_looked_at_with_the_loop() -> None:
    """And what is looked at least often brings everything else along."""
    made = seen(declared(often=60.0, seldom=None))
    assert made.rested(59.0) is None
    assert made.rested(60.0) == {SELDOM}
    assert made.rested(300.0) == frozenset()


def test_retry_comes_when_it_is_due_and_leaves_the_others_in_peace() -> None:
    """Not an interval later."""
    made = seen(declared(often=None, seldom=None), often=20.0)
    assert made.next_at() == 20.0
    assert made.rested(19.0) is None
    assert made.rested(20.0) == {SELDOM}


def test_partial_pass_counts_for_what_it_looked_at() -> None:
    """The others keep their turn."""
    everything = declared(often=60.0, seldom=300.0)
    made = seen(everything)
    made.seen([OFTEN], everything.values(), 60.0, {})
    assert made.next_at() == 120.0
    assert made.rested(299.0) == {SELDOM}
    assert made.rested(301.0) == frozenset()


def test_new_declaration_has_its_turn_at_once() -> None:
    """What was never looked at does not wait for an interval to pass."""
    made = seen(declared(often=None))
    made.seen([OFTEN], declared(often=None, seldom=None).values(), 10.0, {})
    assert made.rested(10.0) is not None


def test_what_is_ignored_is_never_due() -> None:
    """It is not looked at by any pass, so it must not ask for one."""
    ignored = {SELDOM: wrapper(str(SELDOM), policy=Policy(mode=Mode.IGNORE))}
    made = Schedule(300.0)
    made.seen([OFTEN], [*declared(often=None).values(), *ignored.values()], 0.0, {})
    assert made.next_at() == 300.0


def test_pass_that_could_not_be_made_is_tried_again_after_a_pause_over_everything() -> None:
    """Nobody knows what happened meanwhile."""
    made = seen(declared(often=60.0, seldom=None))
    made.missed(60.0, 600.0)
    assert made.rested(659.0) is None
    assert made.rested(660.0) == frozenset()


def test_fleet_without_anything_to_look_at_still_has_passes() -> None:
    """Its desired state may get something to look at."""
    made = seen({})
    assert made.next_at() == 300.0


@given(
    st.lists(st.floats(1.0, 1000.0), min_size=1, max_size=6),
    st.floats(0.9, 1.1),
    st.floats(1.0, 3000.0),
)
def test_nobody_waits_longer_than_their_interval_and_everything_is_looked_at_together(
    intervals: list[float], jitter: float, until: float
) -> None:
    """Passes that begin exactly when they are due: each resource in time, a whole pass per longest interval."""
    everything = declared(**{f"r{number}": value for number, value in enumerate(intervals)})
    made = Schedule(300.0, jitter)
    clock, last_whole = 0.0, 0.0
    last = dict.fromkeys(everything, 0.0)
    made.seen(everything, everything.values(), 0.0, {})
    for _ in range(60):
        at = made.next_at()
        assert at is not None
        assert at > clock, "a pass is due right after it was made"
        clock = at
        if clock > until:
            break
        rested = made.rested(clock)
        assert rested is not None
        looked = set(everything) - rested
        assert looked
        for found in looked:
            assert clock - last[found] <= everything[found].policy.interval * jitter + 1e-6  # type: ignore[operator]
            last[found] = clock
        if not rested:
            last_whole = clock
        assert clock - last_whole <= max(intervals) * jitter + 1e-6
        made.seen(looked, everything.values(), clock, {})
