"""Each kind's cases: an entry of the desired state, what a node says, and the changes that follow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from reconciler.diff import diff
from reconciler.kinds.registry import kinds
from reconciler.model import Change, Observation
from tests.unit.support import ROOT, Fleet

CASES = sorted((ROOT / "tests" / "cases").glob("*/*.yml"))
KEYS = {"does", "entry", "files", "variables", "fields", "facts", "changes"}


def digests(value: Any) -> Any:
    """``{sha256: TEXT}`` stands for the digest of that text."""
    if isinstance(value, dict):
        if set(value) == {"sha256"}:
            return hashlib.sha256(value["sha256"].encode()).hexdigest()
        return {key: digests(item) for key, item in value.items()}
    return [digests(item) for item in value] if isinstance(value, list) else value


def expected(change: dict[str, Any]) -> dict[str, Any]:
    """A change as the case writes it, in full."""
    return {"fixable": True, "note": "", "diff": False, **change}


def found(change: Change) -> dict[str, Any]:
    """A change as the case would write it; of a text diff only whether there is one."""
    keys = ("field", "desired", "observed", "fixable", "note")
    return {**{key: getattr(change, key) for key in keys}, "diff": bool(change.diff)}


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(fleet: Fleet, path: Path) -> None:
    """What ``does`` says."""
    case = digests(yaml.safe_load(path.read_text()))
    assert set(case) <= KEYS
    assert case["does"]
    for name, text in case.get("files", {}).items():
        fleet.write(text, name)
    fleet.variables("node-1", yaml.safe_dump(case.get("variables", {})))
    fleet.write(yaml.safe_dump({kinds()[path.parent.name].SECTION: [case["entry"]]}, sort_keys=False))
    (resource,) = fleet.load().resources.values()
    if "fields" in case:
        assert resource.fields == case["fields"]
    drifts = diff({resource.id: resource}, {resource.id: Observation(resource.id, case["facts"])})
    changes = drifts[resource.id].changes if drifts else ()
    assert [found(change) for change in changes] == [expected(change) for change in case["changes"]]
