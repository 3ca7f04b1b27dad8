"""Who gets a request, and why: literals in, decision out."""

import asyncio
from typing import Any

import pytest

from sidecar.clock import ManualClock
from sidecar.fleet import Fleet, NoBackend, NoRoom
from sidecar.lane import Hints, Query
from sidecar.model import Api, Backend, ModelMapping, Pool
from sidecar.routing import Way, Why
from sidecar.settings import HotSettings

GPT = Query("gpt", Api.OPENAI.value)


def make(clock: ManualClock, *backends: Backend, **hot: Any) -> Fleet:
    fleet = Fleet(clock, HotSettings(**hot))
    fleet.replace(backends)
    return fleet


def one(name: str, **fields: Any) -> Backend:
    fields.setdefault("model_mappings", {"gpt": ModelMapping(native_id="n")})
    return Backend(id=name, name=name, api_base_url="http://127.0.0.1/v1", **fields)


def spend(fleet: Fleet, name: str) -> None:
    """Use up one start of a backend."""
    now = fleet.clock.now()
    fleet.lanes[name].starts.restore([*fleet.lanes[name].starts.tally(now), (now, 1)])


def order(fleet: Fleet, query: Query = GPT) -> list[str]:
    return [lane.backend.id for lane in fleet.look(query).order]


def test_primary_before_fallback_then_priority_then_least_used() -> None:
    clock = ManualClock()
    fleet = make(
        clock, one("f", pool=Pool.FALLBACK), one("b", priority=1), one("a", priority=1), one("z", priority=0)
    )
    assert order(fleet) == ["z", "a", "b", "f"]
    spend(fleet, "a")
    assert order(fleet) == ["z", "b", "a", "f"]


def test_a_backend_near_its_limit_is_demoted_before_it_answers_429() -> None:
    clock = ManualClock()
    fleet = make(clock, one("a"), one("b"), one("f", pool=Pool.FALLBACK))
    fleet.lanes["a"].hints = Hints(near_until=clock.now() + 5)
    assert order(fleet) == ["b", "a", "f"]
    fleet.lanes["a"].hints = Hints(spent_until=clock.now() + 5)
    assert order(fleet) == ["b", "f", "a"]
    clock.advance(6)
    assert order(fleet) == ["a", "b", "f"]


def test_every_backend_gets_its_reason() -> None:
    clock = ManualClock()
    fleet = make(
        clock,
        one("ant", api=Api.ANTHROPIC), one("off", enabled=False), one("other", model_mappings={"x": ModelMapping(native_id="x")}),
        one("key", key_error="no"), one("bad"), one("tried"), one("cool"), one("ejected"), one("full", rpm_limit=1),
        one("tokens", tpm_limit=10), one("ok"),
    )  # fmt: skip
    lanes, now = fleet.lanes, clock.now()
    lanes["bad"].quarantine = "401"
    lanes["cool"].cooldown = lanes["cool"].cooldown.hit(now, now, lanes["cool"].policy)
    lanes["ejected"].breaker._eject(now)
    lanes["full"].starts.take(now)
    lanes["tokens"].tokens.reserve(now, 9)  # type: ignore[union-attr]
    decision = fleet.look(Query("gpt", Api.OPENAI.value, 5, frozenset({"tried"})))
    assert dict(decision.reasons) == {
        "ant": Why.API, "off": Why.DISABLED, "other": Why.MODEL, "key": Why.KEY_UNREADABLE, "bad": Why.KEY,
        "tried": Why.TRIED, "cool": Why.COOLING, "ejected": Why.EJECTED, "full": Why.NO_START,
        "tokens": Why.NO_TOKENS, "ok": Why.OK,
    }  # fmt: skip


def test_the_emergency_lane_takes_a_tenth_out_of_the_same_window() -> None:
    clock = ManualClock()
    fleet = make(clock, one("a", rpm_limit=40), one("b", rpm_limit=40))
    for name, wait in (("a", 100), ("b", 200)):
        lane = fleet.lanes[name]
        lane.cooldown = lane.cooldown.hit(clock.now(), clock.now(), lane.policy, wait)
    took = [fleet.try_take(GPT)[0] for _ in range(6)]
    assert [grant.lane.backend.id if grant else None for grant in took] == ["a"] * 4 + [None] * 2
    assert fleet.lanes["a"].starts.used(clock.now()) == 4
    assert fleet.emergencies == 4


def test_a_backend_that_only_lacks_a_token_means_wait_and_not_emergency() -> None:
    clock = ManualClock()
    fleet = make(clock, one("a", rpm_limit=1), one("b"))
    spend(fleet, "a")
    fleet.lanes["b"].cooldown = fleet.lanes["b"].cooldown.hit(
        clock.now(), clock.now(), fleet.lanes["b"].policy
    )
    assert fleet.look(GPT).way is Way.WAIT


def test_all_ejected_fails_open_to_the_least_bad() -> None:
    clock = ManualClock()
    fleet = make(clock, one("a"), one("b"))
    fleet.lanes["a"].breaker._eject(clock.now() + 5)
    fleet.lanes["b"].breaker._eject(clock.now())
    decision = fleet.look(GPT)
    assert (decision.way, decision.order[0].backend.id) == (Way.FAIL_OPEN, "b")


