"""Whole passes from the command line, with Ansible's door replaced: nodes are this machine, roles' steps are run as they are."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from reconciler import node, runner
from reconciler.runner import Result, Settings, Workspace
from reconciler.store import Store
from tests.unit.support import Fleet, Said, reconcile
from tests.unit.support import step as take


class Door:
    """What ``runner.run`` does, without Ansible. Counts runs; ``trouble`` may change or drop a node's result."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.trouble: Callable[[str, Result], Result | None] = lambda _name, result: result
        self.sabotage: Callable[[str, str], None] = lambda _tasks, _id: None

    def __call__(
        self,
        name: str,
        nodes: Sequence[str],
        workspace: Workspace,
        _settings: Settings,
        on_result: Any,
        **_more: Any,
    ) -> None:
        """Run a playbook on ``nodes``."""
        self.runs.append(name)
        for host in nodes:
            request = json.loads((workspace.requests / f"{host}.json").read_text())
            work = self.look if name == "observe.yml" else self.act
            for result in work(host, request):
                changed = self.trouble(name, result)
                if changed is not None:
                    on_result(changed)

    def look(self, host: str, request: Any) -> list[Result]:
        """The observing task."""
        batches = []
        for batch in request["batches"]:
            answer = run_script(batch)
            batches.append({"answer": answer, "connection": {"transport": "pipelined"}, "seconds": 0.1})
        return [Result(host, "ok", {"reconciler": {"batches": batches}})]

    def act(self, host: str, actions: list[dict[str, Any]]) -> list[Result]:
        """The roles' tasks: back up and apply, or roll back; a failure is said and the next action goes on."""
        found = []
        for action in actions:
            steps = ["rollback"] if action["tasks"] == "rollback" else ["backup", "apply"]
            for name in steps:
                given = {"attempt": action["attempt"], "protected": action["protected"]}
                answer = take(name, action["kind"], action["resource"], **given)
                if "failed" in answer:
                    found.append(
                        Result(host, "ok", {"msg": {"failed": action["id"], "reason": answer["failed"]}})
                    )
                    break
            self.sabotage(action["tasks"], action["id"])
        return found


