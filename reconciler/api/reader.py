"""The store as the server reads it: one connection in a thread of its own, so that nothing blocks the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from reconciler.model import ConfigurationError
from reconciler.store import Store, StoreError

T = TypeVar("T")
_NONE = (0, 0)


class Unreadable(Exception):  # noqa: N818 - it says what happened
    """The store cannot be read now; the message says why."""


class Reader:
    """Reads from the store at ``path``. Keeps its connection: opening one and closing the last one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, "http-store")
        self._store: Store | None = None
        self._file = _NONE

    async def read(self, work: Callable[[Store], T]) -> T:
        """What ``work`` makes of the store as it was at one moment. Raises Unreadable."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, work)

    async def version(self) -> tuple[int, ...]:
        """Another value whenever something was written."""
        return await self.read(
            lambda store: (*self._file, int(store.db.execute("PRAGMA data_version").fetchone()[0]))
        )

    def close(self) -> None:
        """End the thread once what it does is done."""
        self._thread.submit(self._let_go)
        self._thread.shutdown(wait=True)

    def _read(self, work: Callable[[Store], T]) -> T:
        try:
            store = self._open()
            with store.transaction():  # of a reader: everything it reads is of the same moment
                return work(store)
        except (StoreError, ConfigurationError, OSError) as error:
            self._let_go()
            raise Unreadable(str(error)) from error

    def _open(self) -> Store:
        """The connection, or a new one where there is none or another file took the place of the one it is to."""
        if self._store is None or _identity(self.path) != self._file:
            self._let_go()
            self._file = _identity(self.path)
            # Before the first pass there is none: nothing is known, and it is the pass's part to make it.
            self._store = Store(self.path if self._file != _NONE else None)
        return self._store

    def _let_go(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return _NONE
    return (found.st_dev, found.st_ino)
