"""Requests for a pass at once."""

from __future__ import annotations

from reconciler import asks
from reconciler.store import Store


def test_request_is_waiting_then_taken_then_done(store: Store) -> None:
    """Whoever asked can follow it, and nobody takes it twice."""
    number = asks.ask(store, "node-1", "dana")
    assert [found.target for found in asks.waiting(store)] == ["node-1"]
    assert (asks.state(store, number) or {})["state"] == "waiting"
    taken = asks.waiting(store)
    asks.take(store, taken)
    assert (asks.state(store, number) or {})["state"] == "taken"
    assert asks.waiting(store) == []
    asks.done(store, taken, "run-1", 3)
    found = asks.state(store, number) or {}
    assert (found["state"], found["run_id"], found["exit_code"]) == ("done", "run-1", 3)


def test_unknown_request_is_said_to_be(store: Store) -> None:
    """Nothing is made up."""
    assert asks.state(store, 7) is None


def test_request_nobody_took_for_a_week_is_not_wanted_any_more(store: Store) -> None:
    """A daemon that comes back after that starts no pass for it."""
    asks.ask(store, "", "dana")
    store.db.execute("UPDATE asks SET asked = '2026-01-01T00:00:00+00:00'")
    assert asks.waiting(store) == []
    asks.ask(store, "", "dana")
    assert store.db.table("asks").count == 1
