"""The one clock: every state machine is handed one, so tests move it by hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time in seconds since the epoch, never going backwards."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...


class SystemClock:
    """Wall time at start plus what the monotonic clock counted since.

    Deadlines must mean the same after a restart (hence wall time) and must not
    jump when somebody sets the machine's clock (hence monotonic).
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._offset + time.monotonic()


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, at: float = 1_800_000_000.0) -> None:
        self.at = at

    def now(self) -> float:
        """Where the hand stands, in seconds since the epoch."""
        return self.at

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`."""
        self.at += seconds
