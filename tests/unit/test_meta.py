"""A new kind is one module and one role: what each of them has to bring, and that nobody else knows its name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from reconciler.kinds import names, probe_path
from reconciler.kinds.registry import kinds
from tests.unit.support import ROOT

KINDS = names()
RECONCILER = ROOT / "reconciler"


def role(kind: str, name: str) -> Path:
    """A file of a kind's role."""
    return ROOT / "roles" / kind / name


def cases(kind: str) -> list[dict[str, Any]]:
    """The data files of a kind."""
    return [
        yaml.safe_load(path.read_text()) for path in sorted((ROOT / "tests" / "cases" / kind).glob("*.yml"))
    ]


def test_there_are_kinds_and_each_is_a_package_with_a_role() -> None:
    """No kind without a role, no cases and, but for the one that installs us, no role without a kind."""
    packages = {path.parent.name for path in (RECONCILER / "kinds").glob("*/__init__.py")}
    roles = {path.name for path in (ROOT / "roles").iterdir() if path.is_dir()} - {"controller"}
    tested = {path.name for path in (ROOT / "tests" / "cases").iterdir() if path.is_dir()}
    assert set(KINDS) == set(kinds()) == packages == roles == tested
    assert len(KINDS) >= 5


def test_sections_check_types_and_orders_are_distinct() -> None:
    """Two kinds never share a section of the desired state or a check type of events."""
    models = list(kinds().values())
    assert len({model.SECTION for model in models}) == len(models)
    assert len({model.CHECK_TYPE for model in models}) == len(models)
    assert [model.ORDER for model in models] == sorted({model.ORDER for model in models})
    assert all(re.fullmatch(r"C\d+", model.CHECK_TYPE) for model in models)
    assert all(name == model.KIND for name, model in kinds().items())


@pytest.mark.parametrize("kind", KINDS)
def test_role_has_its_skeleton(kind: str) -> None:
    """Typed inputs, the fix, ten lines about it, and the undo or the reason why there is none."""
    for name in ("meta/argument_specs.yml", "tasks/main.yml", "README.md"):
        assert role(kind, name).is_file(), name
    reason = kinds()[kind].NO_ROLLBACK
    assert role(kind, "tasks/rollback.yml").is_file() != bool(reason)
    assert reason == "" or len(reason.split()) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_argument_specs_describe_the_entry_points_that_exist(kind: str) -> None:
    """main, and rollback where there is one."""
    specs = yaml.safe_load(role(kind, "meta/argument_specs.yml").read_text())["argument_specs"]
    tasks = {path.stem for path in role(kind, "tasks").glob("*.yml")}
    assert "main" in specs
    assert set(specs) <= tasks


@pytest.mark.parametrize("kind", KINDS)
def test_role_backs_up_before_it_applies(kind: str) -> None:
    """In every role that has steps of its own."""
    if not role(kind, "files/steps.py").exists():
        assert kinds()[kind].NO_ROLLBACK
        return
    tasks = yaml.safe_load(role(kind, "tasks/main.yml").read_text())
    steps = [task["reconciler_step"]["step"] for task in tasks if "reconciler_step" in task]
    assert steps == ["backup", "apply"]
    assert "no_log" not in tasks[0] or tasks[0]["no_log"]


def node_side() -> list[Path]:
    """Every file that runs on nodes."""
    found = [probe_path(kind) for kind in KINDS]
    found += sorted((ROOT / "roles").glob("*/files/*.py"))
    return [
        *found,
        *(path for path in sorted((RECONCILER / "node").glob("*.py")) if path.name != "__init__.py"),
    ]


