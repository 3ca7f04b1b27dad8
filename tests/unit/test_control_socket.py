"""Asking a control master whether it lives, in its own protocol."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.plugins import transport

HELLO = struct.pack(">3I", 8, transport.MUX_HELLO, transport.MUX_VERSION)
ALIVE = struct.pack(">4I", 12, transport.MUX_ALIVE, 0, 4711)
EXTENDED_HELLO = struct.pack(">4I4s", 16, transport.MUX_HELLO, transport.MUX_VERSION, 4, b"info")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transport, "SOCKET_CHECK_SECONDS", 0.3)
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
    answer(master, struct.pack(">3I", 8, transport.MUX_HELLO, 5), ALIVE)
    assert transport.socket_state([str(ssh), "node"], path) == state
