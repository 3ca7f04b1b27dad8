"""The door to ansible-runner: environment, private workspace, and a child that dies or hangs."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from reconciler import runner
from reconciler.model import RunError
from reconciler.runner import Result, Settings, Workspace
from tests.unit.support import ROOT


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An inventory that nobody reads here."""
    return Settings(tmp_path / "inventory", forks=7)


def environment(settings: Settings) -> dict[str, str]:
    """What Ansible would get."""
    return runner._environment(settings)


# --- environment ------------------------------------------------------------------------------------


def test_what_correctness_needs_is_set(settings: Settings) -> None:
    """Roles, plugins, forks."""
    found = environment(settings)
    roles = found["ANSIBLE_ROLES_PATH"].split(os.pathsep)
    assert (Path(roles[0]) / "wrapper" / "tasks" / "main.yml").exists()
    assert (Path(found["ANSIBLE_ACTION_PLUGINS"]) / "reconciler_step.py").exists()
    assert found["ANSIBLE_FORKS"] == "7"
    assert found["ANSIBLE_PIPELINING"] == "True"
    assert "ControlPersist" in found["ANSIBLE_SSH_ARGS"]
    assert "ANSIBLE_CONFIG" not in found


def test_users_configuration_is_respected(settings: Settings) -> None:
    """What their ansible.cfg says about connections is not overridden; its roles come after ours."""
    Path("ansible.cfg").write_text("[ssh_connection]\nssh_args = -F mine\n")
    found = environment(settings)
    assert found["ANSIBLE_CONFIG"] == str(Path("ansible.cfg").resolve())
    assert "ANSIBLE_SSH_ARGS" not in found
    assert found["ANSIBLE_PIPELINING"] == "True"


