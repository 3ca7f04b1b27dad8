"""Those who are asked in tests of the analysis: an endpoint on raw sockets, commands, and questions for them."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reconciler.model import Change, Question, ResourceId

ANSWER: dict[str, Any] = {
    "severity": 4,
    "root_cause": "The package was never installed.",
    "plan": "Install it.",
    "install": {"npm": "jq-cli"},
    "commands": [["npm", "install", "-g", "jq-cli"]],
    "prevention": "Declare it.",
}


def question(text: str = "node-1/tool/jq", **given: Any) -> Question:
    """A missing command that nobody declared how to install, unless told otherwise."""
    fields: dict[str, Any] = {
        "check_type": "C4",
        "desired": {"version": "any"},
        "changes": (Change("version", "any", "absent", fixable=False, note="no install method is declared"),),
        "needs_plan": True,
    }
    return Question(ResourceId.parse(text), **{**fields, **given})


def completion(content: Any, finish: str | None = "stop") -> bytes:
    """A whole answer of the endpoint; content that is no text becomes JSON."""
    text = content if isinstance(content, str) else json.dumps(content)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return reply(json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


def reply(body: bytes, status: int = 200, headers: str = "") -> bytes:
    """An HTTP message."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


Behaviour = Callable[[socket.socket, Seen, threading.Event], None]


def says(message: bytes) -> Behaviour:
    """Answers at once."""
    return lambda connection, _seen, _over: connection.sendall(message)


def drips(message: bytes, gap: float) -> Behaviour:
    """One byte at a time: no single read ever waits for long."""

    def behave(connection: socket.socket, _seen: Seen, over: threading.Event) -> None:
        for at in range(len(message)):
            connection.sendall(message[at : at + 1])
            if over.wait(gap):
                return

    return behave


def hangs(_connection: socket.socket, _seen: Seen, over: threading.Event) -> None:
    """Takes the request and says nothing."""
    over.wait(60)


def late(seconds: float, message: bytes) -> Behaviour:
    """Answers after a while."""

    def behave(connection: socket.socket, _seen: Seen, over: threading.Event) -> None:
        over.wait(seconds)
        connection.sendall(message)

    return behave


def resets(connection: socket.socket, _seen: Seen, _over: threading.Event) -> None:
    """Cuts with a RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Loopback:
    """An OpenAI-compatible endpoint that behaves as badly as it is told."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.seen: list[Seen] = []
        self.busy = self.busiest = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=32)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            request = _read(connection)
            with self._lock:
                self.seen.append(request)
                self.busy += 1
                self.busiest = max(self.busiest, self.busy)
            try:
                self.behave(connection, request, self._over)
            finally:
                with self._lock:
                    self.busy -= 1


def _read(connection: socket.socket) -> Seen:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return Seen(first.split(" ")[1], headers, body)


def executable(directory: Path, name: str, source: str) -> Path:
    """A Python program on its own; ``SAID`` in it is where it can leave what it was told."""
    path = directory / name
    path.write_text(f"#!{sys.executable} -I\nSAID = {str(directory / (name + '.said'))!r}\n{source}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
