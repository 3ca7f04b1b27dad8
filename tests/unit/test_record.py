"""Episodes: one ``detected``, exactly one terminal event per attempt, and conditions that say how things stand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reconciler.model import SECRET, Mode, Policy, Resource
from reconciler.status import status_document
from reconciler.store import Store
from tests.unit.support import rid, wrapper
from tests.unit.test_loop import World, world

KEY = "node-1/wrapper/w"


def condition(store: Store, key: str = KEY) -> dict[str, object]:
    """The condition, which is there."""
    found = store.condition(key)
    assert found is not None
    return found


def stubborn(store: Store, resource: Resource | None = None) -> World:
    """A resource that no repair helps."""
    fleet = world(store, resource or wrapper())
    fleet.converger.stubborn = {rid(KEY)}
    return fleet


def test_one_detected_per_episode(store: Store) -> None:
    """However many passes it lasts."""
    fleet = stubborn(store)
    for _ in range(3):
        fleet.run()
    assert fleet.events(KEY) == ["detected", *["fixing", "rolled_back"] * 3]


def test_attempts_are_counted_within_the_episode(store: Store) -> None:
    """And begin anew after a success."""
    fleet = stubborn(store)
    for _ in range(2):
        fleet.run()
    fleet.converger.stubborn = set()
    fleet.run()
    fleet.observer.contents[rid(KEY)] = "old"
    fleet.run()
    counts = [(row["status"], row["fix_attempts"]) for row in reversed(store.events())]
    assert counts == [
        ("detected", 0),
        ("fixing", 1),
        ("rolled_back", 1),
        ("fixing", 2),
        ("rolled_back", 2),
        ("fixing", 3),
        ("fixed", 3),
        ("detected", 0),
        ("fixing", 1),
        ("fixed", 1),
    ]


def test_unknown_in_between_opens_no_second_episode(store: Store) -> None:
    """A node that fell silent while something was wrong, and came back."""
    fleet = stubborn(store)
    fleet.run()
    fleet.observer.silent = {"node-1"}
    for _ in range(2):
        fleet.run()
    assert condition(store)["status"] == "Unknown"
    fleet.observer.silent = set()
    fleet.run()
    assert fleet.events(KEY).count("detected") == 1


def test_unknown_alone_opens_no_episode(store: Store) -> None:
    """Silence is not drift, before or after."""
    fleet = world(store, wrapper(), contents={KEY: "new"})
    for silent in ({"node-1"}, set(), {"node-1"}, set()):
        fleet.observer.silent = set(silent)
        fleet.run()
    assert store.events() == []


def test_recovery_without_us_closes_the_episode(store: Store) -> None:
    """Somebody repaired it by hand: one terminal event that says so, and the next drift is a new episode."""
    fleet = stubborn(store)
    fleet.run()
    fleet.observer.contents[rid(KEY)] = "new"
    fleet.run()
    fleet.run()
    assert fleet.events(KEY) == ["detected", "fixing", "rolled_back", "fixed"]
    assert "without our doing" in store.events(limit=1)[0]["details"]["reason"]
    fleet.observer.contents[rid(KEY)] = "old"
    fleet.run()
    assert fleet.events(KEY).count("detected") == 2


def test_recovery_after_silence_closes_the_episode_too(store: Store) -> None:
    """Broken, silent, and back as desired."""
    fleet = stubborn(store)
    fleet.run()
    fleet.observer.silent = {"node-1"}
    fleet.run()
    fleet.observer.silent = set()
    fleet.observer.contents[rid(KEY)] = "new"
    fleet.run()
    assert fleet.events(KEY)[-1] == "fixed"


@pytest.mark.parametrize(("digest", "cause"), [("d1", "corrective"), ("d2", "intended")])
def test_corrective_and_intended_changes_are_told_apart(store: Store, digest: str, cause: str) -> None:
    """Whether the node moved away, or git did."""
    fleet = world(store, wrapper(), contents={KEY: "new"})
    fleet.run()
    fleet.observer.contents[rid(KEY)] = "old"
    resource = replace(fleet.resources[rid(KEY)], digest=digest)
    again = World(store, {rid(KEY): resource}, fleet.observer, fleet.converger)
    again.run()
    (first,) = store.events(status="detected")
    assert first["details"]["cause"] == cause


def test_details_name_run_revision_and_changes(store: Store) -> None:
    """Everything that somebody needs a year later."""
    stubborn(store).run()
    details = store.events(status="rolled_back")[0]["details"]
    assert (details["run"], details["revision"], details["reason"]) == ("run-1", "abc123", "it does not hold")
    assert details["changes"] == [{"field": "content", "desired": "new", "observed": "old"}]


def test_secret_values_never_reach_the_store(store: Store) -> None:
    """Neither events nor conditions hold a digest of one."""
    fields = {"type": "file", "content": "digest-of-the-secret"}
    fleet = stubborn(store, wrapper(secret=True, fields=fields))
    fleet.observer.contents[rid(KEY)] = "digest-of-another-secret"
    fleet.run()
    dump = "\n".join(store.db.iterdump())
    assert "digest-of" not in dump
    assert SECRET in dump


def test_condition_keeps_since_while_the_status_stays(store: Store) -> None:
    """Since when it is broken, not when it was last looked at."""
    fleet = stubborn(store)
    fleet.run()
    store.db.execute("UPDATE conditions SET since = '2020-01-01T00:00:00+00:00'")
    fleet.run()
    assert condition(store)["since"] == "2020-01-01T00:00:00+00:00"
    fleet.converger.stubborn = set()
    fleet.run()
    assert condition(store)["since"] != "2020-01-01T00:00:00+00:00"
    assert (condition(store)["status"], condition(store)["reason"]) == ("True", "AsDesired")


def test_conditions_of_what_is_no_longer_declared_are_forgotten(store: Store) -> None:
    """And those outside a limited pass are kept."""
    fleet = world(store, wrapper("node-1/wrapper/a"), wrapper("node-1/wrapper/b"))
    fleet.run()
    del fleet.resources[rid("node-1/wrapper/a")]
    fleet.run()
    assert list(store.conditions()) == ["node-1/wrapper/b"]


def test_status_scores_nodes_and_the_fleet(store: Store) -> None:
    """The share of resources that are as desired, in percent."""
    warned = wrapper("node-2/wrapper/w", policy=Policy(mode=Mode.WARN))
    fleet = world(
        store,
        wrapper("node-1/wrapper/w"),
        warned,
        wrapper("node-2/wrapper/v"),
        contents={"node-2/wrapper/v": "new", "node-2/wrapper/w": "old"},
    )
    fleet.run()
    document = status_document(store)
    assert (
        document["score"],
        document["nodes"]["node-1"]["score"],
        document["nodes"]["node-2"]["score"],
    ) == (67, 100, 50)
    assert document["last_pass"]["exit_code"] == 2
