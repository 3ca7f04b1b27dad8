"""A fleet as people run one, behind the real loop, recorder, alerts and store; only the nodes are make-believe.

What the nodes say comes from the kinds' own cases: the real comparisons decide what that means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from reconciler.alerts import Alerts
from reconciler.desired.load import Desired, load
from reconciler.inventory import Inventory
from reconciler.loop import Pass, Wishes
from reconciler.model import (
    Action,
    NodeState,
    Observation,
    Observed,
    Outcome,
    Report,
    Resource,
    ResourceId,
    Status,
)
from reconciler.record import Context, Recorder
from reconciler.store import Store
from tests.unit.test_cases import ROOT, digests

# Name of the resource: its kind, the case it is declared as, and what else its declaration says.
RESOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "dispatch": ("schema", {"database": "~/dispatch.db"}),
    "task-wrapper": ("wrapper", {"dest": "~/task-wrapper.sh"}),
    "agent-env": ("wrapper", {"dest": "~/.config/agent.env"}),
    "control": ("ssh", {}),
    "claude": ("tool", {}),
    "claude-glm": ("tool", {}),
    "mm": ("tool", {}),
    "task-watcher": ("service", {}),
}
GOOD = "in_sync"


def case(kind: str, name: str) -> dict[str, Any]:
    """One of a kind's cases."""
    return digests(yaml.safe_load((ROOT / "tests/cases" / kind / f"{name}.yml").read_text()))


@dataclass
class Nodes:
    """What every node holds, as the name of a case per resource; ``silent`` ones do not answer."""

    cases: dict[ResourceId, str]
    silent: set[str] = field(default_factory=set)

    def observe(self, resources: Iterable[Resource], *, fresh: bool = False) -> Observed:
        """What they say now."""
        asked = list(resources)
        assert not fresh
        why = "ssh: connect to host 10.0.3.14 port 22: Connection timed out"
        nodes = {
            r.id.node: NodeState(r.id.node, r.id.node not in self.silent, why, "ssh", 0.4) for r in asked
        }
        return Observed(nodes, {r.id: self._look(r.id, why) for r in asked})

    def _look(self, rid: ResourceId, why: str) -> Observation:
        if rid.node in self.silent:
            return Observation(rid, None, why)
        return Observation(rid, case(rid.kind, self.cases[rid])["facts"])


@dataclass
class Roles:
    """Puts right what it is told to, but not what is in ``stubborn``: that is undone, for the reason given."""

    nodes: Nodes
    stubborn: dict[ResourceId, str] = field(default_factory=dict)

    def repair(
        self, actions: Sequence[Action], resources: Mapping[ResourceId, Resource], before: Observed
    ) -> tuple[list[Outcome], Observed]:
        """One outcome per action, and another look."""
        assert before.nodes
        outcomes = []
        for action in actions:
            why = self.stubborn.get(action.id, "")
            if not why:
                self.nodes.cases[action.id] = GOOD
            status = Status.ROLLED_BACK if why else Status.FIXED
            outcomes.append(Outcome(action.id, status, why, action.changes, number=action.number))
        nodes = {action.id.node for action in actions}
        return outcomes, self.nodes.observe([r for r in resources.values() if r.id.node in nodes])


class Showcase:
    """A fleet of ``nodes`` with a database in ``directory``."""

    def __init__(self, directory: Path, nodes: Sequence[str], copies: int = 1) -> None:
        self.directory, self.db = directory, directory / "reconciler.db"
        _declare(directory, nodes, copies)
        desired = load(directory / "desired_state", Inventory(directory / "hosts.yml"))
        self.desired: Desired = replace(desired, limits=replace(desired.limits, unknown_alert_after=0.0))
        self.nodes = Nodes(dict.fromkeys(self.desired.resources, GOOD))
        self.roles = Roles(self.nodes)
        self.store = Store(self.db)
        self.passes = 0

    def drift(self, key: str, name: str) -> None:
        """Something moved: from now on the resource says what the case of this name says."""
        assert ResourceId.parse(key) in self.desired.resources
        self.nodes.cases[ResourceId.parse(key)] = name

    def stubborn(self, key: str, why: str) -> None:
        """No repair of it holds."""
        self.roles.stubborn[ResourceId.parse(key)] = why

    def run(self, next_in: float | None = 300.0, **wishes: Any) -> Report:
        """One pass."""
        self.passes += 1
        context = Context(f"run-{self.passes}", "4f2a9c1d7e03", None, next_in)
        recorder = Recorder(self.store, self.desired, context, Alerts(self.store, None))
        wanted = Wishes(
            **{"retry": True, "allow_mass_change": True, "fleet": len(self.desired.resources), **wishes}
        )
        made: Any = Pass(self.desired, self.nodes, self.roles, recorder, wanted)  # type: ignore[arg-type]
        report: Report = made.run()
        return report

    def age(self, by: timedelta) -> None:
        """Everything on record happened so much earlier."""
        columns = {
            "guardian_events": ("timestamp",),
            "conditions": ("since", "seen"),
            "passes": ("started", "next"),
            "alerts": ("opened", "seen", "resolved"),
        }
        with self.store.transaction():
            for table, names in columns.items():
                rows = self.store.db.query(f"SELECT rowid AS number, {', '.join(names)} FROM {table}")
                for row in list(rows):
                    for name in names:
                        if row[name]:
                            moved = (datetime.fromisoformat(row[name]) - by).isoformat()
                            self.store.db.execute(
                                f"UPDATE {table} SET {name} = ? WHERE rowid = ?", [moved, row["number"]]
                            )

    def close(self) -> None:
        """Let go of the database."""
        self.store.close()


