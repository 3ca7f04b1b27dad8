"""The machine the lab runs on: what it must have, and programs started on it with a deadline."""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGES = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setsid": "util-linux",
}
INOTIFY_PER_NODE = 32  # measured: PID 1, the user manager, logind and dbus take about 10 on an idle node
INOTIFY_LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")


class LabError(Exception):
    """The lab cannot do what was asked; the message says what to change."""


def os_release() -> dict[str, str]:
    """The system's own description of itself; empty where it has none."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def problems() -> list[str]:
    """What keeps this machine from running a lab, one line each; empty when nothing does."""
    if platform.system() != "Linux" or os_release().get("ID") != "debian":
        return ["the lab needs Debian: its nodes are made from the machine's own apt sources"]
    found = []
    if os.geteuid() != 0:
        found.append("the lab needs root: it mounts overlays and boots systemd-nspawn")
    missing = sorted({package for tool, package in PACKAGES.items() if shutil.which(tool) is None})
    if missing:
        found.append(f"missing programs: apt-get install {' '.join(missing)}")
    return found


def check_host() -> None:
    """Raise LabError with everything that is missing, all at once."""
    if found := problems():
        raise LabError("; ".join(found))


def call(
    command: Sequence[str | Path],
    *,
    deadline: float = 30.0,
    env: Mapping[str, str] | None = None,
) -> str:
    """Standard output of a program of the machine; LabError with its last words when it fails."""
    argv = [str(part) for part in command]
    try:
        done = subprocess.run(  # fails below, with the program's words in the message
            argv,
            capture_output=True,
            text=True,
            timeout=deadline,
            check=False,
            env=env,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as late:
        raise LabError(f"{argv[0]} did not finish within {deadline:g} s") from late
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise LabError(f"{' '.join(argv[:4])} failed ({done.returncode}): {' | '.join(said)}")
    return done.stdout


def allow_inotify(nodes: int) -> None:
    """Raise the kernel's limit for `nodes` systemds.

    Never lowered again: another lab, or a person, may have come to depend on it meanwhile.
    """
    wanted = 128 + INOTIFY_PER_NODE * nodes
    if int(INOTIFY_LIMIT.read_text()) < wanted:
        INOTIFY_LIMIT.write_text(f"{wanted}\n")


def remove_tree(path: Path) -> None:
    """Remove a directory that may not be there; anything that stays is an error, not left over in silence."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def port_is_free(port: int) -> bool:
    """Whether nobody listens there, on any address: a node may later be asked to answer on all of them."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
