"""The supervised child: one ansible-runner run, its results as JSON lines on standard output.

Reads the arguments of ``ansible_runner.run`` as JSON from standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import ansible_runner

STATUSES = {"runner_on_ok": "ok", "runner_on_failed": "failed", "runner_on_unreachable": "unreachable"}
MESSAGES: list[str] = []


def main() -> None:
    """Run once; the exit status is 0 when Ansible did its work, whatever the nodes said."""
    specification = json.load(sys.stdin)
    # Results go to the real standard output; whatever a library prints goes to standard error.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))

    def on_event(event: dict[str, Any]) -> bool:
        status = STATUSES.get(event["event"])
        data = event.get("event_data", {})
        if status is not None:
            line = {"node": data["host"], "status": status, "data": _essence(data)}
            results.write(json.dumps(line) + "\n")
            results.flush()
        elif event["event"] in ("error", "verbose") and event.get("stdout"):
            MESSAGES.append(event["stdout"])
        return False  # write no event file

    run = ansible_runner.run(**specification, event_handler=on_event, quiet=True)
    # 0: all well; 2 and 4: hosts failed or were unreachable, which the results say better.
    if run.status in ("timeout", "error") or run.rc not in (0, 2, 4):
        said = "\n".join(MESSAGES) or (run.stdout.read() if run.stdout else "")
        results.write(json.dumps({"error": f"{run.status} (exit {run.rc}): {said.strip()[-800:]}"}) + "\n")
        results.flush()


def _essence(data: dict[str, Any]) -> dict[str, Any]:
    """What the reconciler reads of a task's result; everything else stays in this process."""
    result = data.get("res") or {}
    keys = ("reconciler", "msg", "changed", "attempt", "detail", "changes", "saved", "control_socket")
    return {
        "task_action": data.get("task_action"),
        "role": data.get("role"),
        **{k: result[k] for k in keys if k in result},
    }


if __name__ == "__main__":
    main()
