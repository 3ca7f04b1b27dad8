"""Structured logs: one line an event, on standard error, never a key in them."""

import logging
import sys
from typing import Any

import orjson
import structlog

from sidecar.errors import redact_text

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
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact,
    ]
    factory: Any
    if style == "json":
        processors.append(structlog.processors.JSONRenderer(serializer=_dump))
        factory = structlog.BytesLoggerFactory(sys.stderr.buffer)
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
        factory = structlog.PrintLoggerFactory(sys.stderr)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Forward()]
    root.setLevel(max(_LEVELS[level], logging.WARNING))


def _dump(event: Any, **_options: Any) -> bytes:
    return orjson.dumps(event, default=str)


class _Forward(logging.Handler):
    """Library logs in our shape."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(
            record.levelno, record.getMessage(), exc_info=record.exc_info or None, logger=record.name
        )
