"""Ask, in one process, every node to which a connection is open that can be shared (OpenSSH's ControlMaster).

Ansible starts a worker per node and task, which costs the controller several times what the answer costs the node.
A node that cannot be asked here, or does not answer here, keeps its request: ``reconciler_observe`` looks at it then.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleError
from ansible.playbook.play_context import PlayContext
from ansible.plugins.action import ActionBase

from reconciler import mailbox, node
from reconciler.plugins import mux, transport

PATIENCE_SECONDS = 3.0
SSH = ("ssh", "ansible.builtin.ssh", "smart")

Batches = list[dict[str, Any]]


class ActionModule(ActionBase):  # type: ignore[misc]
    """``reconciler_observe_shared:`` without arguments; runs once for all nodes of a play."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _requires_connection = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Leave ``{batches: [{answer | error, connection, seconds}]}`` of nodes in the mailbox; remove their requests."""
        super().run(tmp, task_vars)
        known = task_vars or {}
        requests = Path(known["reconciler_requests"])
        if (requests.parent / mailbox.NAME).exists():
            talks = Talks(known["ansible_forks"])
            for path in sorted(requests.glob("*.json")):
                batches = json.loads(path.read_text(encoding="utf-8"))["batches"]
                connection = self._connected(known["hostvars"][path.stem], batches)
                if not talks.begin(path, connection, batches):
                    break
            talks.end()
        # Which of them the result is about, Ansible alone decides: none is answered by it.
        return {"changed": False, "delivered": True}

    def _connected(self, variables: Mapping[str, Any], batches: Batches) -> Any:
        """The node's connection as Ansible sets it up; None where ssh has more to do than to pass on streams."""
        if any(batch["become"] or batch["fresh"] for batch in batches):
            return None
        try:
            if variables.get("ansible_connection", self._task.connection) not in SSH:
                return None
            # Not this task's context, which knows the first node's user and password.
            connection = self._shared_loader_obj.connection_loader.get("ansible.builtin.ssh", PlayContext())
            names = constants.config.get_plugin_vars("connection", connection._load_name)  # noqa: SLF001 - no public one
            connection.set_options(var_options={name: variables[name] for name in names if name in variables})
        except AnsibleError:  # the node's own worker says what is wrong with its variables
            return None
        ssh = os.path.basename(connection.get_option("ssh_executable"))  # noqa: PTH119 - a name, not a place
        shares = connection.is_pipelining_enabled() and not connection.get_option("password")
        return connection if ssh == "ssh" and shares else None


@dataclass
class Talks:
    """Conversations with nodes, ``at_once`` of them at a time."""

    at_once: int
    _running: int = 0
    _others_wait: bool = False
    _ended: queue.SimpleQueue[bool] = field(default_factory=queue.SimpleQueue)

    def begin(self, path: Path, connection: Any, batches: Batches) -> bool:
        """Ask the node when it is its turn. False: those before it are silent, and it had better be asked elsewhere."""
        if connection is None:
            self._others_wait = True
            return True
        if self._running >= self.at_once and not self._one_ended():
            return False
        # A daemon: nobody waits for one that is given up.
        talk = threading.Thread(target=_talk, args=(path, connection, batches, self._ended), daemon=True)
        talk.start()
        self._running += 1
        return True

    def end(self) -> None:
        """Wait for what is under way; not for long where other nodes wait for their turn elsewhere."""
        while self._running and self._one_ended():
            pass

    def _one_ended(self) -> bool:
        """Whether one came to its end while it was worth waiting."""
        try:
            answered = self._ended.get(timeout=PATIENCE_SECONDS if self._others_wait else None)
        except queue.Empty:
            return False
        self._running -= 1
        self._others_wait |= not answered
        return True


def _talk(path: Path, connection: Any, batches: Batches, ended: queue.SimpleQueue[bool]) -> None:
    """Ask one node, and put into ``ended`` whether it answered."""
    answered = False
    try:
        found = [transport.told(lambda batch=batch: _converse(connection, batch)) for batch in batches]  # type: ignore[misc]
        answered = mailbox.deliver(path.parent.parent, path.stem, {"reconciler": {"batches": found}})
        if answered:
            path.unlink(missing_ok=True)
    except (mux.UnavailableError, mux.LostError):
        pass
    finally:
        ended.put(answered)


def _converse(connection: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One batch over the open master. Raises what ``transport.converse`` does, and the errors of ``mux``."""
    facts, path = transport.examine(connection, fresh=False, fresh_every=batch["fresh_every"])
    if path is None or facts["control_socket"] != "alive":
        raise mux.UnavailableError("no open master")
    facts["transport"] = "pipelined"
    command = f"{batch['interpreter']} {node.INTERPRETER_FLAGS}"
    try:
        status, out, err = mux.run(path, command, node.call(batch["script"], facts), batch["seconds"])
    except TimeoutError:
        raise transport.SilentError(batch["seconds"]) from None
    return node.parse(
        batch["nonce"], status, out.decode(errors="replace"), err.decode(errors="replace")
    ), facts
