"""Ask one node for the facts of everything declared on it: one round trip, one prepared script.

The controller wrote ``NODE.json`` (mode 0600) into the directory that the variable ``reconciler_requests``
names, with one script per privilege; a node whose resources all need the same privilege costs one round
trip. Never fails and never marks a host unreachable: what could not be learnt is part of the answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

from reconciler import mailbox
from reconciler.plugins import transport


class ActionModule(ActionBase):  # type: ignore[misc]
    """``reconciler_observe:`` without arguments, which would be templated once per node."""

    _supports_check_mode = True
    _requires_connection = True
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Leave ``{batches: [{answer | error, connection, seconds}]}`` in the mailbox.

        Where nobody listens, ``reconciler`` of the result is the same, as JSON text.
        """
        super().run(tmp, task_vars)
        known = task_vars or {}
        requests, name = Path(known["reconciler_requests"]), known["inventory_hostname"]
        path = requests / f"{name}.json"
        if not path.exists():  # nothing is asked of this node
            return {"changed": False}
        request = json.loads(path.read_text(encoding="utf-8"))
        answer = {"batches": [self._ask(batch) for batch in request["batches"]]}
        if mailbox.deliver(
            requests.parent, name, {"reconciler": answer, "task_action": "reconciler_observe"}
        ):
            return {"changed": False, "delivered": True}
        # As text: Ansible walks through every value of a result several times, and through a text but once.
        return {"changed": False, "reconciler": json.dumps(answer)}

    def _ask(self, batch: dict[str, Any]) -> dict[str, Any]:
        return transport.told(
            lambda: transport.converse(
                self,
                batch["script"],
                batch["nonce"],
                interpreter=batch["interpreter"],
                seconds=batch["seconds"],
                become=batch["become"],
                fresh=batch["fresh"],
                fresh_every=batch["fresh_every"],
            )
        )
