"""Speaking with a control master in its own protocol: whether it lives, and one command over it."""

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.plugins import mux, transport

HELLO = struct.pack(">3I", 8, mux.HELLO, mux.VERSION)
ALIVE = struct.pack(">4I", 12, mux.ALIVE, 0, 4711)
EXTENDED_HELLO = struct.pack(">4I4s", 16, mux.HELLO, mux.VERSION, 4, b"info")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mux, "CHECK_SECONDS", 0.3)
    return tmp_path / "s"


@pytest.fixture
def master(path: Path) -> Iterator[socket.socket]:
    """Somebody who listens; whether it answers is up to the test."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        yield listening


def answer(master: socket.socket, *parts: bytes) -> None:
    """Say this to the first who connects, and hang up."""

    def serve() -> None:
        conversation, _ = master.accept()
        with conversation:
            for part in parts:
                conversation.sendall(part)
            conversation.recv(64)

    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.parametrize(
    "parts",
    [
        (HELLO, ALIVE),
        (HELLO + ALIVE,),
        (EXTENDED_HELLO, ALIVE),
        (HELLO[:5], HELLO[5:] + ALIVE[:3], ALIVE[3:]),
    ],
)
def test_master_that_says_so_is_alive(path: Path, master: socket.socket, parts: tuple[bytes, ...]) -> None:
    """However its words are cut into pieces."""
    answer(master, *parts)
    assert transport.socket_state(["ssh", "node"], path) == "alive"


def test_silent_master_is_hung(path: Path, master: socket.socket) -> None:
    """The kernel accepts the connection; nobody reads it."""
    assert master
    assert transport.socket_state(["ssh", "node"], path) == "hung"


@pytest.mark.parametrize("parts", [(), (HELLO,), (HELLO[:6],)])
def test_master_that_hangs_up_is_dead(path: Path, master: socket.socket, parts: tuple[bytes, ...]) -> None:
    """Nothing will ever come over this socket."""
    answer(master, *parts)
    assert transport.socket_state(["ssh", "node"], path) == "dead"


def test_socket_without_a_listener_and_a_plain_file_are_dead(path: Path, master: socket.socket) -> None:
    master.close()
    assert transport.socket_state(["ssh", "node"], path) == "dead"
    path.unlink()
    path.write_text("")
    assert transport.socket_state(["ssh", "node"], path) == "dead"


def test_no_socket_is_absent_and_no_path_is_none(path: Path) -> None:
    assert transport.socket_state(["ssh", "node"], path) == "absent"
    assert transport.socket_state(["ssh", "node"], None) == "none"


@pytest.mark.parametrize(("status", "state"), [(0, "alive"), (255, "dead")])
def test_unknown_protocol_is_left_to_ssh(
    path: Path, master: socket.socket, tmp_path: Path, status: int, state: str
) -> None:
    """Another version than ours says nothing about the master."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\nexit {status}\n")
    ssh.chmod(0o755)
    answer(master, struct.pack(">3I", 8, mux.HELLO, 5), ALIVE)
    assert transport.socket_state([str(ssh), "node"], path) == state


# --- a command ---------------------------------------------------------------------------------------


class Master:
    """Plays a master: takes one session, runs its command on the streams that it was given, and tells how it ended."""

    def __init__(self, listening: socket.socket, **given: Any) -> None:
        self.listening, self.given = listening, given
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        """One conversation."""
        conversation, _ = self.listening.accept()
        with conversation:
            conversation.sendall(HELLO)
            message(conversation)
            body = message(conversation)
            assert struct.unpack_from(">I", body)[0] == mux.NEW_SESSION
            # Number, a reserved text, four flags, the escape character, the terminal, then the command.
            self.command = text(body, 8 + 4 + 20 + 4)
            streams = [socket.recv_fds(conversation, 1, 1)[1][0] for _ in range(3)]
            if self.given.get("refuses"):
                conversation.sendall(struct.pack(">4I", 12, 0x80000003, 0, 0))
            else:
                conversation.sendall(struct.pack(">4I", 12, mux.OPENED, 0, 7))
                self.hold(conversation, streams)
            for stream in streams:
                os.close(stream)

    def hold(self, conversation: socket.socket, streams: list[int]) -> None:
        """The command itself, in pieces that fall as they like."""
        done = subprocess.run(
            ["sh", "-c", self.command], stdin=streams[0], stdout=streams[1], stderr=streams[2], check=False
        )
        if not self.given.get("dies"):
            told = struct.pack(">4I", 12, mux.EXIT, 7, done.returncode)
            conversation.sendall(told[:6])
            conversation.sendall(told[6:])


def message(conversation: socket.socket) -> bytes:
    """The next one, without its length."""
    length = struct.unpack(">I", conversation.recv(4, socket.MSG_WAITALL))[0]
    return conversation.recv(length, socket.MSG_WAITALL)


def text(body: bytes, at: int) -> str:
    length = struct.unpack_from(">I", body, at)[0]
    return body[at + 4 : at + 4 + length].decode()


@pytest.mark.parametrize("size", [0, 10, 3_000_000])
def test_command_over_a_master(path: Path, master: socket.socket, size: int) -> None:
    """What is given reaches it whole, however much that is; so does what it says, and how it ended."""
    played = Master(master)
    payload = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    status, out, err = mux.run(path, "cat; echo so >&2; exit 3", payload)
    assert (status, out, err) == (3, payload, b"so\n")
    assert played.command == "cat; echo so >&2; exit 3"


def test_command_that_reads_nothing(path: Path, master: socket.socket) -> None:
    """It need not take what it is given."""
    Master(master)
    assert mux.run(path, "exec <&-; echo done", b"x" * 3_000_000) == (0, b"done\n", b"")


def test_master_that_refuses_a_session_leaves_it_to_ssh(path: Path, master: socket.socket) -> None:
    """As one does whose server allows no further sessions."""
    Master(master, refuses=True)
    with pytest.raises(mux.UnavailableError, match="opens no session"):
        mux.run(path, "true", b"")


@pytest.mark.parametrize("parts", [(), (HELLO,), (HELLO[:6],), (struct.pack(">3I", 8, mux.HELLO, 5),)])
def test_master_that_does_not_begin_leaves_it_to_ssh(
    path: Path, master: socket.socket, parts: tuple[bytes, ...]
) -> None:
    answer(master, *parts)
    with pytest.raises(mux.UnavailableError):
        mux.run(path, "true", b"")


def test_nobody_there_leaves_it_to_ssh(path: Path) -> None:
    with pytest.raises(mux.UnavailableError):
        mux.run(path, "true", b"")


def test_master_that_dies_in_the_middle_is_told(path: Path, master: socket.socket) -> None:
    """Whether the command came to its end is not known: it must not be begun once more."""
    Master(master, dies=True)
    with pytest.raises(mux.LostError):
        mux.run(path, "echo half", b"")


def test_nothing_stays_open(path: Path, master: socket.socket) -> None:
    """Workers end, and the daemon does not."""
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    played = Master(master)
    mux.run(path, "true", b"")
    played.thread.join(10)
    for _ in range(3):
        with pytest.raises(mux.UnavailableError):
            mux.run(path.with_name("none"), "true", b"")
    assert not before or len(list(Path("/proc/self/fd").iterdir())) == before
