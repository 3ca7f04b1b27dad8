"""Reach the node once, over a new control master if none is open. Needs no Python on the node."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

from reconciler.plugins import transport

SECONDS = 20.0


class ActionModule(ActionBase):  # type: ignore[misc]
    """``reconciler_ping: {}``: never changes anything; unreachable within 20 s is a failure."""

    _supports_check_mode = True
    _requires_connection = True
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Answer ``{changed: false}``."""
        super().run(tmp, task_vars)
        try:
            with transport.deadline(SECONDS):
                answer = self._low_level_execute_command("true", sudoable=False)
        except transport.SilentError as error:
            raise AnsibleConnectionFailure(str(error)) from error
        return {"changed": False, "failed": answer["rc"] != 0, "msg": answer["stderr"]}
