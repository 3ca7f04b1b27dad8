"""What the shell offers for a half-typed word: kinds, and nodes and resources that passes have seen."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress

from reconciler import kinds, settings
from reconciler.model import ConfigurationError


def kind(incomplete: str) -> list[str]:
    """Names of kinds; after a comma the next one."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in kinds.names() if name.startswith(last)]


def node(incomplete: str) -> list[str]:
    """Nodes that were looked at."""
    return _beginning(incomplete, {key.split("/", 1)[0] for key in _keys()})


def resource(incomplete: str) -> list[str]:
    """NODE/KIND/NAME, in full."""
    return _beginning(incomplete, _keys())


def target(incomplete: str) -> list[str]:
    """NODE, NODE/KIND or NODE/KIND/NAME: the next part of what was typed, so that the list stays short."""
    depth = incomplete.count("/") + 1
    return _beginning(incomplete, {"/".join(key.split("/", 2)[:depth]) for key in _keys()})


def _beginning(incomplete: str, known: Iterable[str]) -> list[str]:
    return sorted(name for name in known if name.startswith(incomplete))


def _keys() -> list[str]:
    """Issue keys of the store that the settings name; none where there is none. Never a word about what is wrong."""
    with suppress(ConfigurationError, sqlite3.Error):
        path = settings.load().db
        if path.exists():
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1)) as database:
                return [row[0] for row in database.execute("SELECT issue_key FROM conditions")]
    return []
