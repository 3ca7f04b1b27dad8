"""Kinds that can ask a node for several resources at once, and what happens when that goes wrong."""

from pathlib import Path
from typing import Any

import pytest

from reconciler.kinds import probe_path
from tests.unit.support import on_node

# Answers for each unit named, in order; a unit called bad makes the whole call fail, one called hung hangs it.
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in *hung*) exec sleep 60;; *bad*) echo "Unit name bad is not valid" >&2; exit 1;; esac
[ "$1" = --user ] && shift
shift
separator=""
for word; do
  case $word in --*) continue;; esac
  printf '%sActiveState=active\\nSubState=%s\\nLoadState=loaded\\n' "$separator" "$word"
  separator="
"
done
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Path) -> Path:
    """The stand-in of systemctl first on PATH, and what it was called with."""
    (account / "bin").mkdir()
    (account / "bin" / "systemctl").write_text(SYSTEMCTL)
    (account / "bin" / "systemctl").chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def look_at(*units: str, scope: str = "system", timeout: float = 10.0) -> list[dict[str, Any]]:
    """One round trip for several units."""
    shared = {"unit_path": "/x", "scope": scope, "manager": "systemd", "restart_on": []}
    probes = [
        {"kind": "service", "args": {**shared, "unit_name": unit}, "timeout": timeout} for unit in units
    ]
    answers: list[dict[str, Any]] = on_node({"service": probe_path("service")}, {"probes": probes})["probes"]
    return answers


def test_units_of_one_manager_are_asked_for_together(log: Path) -> None:
    """Each gets its own part of the answer."""
    found = look_at("a.service", "b.timer", "c.service")
    assert [answer["facts"]["substate"] for answer in found] == ["a.service", "b.timer", "c.service"]
    assert {answer["facts"]["state"] for answer in found} == {"running"}
    assert len(log.read_text().splitlines()) == 1


def test_one_bad_unit_does_not_spoil_the_others(log: Path) -> None:
    """What fails together is asked for one by one."""
    good, bad = look_at("a.service", "bad.service")
    assert good["facts"]["substate"] == "a.service"
    assert "not valid" in bad["error"]
    assert len(log.read_text().splitlines()) == 3


def test_hung_manager_costs_its_time_once(log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight seconds per unit would be longer than a node is waited for."""
    probe = tmp_path / "probe.py"
    probe.write_text(probe_path("service").read_text().replace("timeout=8", "timeout=0.3"))
    monkeypatch.setattr("tests.unit.test_node_prepare.probe_path", lambda _kind: probe)
    found = look_at("hung.service", "a.service", "b.service")
    assert all("did not end within" in answer["error"] for answer in found)
    assert len(log.read_text().splitlines()) == 1
