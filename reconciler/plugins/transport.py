"""One round trip to a node over whatever connection Ansible has to it.

Runs in Ansible's forked workers. A hung control master must not hang a pass and a node that never
answers must not hold a worker for ever, so every conversation has a deadline of our own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase

from reconciler import node
from reconciler.plugins import mux

FRESH_LOGIN_SECONDS = 15.0
NO_MULTIPLEXING = "-o ControlMaster=no -o ControlPath=none"


_WRAPPING = re.compile(
    r"^(Task failed: )?(Failed to connect to the host via ssh: |Data could not be sent to remote host .{1,300}?"
    r" Make sure this host can be reached over ssh: )?"
)

# What ssh says, and what a person can do about it.
_WAYS_OUT = {
    "Host key verification failed": "log in once by hand, and compare the key that it shows",
    "Permission denied": "is the right user and key in the inventory or in ~/.ssh/config?",
    "Could not resolve hostname": "give ansible_host in the inventory, or the name in ~/.ssh/config",
}


class SilentError(Exception):
    """The node did not answer within the deadline."""

    def __init__(self, seconds: float) -> None:
        """``seconds``: how long it was given."""
        super().__init__(f"no answer within {seconds:g} s")


def converse(
    action: ActionBase,
    script: str,
    nonce: str,
    *,
    interpreter: str = "python3",
    seconds: float = 30.0,
    become: bool = False,
    fresh: bool = False,
    fresh_every: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send ``script`` and return the node's answer and what was learnt of the connection.

    ``fresh`` logs in anew instead of using an open control socket. ``fresh_every`` (seconds) asks for
    a second, fresh login when none succeeded for that long. Raises AnsibleConnectionFailure, SilentError, or
    node.BadAnswerError.
    """
    connection, path = examine(action._connection, fresh=fresh, fresh_every=fresh_every)  # noqa: SLF001 - the base's
    command = f"{interpreter} {node.INTERPRETER_FLAGS}"
    with deadline(seconds):
        reply = _send(action, command, node.call(script, connection), connection, become=become)
    answer = node.parse(nonce, reply["rc"], reply["stdout"], reply["stderr"])
    if fresh_every is not None and path is not None and connection.get("control_socket") == "absent":
        _stamp(path).touch()  # the master that this conversation opened has just logged in
    return answer, connection


