"""Delivers notifications from the store to the routes: late rather than never, and never at the pass's cost."""

from __future__ import annotations

import json
import logging
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from typing import Any

from reconciler.settings import Route, referred
from reconciler.store import Store, now_text

# The first repetition comes after about a minute, later ones after up to an hour.
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
GIVE_UP = timedelta(days=7)
# One delivery takes on so many messages of a route; the others follow with the next.
BATCH = 20
# One call of an endpoint; less where the deadline leaves less.
TIMEOUT = 10.0

_log = logging.getLogger(__name__)
Row = dict[str, Any]


class RouteError(Exception):
    """The address of a route cannot be had; the message says which reference and why, not what it holds."""


def address(route: Route) -> str:
    """The Apprise URL that a route refers to. Raises RouteError."""
    try:
        return referred(route.url)
    except LookupError as error:
        raise RouteError(str(error)) from None


class Notifier:
    """Sends what :class:`reconciler.alerts.Alerts` put into the store."""

    def __init__(self, store: Store, routes: Sequence[Route]) -> None:
        self.store, self.routes = store, {route.name: route for route in routes}

    def deliver(self, now: datetime, deadline_seconds: float) -> None:
        """Send what is due and keep what became of it, within the deadline. Never raises.

        At least once: what was sent by a process that was killed before it could say so is sent again.
        """
        try:
            self._deliver(now, time.monotonic() + deadline_seconds)
        except Exception:  # noqa: BLE001 - whatever happens here, the pass is over and stands
            _log.exception("notifications could not be delivered; the next pass tries again")

    def _deliver(self, now: datetime, deadline: float) -> None:
        self._without_route(now)
        due: dict[str, list[Row]] = {}
        for row in self._due(now):
            due.setdefault(row["route"], []).append(row)
        messages: dict[str, list[Row]] = {}
        for name, rows in due.items():
            try:
                url = address(self.routes[name])
            except RouteError as error:
                self._failed(rows[0], str(error), now)
                self._held(rows[1:], rows[0], now)
                continue
            claimed = [row for row in rows if self._claimed(row, now, deadline - time.monotonic())]
            if claimed:
                messages[name] = [{**row, "url": url} for row in claimed]
        if messages:
            self._send(messages, now, deadline)

    def _send(self, messages: Mapping[str, Sequence[Row]], now: datetime, deadline: float) -> None:
        waiting = {row["id"]: row for rows in messages.values() for row in rows}
        began: set[int] = set()
        failed: dict[str, Row] = {}
        works: set[str] = set()
        seconds = max(0.1, deadline - time.monotonic())
        for answer in conversation(messages, deadline):
            if answer["state"] == "started":
                began.add(answer["id"])
                continue
            row = waiting.pop(answer["id"])
            if answer["state"] == "sent":
                works.add(row["route"])
                self._sent(row, now)
            else:
                failed[row["route"]] = row
                self._failed(row, answer["error"], now)
        for row in [row for number, row in waiting.items() if number in began]:
            failed[row["route"]] = waiting.pop(row["id"])
            self._failed(row, f"no answer within {seconds:.0f} s", now)
        for row in waiting.values():
            if row["route"] in failed:
                self._held([row], failed[row["route"]], now)
            elif row["route"] in works:
                self._again(row, now)  # there was no time left for it
            else:
                failed[row["route"]] = row
                self._failed(row, "the process that sends did not get as far as sending", now)
        for name in works - set(failed):
            self._recovered(name, now)

    # --- the table ---

    def _due(self, now: datetime) -> list[Row]:
        """What may be sent now. A resolution waits for its opening; what failed often lets others go first."""
        rows: list[Row] = []
        for name in self.routes:
            rows += self.store.db.query(
                "SELECT * FROM deliveries d WHERE route = ? AND status = 'due' AND next_try <= ? AND NOT EXISTS "
                "(SELECT 1 FROM tellings t JOIN deliveries o ON o.id = t.delivery "
                " WHERE t.resolution = d.id AND t.route = d.route AND o.status = 'due') "
                "ORDER BY attempts, level, id LIMIT ?",
                [name, now_text(now), BATCH],
            )
        return rows

    def _claimed(self, row: Row, now: datetime, seconds: float) -> bool:
        """Take a message, so that no other process sends it, too; if this one dies, it is due again soon."""
        until = now_text(now + timedelta(seconds=max(0.0, seconds) + 60))
        return self._change(
            "UPDATE deliveries SET next_try = ? WHERE id = ? AND status = 'due' AND next_try = ?",
            [until, row["id"], row["next_try"]],
        )

    def _sent(self, row: Row, now: datetime) -> None:
        self._change(
            "UPDATE deliveries SET status = 'sent', attempts = attempts + 1, ended = ?, error = '' WHERE id = ?",
            [now_text(now), row["id"]],
        )

    def _failed(self, row: Row, error: str, now: datetime) -> None:
        attempts = row["attempts"] + 1
        over = now - datetime.fromisoformat(row["created"]) >= GIVE_UP
        self._change(
            "UPDATE deliveries SET status = ?, attempts = ?, next_try = ?, error = ?, ended = ? WHERE id = ?",
            [
                "given_up" if over else "due", str(attempts), now_text(now + pause(attempts)),
                error, now_text(now) if over else None, row["id"],
            ],
        )  # fmt: skip

    def _recovered(self, route: str, now: datetime) -> None:
        """The route works: what waited for that is due."""
        self._change(
            "UPDATE deliveries SET next_try = ? WHERE route = ? AND status = 'due' AND error != '' AND next_try > ?",
            [now_text(now), route, now_text(now)],
        )

    def _held(self, rows: Sequence[Row], behind: Row, now: datetime) -> None:
        """Not tried, because the route failed just before: due when that is tried again."""
        for row in rows:
            over = now - datetime.fromisoformat(row["created"]) >= GIVE_UP
            self._change(
                "UPDATE deliveries SET next_try = (SELECT next_try FROM deliveries WHERE id = ?), "
                "status = ?, ended = ?, error = 'it waits: the route failed with another notification' WHERE id = ?",
                [behind["id"], "given_up" if over else "due", now_text(now) if over else None, row["id"]],
            )

    def _again(self, row: Row, now: datetime) -> None:
        self._change("UPDATE deliveries SET next_try = ? WHERE id = ?", [now_text(now), row["id"]])

    def _without_route(self, now: datetime) -> None:
        """What is due on a route that the settings no longer have says so, and is given up in the end."""
        marks = ", ".join("?" for _ in self.routes)
        reason = "there is no route of this name in the settings"
        old = now_text(now - GIVE_UP)
        rows = self.store.db.query(
            f"SELECT id, created FROM deliveries WHERE status = 'due' AND route NOT IN ({marks}) "  # noqa: S608 - question marks
            "AND (error != ? OR created <= ?)",
            [*self.routes, reason, old],
        )
        for row in list(rows):
            over = row["created"] <= old
            self._change(
                "UPDATE deliveries SET error = ?, status = ?, ended = ? WHERE id = ?",
                [reason, "given_up" if over else "due", now_text(now) if over else None, row["id"]],
            )

    def _change(self, sql: str, values: Sequence[str | None]) -> bool:
        with self.store.db.atomic():
            return bool(self.store.db.execute(sql, list(values)).rowcount)


