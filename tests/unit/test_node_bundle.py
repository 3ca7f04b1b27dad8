"""The one script of a round trip: it carries anything, isolates every probe, and runs on old Pythons."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler import node
from reconciler.kinds import names, probe_path
from tests.unit.support import ROOT, converge, look, on_node, step
from tests.unit.test_node_wrapper import declared

ECHO = "lib = None\ndef observe(args, connection):\n    return {'args': args, 'connection': connection}\n"


def runs(python: str) -> bool:
    """Whether the interpreter works (a version manager's stand-in may not)."""
    done = subprocess.run([python, "-c", ""], capture_output=True, check=False)
    return done.returncode == 0


def old_pythons() -> list[str]:
    """Interpreters between 3.6 and 3.8 on this machine, the oldest first."""
    found = [shutil.which(f"python3.{minor}") for minor in (6, 7, 8)]
    found += [
        str(path) for path in sorted(Path("~/.pyenv/versions").expanduser().glob("3.[678].*/bin/python"))
    ]
    return [path for path in found if path and runs(path)]


# Where a machine has no old interpreter, its own stands in: the syntax is checked for 3.6 elsewhere.
PYTHONS = [sys.executable, *old_pythons()[:1]]


def probes(tmp_path: Path, *sources: str, timeout: float = 10.0) -> list[dict[str, Any]]:
    """Answers of probes made from source text, in one bundle."""
    paths = {}
    for number, text in enumerate(sources):
        paths[f"k{number}"] = tmp_path / f"probe{number}.py"
        paths[f"k{number}"].write_text(text)
    request = {"probes": [{"kind": kind, "args": {}, "timeout": timeout} for kind in paths]}
    answers: list[dict[str, Any]] = on_node(paths, request)["probes"]
    return answers


texts = st.text(max_size=30) | st.sampled_from(
    ["{{ 7 * 7 }}", "{% raw %}", '"', "'''", '\\"\\', "\\u0041", "\n", "\r\n", "-n", "$HOME `id`", "%s %(x)s", "\u2028\u0085", "\U0001f600", "\x00"]
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("python", PYTHONS)
def test_any_value_survives_the_round_trip(tmp_path: Path, python: str) -> None:
    """Braces, quotes, newlines, other scripts: whatever a declaration holds, the node gets exactly that."""
    path = tmp_path / "echo.py"
    path.write_text(ECHO)
    batches: list[Any] = []

    @settings(max_examples=40)
    @given(values)
    def collect(value: Any) -> None:
        batches.append(value)

    collect()
    items = [{"kind": "echo", "args": value, "timeout": 10} for value in batches]
    answer = on_node({"echo": path}, {"probes": items}, connection={"said": batches}, python=python)
    assert [probe["facts"]["args"] for probe in answer["probes"]] == batches
    assert answer["probes"][0]["facts"]["connection"]["said"] == batches


def test_probes_that_fail_are_alone_in_it(tmp_path: Path) -> None:
    """Raising, ending the program, printing, hanging, answering what cannot be sent: the others answer."""
    failing = {
        "raise ValueError('no\\nluck')": "ValueError: no\nluck",
        "import sys; sys.exit(3)": "SystemExit: 3",
        "import time; time.sleep(60)": "the probe did not answer within 0.5 s",
        "import time\n    try: time.sleep(60)\n    except Exception: pass": "the probe did not answer within 0.5 s",
        "return {'a': {1, 2}}": "TypeError: set has no place in JSON",
        "raise KeyError('x')": "KeyError: 'x'",
        "import no_such_module": "No module named 'no_such_module'",
    }
    sources = [f"lib = None\ndef observe(args, connection):\n    {body}\n" for body in failing]
    noisy = "lib = None\nimport os\ndef observe(args, connection):\n    print('noise'); os.write(1, b'more'); return {'ok': 1}\n"
    broken = "def observe(:\n"
    answers = probes(tmp_path, *sources, broken, noisy, ECHO, timeout=0.5)
    for answer, error in zip(answers, failing.values(), strict=False):
        assert error in answer["error"]
        assert "facts" not in answer
    assert "SyntaxError" in answers[-3]["error"]
    assert answers[-2]["facts"] == {"ok": 1}
    assert answers[-1]["facts"] == {"args": {}, "connection": {}}


def test_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """A grandchild that keeps the pipe open hangs nobody."""
    mark = tmp_path / "mark"
    body = f"lib.run(['sh', '-c', 'sleep 47 & echo $! > {mark}; wait'], timeout=60)"
    (answer,) = probes(tmp_path, f"lib = None\ndef observe(args, connection):\n    {body}\n", timeout=0.7)
    assert "did not answer" in answer["error"]
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", mark.read_text().strip()], capture_output=True, text=True, check=False
    )
    assert state.stdout.strip()[:1] in ("", "Z")


def test_environment_of_the_node_is_set_for_probes(tmp_path: Path) -> None:
    """From the inventory; PYTHON* variables of the session do not count."""
    path = tmp_path / "p.py"
    path.write_text(
        "lib = None\nimport os, sys\ndef observe(a, c):\n    return {'x': os.environ.get('X'), 'isolated': sys.flags.isolated}\n"
    )
    request = {"probes": [{"kind": "p", "args": {}, "timeout": 5}], "environment": {"X": "y"}}
    answer = on_node({"p": path}, request, env={"PYTHONPATH": "/nowhere", "PYTHONSTARTUP": "/x"})
    assert answer["probes"][0]["facts"] == {"x": "y", "isolated": 1}


@pytest.mark.parametrize(
    ("status", "out", "err", "reason"),
    [
        (127, "", "sh: python3: not found", "no Python on the node"),
        (1, "", "Permission denied", "exit status 1 and no facts: Permission denied"),
        (0, "motd only", "", "exit status 0 and no facts: motd only"),
        (0, "", "", "nothing at all"),
        (0, "@@n@@{", "", "no facts"),
    ],
)
def test_answer_that_is_none_says_what_came_instead(status: int, out: str, err: str, reason: str) -> None:
    """A login message, a missing interpreter, half an answer."""
    with pytest.raises(node.BadAnswerError, match=reason):
        node.parse("@@n@@", status, out, err)


def test_noise_around_the_answer_is_ignored() -> None:
    """Shell profiles print."""
    assert node.parse("@@n@@", 0, 'hello\n@@n@@{"a": 1}@@n@@\nbye', "warning") == {"a": 1}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("kind", names())
def test_every_probe_answers_on_every_python(kind: str, python: str) -> None:
    """Facts or a reason in words, never a failure of the program itself."""
    args: dict[str, dict[str, Any]] = {
        "heartbeat": {
            "agent": "a",
            "settings": {"label": "a", "late_after": 60},
            "manager": "systemd",
            "scope": "user",
            "state": "~/a.json",
            "ledger": "~/l.json",
            "timer_files": {"unit": "a", "files": [], "sha256": ""},
            "files": {
                name: {"path": "~/x", "sha256": "", "link": "~/y"}
                for name in ("file", "program", "config", "launcher")
            },
        },
        "schema": {"database": "~/d.db", "tables": {}},
        "service": {
            "unit_name": "x.service",
            "unit_path": "~/x.service",
            "scope": "user",
            "manager": "systemd",
            "restart_on": [],
        },
        "ssh": {},
        "tool": {"command": "sh", "version_args": ["-c", "echo 1.2.3"], "version_regex": None, "path": []},
        "wrapper": {"dest": "~/w"},
    }
    answer = look(kind, args[kind], python=python)
    error = answer.get("error", "")
    assert ("facts" in answer) or "systemctl" in error or "systemd does not answer" in error


@pytest.mark.parametrize("python", PYTHONS)
def test_steps_run_on_every_python(account: Path, python: str) -> None:
    """Back up, apply, undo: a file and a database."""
    dest = account / "w"
    dest.write_text("old\n")
    assert converge("wrapper", declared(dest), python=python)["result"]["changed"]
    assert step("rollback", "wrapper", declared(dest), python=python)["result"]["changed"]
    assert dest.read_text() == "old\n"
    column = {
        "declared": "TEXT",
        "type": "TEXT",
        "notnull": False,
        "default": None,
        "key": False,
        "refused": "",
    }
    for attempt in ("s1", "s2"):
        columns = {"a": column, attempt: column}
        resource = {"database": "~/d.db", "tables": {"t": {"columns": columns, "indexes": {}}}}
        answer = converge("schema", resource, python=python, attempt=attempt)
        assert answer["result"]["changed"], answer
    assert (account / "d.db.s2.bak").exists()


def test_bundle_writes_nothing_to_the_node(account: Path) -> None:
    """Observing is read-only."""
    look("wrapper", {"dest": "~/w"})
    look("tool", {"command": "sh", "version_args": [], "version_regex": None, "path": []})
    assert list(account.iterdir()) == []


def test_request_is_plain_ascii_python() -> None:
    """Whatever the locale of the node's session is."""
    script = node.bundle(
        {"wrapper": probe_path("wrapper")}, {"nonce": "n", "probes": [{"\u4e2d": "\U0001f600"}]}
    )
    assert script.isascii()
    assert json.dumps({"\u4e2d": 1}) in script or "\\u4e2d" in script
    assert (ROOT / "reconciler" / "node" / "lib.py").read_text().isascii()
