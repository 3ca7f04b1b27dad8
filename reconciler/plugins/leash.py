"""End Ansible's processes with whoever started them.

Ansible's workers have sessions of their own since ansible-core 2.19: they outlive their killed parent, finish what
they are at, and wait for ever where nobody reads their result any more.
"""

from __future__ import annotations

import os
import signal
import threading
import time

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0

_forking = [0]


def follow(parent: int) -> None:
    """End this process when ``parent`` no longer is its parent: in order (SIGTERM), or else with SIGKILL."""
    threading.Thread(target=_wait_for, args=(parent,), name="leash", daemon=True).start()


def workers_follow() -> None:
    """Whatever this process forks from now on ends with it; so do its SSH clients, which get the same signal."""
    os.register_at_fork(
        before=lambda: _forking.__setitem__(0, os.getpid()), after_in_child=lambda: follow(_forking[0])
    )


def _wait_for(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
