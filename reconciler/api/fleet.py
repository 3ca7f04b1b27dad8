"""What the page shows, put together once per change however many look at it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from reconciler.api import documents
from reconciler.api.reader import Reader
from reconciler.api.state import DaemonState

# Suspensions end and passes grow old by themselves: so often it is looked whether something did.
_AGE = 15.0
# Within this time nobody asks the database again whether something changed.
_QUIET = 0.4


@dataclass(frozen=True)
class Shown:
    """The document, ready to send; ``revision`` is another one whenever it says something else."""

    revision: str
    body: bytes
    packed: bytes


class Fleet:
    """The fleet as everybody sees it. ``interval`` is that of passes, in seconds."""

    def __init__(self, reader: Reader, state: Callable[[], DaemonState], interval: float) -> None:
        self.reader, self.state, self.interval = reader, state, interval
        self._lock = asyncio.Lock()
        self._shown: Shown | None = None
        self._of: tuple[object, ...] = ()
        self._asked = -_QUIET

    async def shown(self) -> Shown:
        """The newest document. Raises Unreadable."""
        async with self._lock:
            now = time.monotonic()
            if self._shown is None or now - self._asked >= _QUIET:
                state = self.state()
                of = (await self.reader.version(), state, int(now / _AGE))
                if self._shown is None or of != self._of:
                    self._shown = await self.reader.read(
                        lambda store: _shown(documents.fleet(store, state, self.interval))
                    )
                    self._of = of
                self._asked = now
            return self._shown

    async def unready(self) -> list[dict[str, str]]:
        """Why the fleet's state is not to be relied on. Raises Unreadable."""
        state = self.state()
        last = await self.reader.read(lambda store: store.last_pass())
        return documents.unready(last, state, self.interval, datetime.now(UTC))


def _shown(document: dict[str, object]) -> Shown:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), default=str)
    revision = hashlib.sha256(text.encode()).hexdigest()[:16]
    body = f'{{"revision":"{revision}",{text[1:]}'.encode()
    return Shown(revision, body, gzip.compress(body, 3))
