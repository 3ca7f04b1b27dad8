"""A client of OpenSSH's control masters: whether one lives, and one command over it (OpenSSH, PROTOCOL.mux, version 4).

Starting ``ssh`` for that costs the controller as much as all else that it does for a node. What does not go as
expected here is left to ``ssh``, which knows every version of its protocol.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import struct
import time
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path

VERSION = 4
HELLO, NEW_SESSION, ALIVE_CHECK = 0x00000001, 0x10000002, 0x10000004
EXIT, ALIVE, OPENED = 0x80000004, 0x80000005, 0x80000006
NO_ESCAPE = 0xFFFFFFFF
CHECK_SECONDS = 3.0
LONGEST = 1 << 16  # bytes of a message


class UnavailableError(Exception):
    """Nothing was begun over this master: ssh itself may fare better."""


class LostError(Exception):
    """The command was begun, and its end was never heard of."""


def state(path: Path) -> str:
    """``alive``, ``dead`` (nobody listens) or ``hung`` (somebody, but silent); empty: the answer is not understood."""
    until = time.monotonic() + CHECK_SECONDS
    with socket.socket(socket.AF_UNIX) as master:
        master.settimeout(CHECK_SECONDS)
        try:
            master.connect(str(path))
            master.sendall(_message(HELLO, VERSION) + _message(ALIVE_CHECK, 0))
            hello = _received(master, until)
            alive = _received(master, until)
        except (TimeoutError, BlockingIOError):
            return "hung"
        except (OSError, EOFError):
            return "dead"
    understood = hello[:2] == (HELLO, VERSION) and alive[:1] == (ALIVE,)
    return "alive" if understood else ""


def run(path: Path, command: str, payload: bytes, seconds: float) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and standard error of a command that is given ``payload`` on standard input.

    Raises UnavailableError, LostError, or, when it takes longer than so many seconds, TimeoutError.
    """
    until = time.monotonic() + seconds
    with ExitStack() as stack:
        master = stack.enter_context(socket.socket(socket.AF_UNIX))
        pipes = [_pipe(stack) for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        to_node, *from_node = [pipes[0][1], pipes[1][0], pipes[2][0]]
        try:
            _open_session(master, path, command, [stream.fileno() for stream in theirs], until)
        except TimeoutError:
            raise  # the node may be gone, of which its master knows nothing yet
        except (OSError, EOFError) as error:
            raise UnavailableError(str(error)) from error
        finally:
            for stream in theirs:
                stream.close()
        return _converse(master, to_node, from_node, payload, until)


def _pipe(stack: ExitStack) -> tuple[FileIO, FileIO]:
    """Both ends, closed with ``stack`` at the latest."""
    reads, writes = os.pipe()
    return stack.enter_context(FileIO(reads, "r")), stack.enter_context(FileIO(writes, "w"))


def _open_session(master: socket.socket, path: Path, command: str, streams: list[int], until: float) -> None:
    """Let the master start the command with these for its standard streams."""
    master.settimeout(max(0.001, until - time.monotonic()))
    master.connect(str(path))
    master.sendall(_message(HELLO, VERSION))
    if _received(master, until)[:2] != (HELLO, VERSION):
        raise UnavailableError("it speaks another version of the protocol")
    # As Debian's and Apple's ssh_config send them; a server takes what it likes.
    variables = [f"{key}={value}" for key, value in os.environ.items() if re.fullmatch("LANG|LC_.*", key)]
    texts = b"".join(_text(word) for word in ("", command, *variables))
    body = struct.pack(">2I", NEW_SESSION, 0) + _text("") + struct.pack(">5I", 0, 0, 0, 0, NO_ESCAPE) + texts
    master.sendall(struct.pack(">I", len(body)) + body)
    for handle in streams:
        socket.send_fds(master, [b"\0"], [handle])
    if _received(master, until)[:1] != (OPENED,):
        raise UnavailableError("it opens no session")


def _converse(
    master: socket.socket, to_node: FileIO, from_node: list[FileIO], payload: bytes, until: float
) -> tuple[int, bytes, bytes]:
    """Hand over ``payload`` and take what comes, until all streams are at their end."""
    said = {stream.fileno(): bytearray() for stream in from_node}
    told, status, left = bytearray(), None, memoryview(payload)
    os.set_blocking(to_node.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(to_node, selectors.EVENT_WRITE)
        selector.register(master, selectors.EVENT_READ)
        for stream in from_node:
            selector.register(stream, selectors.EVENT_READ)
        while status is None or set(from_node) & {key.fileobj for key in selector.get_map().values()}:
            remaining = until - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            for key, _mask in selector.select(remaining):
                if key.fileobj is to_node:
                    with suppress(BlockingIOError):
                        left = _written(to_node, left)
                    if not left:
                        selector.unregister(to_node)
                        to_node.close()
                    continue
                part = _read(key.fd)
                if not part:
                    selector.unregister(key.fileobj)
                if key.fileobj is not master:
                    said[key.fd] += part
                    continue
                told += part
                status = _status(told) if status is None else status
                if not part and status is None:
                    raise LostError("the control master ended before the command did")
    out, err = said.values()
    return status, bytes(out), bytes(err)


def _read(handle: int) -> bytes:
    """What is there; nothing at the end, however it came."""
    try:
        return os.read(handle, LONGEST)
    except ConnectionResetError:
        return b""


def _written(stream: FileIO, left: memoryview) -> memoryview:
    """What is still to be written; nothing where nobody reads any more."""
    try:
        return left[os.write(stream.fileno(), left) :]
    except BrokenPipeError:
        return memoryview(b"")


def _status(told: bytearray) -> int | None:
    """The exit status, once the master has told it; complete messages are taken away."""
    while len(told) >= 4 and len(told) >= 4 + (length := struct.unpack_from(">I", told)[0]):  # noqa: PLR2004
        body = bytes(told[4 : 4 + length])
        del told[: 4 + length]
        if len(body) >= 12 and struct.unpack_from(">I", body)[0] == EXIT:  # noqa: PLR2004 - session, status
            return int(struct.unpack_from(">I", body, 8)[0])
    return None


def _message(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers) + 1}I", 4 * len(numbers), *numbers)


def _text(word: str) -> bytes:
    content = os.fsencode(word)
    return struct.pack(">I", len(content)) + content


def _received(master: socket.socket, until: float) -> tuple[int, ...]:
    """One message, as numbers. Raises TimeoutError, OSError or EOFError."""
    found = b""
    wanted = 4
    while len(found) < wanted:
        master.settimeout(max(0.001, until - time.monotonic()))
        part = master.recv(wanted - len(found))
        if not part:
            raise EOFError("it hung up")
        found += part
        if wanted == 4 and len(found) == 4:  # noqa: PLR2004 - the length that comes first
            wanted += min(struct.unpack(">I", found)[0], LONGEST)
    return struct.unpack(f">{(len(found) - 4) // 4}I", found[4 : 4 + (len(found) - 4) // 4 * 4])
