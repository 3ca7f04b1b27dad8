"""One process at a time runs continuously on a database; the system lets go of its lock with the process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reconciler.lease import BusyError


@contextmanager
def instance(db: Path) -> Iterator[None]:
    """Be the one. Raises BusyError."""
    path = _lock_file(db)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"process {running(db)} already runs continuously on {db}") from None
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def running(db: Path) -> int | None:
    """The process that runs continuously on this database, or None."""
    try:
        handle = os.open(_lock_file(db), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return int(os.read(handle, 32) or 0)
    else:
        return None
    finally:
        os.close(handle)


def _lock_file(db: Path) -> Path:
    return db.with_name(f"{db.name}.daemon")
