"""Let Ansible start before it is known what to ask: it waits here, all loaded, until the requests are written.

A third of a pass without drift is Ansible's start; meanwhile the reconciler reads the desired state.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

from reconciler.plugins import leash

DOCUMENTATION = """
name: reconciler_gate
type: aggregate
short_description: Wait until the requests are written
description:
  - Where E(RECONCILER_CHILD) names the process that started Ansible, ends Ansible and its workers with it.
  - Where E(RECONCILER_GATE) names a file, waits for it at the start of each play, and lets the play run on those of the
    nodes listed there that have a request, a file in the directory C(requests) beside it.
options: {}
"""

POLL_SECONDS = 0.005


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Waits until the requests are written, or until whoever started Ansible has given up."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "reconciler_gate"
    CALLBACK_NEEDS_ENABLED = False

    def v2_playbook_on_start(self, _playbook: Any) -> None:
        """From here on Ansible ends with whoever started it."""
        child = os.environ.get("RECONCILER_CHILD")
        if child:
            leash.follow(int(child))
            leash.workers_follow()

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Wait, then narrow the play down to the nodes that something is asked of."""
        gate = os.environ.get("RECONCILER_GATE")
        if not gate:
            return
        path = Path(gate)
        while not path.exists():
            if not path.parent.exists():
                os._exit(1)  # nothing has begun, and nobody is left to hear of it
            time.sleep(POLL_SECONDS)
        nodes = path.read_text(encoding="utf-8").split("\n")
        play.hosts = [node for node in nodes if (path.with_name("requests") / f"{node}.json").exists()]
