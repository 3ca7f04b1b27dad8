"""Where Ansible's workers leave a node's answer as soon as they have it.

Ansible hands results on one by one, and only after every node's worker was started; what waits there is late by then,
and costs more to pass on than it cost to learn. Imported by every worker: nothing but the standard library.
"""

from __future__ import annotations

import json
import selectors
import socket
from pathlib import Path
from typing import Any

NAME = "answers"
BACKLOG = 512
SEND_SECONDS = 10.0


def deliver(directory: Path, node: str, data: dict[str, Any]) -> bool:
    """Leave what is known of one node. False where nobody listens: then Ansible's own result has to carry it."""
    content = json.dumps({"node": node, "status": "ok", "data": data}).encode()
    try:
        with socket.socket(socket.AF_UNIX) as sender:
            sender.settimeout(SEND_SECONDS)
            sender.connect(str(directory / NAME))
            sender.sendall(content)
    except OSError:
        return False
    return True


class Mailbox:
    """The receiving end. It belongs to one selector, and is asked what has arrived when that says so."""

    def __init__(self, directory: Path) -> None:
        """Listen in ``directory``, to which nobody else must have access; where that cannot be, nothing arrives."""
        self._listening = socket.socket(socket.AF_UNIX)
        self._open: dict[socket.socket, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        try:
            self._listening.bind(str(directory / NAME))
        except OSError:  # the path is too long for a socket: temporary directories of some systems are
            return
        self._listening.listen(BACKLOG)
        self._listening.settimeout(0)
        self._selector.register(self._listening, selectors.EVENT_READ)

    def fileno(self) -> int:
        """What a selector watches: it is readable when something has arrived."""
        return self._selector.fileno()

    def arrived(self) -> list[dict[str, Any]]:
        """All that is complete by now, without waiting. What was cut short is dropped: its node stays silent."""
        found = []
        while ready := self._selector.select(0):
            for key, _mask in ready:
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    found += self._read(key.fileobj)  # type: ignore[arg-type]
        return found

    def close(self) -> None:
        """Stop listening."""
        for sender in [*self._open, self._listening]:
            sender.close()
        self._open.clear()
        self._selector.close()

    def _accept(self) -> None:
        try:
            sender, _address = self._listening.accept()
        except OSError:  # it has gone again
            return
        sender.settimeout(0)
        self._open[sender] = bytearray()
        self._selector.register(sender, selectors.EVENT_READ)

    def _read(self, sender: socket.socket) -> list[dict[str, Any]]:
        try:
            part = sender.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            part = b""
        if part:
            self._open[sender] += part
            return []
        self._selector.unregister(sender)
        sender.close()
        try:
            return [json.loads(self._open.pop(sender))]
        except ValueError:
            return []
