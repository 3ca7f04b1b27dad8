"""One applier: a lease in the store with an epoch that only grows.

The holder renews it while it lives. Another process may take it when the holder is gone, which the lock of a file
tells at once, or when it has not been renewed for :data:`SECONDS`: a process that was stopped, or that hangs. From
then on the first one can record nothing any more, and nodes refuse its steps: each step carries the epoch, and
a node remembers the highest it has seen.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from reconciler.store import Store, StoreError, now_text

SECONDS = 30.0


class BusyError(Exception):
    """Another pass holds the lease; the message says which."""


class Lease:
    """Held by one pass, from before it looks until it has recorded everything. Use it as a context manager.

    ``epoch`` is never used again: it follows the wall clock as well as its predecessor, so that it also grows
    when the database was lost. ``fence_due`` says that a predecessor may still be about: nodes have to be told.
    """

    def __init__(self, path: Path, run_id: str, seconds: float = SECONDS) -> None:
        self.path, self.seconds = path, seconds
        self.holder = f"{run_id}, process {os.getpid()}"
        self.epoch = 0
        self.fence_due = False
        self._lock = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take it. Raises BusyError where another pass has it."""
        store = Store(self.path)
        try:
            with store.db.atomic():
                self._take(store)
        except BaseException:
            self._let_go()
            raise
        finally:
            store.close()
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(StoreError):
            store = Store(self.path)
            with store.db.atomic():
                store.db.execute("UPDATE lease SET holder = '' WHERE epoch = ?", [self.epoch])
            store.close()
        self._let_go()

    def fenced(self) -> None:
        """All nodes that answer know of this epoch."""
        store = Store(self.path)
        with store.db.atomic():
            store.db.execute("UPDATE lease SET fence_due = 0 WHERE epoch = ?", [self.epoch])
        store.close()
        self.fence_due = False

    def _take(self, store: Store) -> None:
        # Written first: from here on nobody else can.
        store.db.execute(
            "INSERT OR IGNORE INTO lease (id, epoch, holder, boot, clock, renewed) VALUES (1, 0, '', '', 0, '')"
        )
        row = next(iter(store.db.query("SELECT * FROM lease")))
        alive = row["holder"] != "" and self._is_alive(row["epoch"])
        age = time_since(row["boot"], row["clock"])
        if alive and (age is None or age < self.seconds):
            raise BusyError(f"another pass is under way: {row['holder']}")
        self.epoch = max(row["epoch"] + 1, int(time.time()))
        self.fence_due = alive or bool(row["fence_due"])
        self._lock = os.open(self._file(self.epoch), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fence = int(self.fence_due)
        store.db.execute(
            "UPDATE lease SET epoch = ?, holder = ?, fence_due = ? WHERE id = 1",
            [self.epoch, self.holder, fence],
        )
        self._renewed(store)

    def _file(self, epoch: int) -> Path:
        return self.path.with_name(f"{self.path.name}.lease-{epoch}")

    def _is_alive(self, epoch: int) -> bool:
        """Whether the process that took this epoch still exists; the system drops its lock with it."""
        path = self._file(epoch)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(handle)

    def _let_go(self) -> None:
        if self._lock >= 0:
            self._file(self.epoch).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def _renew(self) -> None:
        """In a thread of its own: a pass that waits for a node is alive."""
        while not self._stop.wait(self.seconds / 4):
            with suppress(
                StoreError
            ):  # tried again soon; a store that stays away costs the lease, as it should
                store = Store(self.path)
                with store.db.atomic():
                    self._renewed(store)
                store.close()

    def _renewed(self, store: Store) -> None:
        boot, clock = boot_clock()
        now = now_text(datetime.now(UTC))
        store.db.execute(
            "UPDATE lease SET boot = ?, clock = ?, renewed = ? WHERE epoch = ?",
            [boot, clock, now, self.epoch],
        )


def boot_clock() -> tuple[str, float]:
    """Which boot of this machine this is, and seconds since then: a clock that nobody can set."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return boot, time.clock_gettime(clock)


def time_since(boot: str, clock: float) -> float | None:
    """Seconds since a reading of :func:`boot_clock`; infinite when that was before this boot."""
    now_boot, now_clock = boot_clock()
    return now_clock - clock if boot == now_boot and now_clock >= clock else float("inf")