def _declare(directory: Path, nodes: Sequence[str], copies: int) -> None:
    """Write inventory and desired state, each resource as its kind's case of what is as desired declares it."""
    state = directory / "desired_state"
    (state / "files").mkdir(parents=True)
    sections: dict[str, list[dict[str, Any]]] = {}
    for copy in range(copies):
        for name, (kind, more) in RESOURCES.items():
            found = case(kind, GOOD)
            for path, text in (
                yaml.safe_load((ROOT / f"tests/cases/{kind}/{GOOD}.yml").read_text()).get("files", {}).items()
            ):
                (state / path).write_text(text)
            entry = {**found["entry"], **more, "nodes": "all"}
            if "name" in entry:
                entry["name"] = name if not copy else f"{name}-{copy}"
            elif copy:
                continue
            if "dest" in entry:
                entry["dest"] += str(copy or "")
            if "database" in entry:
                entry["database"] += str(copy or "")
            sections.setdefault(_section(kind), []).append(entry)
    (state / "fleet.yml").write_text(yaml.safe_dump(sections, sort_keys=False))
    hosts = {"all": {"hosts": {node: {"ansible_connection": "ssh"} for node in nodes}}}
    (directory / "hosts.yml").write_text(yaml.safe_dump(hosts, sort_keys=False))


def _section(kind: str) -> str:
    from reconciler.kinds.registry import kinds  # noqa: PLC0415 - for one word

    return kinds()[kind].SECTION


def busy_night(fleet: Showcase) -> None:
    """A history worth looking at: repairs of a week, a service that does not stay up, a silent node, a suspension."""
    week = (
        ("node-3/wrapper/task-wrapper", "other_content", 90), ("node-5/tool/claude", "too_old", 1300),
        ("node-2/ssh/control", "dead_socket", 20), ("controller/schema/dispatch", "no_column", 45),
        ("node-4/service/task-watcher", "stopped", 610), ("node-1/tool/mm", "absent", 240),
        ("node-6/wrapper/agent-env", "other_mode", 15), ("node-2/service/task-watcher", "stopped", 180),
    )  # fmt: skip
    fleet.run()
    for key, name, seconds in week:
        fleet.drift(key, name)
        fleet.stubborn(key, "the role's own check failed")
        fleet.run()
        fleet.age(timedelta(seconds=seconds))
        fleet.roles.stubborn.clear()
        fleet.run()
        fleet.age(timedelta(hours=9, minutes=seconds % 47))
    _tonight(fleet)


def _tonight(fleet: Showcase) -> None:
    from reconciler.model import Suspension  # noqa: PLC0415 - used once

    until = datetime.now(UTC) + timedelta(hours=20)
    reason = "disk is being replaced"
    fleet.store.suspend("node-6/tool", Suspension(reason, "dana@controller", until))
    fleet.drift("node-6/tool/claude-glm", "too_old")
    fleet.drift("node-4/service/task-watcher", "failed")
    fleet.stubborn("node-4/service/task-watcher", "it was started and is failed again: exit status 3")
    fleet.drift("node-5/schema/dispatch", "other_type")
    fleet.run()
    fleet.age(timedelta(minutes=47))
    fleet.nodes.silent = {"node-7"}
    fleet.run()
    fleet.age(timedelta(minutes=16))
    fleet.drift("node-1/wrapper/task-wrapper", "other_content")
    fleet.run()
    fleet.age(timedelta(seconds=70))
