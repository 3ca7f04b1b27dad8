"""Server-sent events: a line with a number whenever something has changed. Who wants to know what, asks.

So an open page costs a comparison twice a second, and the document is made once for all of them.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from reconciler.api.errors import answer
from reconciler.api.fleet import Fleet
from reconciler.api.reader import Unreadable

POLL, HEARTBEAT = 0.5, 15.0
MOST = 100


class Streams:
    """The streams that are open: so many at most, and none after ``close``."""

    def __init__(self, most: int = MOST) -> None:
        self.most, self.open = most, 0
        self._closing = threading.Event()

    def close(self) -> None:
        """Every stream ends within half a second. For another thread to call."""
        self._closing.set()

    def response(self, fleet: Fleet) -> Response:
        """A new stream, or why there is none."""
        if self.open >= self.most:
            return answer(503, f"{self.most} pages are open already; close one", {"retry-after": "30"})
        headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
        return StreamingResponse(self._changes(fleet), 200, headers, "text/event-stream")

    async def _changes(self, fleet: Fleet) -> AsyncIterator[bytes]:
        self.open += 1
        try:
            before, spoke = "", time.monotonic()
            yield b"retry: 2000\n\n"
            while not self._closing.is_set():
                said = await _news(fleet)
                if said != before:
                    before, spoke = said, time.monotonic()
                    yield f"data: {said}\n\n".encode()
                elif time.monotonic() - spoke >= HEARTBEAT:
                    spoke = time.monotonic()
                    yield b": still here\n\n"
                await asyncio.sleep(POLL)
        finally:
            self.open -= 1


async def _news(fleet: Fleet) -> str:
    try:
        return json.dumps({"revision": (await fleet.shown()).revision})
    except Unreadable as error:
        return json.dumps({"error": str(error)})
