"""Ask, in one process, every node to which a connection is open that can be shared (OpenSSH's ControlMaster).

Ansible starts a worker per node and task, which costs the controller half of what the answer costs the node.
A node that cannot be asked here, or does not answer here, keeps its request: ``reconciler_observe`` looks at it then.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleError
from ansible.playbook.play_context import PlayContext
from ansible.plugins.action import ActionBase
from ansible.vars.hostvars import HostVarsVars

from reconciler import mailbox, node
from reconciler.plugins import mux, transport

PATIENCE_SECONDS = 3.0  # nobody answers: how long those wait who are asked afterwards
HANDLES = 8  # that a conversation opens
KEPT_HANDLES = 64  # for all else in this process
MOST = 1000  # conversations at a time, where handles are not limited
SSH, SUDO = "ansible.builtin.ssh", "ansible.builtin.sudo"
WRAPS_OTHERWISE = {"ansible_become", "ansible_shell_type", "ansible_shell_executable"}

Batches = list[dict[str, Any]]


class ActionModule(ActionBase):  # type: ignore[misc]
    """``reconciler_observe_shared:`` without arguments; runs once for all nodes of a play."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _requires_connection = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Leave nodes' ``{batches: [{answer | error, connection, seconds}]}`` in the mailbox; drop their requests."""
        super().run(tmp, task_vars)
        known = task_vars or {}
        requests = Path(known["reconciler_requests"])
        if (requests.parent / mailbox.NAME).exists():
            talks = Talks(min(known["ansible_forks"], _most_at_once()))
            for path in sorted(requests.glob("*.json")):
                batches = json.loads(path.read_text(encoding="utf-8"))["batches"]
                try:
                    variables = self._variables(path.stem, known)
                    name = str(variables.get("ansible_connection", self._task.connection))
                    if name not in ("ssh", SSH, "smart"):
                        continue
                    connection = self._connected(name, variables, batches)
                except AnsibleError:  # the node's own worker says what is wrong with its variables
                    continue
                if not talks.begin(path, connection, batches):
                    break
            talks.end()
        # Which of them the result is about, Ansible alone decides: none is answered by it.
        return {"changed": False, "delivered": True}

    def _variables(self, name: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the node's own worker would see, to be templated as it is read: ``hostvars`` of others knows less."""
        play, hostvars = self._task.get_play(), known["hostvars"]
        found = play.get_variable_manager().get_vars(
            play=play,
            host=hostvars._inventory.get_host(name),  # noqa: SLF001 - nobody else hands it to an action
            _hosts=known["ansible_play_batch"],
            _hosts_all=known["ansible_play_hosts_all"],
        )
        seen: Mapping[str, Any] = HostVarsVars(found, loader=self._loader, host=name)
        return seen

    def _connected(self, name: str, variables: Mapping[str, Any], batches: Batches) -> Any:
        """The node's connection as Ansible sets it up; None where ssh has more to do than to pass on streams."""
        if any(batch["fresh"] for batch in batches):
            return None
        # Not this task's context, which knows the first node's user and password.
        connection = self._plugin("connection", name.replace("smart", "ssh"), SSH, variables, PlayContext())
        if connection is None or connection.get_option("password"):
            return None
        if any(batch["become"] for batch in batches):
            method = variables.get("ansible_become_method") or self._task.become_method
            sudo = self._plugin("become", method, SUDO, variables) if method in ("sudo", SUDO) else None
            if sudo is None or not self._asks_nothing(sudo) or WRAPS_OTHERWISE & set(variables):
                return None
            connection.set_become_plugin(sudo)
        ssh = os.path.basename(connection.get_option("ssh_executable"))  # noqa: PTH119 - a name, not a place
        return connection if ssh == "ssh" and connection.is_pipelining_enabled() else None

    def _asks_nothing(self, sudo: Any) -> bool:
        """Whether it refuses rather than waits for a password, for which it would take the script's first lines."""
        flags = shlex.split(sudo.get_option("become_flags") or "")
        has_password = sudo.get_option("become_pass") or self._play_context.become_pass
        return not has_password and bool({"-n", "--non-interactive"} & set(flags))

    def _plugin(self, kind: str, name: str, own: str, variables: Mapping[str, Any], *given: Any) -> Any:
        """Ansible's own plugin with the node's options; None where the user has another one of that name."""
        plugin = getattr(self._shared_loader_obj, f"{kind}_loader").get(name, *given)
        if plugin is None or not plugin.matches_name([own]):
            return None
        options = constants.config.get_plugin_vars(kind, plugin._load_name)  # noqa: SLF001 - Ansible's own way to ask
        plugin.set_options(
            var_options={option: variables[option] for option in options if option in variables}
        )
        return plugin


def _most_at_once() -> int:
    """Conversations for which there are handles."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if allowed == resource.RLIM_INFINITY else max(1, (allowed - KEPT_HANDLES) // HANDLES)


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
        found = [transport.told(partial(_converse, connection, batch)) for batch in batches]
        answered = mailbox.deliver(path.parent.parent, path.stem, {"reconciler": {"batches": found}})
        if answered:
            path.unlink(missing_ok=True)
    except (mux.UnavailableError, mux.LostError):
        pass  # the request stays: its own worker looks at the node
    finally:
        ended.put(answered)


def _converse(connection: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One batch over the open master. Raises what ``transport.converse`` does, and the errors of ``mux``."""
    facts, path = transport.examine(connection, fresh=False, fresh_every=None)
    if path is None or facts["control_socket"] != "alive":
        raise mux.UnavailableError("no open master")
    if batch["fresh_every"] is not None:
        if transport.login_is_due(path, batch["fresh_every"]):
            raise mux.UnavailableError("ssh has to log in")
        facts["login"] = "recent"
    facts["transport"] = "pipelined"
    command = f"{batch['interpreter']} {node.INTERPRETER_FLAGS}"
    sudo = connection.become if batch["become"] and _is_somebody_else(connection) else None
    if sudo:
        command = sudo.build_become_command(command, connection._shell)  # noqa: SLF001 - it has no other name
    try:
        status, out, err = mux.run(path, command, node.call(batch["script"], facts), batch["seconds"])
    except TimeoutError:
        raise transport.SilentError(batch["seconds"]) from None
    if sudo and not sudo.check_success(out):
        raise mux.UnavailableError("no privilege")  # Ansible says it better
    return node.parse(
        batch["nonce"], status, out.decode(errors="replace"), err.decode(errors="replace")
    ), facts


def _is_somebody_else(connection: Any) -> bool:
    """Whether privilege makes a difference: Ansible does not ask for what the account is already."""
    becomes, is_now = connection.become.get_option("become_user"), connection.get_option("remote_user")
    return bool(constants.BECOME_ALLOW_SAME_USER or becomes != is_now)
