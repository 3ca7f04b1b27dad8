"""Sends the notifications of one route through Apprise: a program of its own, and the only importer of it.

A process, not a thread of the reconciler: an endpoint that never answers can be ended, and Apprise costs nothing
while there is nothing to tell. One line of JSON comes in, one goes out per step. The address holds tokens: it
comes in over a pipe and never goes out.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import apprise

_TYPES = {"P0": apprise.NotifyType.FAILURE, "P1": apprise.NotifyType.WARNING, "P2": apprise.NotifyType.INFO}
_FORMATS = {
    "text": apprise.NotifyFormat.TEXT,
    "html": apprise.NotifyFormat.HTML,
    "chat": apprise.NotifyFormat.MARKDOWN,
}
_STATUS = re.compile(r"error=([345]\d\d)\b")
_HIDDEN = "(hidden)"


class _Heard(logging.Handler):
    """What Apprise said last: it answers with yes or no, the reason only goes to its log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it; the last words are the reason of a failure."""
        self.text = record.getMessage()


def send(message: Mapping[str, Any], timeout: float, heard: _Heard) -> str:
    """Send one message; the answer is empty, or why it was not taken."""
    box = apprise.Apprise(asset=_asset())
    if not box.add(message["url"]):
        return f"Apprise does not understand the address of this route ({scheme(message['url'])}://…)"
    for server in box:
        server.socket_connect_timeout = min(timeout, server.socket_connect_timeout)
        server.socket_read_timeout = timeout
    kind = apprise.NotifyType.SUCCESS if message["what"] == "resolved" else _TYPES[message["level"]]
    heard.text = ""
    form = _FORMATS[message.get("format", "text")]
    if box.notify(title=message["title"], body=message["body"], notify_type=kind, body_format=form):
        return ""
    said = heard.text
    status = _STATUS.search(said)
    return (
        f"it answered HTTP {status[1]}"
        if status
        else without_secrets(said, message["url"]) or "no reason was given"
    )


def _asset() -> apprise.AppriseAsset:
    """No pictures from elsewhere, no files, no keys made up, nothing of the address in what is logged."""
    return apprise.AppriseAsset(
        app_id="reconcile", app_desc="Fleet reconciler", app_url="", image_url_mask="", image_url_logo="",
        async_mode=False, secure_logging=True, pgp_autogen=False, pem_autogen=False,
        storage_mode=apprise.PersistentStoreMode.MEMORY,
    )  # fmt: skip


def scheme(url: str) -> str:
    """The part of an address that may be shown."""
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,30}(?=://)", url)
    return found[0].lower() if found else "?"


def without_secrets(text: str, url: str) -> str:
    """Words of a library about this address, without any part of it."""
    text = re.sub(r"\S+://\S+", _HIDDEN, " ".join(text.split()))
    parts = {part for whole in (url, unquote(url)) for part in re.split(r"[/:@?&=,;#\s]+", whole)}
    for part in sorted(parts - {scheme(url)}, key=len, reverse=True):
        if len(part) >= 4:  # noqa: PLR2004 - what is shorter is part of ordinary words
            text = text.replace(part, _HIDDEN)
    return text[:200]


def _end_with_parent() -> None:
    """Whoever started this holds the other end of the pipe; it closes with them, however they end."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _first_line() -> bytes:
    """Of standard input, as it comes: a buffer's lock would be in the way at the end."""
    found = b""
    while not found.endswith(b"\n") and (chunk := os.read(0, 1 << 16)):
        found += chunk
    return found


def main() -> None:
    """Send in order until one fails: what is wrong with it is probably wrong with the route."""
    task = json.loads(_first_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What a plugin prints must not be taken for a report.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    heard, logger = _Heard(), logging.getLogger("apprise")
    logger.addHandler(heard)
    logger.propagate = False
    for message in task["messages"]:
        out.write(json.dumps({"id": message["id"], "state": "started"}) + "\n")
        try:
            error = send(message, task["timeout"], heard)
        except Exception as failure:  # noqa: BLE001 - whatever a plugin of Apprise does, its route failed
            error = f"{type(failure).__name__}: {without_secrets(str(failure), message['url'])}"
        state = "failed" if error else "sent"
        out.write(json.dumps({"id": message["id"], "state": state, "error": error}) + "\n")
        if error:
            break


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of Apprise that still wait for somebody are not waited for