def run_script(batch: dict[str, Any]) -> Any:
    """One prepared script, as the action plugin sends it."""
    payload = node.call(batch["script"], {"connection": "local"})
    argv = [sys.executable, *node.INTERPRETER_FLAGS.split()]
    done = subprocess.run(argv, input=payload, capture_output=True, timeout=60, check=False)
    return node.parse(batch["nonce"], done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    """The replaced door."""
    found = Door()
    monkeypatch.setattr(runner, "run", found)
    monkeypatch.setattr(runner.Workspace, "start_ahead", lambda *_given: None)
    return found


ENTRY = 'wrappers: [{name: w, nodes: node-1, dest: ~/w.sh, content: "new\\n", mode: "0755"%s}]\n'


def once(*words: str) -> Said:
    """One pass with its store in the working directory."""
    return reconcile("--once", "--db", "r.db", *words)


def test_pass_fixes_verifies_and_records(fleet: Fleet, door: Door, account: Path) -> None:
    """Look, act, look again; then nothing is left to do."""
    fleet.write(ENTRY % "")
    said = once("--output", "json")
    assert (said.code, said.json()["outcomes"][0]["status"]) == (0, "fixed")
    assert (account / "w.sh").read_text() == "new\n"
    assert door.runs == ["observe.yml", "converge.yml", "observe.yml"]
    door.runs.clear()
    assert once().code == 0
    assert door.runs == ["observe.yml"]


def test_check_changes_nothing_at_all(fleet: Fleet, door: Door, account: Path) -> None:
    """Not on the node and not in the store; the diff is shown."""
    fleet.write(ENTRY % "")
    (account / "w.sh").write_text("old\n")
    said = once("--check")
    assert said.code == 2
    assert door.runs == ["observe.yml"]
    assert "-old" in said.out
    assert "+new" in said.out
    assert "would fix" in said.out
    # Ansible's own directory is the controller's; here it shares its home with the node.
    assert [path.name for path in account.iterdir() if path.name != ".ansible"] == ["w.sh"]
    assert (account / "w.sh").read_text() == "old\n"
    assert reconcile("events", "--db", "r.db", "-o", "json").out.strip() in ("", "[]")


def test_json_output_is_exactly_one_document(fleet: Fleet, door: Door) -> None:
    """Nothing else on standard output, whatever happens."""
    fleet.write(ENTRY % "")
    for words in (["--check"], [], []):
        document = once("--output", "json", *words).json()
        assert {
            "run_id",
            "revision",
            "nodes",
            "drifts",
            "outcomes",
            "counts",
            "durations",
            "exit_code",
        } <= set(document)
    assert door.runs


def test_failed_repair_is_undone_and_said(fleet: Fleet, door: Door, account: Path) -> None:
    """The file is as before, the outcome is rolled_back with the reason, exit code 3."""
    fleet.write(
        'wrappers: [{name: w, nodes: node-1, dest: ~/w.sh, content: "if\\n", validate: bash -n %s}]\n'
    )
    (account / "w.sh").write_text("old\n")
    said = once("--output", "json")
    (outcome,) = said.json()["outcomes"]
    assert (said.code, outcome["status"]) == (3, "rolled_back")
    assert "syntax error" in outcome["detail"]
    assert (account / "w.sh").read_text() == "old\n"
    assert door.runs == ["observe.yml", "converge.yml", "observe.yml", "converge.yml", "observe.yml"]


def test_repair_that_does_not_hold_is_no_success(fleet: Fleet, door: Door, account: Path) -> None:
    """Ansible says ok, the node says otherwise: believed is the node."""
    fleet.write(ENTRY % "")
    (account / "w.sh").write_text("old\n")
    (account / "w.sh").chmod(0o755)
    door.sabotage = lambda tasks, _id: (
        (account / "w.sh").write_text("changed back\n") and None if tasks == "main" else None
    )
    (outcome,) = once("--output", "json").json()["outcomes"]
    assert outcome["status"] == "rolled_back"
    assert outcome["detail"].startswith("it ran without an error, yet content is ")
    assert (account / "w.sh").read_text() == "old\n"


def test_undo_that_fails_too_is_the_worst(fleet: Fleet, door: Door, account: Path) -> None:
    """Neither as desired nor as before: severity 5."""
    fleet.write(ENTRY % "")
    (account / "w.sh").write_text("old\n")
    (account / "w.sh").chmod(0o755)
    door.sabotage = lambda _tasks, _id: (account / "w.sh").write_text("changed again\n") and None
    said = once("--output", "json")
    (outcome,) = said.json()["outcomes"]
    assert (said.code, outcome["status"], outcome["severity"]) == (3, "failed", 5)
    assert "the undo failed too" in outcome["detail"]


def test_node_that_falls_silent_after_the_repair_is_not_touched_again(
    fleet: Fleet, door: Door, account: Path
) -> None:
    """No undo is tried blindly; the attempt stays open, and the next pass that sees the node settles it."""
    fleet.write(ENTRY % "")

    def silent(name: str, result: Result) -> Result | None:
        if name == "observe.yml" and "converge.yml" in door.runs:
            return Result(result.node, "unreachable", {"msg": "Connection refused"})
        return result

    door.trouble = silent
    said = once("--output", "json")
    assert (said.code, said.json()["outcomes"]) == (4, [])
    assert "Connection refused" in said.json()["unknown"][0]["reason"]
    assert door.runs.count("converge.yml") == 1
    assert (account / "w.sh").read_text() == "new\n"
    door.trouble = lambda _name, result: result
    said = once("--output", "json")
    (outcome,) = said.json()["outcomes"]
    assert (said.code, outcome["status"]) == (0, "fixed")
    assert door.runs.count("converge.yml") == 1
    events = [row["status"] for row in reconcile("events", "--db", "r.db", "-o", "json").json()]
    assert events == ["detected", "fixing", "fixed"]


def test_silent_node_is_asked_twice_and_left_alone(fleet: Fleet, door: Door, account: Path) -> None:
    """The second answer counts; without one the state is unknown, exit code 4."""
    fleet.write(ENTRY % "")
    door.trouble = lambda _name, _result: None
    said = once("--output", "json")
    document = said.json()
    assert said.code == 4
    assert document["nodes"]["node-1"]["reason"] == "Ansible gave no result for it"
    assert door.runs == ["observe.yml", "observe.yml"]
    assert list(account.iterdir()) == []
    door.runs.clear()
    door.trouble = lambda _name, result: result if len(door.runs) > 1 else None
    assert once().code == 0
    assert door.runs[:2] == ["observe.yml", "observe.yml"]


def test_protected_path_is_refused_on_the_node_too(fleet: Fleet, door: Door, account: Path) -> None:
    """A link that nobody saw in the declaration."""
    (account / ".ssh").mkdir()
    (account / ".ssh" / "config").write_text("mine\n")
    (account / "w.sh").symlink_to(account / ".ssh" / "config")
    fleet.write(ENTRY % "")
    (outcome,) = once("--output", "json").json()["outcomes"]
    assert outcome["status"] in ("failed", "rolled_back")
    assert "is protected" in outcome["detail"]
    assert (account / "w.sh").is_symlink()
    assert (account / ".ssh" / "config").read_text() == "mine\n"
    assert door.runs


def test_secret_appears_nowhere(
    fleet: Fleet, door: Door, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither value nor digest: not in text, JSON, store, status, events or explain."""
    monkeypatch.setenv("TOKEN", "hunter2-hunter2")
    fleet.write("wrappers: [{name: w, nodes: node-1, dest: ~/w, content: {$env: TOKEN}}]\n")
    (account / "w").write_text("hunter1-hunter1")
    said = [once("--check"), once("--output", "json"), once()]
    for words in (["status"], ["events"], ["explain", "node-1/wrapper/w"]):
        said += [reconcile(*words, "--db", "r.db"), reconcile(*words, "--db", "r.db", "-o", "json")]
    store = Store(fleet.directory / "r.db")
    text = "\n".join(store.db.iterdump()) + "".join(one.out + one.err for one in said)
    store.close()
    assert [one.code for one in said[:3]] == [2, 0, 0]
    assert (account / "w").read_text() == "hunter2-hunter2"
    for word in ("hunter1-hunter1", "hunter2-hunter2"):
        assert word not in text
        assert hashlib.sha256(word.encode()).hexdigest() not in text
        assert hashlib.sha256(word.encode()).hexdigest()[:12] not in text
    assert door.runs


def test_limit_and_kind_narrow_a_pass(fleet: Fleet, door: Door) -> None:
    """Nothing else is even looked at, and nothing else is forgotten."""
    fleet.write(ENTRY % "")
    fleet.write("tools: [{name: sh, nodes: workers, version_args: [-c, 'true']}]\n", "b.yml")
    assert once().code == 0
    document = once("--output", "json", "--limit", "node-1", "--kind", "tool").json()
    assert (document["counts"]["resources"], list(document["nodes"])) == (1, ["node-1"])
    nodes = reconcile("status", "--db", "r.db", "-o", "json").json()["nodes"]
    assert sum(len(node["resources"]) for node in nodes.values()) == 3
    assert door.runs


def test_status_and_explain_tell_what_passes_saw(fleet: Fleet, door: Door, account: Path) -> None:
    """In words for people."""
    fleet.write(ENTRY % ", ignore: [owner]")
    (account / "w.sh").mkdir()
    assert once().code == 3
    said = reconcile("status", "--db", "r.db")
    assert "node-1/wrapper/w" in said.out
    assert (
        "only files and links are ever replaced"
        in reconcile("explain", "node-1/wrapper/w", "--db", "r.db").out
    )
    assert door.runs == ["observe.yml"]