def pause(attempts: int) -> timedelta:
    """How long after so many failures the next attempt is due: doubling, at most an hour, up to a quarter less."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempts - 1, 10))
    return timedelta(seconds=longest * random.uniform(0.75, 1.0))  # noqa: S311 - spreads load, guards nothing


def try_routes(routes: Sequence[Route], deadline_seconds: float) -> dict[str, str]:
    """Send a test message on every route; per route what went wrong, or nothing."""
    messages = {}
    for route in routes:
        levels = ", ".join(route.levels)
        body = f"What: a test of the route {route.name}\nNext: nothing; alerts of {levels} come this way."
        messages[route.name] = {"title": "[test] reconcile: notifications arrive", "body": body}
    return _at_once(routes, messages, deadline_seconds)


def send_now(routes: Sequence[Route], message: Mapping[str, str], deadline_seconds: float) -> dict[str, str]:
    """Send one message on every route, once, now; per route what went wrong, or nothing.

    ``message`` has ``title``, ``body`` and the body's ``format``: text, html, or chat (Markdown).
    """
    return _at_once(routes, {route.name: message for route in routes}, deadline_seconds)


def _at_once(
    routes: Sequence[Route], wanted: Mapping[str, Mapping[str, str]], deadline_seconds: float
) -> dict[str, str]:
    deadline = time.monotonic() + deadline_seconds
    found: dict[str, str] = {}
    messages: dict[str, list[Row]] = {}
    for number, route in enumerate(routes):
        found[route.name] = f"no answer within {deadline_seconds:.0f} s"
        try:
            url = address(route)
        except RouteError as error:
            found[route.name] = str(error)
            continue
        messages[route.name] = [
            {"id": number, "url": url, "level": "P2", "what": "opened", **wanted[route.name]}
        ]
    for answer in conversation(messages, deadline) if messages else ():
        if answer["state"] != "started":
            found[routes[answer["id"]].name] = answer.get("error", "")
    return found


# --- the processes that send ------------------------------------------------------------------------


def conversation(messages: Mapping[str, Sequence[Row]], deadline: float) -> Iterator[Row]:
    """What the sending processes report, one per route, as they do. At the deadline (monotonic) all are ended."""
    timeout = max(0.5, min(TIMEOUT, 0.8 * (deadline - time.monotonic())))
    with ExitStack() as ended, selectors.DefaultSelector() as selector:
        for rows in messages.values():
            process = subprocess.Popen(
                # -P: a file that happens to lie in the working directory is no module.
                [sys.executable, "-P", "-m", "reconciler.sender"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a traceback there could hold an address
                start_new_session=True,
            )
            ended.callback(_end, process)
            _hand_over(process, {"timeout": timeout, "messages": rows})
            selector.register(process.stdout or -1, selectors.EVENT_READ, [b""])
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _mask in selector.select(timeout=left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                *lines, key.data[0] = (key.data[0] + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines)


def _hand_over(process: subprocess.Popen[bytes], task: Mapping[str, Any]) -> None:
    """The pipe stays open: the process ends when it closes, which a killed reconciler does, too."""
    assert process.stdin  # noqa: S101 - for the type checker
    with suppress(BrokenPipeError):  # it died at once; then it reports nothing, which says so
        process.stdin.write(json.dumps(task).encode() + b"\n")
        process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            if stream:
                stream.close()
