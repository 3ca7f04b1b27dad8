"""Alerts after somebody raised one: episodes, their files, and who has been told of what.

The pass only raises and resolves, in its own transactions. Everything that leaves the store is derived by
:meth:`Alerts.settle` from what stands in it: what is not written yet is written, what is not told yet is told.
So it may end anywhere and be called again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from reconciler.alert_files import LISTS, AlertFiles, alert_rows, document, dumped, file_name
from reconciler.model import Alert, Change
from reconciler.settings import Route
from reconciler.store import Store, now_text
from reconciler.wording import (
    Background,
    Message,
    Subject,
    causes,
    level_of,
    opening,
    resolution,
    summary,
)

# A cause is told once in this time on a route, unless it gets worse.
QUIET = timedelta(hours=24)
# Notifications that are over are kept so long, and resolved alerts.
KEEP_DELIVERIES, KEEP_ALERTS = timedelta(days=30), timedelta(days=365)
# When everything breaks at once, so many causes get a notification each; one more sums up the rest.
MAX_MESSAGES = 10

_LEVEL_SEVERITIES = {"P0": (5, 5), "P1": (3, 4), "P2": (1, 2)}

Row = dict[str, Any]


class Alerts:
    """The alerts of one store. ``directory`` receives a file per episode; ``routes`` are who is told."""

    def __init__(self, store: Store, directory: Path | None, routes: Sequence[Route] = ()) -> None:
        self.store, self.directory, self.routes = store, directory, tuple(routes)

    # --- what the pass says ---

    def raise_(self, alert: Alert, context: Mapping[str, Any], now: datetime) -> None:
        """Open the alert of this key and reason, or refresh the one that is open; nobody is told yet.

        Joins the caller's transaction where there is one. ``context`` is the ``run`` and ``revision`` that
        found it. The severity of an episode is the worst it ever had.
        """
        said = {
            "severity": alert.severity,
            "detail": alert.detail,
            "advice": alert.advice,
            "changes": dumped([_change(change) for change in alert.changes]),
            "audience": dumped(sorted(alert.to)),
        }
        with self._writing():
            before = self._rows("status = 'open' AND key = ? AND reason = ?", [alert.key, alert.reason])
            if before:
                self._refresh(before[0], said, now)
            else:
                self._begin(alert, said, context, now)

    def _begin(
        self, alert: Alert, said: Mapping[str, Any], context: Mapping[str, Any], now: datetime
    ) -> None:
        subject = Subject.of(alert)
        known = self.store.db.execute("SELECT DISTINCT node FROM conditions").fetchall()
        cause, family = causes(alert, {node for (node,) in known})
        moment = now_text(now)
        self._insert(
            "alerts",
            {
                "key": alert.key, "reason": alert.reason,
                "node": subject.node, "kind": subject.kind, "name": subject.name,
                "status": "open", "opened": moment, "seen": moment,
                "cause": cause, "family": family,
                "run": str(context.get("run", "")), "revision": str(context.get("revision", "")),
                **said,
            },
        )  # fmt: skip

    def _refresh(self, before: Row, said: Mapping[str, Any], now: datetime) -> None:
        said = {**said, "severity": max(before["severity"], said["severity"])}
        # That it was seen once more is no reason to write a file in every pass.
        shown = {**said, **{name: json.loads(said[name]) for name in LISTS}}
        file = before["file"] if all(before[name] == value for name, value in shown.items()) else "stale"
        self.store.db.execute(
            "UPDATE alerts SET severity = :severity, detail = :detail, advice = :advice, changes = :changes, "
            "audience = :audience, seen = :seen, occurrences = occurrences + 1, file = :file WHERE id = :id",
            {**said, "seen": now_text(now), "file": file, "id": before["id"]},
        )

    def resolve(
        self,
        key: str,
        now: datetime,
        reason: str = "",
        only: str | None = None,
        keep: Collection[str] = (),
    ) -> None:
        """End every open alert of this key, or ``only`` the one with that reason; ``reason`` says why it is over.

        Alerts with a reason in ``keep`` go on.
        """
        with self._writing():
            self.store.db.execute(
                "UPDATE alerts SET status = 'resolved', resolved = :now, resolution = :why, file = 'stale' "
                "WHERE key = :key AND status = 'open' AND (:only IS NULL OR reason = :only) "
                "AND reason NOT IN (SELECT value FROM json_each(:keep))",
                {"key": key, "now": now_text(now), "why": reason, "only": only, "keep": dumped([*keep])},
            )

    # --- what people and programs ask ---

    def open_keys(self) -> set[str]:
        """What open alerts are about."""
        return {row["key"] for row in self._rows("status = 'open'")}

    def open(self) -> list[Row]:
        """Every open alert, worst first, as its file has it."""
        return [self._shown(row) for row in self._rows("status = 'open' ORDER BY severity DESC, id")]

    def listed(
        self,
        *,
        search: str | None = None,
        resolved: bool = False,
        node: str | None = None,
        kind: str | None = None,
        levels: Sequence[str] | None = None,
        since: str | None = None,
        limit: int = 50,
    ) -> list[Row]:
        """Alerts that match every filter: open ones, worst first; then, if wanted, ``resolved`` ones, newest first.

        Every word of ``search`` has to stand somewhere in the key, reason, detail or advice. ``since`` is a
        time as the store writes it: opened, or resolved, not before it.
        """
        where, values = ["1"], []
        for clause, value in (("node = ?", node), ("kind = ?", kind)):
            if value is not None:
                where.append(clause)
                values.append(value)
        if since is not None:
            where.append("coalesce(resolved, opened) >= ?")
            values.append(since)
        if not resolved:
            where.append("status = 'open'")
        if levels is not None:
            spans = [_LEVEL_SEVERITIES[level] for level in levels]
            where.append("(" + " OR ".join("severity BETWEEN ? AND ?" for _ in spans) + ")")
            values += [str(bound) for span in spans for bound in span]
        for word in (search or "").split():
            where.append("instr(lower(key || ' ' || reason || ' ' || detail || ' ' || advice), lower(?))")
            values.append(word)
        rank = "CASE status WHEN 'open' THEN -severity END, CASE status WHEN 'open' THEN id ELSE -id END"
        order = f"status = 'open' DESC, {rank}"
        rows = self._rows(f"{' AND '.join(where)} ORDER BY {order} LIMIT ?", [*values, str(limit)])
        return [self._shown(row) for row in rows]

    def undelivered(self) -> list[Row]:
        """Notifications that wait or were given up, oldest first, with how often they were tried and why not sent."""
        return list(
            self.store.db.query(
                "SELECT id, route, what, level, title, created, status, attempts, next_try, error "
                "FROM deliveries WHERE status != 'sent' ORDER BY id"
            )
        )

    def _shown(self, row: Row) -> Row:
        where = self.directory / file_name(row) if self.directory and row["file"] == "written" else None
        return {
            **document(row),
            "seen": row["seen"],
            "file": str(where) if where else None,
            "file_error": row["file_error"],
        }

    # --- what follows from it ---

    def settle(self, now: datetime) -> None:
        """Bring notifications and files up to what is known: after the pass, or after the one that was killed.

        Never fails for the directory's sake. Other processes may do the same at the same time.
        """
        with self._writing():
            for route in self.routes:
                self._tell_openings(route, now)
                self._tell_resolutions(route, now)
        self._forget(now)
        if self.directory is not None:
            AlertFiles(self.store, self.directory).settle(now)

    def _tell_openings(self, route: Route, now: datetime) -> None:
        """Group what this route was not told; the worst first, and a summary where they are too many."""
        alerts = self._rows("status = 'open' ORDER BY id")
        families: dict[str, list[Row]] = {}
        for row in self._untold(route, alerts, now):
            families.setdefault(row["family"], []).append(row)
        groups = sorted(families.values(), key=lambda rows: -max(row["severity"] for row in rows))
        single = len(groups) if len(groups) <= MAX_MESSAGES + 1 else MAX_MESSAGES
        for rows in groups[:single]:
            known = self._background(route, rows, alerts)
            what = "worse" if known.worse_than else "opened"
            self._tell(route, what, opening(rows, known), rows, now)
        if rest := [row for rows in groups[single:] for row in rows]:
            self._tell(route, "opened", summary(rest), rest, now)

    def _untold(self, route: Route, alerts: Iterable[Row], now: datetime) -> list[Row]:
        """Open alerts to tell on this route now: a level it was not told of, of a cause that is not quiet."""
        told = dict(
            self.store.db.execute(
                "SELECT alert, min(level) FROM tellings WHERE route = ? GROUP BY alert", [route.name]
            ).fetchall()
        )
        quiet = dict(
            self.store.db.execute(
                "SELECT a.cause, min(t.level) FROM tellings t JOIN alerts a ON a.id = t.alert "
                "JOIN deliveries d ON d.id = t.delivery WHERE t.route = ? AND d.created > ? GROUP BY a.cause",
                [route.name, now_text(now - QUIET)],
            ).fetchall()
        )
        found: dict[str, list[Row]] = {}
        for row in alerts:
            level = level_of(row["severity"])
            if _takes(route, row) and level < told.get(row["id"], "P9"):
                found.setdefault(row["cause"], []).append(row)
        return [
            row
            for cause, rows in found.items()
            if level_of(max(row["severity"] for row in rows)) < quiet.get(cause, "P9")
            for row in rows
        ]

    def _background(self, route: Route, rows: Sequence[Row], alerts: Iterable[Row]) -> Background:
        ids = {row["id"] for row in rows}
        also = [r["node"] for r in alerts if r["family"] == rows[0]["family"] and r["id"] not in ids]
        recurred, told, before = 0, "", "P9"
        for cause in {row["cause"] for row in rows}:
            last, moment, level = self.store.db.execute(
                "SELECT coalesce(max(t.alert), 0), max(d.created), min(t.level) FROM tellings t "
                "JOIN alerts a ON a.id = t.alert LEFT JOIN deliveries d ON d.id = t.delivery "
                "WHERE t.route = ? AND a.cause = ?",
                [route.name, cause],
            ).fetchone()
            told, before = max(told, moment or ""), min(before, level or "P9")
            recurred += self.store.db.execute(
                "SELECT count(*) FROM alerts a WHERE cause = ? AND id > ? AND EXISTS "
                "(SELECT 1 FROM alerts b WHERE b.key = a.key AND b.cause = a.cause AND b.id < a.id)",
                [cause, last],
            ).fetchone()[0]
        worst = max(rows, key=lambda row: row["severity"])
        return Background(
            recurred=recurred if told else 0,
            told=told,
            worse_than=before if level_of(worst["severity"]) < before != "P9" else "",
            also=tuple(dict.fromkeys(node for node in also if node)),
            attempts=self._repairs(worst["key"]),
        )

    def _repairs(self, key: str) -> int:
        """How many repairs of this resource began since it was last as desired."""
        row = self.store.db.execute(
            "SELECT count(*) FROM guardian_events WHERE issue_key = :key AND status = 'fixing' AND id > "
            "coalesce((SELECT max(id) FROM guardian_events WHERE issue_key = :key AND status = 'fixed'), 0)",
            {"key": key},
        ).fetchone()
        return int(row[0])

    def _tell_resolutions(self, route: Route, now: datetime) -> None:
        """One message per cause that is over everywhere.

        What was over long ago is no news any more: nobody was here to say so, or the route comes back after a while.
        """
        rows = self._rows(
            "status = 'resolved' AND id IN (SELECT alert FROM tellings WHERE route = ? AND resolution IS NULL) "
            "AND NOT EXISTS (SELECT 1 FROM alerts o WHERE o.cause = alerts.cause AND o.status = 'open') ORDER BY id",
            [route.name],
        )
        families: dict[str, list[Row]] = {}
        for row in rows:
            families.setdefault(row["family"], []).append(row)
        for group in families.values():
            fresh = any(row["resolved"] > now_text(now - QUIET) for row in group)
            number = (
                self._deliver(route, "resolved", resolution(group), now) if route.resolved and fresh else 0
            )
            for row in group:
                self.store.db.execute(
                    "UPDATE tellings SET resolution = ? WHERE alert = ? AND route = ? AND resolution IS NULL",
                    [number, row["id"], route.name],
                )

    def _tell(self, route: Route, what: str, message: Message, rows: Iterable[Row], now: datetime) -> None:
        number = self._deliver(route, what, message, now)
        for row in rows:
            self._insert(
                "tellings",
                {
                    "alert": row["id"],
                    "route": route.name,
                    "level": level_of(row["severity"]),
                    "delivery": number,
                },
            )

    def _deliver(self, route: Route, what: str, message: Message, now: datetime) -> int:
        moment = now_text(now)
        return self._insert(
            "deliveries",
            {
                "route": route.name, "what": what, "level": message.level,
                "title": message.title, "body": message.body, "created": moment, "next_try": moment,
            },
        )  # fmt: skip

    def _forget(self, now: datetime) -> None:
        """Drop what nothing refers to any more."""
        deliveries, alerts = now_text(now - KEEP_DELIVERIES), now_text(now - KEEP_ALERTS)
        with self._writing():
            self.store.db.execute("DELETE FROM deliveries WHERE status != 'due' AND ended < ?", [deliveries])
            old = "SELECT id FROM alerts WHERE status = 'resolved' AND file = 'pruned' AND resolved < ?"
            self.store.db.execute(f"DELETE FROM tellings WHERE alert IN ({old})", [alerts])  # noqa: S608 - a constant
            self.store.db.execute(f"DELETE FROM alerts WHERE id IN ({old})", [alerts])  # noqa: S608 - the same

    # --- the tables ---

    def _rows(self, where: str, values: Sequence[Any] = ()) -> list[Row]:
        return alert_rows(self.store, where, values)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction that has the write lock before it reads: what it decides by cannot change under it."""
        with self.store.db.atomic():
            self.store.db.execute("UPDATE tellings SET route = route WHERE alert < 0")
            yield

    def _insert(self, table: str, row: Mapping[str, Any]) -> int:
        names = ", ".join(row)
        marks = ", ".join(f":{name}" for name in row)
        cursor = self.store.db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", dict(row))  # noqa: S608 - only the names above
        return int(cursor.lastrowid or 0)


def _takes(route: Route, row: Row) -> bool:
    """Whether an alert is for this route: of its levels, and where the route has audiences, for one of them."""
    return level_of(row["severity"]) in route.levels and (
        not route.to or bool({*route.to} & {*row["audience"]})
    )


def _change(change: Change) -> Row:
    found = {"field": change.field, "desired": change.desired, "observed": change.observed}
    return {**found, "fixable": change.fixable, "note": change.note}
