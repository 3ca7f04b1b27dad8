"""One timer for all phases of an attempt.

`asyncio.timeout().reschedule()` makes a new timer for every chunk of a stream; that was a
quarter of a stream's cost. Here a later deadline is only written down, and the timer that
fires too early is set again: most phases never touch the event loop.
"""

import asyncio
from types import TracebackType
from typing import Self


class Watchdog:
    """Raises TimeoutError in the task that entered it once the deadline is over.

    Deadlines are in the event loop's time. Like asyncio.timeout, it turns its own
    cancellation into TimeoutError and leaves everybody else's alone.
    """

    __slots__ = ("_armed", "_cancelling", "_deadline", "_expired", "_handle", "_loop", "_task")

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self._loop = loop
        self._deadline = self._armed = deadline
        self._expired = False
        self._handle: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    def set(self, deadline: float) -> None:
        """Move the deadline; only an earlier one needs a new timer."""
        self._deadline = deadline
        if deadline < self._armed and self._handle is not None:
            self._handle.cancel()
            self._arm()

    def _arm(self) -> None:
        self._armed = self._deadline
        self._handle = self._loop.call_at(self._armed, self._fire)

    def _fire(self) -> None:
        if self._deadline > self._armed:
            self._arm()
            return
        self._expired = True
        if self._task is not None:
            self._task.cancel()

    def __enter__(self) -> Self:
        """Watch the current task."""
        self._task = asyncio.current_task(self._loop)
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.cancel()
        ours = self._expired and self._task is not None and self._task.uncancel() <= self._cancelling
        if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error
