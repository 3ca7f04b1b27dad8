"""Places where a test ends this process, to show that nothing is lost or done twice whatever happens there.

``RECONCILER_FAILPOINT=NAME`` arms one. A process that reaches it is killed as by a power cut: no handler runs,
nothing is flushed. The node's own places are in ``node/driver.py``, armed by the same variable there.
"""

from __future__ import annotations

import os
import signal

NAMES = (
    "observed",  # the nodes were looked at; nothing is on record yet
    "begun",  # the attempt is on record; nothing was asked of any node
    "applied",  # the roles have run; nobody has looked
    "verified",  # looked; the result is not on record
    "undoing",  # the undo is on record, and not begun
    "undone",  # the undo has run; nobody has looked
    "ended",  # the end of the attempt is on record
    "finished",  # the conditions and the pass are on record
)


def reached(name: str) -> None:
    """Be killed here if a test wants that."""
    if os.environ.get("RECONCILER_FAILPOINT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
