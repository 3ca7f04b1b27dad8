"""Replace a dead or hung SSH control socket of this node; runs on the controller only."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase

from reconciler.plugins import transport


class ActionModule(ActionBase):  # type: ignore[misc]
    """``reconciler_reconnect: {}``: changed when a socket was removed. The next task opens a new master."""

    _supports_check_mode = True
    _requires_connection = True
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Answer ``{changed, control_socket: what was found}``."""
        super().run(tmp, task_vars)
        if self._connection.transport != "ssh":
            return {"changed": False, "control_socket": "none"}
        command, path = transport.control_command(self._connection)
        if path is None:
            return {"changed": False, "control_socket": "none"}
        act = transport.socket_state if self._task.check_mode else transport.replace_socket
        state = act(command, path)
        return {"changed": state in ("dead", "hung"), "control_socket": state}
