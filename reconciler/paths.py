"""Where things are: Ansible's side of the product, and the state of this account."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent


def ansible_home() -> Path:
    """The directory with ``playbooks/`` and ``roles/``: inside an installed wheel, or the checkout."""
    packaged = _PACKAGE / "_ansible"
    return packaged if packaged.is_dir() else _PACKAGE.parent


def playbook(name: str) -> Path:
    """A playbook by its file name."""
    return ansible_home() / "playbooks" / name


def state_home() -> Path:
    """The XDG state directory of this account, for us."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "reconciler"


def control_sockets() -> Path:
    """Where SSH control sockets live. Short on purpose: a socket's path may have about 100 characters."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir() and os.access(runtime, os.W_OK):
        return Path(runtime) / "reconciler-ssh"
    return Path("~/.ansible/rc").expanduser()
