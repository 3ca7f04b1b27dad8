"""Speaking with a control master in its own protocol: whether it lives, and one command over it."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.plugins import mux, transport
from tests.unit.masters import ALIVE, HELLO, Master

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


@pytest.mark.parametrize("size", [0, 10, 3_000_000])
def test_command_over_a_master(path: Path, master: socket.socket, size: int) -> None:
    """What is given reaches it whole, however much that is; so does what it says, and how it ended."""
    played = Master(master)
    payload = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    status, out, err = mux.run(path, "cat; echo so >&2; exit 3", payload, 30)
    assert (status, out, err) == (3, payload, b"so\n")
    assert played.commands == ["cat; echo so >&2; exit 3"]


def test_command_that_reads_nothing(path: Path, master: socket.socket) -> None:
    """It need not take what it is given."""
    Master(master)
    assert mux.run(path, "exec <&-; echo done", b"x" * 3_000_000, 30) == (0, b"done\n", b"")


def test_master_that_refuses_a_session_leaves_it_to_ssh(path: Path, master: socket.socket) -> None:
    """As one does whose server allows no further sessions."""
    Master(master, refuses=True)
    with pytest.raises(mux.UnavailableError, match="opens no session"):
        mux.run(path, "true", b"", 30)


@pytest.mark.parametrize("parts", [(), (HELLO,), (HELLO[:6],), (struct.pack(">3I", 8, mux.HELLO, 5),)])
def test_master_that_does_not_begin_leaves_it_to_ssh(
    path: Path, master: socket.socket, parts: tuple[bytes, ...]
) -> None:
    answer(master, *parts)
    with pytest.raises(mux.UnavailableError):
        mux.run(path, "true", b"", 30)


def test_nobody_there_leaves_it_to_ssh(path: Path) -> None:
    with pytest.raises(mux.UnavailableError):
        mux.run(path, "true", b"", 30)


def test_master_that_dies_in_the_middle_is_told(path: Path, master: socket.socket) -> None:
    """Whether the command came to its end is not known: it must not be begun once more."""
    Master(master, dies=True)
    with pytest.raises(mux.LostError):
        mux.run(path, "echo half", b"", 30)


def test_command_that_takes_too_long_is_given_up(path: Path, master: socket.socket) -> None:
    """Whether it says something meanwhile or not."""
    Master(master)
    with pytest.raises(TimeoutError):
        mux.run(path, "echo begun; exec sleep 5", b"", 0.3)
    with pytest.raises(TimeoutError):
        mux.run(path, "exec yes", b"", 0.5)


def test_master_whose_network_is_gone_is_given_up_in_time(path: Path, master: socket.socket) -> None:
    """It answers for itself, but opens no session: that is the node's silence."""
    Master(master, mute=True)
    assert transport.socket_state(["ssh", "node"], path) == "alive"
    with pytest.raises(TimeoutError):
        mux.run(path, "true", b"", 0.3)


def test_nothing_stays_open(path: Path, master: socket.socket) -> None:
    """Workers end, and the daemon does not."""
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    played = Master(master)
    mux.run(path, "true", b"", 30)
    played.join()
    for _ in range(3):
        with pytest.raises(mux.UnavailableError):
            mux.run(path.with_name("none"), "true", b"", 30)
    assert not before or len(list(Path("/proc/self/fd").iterdir())) == before
