"""The command: what it lists, how it ends, and that standard output holds one thing only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from reconciler import __version__, runner
from reconciler.cli import app
from reconciler.lease import Lease
from reconciler.model import RunError
from reconciler.store import Store
from tests.unit.support import ROOT, Fleet, Said, reconcile

VALID = "wrappers: [{name: w, nodes: node-1, dest: ~/w, content: x}]\n"


def program(*words: str, cwd: Path | None = None) -> Said:
    """The command as a program of its own."""
    argv = [sys.executable, "-c", "from reconciler.cli import main; main()", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=cwd, timeout=60, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


def words_of(text: str) -> set[str]:
    """Options and commands in a help text."""
    return set(re.findall(r"--?[a-z-]+|[a-z]+", re.sub(r"\x1b\[[0-9;]*m", "", text)))


def test_help_lists_every_command_and_option() -> None:
    """And the exit codes."""
    text = program("--help").out
    commands = {"validate", "status", "events", "explain", "init", "schema"}
    options = {
        "--once",
        "--check",
        "--limit",
        "--kind",
        "--desired",
        "--inventory",
        "--db",
        "--output",
        "--version",
    }
    assert commands | options <= words_of(text)
    assert "Exit codes: 0" in text
    assert commands <= set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", sorted(get_command(app).commands))  # type: ignore[attr-defined]
def test_every_command_explains_itself_and_is_documented(command: str) -> None:
    """One line at least, in the help and in docs/commands.md."""
    said = reconcile(command, "--help")
    assert said.code == 0
    assert len(said.out.splitlines()) > 3
    assert f"`reconcile {command}" in (ROOT / "docs" / "commands.md").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["--no-such-option"],
        ["validat"],
        ["--output", "xml", "validate"],
        ["events", "--count", "0"],
        ["explain"],
        ["--limit"],
    ],
)
def test_usage_errors_end_with_one(words: list[str], tmp_path: Path) -> None:
    """2 means drift."""
    said = program(*words, cwd=tmp_path)
    assert (said.code, said.out) == (1, "")
    assert "Usage" in said.err or "Error" in said.err


def test_version() -> None:
    """The package's."""
    assert reconcile("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--limit", "node-11"], "--limit: ", "did you mean 'node-1'?"),
        (["--limit", "node-1,wrkers"], "--limit: ", "did you mean 'workers'?"),
        (["--kind", "wraper"], "--kind: there is no kind 'wraper'", "did you mean 'wrapper'?"),
        (["--kind", "tool,servce"], "--kind: there is no kind 'servce'", "did you mean 'service'?"),
        (["--kind", ","], "--kind names no kind", "known: "),
        (["--desired", "desird"], "no desired state at desird", "name it with --desired"),
        (["--inventory", "hosts"], "no inventory at hosts", "name it with --inventory"),
    ],
)
def test_mistakes_in_the_scope_give_hints(fleet: Fleet, words: list[str], message: str, hint: str) -> None:
    """Nothing is touched, exit code 1; in JSON, too, one document."""
    fleet.write(VALID)
    for output in ("text", "json"):
        said = reconcile("--once", *words, "--db", "r.db", "--output", output)
        assert said.code == 1
        assert f"error: {message}" in said.err
        assert f"hint: {hint}" in said.err
    assert said.json()["problems"][0]["hint"].startswith(hint)
    assert not (fleet.directory / "r.db").exists()


def test_options_of_a_pass_are_refused_with_a_command(fleet: Fleet) -> None:
    """They would be ignored silently otherwise."""
    fleet.write(VALID)
    said = reconcile("--check", "validate")
    assert said.code == 1
    assert "--check goes with a pass, not with the command validate" in said.err


def test_options_may_stand_before_or_after_the_command(fleet: Fleet) -> None:
    """The nearer one wins."""
    fleet.write(VALID)
    assert reconcile("--output", "json", "validate").json()["exit_code"] == 0
    assert reconcile("--desired", "nowhere", "validate", "--desired", "desired_state").code == 0


def test_settings_come_from_environment_and_file(fleet: Fleet) -> None:
    """Command line over environment over file; what is unknown or wrong is an error with its name."""
    fleet.write(VALID)
    fleet.desired.rename(fleet.directory / "wanted")
    assert reconcile("validate").code == 1
    assert reconcile("validate", env={"RECONCILER_DESIRED": "wanted"}).code == 0
    settings = fleet.directory / "reconciler.toml"
    settings.write_text('desired = "wanted"\n')
    assert reconcile("validate").code == 0
    assert reconcile("validate", "--desired", "elsewhere").code == 1
    for text, message in (
        ('desird = "x"\n', "unknown setting 'desird'"),
        ("forks = 0\n", "the setting forks (RECONCILER_FORKS"),
        ('interval = "soon"\n', "the setting interval"),
        ('interval = "0s"\n', "has to be longer than nothing"),
        ("forks = \n", "this is not TOML"),
    ):
        settings.write_text(text)
        said = reconcile("validate")
        assert said.code == 1
        assert message in said.err


def test_ansible_that_cannot_run_is_said_in_one_line(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 and one JSON document; not a traceback."""
    fleet.write(VALID)

    def broken(*_given: object, **_named: object) -> None:
        raise RunError("observe.yml: the interpreter is gone")

    monkeypatch.setattr(runner, "run", broken)
    said = reconcile("--once", "--db", "r.db", "--output", "json")
    assert said.code == 1
    assert said.json()["problems"][0]["message"] == "observe.yml: the interpreter is gone"
    assert "the interpreter is gone" in said.err


def test_second_pass_at_once_is_told_who_is_at_work(fleet: Fleet) -> None:
    """It ends at once."""
    fleet.write(VALID)
    with Lease(fleet.directory / "r.db", "run-1"):
        said = reconcile("--once", "--db", "r.db")
    assert said.code == 1
    assert "another pass is under way: run-1" in said.err


def test_explain_says_what_is_declared_and_suggests(fleet: Fleet) -> None:
    """For what is declared, and for what is mistyped."""
    fleet.write(VALID)
    Store(fleet.directory / "r.db").close()
    document = reconcile("explain", "node-1/wrapper/w", "--db", "r.db", "-o", "json").json()
    assert document["declared_at"] == "desired_state/a.yml:1:12"
    assert document["condition"] is None
    assert "body" not in document["desired"]
    for text in ("node-1/wrapper/v", "node-1/wraper/w", "nonsense"):
        said = reconcile("explain", text, "--db", "r.db")
        assert said.code == 1
        assert "node-1/wrapper/w" in said.err


def test_init_writes_a_valid_desired_state_and_never_overwrites(tmp_path: Path) -> None:
    """What it writes is used as it is."""
    directory = tmp_path / "new"
    assert reconcile("init", str(directory)).code == 0
    said = program("validate", "--output", "json", cwd=directory)
    assert said.code == 0, said.err
    assert json.loads(said.out)["resources"]
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    (directory / "reconciler.toml").unlink()
    again = reconcile("init", str(directory))
    assert again.code == 1
    assert "exists already" in again.err
    assert not (directory / "reconciler.toml").exists()
    assert all(path.read_bytes() == body for path, body in before.items() if path.exists())
