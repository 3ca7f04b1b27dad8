"""Sends notifications through Apprise: a program of its own, and the only importer of it.

A process, not threads of the reconciler: an endpoint that never answers can be ended, and Apprise costs nothing
while there is nothing to tell. One line of JSON comes in, one goes out per step. Routes do not wait for each
other. The addresses hold tokens: they come in over a pipe and never go out.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import apprise

Report = Callable[[Mapping[str, Any]], None]

_TYPES = {"P0": apprise.NotifyType.FAILURE, "P1": apprise.NotifyType.WARNING, "P2": apprise.NotifyType.INFO}
_STATUS = re.compile(r"error=(\d{3})\b")
_HIDDEN = "(hidden)"


class _Heard(logging.Handler):
    """What Apprise says, apart for each route's thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.own = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it; the last words are the reason of a failure."""
        self.own.text = record.getMessage()

    def taken(self) -> str:
        """What was said in this thread since it was last asked."""
        text, self.own.text = getattr(self.own, "text", ""), ""
        return str(text)


def send(message: Mapping[str, Any], timeout: float, heard: _Heard) -> str:
    """Send one message; the answer is empty, or why it was not taken."""
    box = apprise.Apprise(asset=_asset())
    if not box.add(message["url"]):
        return f"Apprise does not understand the address of this route ({scheme(message['url'])}://…)"
    for server in box:
        server.socket_connect_timeout = min(timeout, server.socket_connect_timeout)
        server.socket_read_timeout = timeout
    kind = apprise.NotifyType.SUCCESS if message["what"] == "resolved" else _TYPES[message["level"]]
    heard.taken()
    if box.notify(
        title=message["title"], body=message["body"], notify_type=kind, body_format=apprise.NotifyFormat.TEXT
    ):
        return ""
    said = heard.taken()
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


def one_route(messages: Sequence[Mapping[str, Any]], timeout: float, report: Report, heard: _Heard) -> None:
    """In order, until one fails: what is wrong with it is probably wrong with the route."""
    for message in messages:
        report({"id": message["id"], "state": "started"})
        try:
            error = send(message, timeout, heard)
        except Exception as failure:  # noqa: BLE001 - whatever a plugin of Apprise does, its route failed
            error = f"{type(failure).__name__}: {without_secrets(str(failure), message['url'])}"
        report({"id": message["id"], "state": "failed" if error else "sent", "error": error})
        if error:
            return


def _end_with_parent() -> None:
    """Whoever started this holds the other end of the pipe; it closes with them, however they end."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Read the task, send, report."""
    task = json.loads(_line())
    # What a plugin prints must not be taken for a report.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock, heard = threading.Lock(), _Heard()
    logger = logging.getLogger("apprise")
    logger.addHandler(heard)
    logger.propagate = False

    def report(answer: Mapping[str, Any]) -> None:
        with lock:
            out.write(json.dumps(answer) + "\n")
            out.flush()

    threading.Thread(target=_end_with_parent, daemon=True).start()
    threads = [
        threading.Thread(target=one_route, args=(messages, task["timeout"], report, heard), daemon=True)
        for messages in task["routes"].values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _line() -> bytes:
    """The first line of standard input, byte by byte as it comes: a buffer would be in the way at the end."""
    found = b""
    while not found.endswith(b"\n") and (chunk := os.read(0, 1 << 16)):
        found += chunk
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
