"""The supervised child: one ansible-runner run, its results as JSON lines on standard output.

Reads the arguments of ``ansible_runner.run`` as one line of JSON from standard input, which its parent keeps
open: when it closes, the parent is gone or wants the run to end, and Ansible is ended with all its children.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import ansible_runner

STATUSES = {"runner_on_ok": "ok", "runner_on_failed": "failed", "runner_on_unreachable": "unreachable"}
# What is read of a task's result.
KEYS = (
    "msg", "changed", "attempt", "detail", "changes", "saved", "name", "kind", "control_socket", "delivered",
)  # fmt: skip
MESSAGES: list[str] = []
CANCEL_SECONDS = 10.0


def main() -> None:
    """Run once; the exit status is 0 when Ansible did its work, whatever the nodes said."""
    asked = sys.stdin.readline()
    if not asked:
        return  # whoever started us early had no use for us
    specification = json.loads(asked)
    # So that Ansible can tell that we are gone, also where that was before it asked who its parent is. Not among the
    # specification's variables: those of a child before us in the same directory would be taken in their place.
    os.environ["RECONCILER_CHILD"] = str(os.getpid())
    cancelled = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(cancelled,), daemon=True).start()
    # Results go to the real standard output; whatever a library prints goes to standard error.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: cancelled.set())

    def on_event(event: dict[str, Any]) -> bool:
        status = STATUSES.get(event["event"])
        data = event.get("event_data", {})
        if data.get("ignore_errors") and status == "failed":
            return False
        if status is not None and not cancelled.is_set():
            line = {"node": data["host"], "status": status, "data": _essence(data)}
            results.write(json.dumps(line) + "\n")
            results.flush()
        elif event["event"] in ("error", "verbose") and event.get("stdout"):
            MESSAGES.append(event["stdout"])
        return False  # write no event file

    run = ansible_runner.run(
        **specification, event_handler=on_event, cancel_callback=cancelled.is_set, quiet=True
    )
    # 0: all well; 2 and 4: hosts failed or were unreachable, which the results say better.
    if cancelled.is_set():
        sys.exit(1)
    if run.status in ("timeout", "error") or run.rc not in (0, 2, 4):
        said = "\n".join(MESSAGES) or (run.stdout.read() if run.stdout else "")
        results.write(json.dumps({"error": f"{run.status} (exit {run.rc}): {said.strip()[-800:]}"}) + "\n")
        results.flush()


def _wait_for_the_end(cancelled: threading.Event) -> None:
    """The other end of standard input closes when the parent dies, however it dies."""
    while os.read(0, 4096):
        pass
    cancelled.set()
    time.sleep(CANCEL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)  # ansible-runner hangs; Ansible itself ends with this process


def _essence(data: dict[str, Any]) -> dict[str, Any]:
    """What the reconciler reads of a task's result; everything else stays in this process."""
    result = data.get("res") or {}
    facts = {"reconciler": json.loads(result["reconciler"])} if "reconciler" in result else {}
    return {
        **facts,
        "task_action": data.get("task_action"),
        "role": data.get("role"),
        **{k: result[k] for k in KEYS if k in result},
    }


if __name__ == "__main__":
    main()
