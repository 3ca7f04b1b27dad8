"""What the daemon knows and the store does not: handed over as a value, asked for whenever somebody looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class DaemonState:
    """The moment's state of a daemon. Times are aware; counts are of this process, from its start on.

    ``problems`` are sentences for people: each makes ``/readyz`` say no (the desired state is invalid, the last
    passes could not run). ``errors`` counts passes that could not run or ended with an error of their own.
    ``passes`` counts, by result, the passes that left no record in the store; the others are counted there.
    """

    running_since: datetime | None = None
    next_pass: datetime | None = None
    queue: int = 0
    revision: str = ""
    problems: tuple[str, ...] = ()
    errors: int = 0
    passes: Mapping[str, int] = field(default_factory=dict)
    stopping: bool = False
