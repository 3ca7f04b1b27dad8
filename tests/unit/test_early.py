"""The child that is started before anything else is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from reconciler import early


@pytest.fixture(autouse=True)
def nobody_waits() -> Iterator[None]:
    """Before and after."""
    early._end()
    yield
    early._end()


def test_single_pass_finds_its_child_started() -> None:
    """One; the next that is wanted is a new one."""
    early.begin(["--once", "--limit", "x"])
    early.begin(["--once"])
    (waiting,) = early._waiting
    first = early.child()
    assert first is waiting
    second = early.child()
    assert second.pid != first.pid
    for process in (first, second):
        process.communicate(b"")
        assert process.returncode == 0, "one that nobody has a use for ends in order"


def test_other_commands_start_nothing() -> None:
    """They have no use for it."""
    early.begin(["status"])
    assert early._waiting == []


def test_child_that_died_meanwhile_is_replaced() -> None:
    """Somebody ran out of memory, say."""
    early.begin(["--check"])
    early._waiting[0].kill()
    early._waiting[0].wait()
    dead = early._waiting[0]
    alive = early.child()
    assert alive is not dead
    dead.communicate()
    alive.communicate(b"")
    assert alive.returncode == 0


def test_child_without_a_use_is_ended_with_the_command() -> None:
    """Here since the settings are wrong."""
    script = "import sys; from reconciler import early; early.begin(['--once']); print(early._waiting[0].pid, flush=True); sys.exit(1)"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.stdout), 0)


def test_nothing_heavy_is_loaded_before_it_is_started() -> None:
    """Otherwise it would not be early."""
    script = "import sys, reconciler.__main__; print(sorted({'pydantic', 'rich', 'ansible', 'jinja2', 'typer'} & set(sys.modules)))"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.strip() == "[]"


def test_ctrl_c_while_it_loads_is_no_traceback() -> None:
    """It takes half a second, and people are quick."""
    script = (
        "import sys\nclass Quick:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'reconciler.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Quick())\nsys.argv = ['reconcile', '--once']\n"
        "from reconciler.__main__ import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted: nothing was begun\n")