def told(conversation: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """What a look tells of one conversation: ``{answer, connection}`` or ``{error, reached}``, and ``seconds``."""
    started = time.monotonic()
    found: dict[str, Any] = {}
    try:
        found["answer"], found["connection"] = conversation()
    except (AnsibleError, SilentError) as error:
        found["error"], found["reached"] = failure_reason(error), False
    except node.BadAnswerError as error:
        found["error"], found["reached"] = str(error), True
    found["seconds"] = round(time.monotonic() - started, 3)
    return found


def _send(
    action: ActionBase, command: str, payload: bytes, connection: dict[str, Any], *, become: bool
) -> dict[str, Any]:
    """Pipe the script to the interpreter, or copy it over first where the connection cannot pipe."""
    run = action._low_level_execute_command  # noqa: SLF001 - the documented base class has no public name
    if action._connection.is_pipelining_enabled():  # noqa: SLF001
        connection["transport"] = "pipelined"
        # No shell of Ansible's choice around it: the account's own starts one program as well as any, and each
        # further process costs every node some milliseconds in every pass.
        shell = "" if action._connection.transport == "ssh" else None  # noqa: SLF001
        reply: dict[str, Any] = run(command, in_data=payload, sudoable=become, executable=shell)
        return reply
    connection["transport"] = "copied: this connection cannot pipeline"
    directory = action._make_tmp_path()  # noqa: SLF001
    try:
        path = f"{directory}script.py"
        action._transfer_data(path, payload)  # noqa: SLF001
        reply = run(f"{command} < {shlex.quote(path)}", sudoable=become)
    finally:
        action._remove_tmp_path(directory)  # noqa: SLF001
    return reply


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise SilentError after ``seconds`` and end the client program that was waiting."""

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        raise SilentError(seconds)

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except SilentError as error:
        for frame, _line in traceback.walk_tb(error.__traceback__):
            for value in list(frame.f_locals.values()):
                if isinstance(value, subprocess.Popen):
                    value.kill()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# --- control sockets --------------------------------------------------------------------------------


def examine(connection: Any, *, fresh: bool, fresh_every: float | None) -> tuple[dict[str, Any], Path | None]:
    """What kind of connection this is, the state of its control socket, and its path; steps around a bad one.

    A socket whose master is dead or hung is left in place (the ssh role replaces it) but not used:
    this conversation then logs in anew, which also proves that logging in works.
    """
    found: dict[str, Any] = {"connection": connection.transport}
    if connection.transport != "ssh":
        return found, None
    command, path = control_command(connection)
    found["control_socket"] = socket_state(command, path)
    if fresh or found["control_socket"] in ("dead", "hung"):
        connection.set_option("ssh_args", _without_multiplexing(connection.get_option("ssh_args")))
        found["login"] = "fresh"
    elif fresh_every is not None and path is not None and found["control_socket"] == "alive":
        found["login"] = _fresh_login(command, path, fresh_every)
    return found, path


def _without_multiplexing(ssh_args: str | None) -> str:
    """The user's ssh arguments less whatever would open or use a control socket."""
    kept: list[str] = []
    words = shlex.split(ssh_args or "")
    while words:
        word = words.pop(0)
        value = words.pop(0) if word == "-o" and words else ""
        if not re.match(r"(-o)?Control(Master|Path|Persist)", value or word, re.IGNORECASE):
            kept += [word, value] if value else [word]
    return f"{NO_MULTIPLEXING} {shlex.join(kept)}".strip()


def control_command(connection: Any) -> tuple[list[str], Path | None]:
    """The ssh command line that Ansible would use (without a remote command), and its control path."""
    connection.host = connection.get_option("host") or connection._play_context.remote_addr  # noqa: SLF001
    for name in ("port", "user"):
        if getattr(connection, name, None) is None:
            option = "remote_user" if name == "user" else name
            setattr(connection, name, connection.get_option(option))
    built = connection._build_command(connection.get_option("ssh_executable"), "ssh", connection.host)  # noqa: SLF001
    command = [word.decode() for word in built]
    paths = [
        m[1].strip('"')
        for word in command
        if (m := re.match(r"(?:-o)?ControlPath[ =](.*)", word, re.IGNORECASE))
    ]
    if not paths or paths[0].lower() == "none":
        return command, None
    if "%" not in paths[0]:
        return command, Path(paths[0]).expanduser()
    return command, _expanded_by_ssh(command)


def _expanded_by_ssh(command: list[str]) -> Path | None:
    """The control path with ssh's own %-tokens filled in, as only ssh knows them."""
    answer = subprocess.run(
        [*command[:-1], "-G", command[-1]], capture_output=True, text=True, timeout=5, check=False
    )
    match = re.search(r"^controlpath (.+)$", answer.stdout, re.MULTILINE)
    return Path(match[1]) if match and match[1] != "none" else None


def socket_state(command: list[str], path: Path | None) -> str:
    """``none`` (not used), ``absent``, ``alive``, ``dead`` (nobody listens) or ``hung`` (somebody, but silent)."""
    if path is None:
        return "none"
    if not os.path.lexists(path):
        return "absent"
    return mux.state(path) or _ask_by_ssh(command)


def _ask_by_ssh(command: list[str]) -> str:
    """The same by ssh itself, which knows every version of its protocol."""
    argv = [*command[:-1], "-O", "check", command[-1]]
    try:
        check = subprocess.run(
            argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=mux.CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "hung"
    return "alive" if check.returncode == 0 else "dead"


def _fresh_login(command: list[str], path: Path, every: float) -> str:
    """Log in beside the open master, when none did for ``every`` seconds: an old session outlives a dead sshd."""
    if not login_is_due(path, every):
        return "recent"
    argv = [command[0], "-o", "ControlMaster=no", "-o", "ControlPath=none", *command[1:], "true"]
    try:
        login = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=FRESH_LOGIN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"failed: no answer within {FRESH_LOGIN_SECONDS:g} s"
    if login.returncode == 255:  # noqa: PLR2004 - ssh's own failure, not the command's
        return f"failed: {' | '.join(login.stderr.strip().splitlines()[-2:])[-300:]}"
    _stamp(path).touch()
    return "fresh"


def login_is_due(path: Path, every: float) -> bool:
    """Whether no login beside this socket worked for so many seconds."""
    try:
        return not 0 <= time.time() - _stamp(path).stat().st_mtime < every
    except OSError:
        return True


def _stamp(path: Path) -> Path:
    """The file whose time says when a login beside this socket last worked."""
    return path.with_name(path.name + ".fresh")


def replace_socket(command: list[str], path: Path) -> str:
    """Remove a control socket and end the master behind it; returns what was there. A living one is left."""
    state = socket_state(command, path)
    if state in ("alive", "absent", "none"):
        return state
    for pid in _masters_of(path):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    for leftover in (path, _stamp(path)):
        leftover.unlink(missing_ok=True)
    return state


def _masters_of(path: Path) -> list[int]:
    """Processes of ours that ssh titled ``ssh: PATH [mux]``: the masters of this very socket."""
    listing = subprocess.run(
        ["ps", "-x", "-o", "pid=,command="], capture_output=True, text=True, timeout=10, check=False
    )
    wanted = f"ssh: {path} [mux]"
    rows = (row.strip().split(None, 1) for row in listing.stdout.splitlines())
    return [int(row[0]) for row in rows if len(row) == 2 and row[1].strip() == wanted]  # noqa: PLR2004


def failure_reason(error: Exception) -> str:
    """One line that says why a node did not answer, without Ansible's wrapping."""
    if isinstance(error, AnsibleConnectionFailure | AnsibleError):
        text = str(error.message if hasattr(error, "message") else error)
        text = _WRAPPING.sub("", text)
        lines = [
            line
            for line in text.strip().splitlines()
            if not line.startswith(("debug1:", "Warning: Permanently"))
        ]
        said = " | ".join(lines)[-400:]
        hint = next((f" ({way})" for sign, way in _WAYS_OUT.items() if sign in said), "")
        return said + hint
    return str(error) or type(error).__name__
