"""Plays OpenSSH's control master at its socket: commands run here, on the streams that its clients pass."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from typing import Any

from reconciler.plugins import mux

HELLO = struct.pack(">3I", 8, mux.HELLO, mux.VERSION)
ALIVE = struct.pack(">4I", 12, mux.ALIVE, 0, 4711)


class Master:
    """Serves whoever connects until its socket is closed.

    ``refuses`` opens no session; ``mute`` lets wait for one, as where the network is gone; ``dies`` never tells how a
    command ended; ``hangs`` begins it after so many seconds.
    """

    def __init__(self, listening: socket.socket, **given: Any) -> None:
        self.listening, self.given = listening, given
        self.commands: list[str] = []
        self.at_once = self.most_at_once = 0
        self.threads: list[threading.Thread] = []
        self._begin(self.serve)

    def join(self) -> None:
        """Wait until all that was begun is over; its socket has to be closed, or nobody may be connecting."""
        for thread in self.threads[1:]:
            thread.join(10)

    def serve(self) -> None:
        """Each conversation in a thread of its own."""
        while True:
            try:
                conversation, _ = self.listening.accept()
            except OSError:
                return
            self._begin(self.converse, conversation)

    def converse(self, conversation: socket.socket) -> None:
        """One of them."""
        with conversation, suppress(OSError):  # its client may have given up
            conversation.sendall(HELLO)
            message(conversation)
            body = message(conversation)
            if struct.unpack_from(">I", body)[0] == mux.ALIVE_CHECK:
                conversation.sendall(ALIVE)
                return
            assert struct.unpack_from(">I", body)[0] == mux.NEW_SESSION
            streams = [socket.recv_fds(conversation, 1, 1)[1][0] for _ in range(3)]
            if self.given.get("refuses"):
                conversation.sendall(struct.pack(">4I", 12, 0x80000003, 0, 0))
            elif self.given.get("mute"):
                conversation.recv(1)
            else:
                conversation.sendall(struct.pack(">4I", 12, mux.OPENED, 0, 7))
                # Number, a reserved text, four flags, the escape character, the terminal, then the command.
                self.hold(conversation, streams, text(body, 8 + 4 + 20 + 4))
            for stream in streams:
                os.close(stream)

    def hold(self, conversation: socket.socket, streams: list[int], command: str) -> None:
        """The command itself, in pieces that fall as they like."""
        self.commands.append(command)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if "hangs" in self.given:
            command = f"sleep {self.given['hangs']}; {command}"
        done = subprocess.run(
            ["sh", "-c", command], stdin=streams[0], stdout=streams[1], stderr=streams[2], check=False
        )
        self.at_once -= 1
        if not self.given.get("dies"):
            told = struct.pack(">4I", 12, mux.EXIT, 7, done.returncode & 0xFF)
            conversation.sendall(told[:6])
            conversation.sendall(told[6:])

    def _begin(self, work: Any, *given: Any) -> None:
        thread = threading.Thread(target=work, args=given, daemon=True)
        self.threads.append(thread)
        thread.start()


def message(conversation: socket.socket) -> bytes:
    """The next one, without its length."""
    length = struct.unpack(">I", conversation.recv(4, socket.MSG_WAITALL))[0]
    return conversation.recv(length, socket.MSG_WAITALL)


def text(body: bytes, at: int) -> str:
    """What stands there with its length."""
    length = struct.unpack_from(">I", body, at)[0]
    return body[at + 4 : at + 4 + length].decode()
