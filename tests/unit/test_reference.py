"""Every command is in the documentation, and the shell completes what can be known."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from reconciler import kinds
from reconciler.cli import completion, reference
from reconciler.store import Store, now_text
from tests.unit.support import ROOT


def test_reference_is_current() -> None:
    """`make reference` was run after the last change of a command."""
    assert (ROOT / "docs/reference.md").read_text() == reference.text()


def test_reference_has_every_command_with_every_option() -> None:
    """As the program's own help says them."""
    page = reference.text()
    for words in ([], *[[name] for name in ("now", "explain", "events", "backup", "suspend")]):
        argv = [sys.executable, "-m", "reconciler", *words, "--help"]
        env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
        said = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60, check=True).stdout
        found = {word.strip(",") for word in said.split() if word.startswith("--") and len(word) > 2}
        chapter = page.split(f"\n## {' '.join(['reconcile', *words])}", 1)[1].split("\n## ", 1)[0]
        known = found - {"--help", "--install-completion", "--show-completion", "--no-wait"}
        assert all(option in chapter for option in known), (words, known)


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that has seen two nodes."""
    path = tmp_path / "r.db"
    monkeypatch.setenv("RECONCILER_DB", str(path))
    now = now_text(datetime.now(UTC))
    with closing(Store(path)) as store:
        store.set_conditions(
            {
                "issue_key": key, "node": key.split("/")[0], "kind": key.split("/")[1], "name": key.split("/")[2],
                "status": "True", "reason": "", "message": "", "since": now, "seen": now, "digest": "", "details": {},
            }
            for key in ("node-1/tool/claude", "node-1/tool/mm", "node-2/wrapper/w")
        )  # fmt: skip


@pytest.mark.usefixtures("seen")
def test_completion_offers_what_passes_have_seen() -> None:
    """Part by part for targets."""
    assert completion.node("node-") == ["node-1", "node-2"]
    assert completion.target("no") == ["node-1", "node-2"]
    assert completion.target("node-1/") == ["node-1/tool"]
    assert completion.target("node-1/tool/") == ["node-1/tool/claude", "node-1/tool/mm"]
    assert completion.resource("node-2") == ["node-2/wrapper/w"]
    assert completion.kind("schema,to") == ["schema,tool"]
    assert completion.kind("") == kinds.names()


def test_completion_is_silent_where_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the settings are wrong: the command itself will say so."""
    assert completion.node("") == []
    monkeypatch.chdir(tmp_path)
    Path("reconciler.toml").write_text("nonsense = [")
    assert completion.target("") == []


@pytest.mark.usefixtures("seen")
def test_the_shell_itself_completes() -> None:
    """As bash asks: through the environment."""
    env = {**os.environ, "_RECONCILE_COMPLETE": "complete_bash", "COMP_WORDS": "reconcile explain node-2", "COMP_CWORD": "2"}  # fmt: skip
    argv = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'reconcile'; from reconciler.cli import app; app(prog_name='reconcile')",
    ]
    said = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert said.stdout.split() == ["node-2/wrapper/w"], said.stderr