def test_users_environment_is_respected(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their variables win over our taste, and their roles are found after ours."""
    monkeypatch.setenv("ANSIBLE_SSH_ARGS", "-F mine")
    monkeypatch.setenv("ANSIBLE_PIPELINING", "False")
    monkeypatch.setenv("ANSIBLE_ROLES_PATH", "/srv/roles")
    found = environment(settings)
    assert not {"ANSIBLE_SSH_ARGS", "ANSIBLE_PIPELINING"} & set(found)
    assert found["ANSIBLE_ROLES_PATH"].endswith(f"{os.pathsep}/srv/roles")


def test_configuration_is_found_where_ansible_finds_it(
    settings: Settings, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable, the working directory, the home."""
    assert runner.user_configuration() is None
    (account / ".ansible.cfg").write_text("")
    assert runner.user_configuration() == account / ".ansible.cfg"
    Path("ansible.cfg").write_text("")
    assert runner.user_configuration() == Path("ansible.cfg").resolve()
    (account / "named.cfg").write_text("")
    monkeypatch.setenv("ANSIBLE_CONFIG", str(account / "named.cfg"))
    assert environment(settings)["ANSIBLE_CONFIG"] == str(account / "named.cfg")


def test_broken_configuration_is_left_to_ansible_to_complain_about(settings: Settings) -> None:
    """Ours is not to judge."""
    Path("ansible.cfg").write_text("no section = here\n")
    assert "ANSIBLE_PIPELINING" in environment(settings)


# --- workspace --------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    """Permissions."""
    return stat.S_IMODE(path.stat().st_mode)


def test_requests_are_private_and_gone_afterwards() -> None:
    """0700 and 0600, whatever the umask is; removed also when the run fails."""
    before = os.umask(0)
    try:
        with suppress(ZeroDivisionError), Workspace() as workspace:
            workspace.request("node-1", {"secret": "x"})
            directory = workspace.directory
            path = workspace.requests / "node-1.json"
            assert (mode(directory), mode(workspace.requests), mode(path)) == (0o700, 0o700, 0o600)
            assert json.loads(path.read_text()) == {"secret": "x"}
            raise ZeroDivisionError
    finally:
        os.umask(before)
    assert not directory.exists()


# --- the child --------------------------------------------------------------------------------------

Fake = Callable[[str], list[Result]]


@pytest.fixture
def fake(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Run a playbook with a child program of our own in place of ansible-runner's."""
    settings = Settings(settings.inventory, timeout=0.0)

    def run(
        body: str, timeout: float = 20.0, nodes: Sequence[str] = ("node-1",), **more: Any
    ) -> list[Result]:
        program = tmp_path / "child"
        program.write_text(f"#!{PYTHON}\nimport json, os, signal, subprocess, sys, time\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setattr(runner.sys, "executable", str(program))  # type: ignore[attr-defined]
        results: list[Result] = []
        with Workspace() as workspace:
            found = Settings(settings.inventory, timeout=timeout - 30)
            runner.run("observe.yml", nodes, workspace, found, results.append, **more)
        return results

    return run


PYTHON = sys.executable
LINE = '{"node": "node-1", "status": "ok", "data": {"x": 1}}'


def test_results_arrive_as_they_are_printed(fake: Fake) -> None:
    """One line each."""
    assert fake(f"print('{LINE}')\nprint('{LINE}')") == [Result("node-1", "ok", {"x": 1})] * 2


LETTER = f"""
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from reconciler import mailbox
box = Path(json.loads(sys.stdin.readline())["private_data_dir"])
def told(node, **data):
    print(json.dumps({{"node": node, "status": "ok", "data": data}}), flush=True)
"""


def test_answers_are_taken_from_the_mailbox_once_and_in_any_order(fake: Fake) -> None:
    """Ansible may tell of a delivery before it is read, or never; with the last answer nobody waits for it."""
    began = time.monotonic()
    found = fake(
        LETTER
        + "told('b', delivered=True)\ntime.sleep(0.3)\nassert mailbox.deliver(box, 'a', {'x': 1})\n"
        + "told('a', x=2)\nmailbox.deliver(box, 'b', {'x': 3})\ntold('c', x=4)\ntime.sleep(60)",
        nodes=("a", "b", "c"),
        one_each=True,
    )
    assert sorted((result.node, result.data["x"]) for result in found) == [("a", 1), ("b", 3), ("c", 4)]
    assert time.monotonic() - began < 30


def test_letter_left_just_before_the_end_is_read(fake: Fake) -> None:
    """Also where Ansible says no more."""
    body = LETTER + "assert mailbox.deliver(box, 'node-1', {'x': 1})"
    assert fake(body, one_each=True) == [Result("node-1", "ok", {"x": 1})]


def test_specification_reaches_the_child_on_its_standard_input(fake: Fake, tmp_path: Path) -> None:
    """Never on the command line; desired values are not in it at all."""
    fake(f"open('{tmp_path}/spec', 'w').write(json.dumps([sys.argv[1:], json.loads(sys.stdin.readline())]))")
    argv, found = json.loads((tmp_path / "spec").read_text())
    assert argv == ["-m", "reconciler.runner.child"]
    assert found["playbook"].endswith("playbooks/observe.yml")
    assert found["envvars"]["RECONCILER_GATE"].startswith(found["private_data_dir"])
    assert set(found["extravars"]) == {"reconciler_requests"}
    assert found["settings"]["suppress_env_files"] is True
    assert "rotate_artifacts" not in found


def test_private_variables_stay_out_of_the_child(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That process runs other people's plugins and writes its environment to a file."""
    private = [
        "OPENAI_API_KEY",
        "SIDECAR_TOKEN",
        "RECONCILER_DB",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL",
        "X_API_KEY",
    ]
    for name in [*private, "HARMLESS"]:
        monkeypatch.setenv(name, "value")
    fake(f"open('{tmp_path}/env', 'w').write(json.dumps(dict(os.environ)))")
    found = json.loads((tmp_path / "env").read_text())
    assert not set(private) & set(found)
    assert found["HARMLESS"] == "value"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.stderr.write('no such module'); sys.exit(3)", "no such module"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended badly"),
        ("os.close(0); sys.exit(5)", "ended badly"),
        ('print(\'{"error": "timeout (exit 254): too slow"}\')', "observe.yml: timeout"),
        ("print('not json')", "no result: b'not json'"),
    ],
)
def test_child_that_fails_becomes_a_run_error(fake: Fake, body: str, reason: str) -> None:
    """With what it printed."""
    with pytest.raises(RunError, match=reason):
        fake(body)


def test_results_before_a_bad_end_are_not_lost(fake: Fake, tmp_path: Path) -> None:
    """They were handed on when they arrived; the end is an error all the same."""
    seen: list[Any] = []
    with pytest.raises(RunError):
        seen += fake(f"print('{LINE}', flush=True); sys.exit(1)")
    assert tmp_path.exists()


def is_gone(pid: int) -> bool:
    """Whether a process ended (a zombie that nobody waits for counts as ended)."""
    for _ in range(100):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        if state.stdout.strip()[:1] in ("", "Z"):
            return True
        time.sleep(0.05)
    return False


def test_child_that_hangs_is_ended_with_everything_it_started(fake: Fake, tmp_path: Path) -> None:
    """Also where it does not listen to SIGTERM."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(1))\n"
        "child = subprocess.Popen(['sleep', '61'])\n"
        f"open('{tmp_path}/pids', 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)"
    )
    with pytest.raises(RunError, match="did not end in time"):
        fake(body, timeout=1.0)
    assert all(is_gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_what_outlives_the_child_is_ended_too(fake: Fake, tmp_path: Path) -> None:
    """A worker that was left behind must not go on changing nodes."""
    body = (
        "child = subprocess.Popen(['sleep', '62'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"open('{tmp_path}/pid', 'w').write(str(child.pid))\n"
        "sys.exit(1)"
    )
    with pytest.raises(RunError):
        fake(body)
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_exception_in_a_handler_ends_the_child(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens on this side, nothing runs on unwatched."""
    monkeypatch.setattr(runner, "Result", lambda *_given: 1 / 0)
    body = f"open('{tmp_path}/pid', 'w').write(str(os.getpid()))\nprint('{LINE}', flush=True)\ntime.sleep(60)"
    with pytest.raises(ZeroDivisionError):
        fake(body)
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert signal.getsignal(signal.SIGINT) is not None


def test_what_a_killed_pass_left_behind_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request files may hold secrets; those of a living one stay, and so does what is not ours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = "import sys; from reconciler.runner import Workspace; w = Workspace(); w.request('n', 1); print(w.directory, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as killed, Workspace() as living:  # fmt: skip
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        killed.kill()
        killed.wait()
        (tmp_path / "reconciler-foreign").mkdir()
        assert (left / "requests" / "n.json").exists()
        runner._sweep.cache_clear()
        with Workspace():
            assert not left.exists()
            assert living.directory.exists()
            assert (tmp_path / "reconciler-foreign").exists()
    assert sorted(entry.name for entry in tmp_path.glob("reconciler-*")) == ["reconciler-foreign"]


def test_workspace_is_gone_though_somebody_still_writes_there() -> None:
    """Ansible that was ended takes a moment to notice, and makes files meanwhile."""
    script = (
        "import os, sys, time\nend = time.monotonic() + 1.5\nn = 0\nhere = sys.argv[1] + '/artifacts'\nos.mkdir(here)\n"
        "while time.monotonic() < end:\n"
        "    n += 1\n"
        "    try:\n        open(f'{here}/{n}', 'w').close()\n"
        "    except OSError:\n        pass\n"
        "    if n == 500: print('begun', flush=True)\n"
    )
    with runner.Workspace() as workspace:
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(workspace.directory)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        assert writer.stdout.readline() == "begun\n"
    writer.communicate(timeout=60)
    assert not workspace.directory.exists()


def test_ansible_does_not_wait_for_somebody_who_was_gone_before_it_asked(tmp_path: Path) -> None:
    """Whoever started it was killed while it loaded: its parent is another one from the start."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    env = {
        **os.environ, "RECONCILER_GATE": str(tmp_path / "gate"), "RECONCILER_CHILD": str(gone.pid),
        "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "reconciler/plugins/callback"), "RECONCILER_VARS": "off",
        "ANSIBLE_ACTION_PLUGINS": str(ROOT / "reconciler/plugins/action"),
    }  # fmt: skip
    program = str(Path(sys.executable).parent / "ansible-playbook")
    argv = [program, "-i", "localhost,", "-c", "local", str(ROOT / "playbooks/observe.yml")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr
    assert "ok=" not in done.stdout


BUSY = """\
- hosts: all
  gather_facts: false
  tasks:
    - command: {argv: [sh, -c, "echo begun >> %s/begun; sleep 30"]}
"""


def running(word: str) -> list[int]:
    """Ansible's processes with that word on their command line."""
    found = subprocess.run(
        ["ps", "-e", "-ww", "-o", "pid=,stat=,args="], capture_output=True, text=True, timeout=10, check=True
    )
    rows = [row.split(None, 2) for row in found.stdout.splitlines()]
    return [
        int(pid)
        for pid, state, args in rows
        if "ansible-playbook" in args and word in args and "Z" not in state
    ]


@pytest.mark.parametrize("victim", ["child", "ansible"])
def test_workers_end_with_ansible_and_ansible_with_its_child(tmp_path: Path, victim: str) -> None:
    """However they end: workers have sessions of their own, and ansible-runner only ends Ansible's."""
    (tmp_path / "busy.yml").write_text(BUSY % tmp_path)
    env = {
        **os.environ, "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "reconciler/plugins/callback"),
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }  # fmt: skip
    program = str(Path(sys.executable).parent / "ansible-playbook")
    argv = [program, "-i", "one,two,three,", "-c", "local", str(tmp_path / "busy.yml")]
    # A process in between that ignores what a terminal says when it goes, as under nohup.
    script = (
        "import os, signal, subprocess, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "os.environ['RECONCILER_CHILD'] = str(os.getpid())\n"
        "child = subprocess.Popen(sys.argv[1:], start_new_session=True)\nprint(child.pid, flush=True)\nchild.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as started:
        assert started.stdout
        ansible = int(started.stdout.readline())
        begun = tmp_path / "begun"
        deadline = time.monotonic() + 30
        while not (begun.exists() and len(begun.read_text().split()) == 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(running(str(tmp_path))) == 5  # the one in between, Ansible, and three workers
        os.kill(started.pid if victim == "child" else ansible, signal.SIGKILL)
        deadline = time.monotonic() + 15
        while set(running(str(tmp_path))) - {started.pid} and time.monotonic() < deadline:
            time.sleep(0.05)
        left = sorted(set(running(str(tmp_path))) - {started.pid})
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        started.kill()
    assert left == []


def test_ansible_that_is_started_anew_in_a_directory_follows_its_own_starter(tmp_path: Path) -> None:
    """A look that needs privilege comes after one that was started ahead, whose variables ansible-runner has kept."""
    inventory = tmp_path / "hosts"
    inventory.write_text("one ansible_connection=local\n")
    settings, results = Settings(inventory), list[Result]()
    with Workspace() as workspace:
        workspace.start_ahead("observe.yml", settings)
        kept = workspace.directory / "env" / "envvars"
        deadline = time.monotonic() + 30
        while not kept.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "RECONCILER_GATE" in kept.read_text()
        workspace.request("one", {"batches": []})
        runner.run("observe.yml", ["one"], workspace, settings, results.append, become=True, one_each=True)
    assert [(result.node, result.status) for result in results] == [("one", "ok")]


def test_play_runs_on_those_that_something_is_asked_of(tmp_path: Path) -> None:
    """Nobody else of the inventory, and nobody whose request is answered already."""
    inventory = tmp_path / "hosts"
    inventory.write_text("[all]\none\ntwo\nthree\n[all:vars]\nansible_connection=local\n")
    results = list[Result]()
    with Workspace() as workspace:
        for name in ("one", "three"):
            workspace.request(name, {"batches": []})
        runner.run("observe.yml", ["one", "two"], workspace, Settings(inventory), results.append)
    assert {result.node for result in results if "reconciler" in result.data} == {"one"}
    assert {result.node for result in results} == {"one"}
