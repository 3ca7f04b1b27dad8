"""Words to the supervisor: that we are ready, what we are at, that we are alive (sd_notify(3)). Silent without one."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

_ALIVE_SECONDS = 1.0
_last = 0.0


def notify(*words: str) -> None:
    """Tell the supervisor, such as ``READY=1``. What it does not hear is not our trouble."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A name that begins with @ stands for one that is in no file system.
    where = "\0" + address[1:] if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto("\n".join(words).encode(), where)


def alive() -> None:
    """Say that we get on; called wherever something is waited for, and cheap enough for that."""
    global _last  # noqa: PLW0603 - one process, one supervisor
    now = time.monotonic()
    if now - _last >= _ALIVE_SECONDS:
        _last = now
        notify("WATCHDOG=1")


def sleep(seconds: float) -> None:
    """Wait, alive."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        alive()
        time.sleep(min(left, _ALIVE_SECONDS))
