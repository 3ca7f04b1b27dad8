"""Structured logs on standard error, for people or as JSON: one line an event, with run, node and resource."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from reconciler.model import Event, Status

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(level: str, style: str) -> None:
    """Set up our own logs and those of libraries alike; ``style`` is console or json."""
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    shown: list[Any] = (
        [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
        if style == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False, pad_event_to=28)]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *shown],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("reconciler").setLevel(_LEVELS[level])
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class Log:
    """The logs of passes. Nothing is formatted before somebody reads it."""

    def __init__(self) -> None:
        self._log = structlog.stdlib.get_logger("reconciler")

    def say(self, level: str, event: str, **fields: Any) -> None:
        """One line; fields without a value are left out."""
        kept: MutableMapping[str, Any] = {
            name: value for name, value in fields.items() if value not in (None, "")
        }
        getattr(self._log, level)(event, **kept)

    def event(self, event: Event) -> None:
        """One line for what is put on record."""
        level = "warning" if event.status in (Status.FAILED, Status.ROLLED_BACK) else "info"
        said = event.details
        self.say(
            level, event.status.value, run=said.get("run"), node=event.id.node, resource=str(event.id),
            changes=", ".join(str(change["field"]) for change in said.get("changes", ())),
            attempt=event.fix_attempts or None, cause=said.get("cause"), reason=said.get("reason"),
        )  # fmt: skip
