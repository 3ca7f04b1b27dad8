"""Structured logs: one line an event, on standard error, never a key in them."""

import asyncio
import logging
import sys
from datetime import UTC, datetime
from time import time
from typing import Any, BinaryIO

import orjson
import structlog

from sidecar.errors import redact_text

_KEEP_SECONDS = 0.1
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


def _redact(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Texts that came from elsewhere may quote a key."""
    for key in ("detail", "error", "exception", "event"):
        text = event.get(key)
        if isinstance(text, str) and ("-" in text or "earer" in text):
            event[key] = redact_text(text)
    return event


def configure(level: str, style: str) -> None:
    """Set up both our own logs and those of libraries."""
    processors: list[Any] = [
        structlog.processors.add_log_level,
        _stamp,
        structlog.processors.format_exc_info,
        _redact,
    ]
    if style == "json":
        processors.append(structlog.processors.JSONRenderer(serializer=_dump))
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_names: _Lines(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Forward()]
    root.setLevel(max(_LEVELS[level], logging.WARNING))


def _stamp(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """When it happened, which for a line that was kept a while is `at` (seconds, epoch)."""
    at = event.pop("at", None)
    stamp = datetime.fromtimestamp(time() if at is None else at, UTC)
    event["timestamp"] = stamp.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return event


class _Lines:
    """Writes a line and, unless many are coming, sees to it that it arrives."""

    hold = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def msg(self, line: str | bytes) -> None:
        """One line."""
        self._file.write((line if isinstance(line, bytes) else line.encode(errors="replace")) + b"\n")
        if not _Lines.hold:
            self._file.flush()

    debug = info = warning = error = critical = exception = log = msg


class AccessLog:
    """Lines about requests, put down at once and written together a moment later.

    One system call and one turn of the processors for each would be a fifth of a request's cost.
    """

    def __init__(self) -> None:
        self._kept: list[dict[str, Any]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._log = structlog.get_logger("sidecar.proxy")

    def note(self, **fields: Any) -> None:
        """Keep a line, with the time it happened as `at`."""
        self._kept.append(fields)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_KEEP_SECONDS, self.write)

    def write(self) -> None:
        """Write what is kept."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        kept, self._kept = self._kept, []
        _Lines.hold = True
        try:
            for fields in kept:
                self._log.info("request", **fields)
        finally:
            _Lines.hold = False
            if kept:
                sys.stderr.buffer.flush()


def _dump(event: Any, **_options: Any) -> bytes:
    return orjson.dumps(event, default=str)


class _Forward(logging.Handler):
    """Library logs in our shape."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(
            record.levelno, record.getMessage(), exc_info=record.exc_info or None, logger=record.name
        )
