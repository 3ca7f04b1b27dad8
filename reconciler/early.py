"""The child that runs Ansible, started before anything else is loaded: it loads ansible-runner while we load the rest.

Imports nothing heavy, as it comes first. A child that nobody has a use for is ended at exit.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

# Never in the environment of a process that runs other people's plugins and prints its environment to a file.
PRIVATE_VARIABLES = re.compile(r".*_API_KEY$|SIDECAR_.*|RECONCILER_.*|OPENAI_.*|ANTHROPIC_.*")

_waiting: list[subprocess.Popen[bytes]] = []


def begin(words: list[str]) -> None:
    """Start one where the command line asks for a single pass."""
    if {"--once", "--check"} & set(words) and not _waiting:
        _waiting.append(_started())
        atexit.register(_end)


def child() -> subprocess.Popen[bytes]:
    """One that waits for its specification on standard input. Whoever takes it ends its whole session."""
    while _waiting:
        found = _waiting.pop()
        if found.poll() is None:
            return found
    return _started()


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "reconciler.runner.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={key: value for key, value in os.environ.items() if not PRIVATE_VARIABLES.match(key)},
    )


def _end() -> None:
    for process in _waiting:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    _waiting.clear()
