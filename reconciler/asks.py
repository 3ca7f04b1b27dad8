"""Requests for a pass at once, handed through the store: from the command line or over HTTP to the daemon."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from reconciler.store import Store, now_text

KEEP = timedelta(days=7)


@dataclass(frozen=True)
class Ask:
    """Somebody wants ``target`` looked at now: NODE, NODE/KIND or NODE/KIND/NAME (``*`` stands for any); empty: all."""

    id: int
    target: str


def ask(store: Store, target: str, by: str) -> int:
    """Put a request on record and return its number; the daemon takes it within about a second."""
    row = {"target": target, "by": by, "asked": now_text(datetime.now(UTC))}
    with store.db.atomic():
        old = now_text(datetime.now(UTC) - KEEP)
        store.db.execute("DELETE FROM asks WHERE asked < ?", [old])
        table = store.db.table("asks").insert(row)
    return int(table.last_pk or 0)


def state(store: Store, number: int) -> dict[str, Any] | None:
    """What became of a request: ``state`` (waiting, taken, done), ``run_id``, ``exit_code``; None: unknown."""
    for row in store.db.query("SELECT * FROM asks WHERE id = ?", [number]):
        found = "done" if row["done"] else "taken" if row["taken"] else "waiting"
        return {"state": found, **{key: value for key, value in row.items() if key != "by"}}
    return None


def waiting(store: Store) -> list[Ask]:
    """Requests that nobody has taken, oldest first. What waits for longer than it is kept is not wanted any more."""
    old = now_text(datetime.now(UTC) - KEEP)
    rows = store.db.query("SELECT id, target FROM asks WHERE taken IS NULL AND asked >= ? ORDER BY id", [old])
    return [Ask(row["id"], row["target"]) for row in rows]


def take(store: Store, asks: Iterable[Ask]) -> None:
    """A pass is about to begin for these."""
    with store.db.atomic():
        for found in asks:
            store.db.execute(
                "UPDATE asks SET taken = ? WHERE id = ?", [now_text(datetime.now(UTC)), found.id]
            )


def withdraw(store: Store, number: int) -> None:
    """Whoever asked does not want it any more; one that was taken is finished all the same."""
    with store.db.atomic():
        store.db.execute("DELETE FROM asks WHERE id = ? AND taken IS NULL", [number])


def done(store: Store, asks: Iterable[Ask], run_id: str, exit_code: int, problem: str = "") -> None:
    """The pass that was made for these is over; ``problem`` says why it could not be made."""
    with store.db.atomic():
        for found in asks:
            store.db.execute(
                "UPDATE asks SET done = ?, run_id = ?, exit_code = ?, problem = ? WHERE id = ?",
                [now_text(datetime.now(UTC)), run_id, exit_code, problem, found.id],
            )
