"""A command that is given the prompt and answers with JSON: started without a shell, ended with all its children."""

from __future__ import annotations

import atexit
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from reconciler.analyze.answer import MOST_BYTES, Unavailable, clean, parse
from reconciler.analyze.prompt import Prompt
from reconciler.model import Analysis

_running: dict[subprocess.Popen[bytes], int] = {}  # by whom: a fork of us must not end what is ours
_ALWAYS = ("PATH", "HOME", "LANG")
_LOOK_SECONDS = 0.05
_PIECE = 65_536


class Command:
    """One command with its arguments."""

    def __init__(self, argv: Sequence[str], environment: Sequence[str] = ()) -> None:
        """``environment`` names the variables that are handed on besides PATH, HOME and LANG."""
        self.argv, self.environment = list(argv), environment
        self.name = f"command {self.argv[0]}"

    def ask(self, prompt: Prompt, limit: float) -> Analysis:
        """The judgement. Raises Unavailable, after ``limit`` seconds at the latest."""
        # An empty directory of its own: a coding agent makes itself at home wherever it is started.
        with tempfile.TemporaryDirectory(prefix="analysis-", ignore_cleanup_errors=True) as directory:
            status, out, err = self._run(prompt.text.encode(), limit, directory)
        if status != 0:
            complaint = clean(err.decode(errors="replace"), 200) or "without a word"
            raise Unavailable(f"it ended with {status}: {complaint}")
        try:
            text = out.decode()
        except UnicodeDecodeError:
            raise Unavailable("the answer is not UTF-8 text") from None
        return parse(text, self.name, prose=True)

    def _run(self, prompt: bytes, limit: float, directory: str) -> tuple[int, bytes, bytes]:
        end = time.monotonic() + limit
        wanted = {*_ALWAYS, *self.environment}
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in wanted and not name.upper().startswith("RECONCILER_")
        }
        # A file, not a pipe: a command that does not read cannot make us wait while we write.
        with tempfile.TemporaryFile() as given:
            given.write(prompt)
            given.seek(0)
            process = self._start(given, environment, directory)
            _running[process] = os.getpid()
            try:
                out, err = _listen(process, end, limit)
                return process.wait(), out, err
            finally:
                _end(process)
                _running.pop(process, None)

    def _start(
        self, given: IO[bytes], environment: dict[str, str], directory: str
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self.argv,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd=directory,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise Unavailable(f"it cannot be started: {reason}") from None


def _listen(process: subprocess.Popen[bytes], end: float, limit: float) -> tuple[bytes, bytes]:
    """Standard output and error until the command ends. Children that keep them open are not waited for."""
    assert process.stdout is not None  # noqa: S101 - pipes, by the way it was started
    assert process.stderr is not None  # noqa: S101
    heard = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as selector:
        for descriptor in heard:
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise Unavailable(f"it did not end within {limit:g} s")
            has_ended = process.poll() is not None
            more = _take(selector, heard, 0 if has_ended else min(left, _LOOK_SECONDS))
            if len(heard[process.stdout.fileno()]) > MOST_BYTES:
                raise Unavailable(f"the answer is longer than {MOST_BYTES} bytes")
            if has_ended and not more:
                break
            if not selector.get_map():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, _LOOK_SECONDS))
    out, err = heard.values()
    return bytes(out), bytes(err)


def _take(selector: selectors.BaseSelector, heard: dict[int, bytearray], wait: float) -> bool:
    """Hear what there is; whether there was something."""
    more = False
    if not selector.get_map():
        return False
    for key, _ in selector.select(wait):
        piece = os.read(key.fd, _PIECE)
        if piece:
            more = True
            heard[key.fd] += piece[: MOST_BYTES + 1 - len(heard[key.fd])]
        else:
            selector.unregister(key.fd)
    return more


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and everything that it started, also what put itself into another process group."""
    _signal_group(process.pid, signal.SIGSTOP)  # nothing starts anything while we count
    for child in _descendants(process.pid) if process.poll() is None else []:
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
    _signal_group(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@atexit.register
def _end_all() -> None:
    """Who asked is a daemon thread: it does not live to end its command when the whole process ends."""
    for process, owner in list(_running.items()):
        if owner == os.getpid():
            _end(process)


def _signal_group(leader: int, number: int) -> None:
    with suppress(OSError):
        os.killpg(leader, number)


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, waiting = [], [ancestor]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Every process with its parent's id: from /proc, or where there is none from ps."""
    if not Path("/proc/self/stat").exists():
        yield from _parents_from_ps()
        return
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name stands in parentheses and may contain anything.
            yield int(stat.parent.name), int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])


def _parents_from_ps() -> Iterator[tuple[int, int]]:
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, timeout=5, check=True
        )
        for line in listing.stdout.splitlines():
            pid, parent = line.split()
            yield int(pid), int(parent)
