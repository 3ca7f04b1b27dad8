"""Alerts after they were raised: one file per episode, one telling per cause and day, whatever ends when."""

from __future__ import annotations

import json
import os
import textwrap
import threading
import tomllib
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from jsonschema import Draft202012Validator

from reconciler import alert_files
from reconciler.alert_files import file_name
from reconciler.alerts import Alerts
from reconciler.model import Alert, Change, Event, ResourceId, Status
from reconciler.settings import Route
from reconciler.store import Store, StoreError
from reconciler.wording import causes, level_of, normal
from tests.unit.support import ROOT

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CONTEXT = {"run": "20260102T030405Z-abcdef", "revision": "0123456789ab"}
ALL = Route(name="all", url="$env:ALL")
URGENT = Route(name="urgent", url="$env:URGENT", levels=("P0",), resolved=False)
SCHEMA = json.loads((ROOT / "reconciler" / "alert.schema.json").read_text())
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def alert(key: str = "node-1/tool/claude", severity: int = 3, **given: Any) -> Alert:
    """A repair that failed."""
    detail = given.pop("detail", "npm ended with 1: no space left on device")
    advice = given.pop("advice", "free some space on the node")
    return Alert(key, given.pop("reason", "RepairFailed"), severity, detail, advice, **given)


class Desk:
    """Alerts with a clock of their own."""

    def __init__(self, store: Store, directory: Path | None, *routes: Route) -> None:
        self.store, self.now = store, NOW
        self.alerts = Alerts(store, directory, routes)

    def raise_(self, *raised: Alert) -> None:
        """As a pass does."""
        with self.store.db.atomic():
            for one in raised:
                self.alerts.raise_(one, CONTEXT, self.now)

    def resolve(self, *keys: str, **given: Any) -> None:
        """As a pass does."""
        for key in keys:
            self.alerts.resolve(key, self.now, **given)

    def settle(self, later: timedelta = timedelta()) -> list[tuple[str, str, str]]:
        """Settle, that much later, and answer the notifications that this made: route, what, title."""
        self.now += later
        before = self.store.db.execute("SELECT coalesce(max(id), 0) FROM deliveries").fetchone()[0]
        self.alerts.settle(self.now)
        return [(row["route"], row["what"], row["title"]) for row in self.deliveries(before)]

    def deliveries(self, after: int = 0) -> list[dict[str, Any]]:
        """Notifications, oldest first."""
        return list(self.store.db.query("SELECT * FROM deliveries WHERE id > ? ORDER BY id", [after]))

    @property
    def body(self) -> str:
        """The text of the newest notification."""
        return str(self.deliveries()[-1]["body"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Not there yet."""
    return tmp_path / "state" / "alerts"


@pytest.fixture
def desk(store: Store, directory: Path) -> Desk:
    """One route that takes everything."""
    return Desk(store, directory, ALL)


def names(directory: Path) -> list[str]:
    """Everything that lies there."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def files(directory: Path) -> list[dict[str, Any]]:
    """The alert files, by name; each has to fit the schema."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    for document in found:
        Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(document)
    return found


# --- raising and resolving --------------------------------------------------------------------------


def test_alert_is_open_once_however_often_it_is_raised(desk: Desk) -> None:
    """What is newest is shown, and how often it was raised; another reason is another alert."""
    desk.raise_(alert(detail="first"))
    desk.now += HOUR
    desk.raise_(alert(detail="second"), alert(reason="Flapping"))
    found = {row["reason"]: row for row in desk.alerts.open()}
    assert set(found) == {"RepairFailed", "Flapping"}
    assert (found["RepairFailed"]["detail"], found["RepairFailed"]["occurrences"]) == ("second", 2)
    assert found["RepairFailed"]["opened"] == "2026-01-02T03:04:05+00:00"
    assert found["RepairFailed"]["seen"] == "2026-01-02T04:04:05+00:00"


def test_alert_belongs_to_the_callers_transaction(desk: Desk) -> None:
    """What the caller takes back was never raised, and never resolved."""
    desk.raise_(alert("node-1/tool/a"))

    def ended_in_the_middle() -> None:
        with desk.store.db.atomic():
            desk.alerts.raise_(alert("node-1/tool/b"), CONTEXT, NOW)
            desk.alerts.resolve("node-1/tool/a", NOW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ended_in_the_middle()
    assert [row["key"] for row in desk.alerts.open()] == ["node-1/tool/a"]


def test_resolving_ends_all_of_a_key_or_only_one_reason(desk: Desk) -> None:
    """And nothing of other keys; what is not open stays what it is."""
    desk.raise_(alert(), alert(reason="Flapping"), alert("node-2/tool/claude"))
    desk.resolve("node-1/tool/claude", only="Flapping")
    assert {row["reason"] for row in desk.alerts.open() if row["node"] == "node-1"} == {"RepairFailed"}
    desk.resolve("node-1/tool/claude", reason="it is as desired again")
    desk.now += HOUR
    desk.resolve("node-1/tool/claude", reason="again")
    assert [row["node"] for row in desk.alerts.open()] == ["node-2"]
    ended = [row for row in desk.alerts.listed(resolved=True) if row["status"] == "resolved"]
    assert {row["resolution"] for row in ended} == {"", "it is as desired again"}
    assert {row["resolved"] for row in ended} == {"2026-01-02T03:04:05+00:00"}


def test_severity_of_an_episode_is_its_worst(desk: Desk) -> None:
    """It may look better in between."""
    for severity in (3, 5, 4):
        desk.raise_(alert(severity=severity))
    assert [(row["severity"], row["level"]) for row in desk.alerts.open()] == [(5, "P0")]


@pytest.mark.parametrize(
    ("key", "node", "subject"),
    [
        ("node-1/wrapper/~/bin/x", "", ("node-1", "wrapper", "~/bin/x")),
        ("node-1", "node-1", ("node-1", "", "")),
        ("node-1", "", ("node-1", "", "")),
        ("fleet", "", ("", "", "")),
        ("fleet", "node-1", ("node-1", "", "")),
    ],
)
def test_alert_knows_what_it_is_about(desk: Desk, key: str, node: str, subject: tuple[str, str, str]) -> None:
    """By its key."""
    desk.raise_(alert(key, node=node))
    row = desk.alerts.open()[0]
    assert (row["node"], row["kind"], row["name"]) == subject


def test_levels_follow_from_severity() -> None:
    """As documented."""
    assert [level_of(severity) for severity in (5, 4, 3, 2, 1)] == ["P0", "P1", "P1", "P2", "P2"]


# --- causes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("node-1 timed out after 12.5 s", "node-2 timed out after 7 s"),
        ("alpha: no route to host", "beta: no route to host"),
        ("file is e3b0c44298fc1c149afbf4c8996fb924", "file is 0123456789abcdef"),
        ("run 20260102T030405Z-abcdef failed", "run 20260203T040506Z-123456 failed"),
        (
            "saved in /home/a/.local/state/reconciler/journal/20260102T030405Z-abcdef/tool.x.json",
            "saved in /root/.local/state/reconciler/journal/20260203T040506Z-123456/tool.x.json",
        ),
        ("npm wrote /tmp/npm-1/log", "npm wrote /tmp/npm-abc/log"),
        ("at 2026-01-02T03:04:05+00:00", "at 2026-11-12T13:14:15+00:00"),
        ("id 01234567-89ab-cdef-0123-456789abcdef", "id 11111111-89ab-cdef-0123-aaaaaaaaaaaa"),
        ("two\n  lines", "two lines"),
    ],
)
def test_what_varies_is_no_part_of_the_cause(one: str, other: str) -> None:
    """Names of nodes, numbers, digests, runs, places of attempts."""
    nodes = {"node-1", "node-2", "alpha", "beta"}
    assert normal(one, nodes) == normal(other, nodes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("no space left on device", "permission denied"),
        ("cannot read /etc/passwd", "cannot read /etc/shadow"),
        ("alphabet", "betabet"),
    ],
)
def test_what_matters_is_part_of_the_cause(one: str, other: str) -> None:
    """Words and paths are; a node's name within a word is none."""
    assert normal(one, {"alpha", "beta"}) != normal(other, {"alpha", "beta"})


def test_silence_of_each_node_is_its_own_cause_but_one_family() -> None:
    """That a second one is silent, too, is news; that thirty are is one message."""
    one, other = (alert(node, detail=f"{node} does not answer", node=node) for node in ("alpha", "beta"))
    assert causes(one, ())[0] != causes(other, ())[0]
    assert causes(one, ())[1] == causes(other, ())[1]


# --- files ------------------------------------------------------------------------------------------


def test_file_says_everything_and_is_private(desk: Desk, directory: Path) -> None:
    """In a directory that is private, too, and with nothing left beside it."""
    change = Change("version", ">=2.0", "1.9")
    desk.raise_(alert(changes=(change,)))
    desk.settle()
    [document] = files(directory)
    assert document == {
        "id": 1, "key": "node-1/tool/claude", "node": "node-1", "kind": "tool", "name": "claude",
        "reason": "RepairFailed", "level": "P1", "severity": 3, "status": "open",
        "opened": "2026-01-02T03:04:05+00:00", "resolved": None, "resolution": "",
        "detail": "npm ended with 1: no space left on device", "advice": "free some space on the node",
        "changes": [{"field": "version", "desired": ">=2.0", "observed": "1.9", "fixable": True, "note": ""}],
        "occurrences": 1, "run": CONTEXT["run"], "revision": CONTEXT["revision"], "to": [],
        "cause": "RepairFailed tool/claude: npm ended with #: no space left on device",
    }  # fmt: skip
    assert names(directory) == ["20260102T030405Z-000001-node-1_tool_claude.json"]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert next(directory.iterdir()).stat().st_mode & 0o777 == 0o600


def test_file_is_rewritten_when_something_changed_and_only_then(desk: Desk, directory: Path) -> None:
    """Not because it was seen once more."""
    desk.raise_(alert())
    desk.settle()
    path = next(directory.iterdir())
    inode = path.stat().st_ino
    desk.raise_(alert())
    desk.settle(HOUR)
    assert path.stat().st_ino == inode
    desk.raise_(alert(detail="something else"))
    desk.settle(HOUR)
    assert json.loads(path.read_text())["detail"] == "something else"
    desk.resolve("node-1/tool/claude", reason="fixed by hand")
    desk.settle(HOUR)
    [document] = files(directory)
    assert (document["status"], document["resolution"]) == ("resolved", "fixed by hand")
    assert document["resolved"] == "2026-01-02T05:04:05+00:00"


def test_file_of_an_open_alert_that_was_removed_is_written_again(desk: Desk, directory: Path) -> None:
    """One of a resolved alert is not: somebody tidied up."""
    desk.raise_(alert("node-1/tool/a"), alert("node-1/tool/b"))
    desk.settle()
    desk.resolve("node-1/tool/b")
    desk.settle()
    for path in directory.iterdir():
        path.unlink()
    desk.settle()
    assert [document["name"] for document in files(directory)] == ["a"]


def test_files_of_resolved_alerts_go_after_thirty_days(desk: Desk, directory: Path) -> None:
    """Those of open ones never; the alert itself is remembered for longer."""
    desk.raise_(alert("node-1/tool/a"), alert("node-1/tool/b"))
    desk.resolve("node-1/tool/b")
    desk.settle()
    assert len(files(directory)) == 2
    desk.settle(29 * DAY)
    assert len(files(directory)) == 2
    desk.settle(2 * DAY)
    assert [document["name"] for document in files(directory)] == ["a"]
    assert len(desk.alerts.listed(resolved=True)) == 2
    desk.settle(400 * DAY)
    assert [row["name"] for row in desk.alerts.listed(resolved=True)] == ["a"]


@pytest.mark.parametrize(
    "key", ["node-1/wrapper/~/bin/../x y", "node-1/wrapper/" + "é/" * 300, "..", "n\0de/a/b"]
)
def test_file_name_is_safe_whatever_the_key_holds(desk: Desk, directory: Path, key: str) -> None:
    """No directories, no hidden files, no name that is too long."""
    desk.raise_(alert(key))
    desk.settle()
    [name] = names(directory)
    assert len(name) < 150
    assert name.isascii()
    assert name.startswith("20260102T030405Z-000001-")
    assert files(directory)[0]["key"] == key


def test_directory_that_cannot_be_used_fails_nothing_and_is_tried_again(desk: Desk, directory: Path) -> None:
    """The reason is shown with the alert; notifications do not wait for it."""
    directory.parent.mkdir()
    directory.write_text("a file in its place")
    desk.raise_(alert())
    assert len(desk.settle()) == 1
    [row] = desk.alerts.open()
    assert "exists" in row["file_error"].lower()
    assert row["file"] is None
    directory.unlink()
    assert desk.settle() == []
    [row] = desk.alerts.open()
    assert (row["file_error"], Path(row["file"])) == ("", directory / names(directory)[0])


def test_full_disk_leaves_the_old_file_whole(
    desk: Desk, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next settling writes the new one."""
    desk.raise_(alert())
    desk.settle()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(alert_files.os, "fsync", full)
        desk.raise_(alert(detail="newer"))
        desk.settle()
    assert files(directory)[0]["detail"] == "npm ended with 1: no space left on device"
    assert desk.alerts.open()[0]["file_error"] == "No space left on device"
    desk.settle()
    assert files(directory)[0]["detail"] == "newer"
    assert len(names(directory)) == 1


def test_no_directory_means_no_files(store: Store) -> None:
    """Notifications come all the same."""
    desk = Desk(store, None, ALL)
    desk.raise_(alert())
    assert len(desk.settle()) == 1
    assert desk.alerts.open()[0]["file"] is None


def test_what_is_shipped_is_documented() -> None:
    """Every key of a file, and every setting of a route, in an example that is valid."""
    text = (ROOT / "docs" / "alerts.md").read_text()
    Draft202012Validator.check_schema(SCHEMA)
    assert all(f"`{name}`" in text for name in SCHEMA["properties"])
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"])
    example = tomllib.loads(
        textwrap.dedent(text.split("In `reconciler.toml`:\n\n")[1].split("\nThe variable")[0])
    )
    routes = [Route(**table) for table in example["notify"]]
    assert set(routes[0].model_fields_set) == set(Route.model_fields)


# --- who is told of what ----------------------------------------------------------------------------


def test_alert_is_told_once(desk: Desk) -> None:
    """However often it is raised and settled, also days later."""
    desk.raise_(alert())
    assert desk.settle() == [
        ("all", "opened", "[P1] node-1: tool/claude: npm ended with 1: no space left on device")
    ]
    for later in (timedelta(), HOUR, 2 * DAY, 20 * DAY):
        desk.raise_(alert(detail="npm ended with 2: permission denied"))
        assert desk.settle(later) == []


def test_notification_says_what_why_what_was_tried_and_what_next(desk: Desk) -> None:
    """In short lines."""
    rid = ResourceId.parse("node-1/tool/claude")
    desk.store.record([Event(rid, "C4", Status.FIXING, 2, {}, number) for number in (1, 2)])
    desk.raise_(alert(changes=(Change("version", ">=2.0", "1.9"),)))
    desk.settle()
    assert desk.body.splitlines() == [
        "What: tool/claude RepairFailed, since 2026-01-02 03:04 UTC",
        "Why: npm ended with 1: no space left on device",
        "Differs: version 1.9 → >=2.0",
        "Tried: 2 repairs since it was last as desired",
        "Next: free some space on the node",
        "More: reconcile explain node-1/tool/claude",
    ]


def test_notification_stays_short_and_printable(desk: Desk) -> None:
    """Whatever the node said."""
    changes = tuple(Change(f"field-{number}", "x" * 500, "y" * 500) for number in range(50))
    desk.raise_(alert(detail="bad\x1b[31m\n" * 1000, advice="do " * 1000, changes=changes))
    [(_, _, title)] = desk.settle()
    assert len(title) < 140
    assert len(desk.body) < 2500
    assert title.isprintable()
    assert desk.body.replace("\n", "").isprintable()


def test_alerts_of_one_cause_are_one_notification(desk: Desk) -> None:
    """It names the nodes and how many; another cause is another one, the worst first."""
    desk.raise_(
        *(alert(f"node-{n}/tool/claude", detail=f"npm on node-{n} ended with {n}") for n in range(1, 12))
    )
    desk.raise_(alert("node-1/ssh/fleet", 5, detail="the key was refused"))
    assert [title for _, _, title in desk.settle()] == [
        "[P0] node-1: ssh/fleet: the key was refused",
        "[P1] 11 nodes: tool/claude: npm on node-1 ended with 1",
    ]
    assert (
        "Nodes (11): node-1, node-2, node-3, node-4, node-5, node-6, node-7, node-8 and 3 more" in desk.body
    )


def test_silent_nodes_are_one_notification_but_the_next_one_is_told_too(desk: Desk) -> None:
    """A node that fell silent later is not hidden by the first one's silence."""
    desk.raise_(
        *(alert(n, reason="Unreachable", detail=f"{n} does not answer", node=n) for n in ("alpha", "beta"))
    )
    assert [title for _, _, title in desk.settle()] == ["[P1] 2 nodes: alpha does not answer"]
    desk.raise_(alert("gamma", reason="Unreachable", detail="gamma does not answer", node="gamma"))
    assert [title for _, _, title in desk.settle(HOUR)] == ["[P1] gamma: gamma does not answer"]
    assert "Also on: alpha, beta" in desk.body


def test_cause_is_quiet_for_a_day(desk: Desk) -> None:
    """A node that gets it later is named when the day is over, if it still has it."""
    desk.raise_(alert("node-1/tool/claude"))
    desk.settle()
    desk.raise_(alert("node-2/tool/claude"), alert("node-3/tool/claude"))
    assert desk.settle(HOUR) == []
    desk.resolve("node-3/tool/claude")
    assert desk.settle(22 * HOUR) == []
    assert [title[:12] for _, _, title in desk.settle(HOUR)] == ["[P1] node-2:"]
    assert "Also on: node-1" in desk.body


def test_worse_level_is_told_at_once(desk: Desk) -> None:
    """Once; the same level is not, though its number is higher."""
    desk.raise_(alert(severity=3))
    desk.settle()
    desk.raise_(alert(severity=4))
    assert desk.settle() == []
    desk.raise_(alert(severity=5))
    assert [(what, title[:4]) for _, what, title in desk.settle()] == [("worse", "[P0]")]
    assert "It got worse: it was P1 when it was last told." in desk.body
    desk.raise_(alert(severity=5))
    assert desk.settle(2 * DAY) == []


def test_flap_is_not_told_again_within_a_day_but_counted(desk: Desk) -> None:
    """Nor is its end."""
    desk.raise_(alert())
    desk.settle()
    desk.resolve("node-1/tool/claude")
    assert [what for _, what, _ in desk.settle(HOUR)] == ["resolved"]
    for _ in range(3):
        desk.raise_(alert())
        assert desk.settle(HOUR) == []
        desk.resolve("node-1/tool/claude")
        assert desk.settle(HOUR) == []
    desk.raise_(alert())
    assert [what for _, what, _ in desk.settle(DAY)] == ["opened"]
    assert "It came back 4 times since it was told 2026-01-02 03:04 UTC." in desk.body


def test_what_came_back_and_stays_is_told_when_the_day_is_over(desk: Desk) -> None:
    """Nothing stays open untold for ever."""
    desk.raise_(alert())
    desk.settle()
    desk.resolve("node-1/tool/claude")
    desk.settle(HOUR)
    desk.raise_(alert())
    assert desk.settle(HOUR) == []
    assert [what for _, what, _ in desk.settle(23 * HOUR)] == ["opened"]
    assert "It came back 1 time since" in desk.body


def test_end_is_told_when_all_of_a_cause_is_over(desk: Desk) -> None:
    """In one message, with how and after how long."""
    desk.raise_(alert("node-1/tool/claude"), alert("node-2/tool/claude"))
    desk.settle()
    desk.resolve("node-1/tool/claude")
    assert desk.settle(HOUR) == []
    desk.resolve("node-2/tool/claude", reason="it is as desired again")
    assert desk.settle(HOUR) == [
        ("all", "resolved", "[P1 resolved] 2 nodes: tool/claude: npm ended with 1: no space left on device")
    ]
    assert "Nodes (2): node-1, node-2" in desk.body
    assert "after 1 hour" in desk.body
    assert desk.settle(HOUR) == []


def test_what_was_never_told_has_no_end_to_tell(desk: Desk) -> None:
    """It was raised and over before anybody heard of it; the file is written."""
    desk.raise_(alert())
    desk.resolve("node-1/tool/claude")
    assert desk.settle() == []
    assert desk.alerts.listed(resolved=True)[0]["file"]


def test_routes_take_their_levels_and_may_do_without_ends(store: Store) -> None:
    """Each route is told, and quiet, by itself."""
    desk = Desk(store, None, ALL, URGENT)
    desk.raise_(alert(severity=3))
    assert [route for route, _, _ in desk.settle()] == ["all"]
    desk.raise_(alert(severity=5))
    assert [(route, what) for route, what, _ in desk.settle()] == [("all", "worse"), ("urgent", "opened")]
    desk.resolve("node-1/tool/claude")
    assert [(route, what) for route, what, _ in desk.settle()] == [("all", "resolved")]


def test_new_route_hears_of_what_is_open_but_not_of_what_is_over(store: Store) -> None:
    """And one that comes back after weeks is not told of ends long past."""
    desk = Desk(store, None)
    desk.raise_(alert("node-1/tool/a"), alert("node-1/tool/b"))
    desk.resolve("node-1/tool/b")
    assert desk.settle() == []
    desk.alerts.routes = (ALL,)
    assert [title[:24] for _, _, title in desk.settle(10 * DAY)] == ["[P1] node-1: tool/a: npm"]
    desk.alerts.routes = ()
    desk.resolve("node-1/tool/a")
    assert desk.settle() == []
    desk.alerts.routes = (ALL,)
    assert desk.settle(10 * DAY) == []


def test_flood_of_causes_is_summed_up(desk: Desk) -> None:
    """The worst get a notification of their own, the rest one together; each counts as told."""
    desk.raise_(*(alert(f"node-{n}/tool/t{chr(97 + n)}", 5 if n == 20 else 3) for n in range(25)))
    told = desk.settle()
    assert len(told) == 11
    assert told[0][2].startswith("[P0] node-20: tool/tu")
    assert told[-1][2] == "[P1] 15 more alerts on 15 nodes"
    assert desk.settle(2 * DAY) == []


def test_notifications_that_are_over_are_forgotten_and_told_alerts_stay_told(desk: Desk) -> None:
    """After thirty days."""
    desk.raise_(alert())
    desk.settle()
    desk.store.db.execute("UPDATE deliveries SET status = 'sent', ended = '2026-01-02T03:05:00+00:00'")
    desk.store.db.conn.commit()
    assert desk.settle(40 * DAY) == []
    assert desk.deliveries() == []
    desk.resolve("node-1/tool/claude")
    assert [what for _, what, _ in desk.settle(HOUR)] == ["resolved"]


# --- ends in the middle -----------------------------------------------------------------------------


class EndError(BaseException):
    """The process is killed here."""


def countdown(steps: int) -> Callable[[], None]:
    """Raises in the step after so many."""
    left = [steps]

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise EndError

    return step


def with_ends(monkeypatch: pytest.MonkeyPatch, desk: Desk, step: Callable[[], None]) -> None:
    """Every statement, every sync and every rename may be the last."""
    execute, fsync, replace = desk.store.db.execute, os.fsync, Path.replace

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            step()
            found = real(*args, **given)
            step()
            return found

        return call

    monkeypatch.setattr(desk.store.db, "execute", counted(execute))
    monkeypatch.setattr(alert_files.os, "fsync", counted(fsync))
    monkeypatch.setattr(Path, "replace", counted(replace))


def steps_of_settling(tmp_path: Path, ended_after: int | None) -> tuple[bool, Any]:
    """Settle a fixed history, ended after so many steps, then settle again; whether it ended, and what is left."""
    tmp_path.mkdir()
    store = Store(tmp_path / "r.db")
    desk = Desk(store, tmp_path / "alerts", ALL, URGENT)
    desk.raise_(alert("node-1/tool/a"), alert("node-2/tool/a"), alert("node-1/tool/old"))
    desk.resolve("node-1/tool/old")
    desk.settle()
    desk.now += 31 * DAY
    desk.raise_(alert("node-1/tool/a", 5, detail="worse"), alert("node-3/tool/b"))
    desk.resolve("node-2/tool/a")
    ended = False
    if ended_after is not None:
        with pytest.MonkeyPatch.context() as patched:
            with_ends(patched, desk, countdown(ended_after))
            try:
                desk.alerts.settle(desk.now)
            except EndError:
                ended = True
        store.close()
        store = Store(tmp_path / "r.db")
        desk.store, desk.alerts = store, Alerts(store, tmp_path / "alerts", (ALL, URGENT))
    desk.alerts.settle(desk.now)
    told = [(row["route"], row["what"], row["title"]) for row in desk.deliveries()]
    left = (told, files(tmp_path / "alerts"), names(tmp_path / "alerts"), desk.alerts.open())
    store.close()
    return ended, json.loads(json.dumps(left).replace(str(tmp_path), ""))


def test_settling_may_end_anywhere(tmp_path: Path) -> None:
    """The next one leaves what an undisturbed one leaves: the same notifications, the same files."""
    _, wanted = steps_of_settling(tmp_path / "whole", None)
    ended, number = True, 0
    while ended:
        ended, left = steps_of_settling(tmp_path / f"ended-{number}", number)
        assert left == wanted, number
        number += 1
    assert number > 40


def test_several_processes_may_settle_at_once(tmp_path: Path) -> None:
    """Nothing is told twice, and in the end the files say what the store says."""
    Store(tmp_path / "r.db").close()
    errors: list[BaseException] = []

    def busy(number: int) -> None:
        try:
            with closing(Store(tmp_path / "r.db")) as store:
                alerts = Alerts(store, tmp_path / "alerts", (ALL,))
                for turn in range(30):
                    if number == 0:
                        alerts.raise_(
                            alert(f"node-{turn % 3}/tool/t", 3 + turn % 3, detail=f"{turn % 2}"), CONTEXT, NOW
                        )
                        if turn % 7 == 0:
                            alerts.resolve("node-1/tool/t", NOW)
                    alerts.settle(NOW)
        except BaseException as error:  # noqa: BLE001 - told by the test
            errors.append(error)

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with closing(Store(tmp_path / "r.db")) as store:
        desk = Desk(store, tmp_path / "alerts", ALL)
        assert desk.settle() == []
        rows = {row["id"]: row for row in desk.alerts.listed(resolved=True)}
        shown = {document["id"]: document for document in files(tmp_path / "alerts")}
        assert set(rows) == set(shown)
        for number, document in shown.items():
            assert {**document, "occurrences": 0} == {
                **{name: rows[number][name] for name in document},
                "occurrences": 0,
            }
        tellings = [(row["alert"], row["level"]) for row in store.db.query("SELECT * FROM tellings")]
        assert len(tellings) == len(set(tellings))
        assert all(not name.startswith(".") for name in names(tmp_path / "alerts"))


def test_failing_database_is_the_callers_to_judge(desk: Desk) -> None:
    """Only the directory is our own affair."""
    desk.raise_(alert())
    desk.store.db.execute("DROP TABLE deliveries")
    with pytest.raises(StoreError):
        desk.settle()


KEYS = ("node-1/tool/a", "node-2/tool/a", "node-1", "node-2", "fleet")
REASONS = ("RepairFailed", "Flapping")


class Histories(RuleBasedStateMachine):
    """Any history of raising, resolving, settling, being killed and time going by."""

    @initialize()
    def begin(self) -> None:
        """Nothing has happened."""
        self.directory = Path(f"alerts-{os.urandom(8).hex()}").absolute()
        self.store = Store(None)
        self.desk = Desk(self.store, self.directory, ALL, URGENT)
        self.settled = True

    @rule(
        key=st.sampled_from(KEYS), reason=st.sampled_from(REASONS), severity=st.integers(1, 5),
        detail=st.sampled_from(["failed on node-1", "failed on node-2", "broken"]),
    )  # fmt: skip
    def raise_(self, key: str, reason: str, severity: int, detail: str) -> None:
        """Somebody has to hear of it."""
        self.desk.raise_(alert(key, severity, reason=reason, detail=detail))
        self.settled = False

    @rule(key=st.sampled_from(KEYS), only=st.sampled_from([None, *REASONS]))
    def resolve(self, key: str, only: str | None) -> None:
        """It is over."""
        self.desk.resolve(key, only=only)
        self.settled = False

    @rule()
    def settle(self) -> None:
        """And once more, which changes nothing."""
        self.desk.settle()
        assert self.desk.settle() == []
        self.settled = True

    @rule(steps=st.integers(0, 60))
    def end_in_the_middle(self, steps: int) -> None:
        """Killed while it settles."""
        with pytest.MonkeyPatch.context() as patched:
            with_ends(patched, self.desk, countdown(steps))
            try:
                self.desk.alerts.settle(self.desk.now)
            except EndError:
                self.settled = False

    @rule(later=st.sampled_from([timedelta(minutes=5), 7 * HOUR, DAY, 31 * DAY]))
    def wait(self, later: timedelta) -> None:
        """Time goes by."""
        self.desk.now += later
        self.settled = False

    @invariant()
    def one_open_alert_per_key_and_reason(self) -> None:
        """Never two."""
        found = [(row["key"], row["reason"]) for row in self.desk.alerts.open()]
        assert len(found) == len(set(found))

    @invariant()
    def no_opening_is_told_twice(self) -> None:
        """On one route: only a worse level is told again, and an end once."""
        tellings: dict[tuple[int, str], list[str]] = {}
        for row in self.store.db.query("SELECT * FROM tellings ORDER BY delivery"):
            tellings.setdefault((row["alert"], row["route"]), []).append(row["level"])
        for levels in tellings.values():
            assert levels == sorted(set(levels), reverse=True)
        ends = self.store.db.query(
            "SELECT alert, route, count(DISTINCT resolution) AS ends FROM tellings "
            "WHERE resolution > 0 GROUP BY alert, route"
        )
        assert all(row["ends"] == 1 for row in ends)

    @invariant()
    def one_file_per_episode(self) -> None:
        """With what the store says, unless it is too old; nothing else lies there once it settled."""
        if not self.settled:
            return
        limit = (self.desk.now - timedelta(days=30)).isoformat(timespec="seconds")
        rows = list(self.store.db.query("SELECT * FROM alerts"))
        kept = {file_name(row): row for row in rows if row["status"] == "open" or row["resolved"] >= limit}
        assert names(self.directory) == sorted(kept)
        for name, row in kept.items():
            document = json.loads((self.directory / name).read_text())
            assert (document["status"], document["severity"]) == (row["status"], row["severity"])

    @invariant()
    def nothing_urgent_stays_untold(self) -> None:
        """Once it settled, every open alert was told on a route that takes it, or one of its cause within the day."""
        if not self.settled:
            return
        limit = (self.desk.now - DAY).isoformat(timespec="seconds")
        for row in self.store.db.query("SELECT * FROM alerts WHERE status = 'open'"):
            told = self.store.db.execute(
                "SELECT count(*) FROM tellings t JOIN alerts a ON a.id = t.alert JOIN deliveries d ON d.id = t.delivery "
                "WHERE t.route = 'all' AND t.level <= ? AND (a.id = ? OR (a.cause = ? AND d.created > ?))",
                [level_of(row["severity"]), row["id"], row["cause"], limit],
            ).fetchone()[0]
            assert told, row

    def teardown(self) -> None:
        """Nothing stays open."""
        if hasattr(self, "store"):
            self.store.close()


TestHistories = Histories.TestCase
