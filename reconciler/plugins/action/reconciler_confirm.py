"""Confirm a change over a new login: the node has not locked us out, and need not undo it by itself."""

from __future__ import annotations

import secrets
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

from reconciler import node
from reconciler.plugins import transport

SECONDS = 20.0


class ActionModule(ActionBase):  # type: ignore[misc]
    """``reconciler_confirm: {kind: KIND, name: NAME, attempt: ID}``; fails where the node has undone it already."""

    _supports_check_mode = False
    _requires_connection = True
    _VALID_ARGS = frozenset({"kind", "name", "attempt"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Answer ``{changed: False}``."""
        super().run(tmp, task_vars)
        known, args = task_vars or {}, self._task.args
        environment = self._templar.template(known.get("reconciler_environment") or {})
        nonce = f"@@{secrets.token_hex(12)}@@"
        request = {
            "nonce": nonce,
            "confirm": [args["kind"], args["name"], args["attempt"]],
            "environment": {str(key): str(value) for key, value in environment.items()},
        }
        interpreter = str(self._templar.template(known.get("ansible_python_interpreter") or "python3"))
        try:
            answer, _connection = transport.converse(
                self,
                node.bundle({}, request),
                nonce,
                interpreter="python3" if interpreter.startswith("auto") else interpreter,
                seconds=SECONDS,
                become=bool(self._task.become),
                fresh=True,
            )
        except transport.SilentError as error:
            raise AnsibleConnectionFailure(str(error)) from error
        except node.BadAnswerError as error:
            raise AnsibleActionFail(str(error)) from error
        if "failed" in answer:
            raise AnsibleActionFail(f"{args['kind']} {args['name']}: {answer['failed']}")
        return {"kind": args["kind"], "name": args["name"], **answer["result"]}