@pytest.mark.parametrize("path", node_side(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_runs_on_nodes_is_python_3_6_and_standard_library(path: Path) -> None:
    """Syntax of 3.6, and no import that a node may lack."""
    tree = ast.parse(path.read_text(), feature_version=(3, 6))
    late = {"dataclasses", "zoneinfo", "tomllib", "graphlib", "contextvars"}
    for item in ast.walk(tree):
        imported: list[str] = []
        if isinstance(item, ast.Import):
            imported = [alias.name for alias in item.names]
        if isinstance(item, ast.ImportFrom):
            assert item.module != "__future__"
            imported = [str(item.module)]
        for name in imported:
            assert name.split(".")[0] in STANDARD - late, f"{name} in line {item.lineno}"
        assert not isinstance(item, ast.NamedExpr | ast.JoinedStr | ast.AnnAssign), f"line {item.lineno}"


STANDARD = {
    "_json", "_sha2", "_sha256", "_signal", "_sqlite3", "ast", "base64", "contextlib", "errno", "fcntl", "fnmatch", "glob", "grp", "hashlib", "io", "json", "os", "plistlib", "pwd", "re", "select",
    "shlex", "shutil", "signal", "sqlite3", "stat", "subprocess", "sys", "tarfile", "tempfile", "time", "types", "urllib", "zipfile",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_probe_has_the_two_functions_and_says_what_it_compares(kind: str) -> None:
    """observe(args, connection) and changes(declared, facts)."""
    tree = ast.parse(probe_path(kind).read_text())
    functions = {item.name: len(item.args.args) for item in tree.body if isinstance(item, ast.FunctionDef)}
    assert (functions["observe"], functions["changes"]) == (2, 2)
    assert any(
        isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "COMPARED" for item in tree.body
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kind_has_cases(kind: str) -> None:
    """One in sync, and two that are not."""
    found = cases(kind)
    assert [case for case in found if not case["changes"]]
    assert len([case for case in found if case["changes"]]) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_kind_has_a_scenario_on_a_node(kind: str) -> None:
    """Molecule runs the role itself."""
    scenario = yaml.safe_load((ROOT / "molecule" / kind / "molecule.yml").read_text())
    assert scenario


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_documented(kind: str) -> None:
    """Under its name and check type, with every field of its own."""
    text = (ROOT / "docs" / "kinds.md").read_text()
    heading = f"## {kind} ({kinds()[kind].CHECK_TYPE})"
    assert heading in text
    chapter = text.split(heading)[1].split("\n## ")[0]
    common = set(
        next(model for model in kinds()[kind].__mro__ if model.__name__ == "Declaration").model_fields
    )  # type: ignore[attr-defined]
    for name, field in kinds()[kind].model_fields.items():
        if name not in common:
            assert f"`{field.alias or name}" in chapter, name


def test_nobody_but_the_kind_knows_its_name() -> None:
    """No branch on a kind's name anywhere else: neither in Python nor in the playbooks."""
    own = {RECONCILER / "kinds" / kind for kind in KINDS}
    for path in sorted(RECONCILER.rglob("*.py")):
        if any(directory in path.parents for directory in own) or "scaffold_files" in path.parts:
            continue
        for item in ast.walk(ast.parse(path.read_text())):
            if isinstance(item, ast.Compare | ast.Dict | ast.Subscript | ast.Match):
                literals = {leaf.value for leaf in ast.walk(item) if isinstance(leaf, ast.Constant)}
                # "ssh" is a transport of Ansible's, too: there its connection plugins are meant.
                known = set(KINDS) - ({"ssh"} if "plugins" in path.parts else set())
                assert not literals & known, f"{path.name}:{item.lineno}"
    for path in sorted((ROOT / "playbooks").rglob("*.yml")):
        text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        assert not re.findall(rf"['\"/ ]({'|'.join(KINDS)})['\"/]", text), path.name


def test_files_and_functions_stay_small() -> None:
    """About thirty lines a function, five hundred a file at the very most."""
    for path in [*sorted(RECONCILER.rglob("*.py")), *sorted((ROOT / "roles").rglob("*.py"))]:
        text = path.read_text()
        # The heartbeat program is one file on purpose: it is replaced on the node in one step, while timers start it.
        assert text.count("\n") <= 500 or path.parts[-3:] == ("heartbeat", "files", "heartbeat.py"), path
        for item in ast.walk(ast.parse(text)):
            if isinstance(item, ast.FunctionDef):
                length = (item.end_lineno or 0) - item.lineno
                assert length <= 50, f"{path.name}: {item.name} has {length} lines"
