"""Commands that are asked: what they are told, what they may say, and that nothing of them is left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from reconciler.analyze import Analyzer
from reconciler.model import ResourceId
from reconciler.settings import AnalysisSettings
from tests.unit.analyzers import ANSWER, executable, question
from tests.unit.support import ROOT

JQ = ResourceId("node-1", "tool", "jq")
GOOD = json.dumps(ANSWER)


def analyzer(*programs: Path, **given: Any) -> Analyzer:
    commands = tuple((str(program), "-p") for program in programs)
    return Analyzer(AnalysisSettings(commands=commands, **given))


def ask(path: Path, source: str, **given: Any) -> tuple[str, str]:
    """Who answered, and the first note."""
    asked = analyzer(executable(path, "judge", source), **given)
    found = asked.analyze([question()], 20)[JQ]
    return found.backend, next(iter(asked.notes[JQ]), "")


@pytest.mark.parametrize(
    "said",
    [
        GOOD,
        f"Let me see {{ok}}.\n\n{GOOD}\nHope this helps!",
        f"```json\n{GOOD}\n```\n",
        f"a `{{}}`-free ```\n{GOOD}```",
    ],
)
def test_one_json_object_is_an_answer_with_and_without_words_around(tmp_path: Path, said: str) -> None:
    backend, note = ask(tmp_path, f"print({said.replace('{}', 'brace')!r})")
    assert (backend, note) == (f"command {tmp_path}/judge", "")


BAD = {
    "rubbish": ("print('I cannot say')", "no JSON objects"),
    "nothing": ("pass", "no JSON objects"),
    "two objects": (f"print({GOOD!r} * 2)", "2 JSON objects"),
    "the question again": ("import sys; print(sys.stdin.read())", "JSON objects"),
    "wrong schema": ("print('{\"severity\": 9, \"root_cause\": \"x\"}')", "wrong severity"),
    "not UTF-8": ("import sys; sys.stdout.buffer.write(b'\\xff{}')", "not UTF-8"),
    "exit 1": (f"import sys; print({GOOD!r}); sys.exit('no credit left')", "it ended with 1: no credit left"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "it ended with -9: without a word"),
    "10 MB": ("import sys\nfor _ in range(10): sys.stdout.write('x' * 1_000_000)", "longer than"),
    "endless": ("while True: print('x' * 9999)", "longer than"),
    "braces": ("print('{' * 900_000)", "no JSON objects"),
    "deep": ("print('{\"a\":[' * 100_000)", "no JSON objects"),
    "hang": ("import time; time.sleep(60)", "did not end within 0.7 s"),
    "stubborn": (
        "import signal, time\nfor n in (15, 2, 1): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
        "did not end within 0.7 s",
    ),
    "closed and hanging": ("import os, time; os.close(1); os.close(2); time.sleep(60)", "did not end within 0.7 s"),
    "endless complaint": ("import sys\nwhile True: sys.stderr.write('x' * 9999)", "did not end within 0.7 s"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_unavailable(tmp_path: Path, name: str) -> None:
    """In time, with the reason."""
    source, reason = BAD[name]
    before = time.monotonic()
    backend, note = ask(tmp_path, source, timeout="0.7s" if "0.7" in reason else "15s")
    assert backend == "rules"
    assert reason in note
    assert time.monotonic() - before < 8


def test_a_command_that_is_not_there_or_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    asked = Analyzer(AnalysisSettings(commands=(("no-such-judge",), (str(tmp_path / "text"),), ("a\0b",))))
    assert asked.analyze([question()], 20)[JQ].backend == "rules"
    first, second, third = asked.notes[JQ]
    assert "cannot be started: No such file" in first
    assert "cannot be started: Permission denied" in second
    assert "cannot be started" in third


def test_the_next_command_is_asked(tmp_path: Path) -> None:
    """In the order of the settings."""
    bad = executable(tmp_path, "mm", "print('no')")
    good = executable(tmp_path, "claude-glm", f"print({GOOD!r})")
    asked = analyzer(bad, good)
    assert asked.analyze([question()], 20)[JQ].backend == f"command {good}"
    assert len(asked.notes[JQ]) == 1


TELLS = f"""
import json, os, sys
told = {{"argv": sys.argv[1:], "stdin": sys.stdin.read(), "env": dict(os.environ), "cwd": os.getcwd(),
        "there": os.listdir(), "session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid()}}
open(SAID, "w").write(json.dumps(told))
print({GOOD!r})
"""


def test_what_a_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt on standard input, its own arguments, few variables, an empty directory, a session of its own."""
    monkeypatch.setenv("RECONCILER_DB", "/srv/secret.db")
    monkeypatch.setenv("MM_KEY", "for the judge")
    monkeypatch.setenv("OTHER", "not for it")
    monkeypatch.setenv("LANG", "C.UTF-8")
    program = executable(tmp_path, "judge", TELLS)
    analyzer(program, environment=("MM_KEY",)).analyze([question()], 20)
    told = json.loads((tmp_path / "judge.said").read_text())
    assert told["argv"] == ["-p"]
    assert "ISSUE (data only): {" in told["stdin"]
    set_by_python = {"LC_CTYPE"}
    assert set(told["env"]) - set_by_python == {"PATH", "HOME", "LANG", "MM_KEY"}
    assert (told["there"], told["session"], told["group"]) == ([], True, True)
    assert not Path(told["cwd"]).exists()


def test_no_shell_reads_the_words(tmp_path: Path) -> None:
    program = executable(tmp_path, "judge", TELLS)
    words = (str(program), "$(touch pwned)", "; touch pwned", "*")
    Analyzer(AnalysisSettings(commands=(words,))).analyze([question()], 20)
    assert json.loads((tmp_path / "judge.said").read_text())["argv"] == list(words[1:])
    assert not list(Path.cwd().iterdir())


FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-I", "-c", "import time; time.sleep(60)"]
plain = subprocess.Popen(sleep)
grand = subprocess.Popen([sys.executable, "-I", "-c", f"import subprocess; p = subprocess.Popen({sleep!r}); "
                          "print(p.pid, flush=True); p.wait()"], stdout=subprocess.PIPE)
away = subprocess.Popen(sleep, start_new_session=True)
ids = [os.getpid(), plain.pid, grand.pid, int(grand.stdout.readline()), away.pid]
open(SAID + ".new", "w").write(" ".join(map(str, ids)))
os.rename(SAID + ".new", SAID)
"""


def is_alive(pid: int) -> bool:
    """A process that is only waiting to be reaped is none."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_children_do_not_outlive_the_timeout(tmp_path: Path) -> None:
    """Neither a child, nor a grandchild, nor one that went into a session of its own."""
    program = executable(tmp_path, "judge", FAMILY + "time.sleep(60)\n")
    asked = analyzer(program, timeout="4s")
    assert asked.analyze([question()], 20)[JQ].backend == "rules"
    pids = list(map(int, (tmp_path / "judge.said").read_text().split()))
    assert len(pids) == 5
    assert gone(pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_children_left_behind_by_a_good_answer_are_ended_and_not_waited_for(tmp_path: Path) -> None:
    """They hold standard output open; the answer is there all the same."""
    source = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(60)"])
open(SAID, "w").write(str(child.pid))
print({GOOD!r}, flush=True)
"""
    before = time.monotonic()
    backend, _note = ask(tmp_path, source)
    assert backend != "rules"
    assert time.monotonic() - before < 12
    assert gone([int((tmp_path / "judge.said").read_text())])


def test_a_command_that_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    """However long the question is."""
    program = executable(tmp_path, "judge", f"print({GOOD!r})")
    asked = analyzer(program)
    long = {f"field-{number}": "some words " * 100 for number in range(40)}
    assert asked.analyze([question(desired=long)], 20)[JQ].backend != "rules"


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    """A pass every five minutes for months."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("counts descriptors in /proc")
    asked = analyzer(executable(tmp_path, "judge", "print('no')"))
    asked.analyze([question()], 20)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        asked.analyze([question()], 20)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_a_command_does_not_outlive_the_process_that_asked(tmp_path: Path) -> None:
    """A pass that is interrupted leaves no agent behind that goes on spending."""
    source = "import os, time\nopen(SAID, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    program = executable(tmp_path, "judge", source)
    code = f"""
import threading, time
from pathlib import Path
from reconciler.analyze import Analyzer
from reconciler.settings import AnalysisSettings
from tests.unit.analyzers import question
asked = Analyzer(AnalysisSettings(commands=(({str(program)!r},),)))
threading.Thread(target=asked.analyze, args=([question()], 60), daemon=True).start()
said = Path({str(tmp_path)!r}) / "judge.said"
while not (said.exists() and said.read_text()):
    time.sleep(0.02)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, cwd=ROOT)
    assert gone([int((tmp_path / "judge.said").read_text())])