def test_a_recovery_within_the_precheck_threshold_is_waited_for() -> None:
    clock = ManualClock()
    fleet = make(clock, one("a"))
    lane = fleet.lanes["a"]
    lane.cooldown = lane.cooldown.hit(clock.now(), clock.now(), lane.policy)
    assert fleet.look(GPT).way is Way.EMERGENCY
    clock.advance(21)
    assert fleet.look(GPT).way is Way.WAIT


def test_a_quarantined_backend_is_not_even_used_in_an_emergency() -> None:
    fleet = make(ManualClock(), one("a"))
    fleet.lanes["a"].quarantine = "401"
    assert fleet.look(GPT).way is Way.NONE


def test_changed_configuration_keeps_what_is_counted_and_a_new_key_lifts_a_quarantine() -> None:
    clock = ManualClock()
    fleet = make(clock, one("a", api_key="old"))
    spend(fleet, "a")
    fleet.lanes["a"].quarantine = "401"
    fleet.replace([one("a", api_key="old", priority=9)])
    assert fleet.lanes["a"].quarantine == "401"
    fleet.replace([one("a", api_key="new")])
    assert fleet.lanes["a"].quarantine == ""
    assert fleet.lanes["a"].starts.used(clock.now()) == 1


# -- the queue -------------------------------------------------------------------------------


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_line_is_first_in_first_out_and_woken() -> None:
    async def run() -> None:
        clock = ManualClock()
        fleet = make(clock, one("a", rpm_limit=1), queue_timeout_seconds=600)
        spend(fleet, "a")
        got: list[int] = []

        async def wait(number: int) -> None:
            grant, _ = await fleet.admit(GPT, 600)
            grant.lane.sent(grant, clock.now())
            got.append(number)

        tasks = [asyncio.create_task(wait(number)) for number in range(3)]
        await settle()
        assert fleet.queued == 3
        for count in (1, 2, 3):
            clock.advance(61)
            fleet.wake()
            await settle()
            assert got == list(range(count))
        await asyncio.gather(*tasks)
        fleet.close()

    asyncio.run(run())


def test_a_newcomer_does_not_overtake_the_line() -> None:
    async def run() -> None:
        clock = ManualClock()
        fleet = make(clock, one("a", rpm_limit=1), queue_timeout_seconds=600)
        spend(fleet, "a")
        first = asyncio.create_task(fleet.admit(GPT, 600))
        await settle()
        clock.advance(61)
        second = asyncio.create_task(fleet.admit(GPT, 600))
        await settle()
        fleet.wake()
        await settle()
        assert first.done()
        assert not second.done()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert fleet.queued == 0
        fleet.close()

    asyncio.run(run())


def test_a_wait_that_would_be_too_long_is_refused_at_once_with_the_true_time() -> None:
    async def run() -> None:
        clock = ManualClock()
        fleet = make(clock, one("a", rpm_limit=1))
        spend(fleet, "a")
        clock.advance(20)
        with pytest.raises(NoRoom) as refused:
            await fleet.admit(GPT, 120)
        assert refused.value.retry_after == pytest.approx(40.1)
        assert fleet.queued == 0

    asyncio.run(run())


def test_a_full_queue_refuses() -> None:
    async def run() -> None:
        clock = ManualClock()
        fleet = make(clock, one("a", rpm_limit=1), queue_max_depth=1, queue_timeout_seconds=600)
        spend(fleet, "a")
        first = asyncio.create_task(fleet.admit(GPT, 600))
        await settle()
        with pytest.raises(NoRoom) as refused:
            await fleet.admit(GPT, 600)
        assert (refused.value.code, refused.value.retry_after) == ("queue_full", pytest.approx(120.2))
        fleet.drain()
        with pytest.raises(NoRoom):
            await first
        fleet.close()

    asyncio.run(run())


def test_a_caller_who_leaves_with_a_grant_in_hand_passes_it_on() -> None:
    async def run() -> None:
        clock = ManualClock()
        fleet = make(clock, one("a", rpm_limit=1), queue_timeout_seconds=600)
        spend(fleet, "a")
        first, second = (asyncio.create_task(fleet.admit(GPT, 600)) for _ in range(2))
        await settle()
        clock.advance(61)
        fleet.wake()  # the grant is set, the task has not run yet
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await settle()
        grant, _ = await second
        assert grant.lane.count.in_flight == 1
        assert fleet.lanes["a"].starts.used(clock.now()) == 1
        fleet.close()

    asyncio.run(run())


def test_waiters_are_told_when_their_last_backend_disappears() -> None:
    async def run() -> None:
        clock = ManualClock()
        fleet = make(clock, one("a", rpm_limit=1), queue_timeout_seconds=600)
        spend(fleet, "a")
        task = asyncio.create_task(fleet.admit(GPT, 600))
        await settle()
        fleet.replace([])
        with pytest.raises(NoBackend):
            await task
        fleet.close()

    asyncio.run(run())


def test_a_grant_given_back_leaves_no_trace() -> None:
    clock = ManualClock()
    fleet = make(clock, one("a", tpm_limit=100))
    grant, _ = fleet.try_take(Query("gpt", Api.OPENAI.value, 80))
    assert grant is not None
    grant.lane.give_back(grant, clock.now())
    lane = fleet.lanes["a"]
    assert (lane.starts.used(clock.now()), lane.tokens.used(clock.now()), lane.count.in_flight) == (0, 0, 0)  # type: ignore[union-attr]
