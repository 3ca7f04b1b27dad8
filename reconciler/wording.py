"""What an alert is called, what it has in common with others, and the words in which people are told. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from reconciler.model import Alert, ResourceId

LEVELS = ("P0", "P1", "P2")
FLEET = "fleet"
# A notification is read on a telephone; what is longer stands in the alert's file.
HEADLINE, PARAGRAPH, NAMES, CHANGES, LINES = 90, 600, 8, 5, 15

_RUN = r"\d{8}T\d{6}Z-[0-9a-f]{6}"
# Order matters: what is recognised as a whole goes before the numbers that it is made of.
_VARYING = (
    (re.compile(rf"[^\s'\":,;()]*{_RUN}[^\s'\":,;()]*"), "<attempt>"),
    (re.compile(r"(?:/tmp|/var/tmp|/var/folders)/[^\s'\":,;()]+"), "<temporary>"),
    (re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE), "#"),
    (re.compile(r"\b(?:0x)?(?=[0-9a-f]*\d)[0-9a-f]{7,}\b", re.IGNORECASE), "#"),
    (re.compile(r"\d+(?:[.,:]\d+)*"), "#"),
    (re.compile(r"\s+"), " "),
)


def level_of(severity: int) -> str:
    """P0: act now (5); P1: today (4, 3); P2: routine (2, 1)."""
    if severity >= 5:  # noqa: PLR2004 - the scale of severities ends there
        return "P0"
    return "P1" if severity >= 3 else "P2"  # noqa: PLR2004 - the same


@dataclass(frozen=True, slots=True)
class Subject:
    """What an alert is about. ``node`` is empty for the fleet; ``kind`` and ``name`` unless it is a resource."""

    node: str
    kind: str = ""
    name: str = ""

    @classmethod
    def of(cls, alert: Alert) -> Subject:
        """From the alert's key, and its node where that is given."""
        try:
            rid = ResourceId.parse(alert.key)
        except ValueError:
            return cls(alert.node or ("" if alert.key == FLEET else alert.key))
        return cls(alert.node or rid.node, rid.kind, rid.name)


def causes(alert: Alert, nodes: Collection[str]) -> tuple[str, str]:
    """The cause that is told once a day, and the family of causes that one notification may tell together.

    They differ for what is wrong with a node as a whole: that the second node is silent, too, is news
    although the first one's silence was told; but thirty that fall silent together are one message.
    """
    subject = Subject.of(alert)
    what = normal(alert.detail, {*nodes, subject.node} - {""})
    if subject.kind:
        cause = f"{alert.reason} {subject.kind}/{subject.name}: {what}"
        return cause, cause
    family = "<node>" if subject.node == alert.key else alert.key
    return f"{alert.reason} {alert.key}: {what}", f"{alert.reason} {family}: {what}"


def normal(detail: str, nodes: Iterable[str] = ()) -> str:
    """Text without what differs from node to node and from attempt to attempt."""
    # The longest first: node-1 is also the beginning of node-1.example.
    for node in sorted(nodes, key=len, reverse=True):
        detail = re.sub(rf"(?<![\w.-]){re.escape(node)}(?![\w-]|\.\w)", "<node>", detail)
    for pattern, placeholder in _VARYING:
        detail = pattern.sub(placeholder, detail)
    return detail.strip()


@dataclass(frozen=True, slots=True)
class Message:
    """A notification in words, and how bad it is."""

    level: str
    title: str
    body: str


@dataclass(frozen=True, slots=True)
class Background:
    """What is known of a cause beside the alerts that are told now.

    ``recurred`` counts episodes since it was last told at ``told``; ``worse_than`` is the level told then;
    ``also`` are nodes that have it, too; ``attempts`` are the repairs begun since it was last as desired.
    """

    recurred: int = 0
    told: str = ""
    worse_than: str = ""
    also: tuple[str, ...] = ()
    attempts: int = 0


Row = Mapping[str, Any]


def opening(rows: Sequence[Row], known: Background) -> Message:
    """Alerts that share one cause: what, why, what was tried, what to do."""
    worst = max(rows, key=lambda row: row["severity"])
    level = level_of(worst["severity"])
    lines = [f"What: {_what(worst)}, since {_moment(min(row['opened'] for row in rows))}"]
    lines.append(f"Why: {_shortened(worst['detail'], PARAGRAPH)}")
    nodes = _nodes(rows)
    if len(nodes) > 1:
        lines.append(f"Nodes ({len(nodes)}): {_listed(nodes)}")
    if known.also:
        lines.append(f"Also on: {_listed(known.also)}")
    if worst["changes"]:
        lines.append(f"Differs: {_changes(worst['changes'])}")
    if known.attempts:
        lines.append(f"Tried: {_count(known.attempts, 'repair')} since it was last as desired")
    if known.worse_than:
        lines.append(f"It got worse: it was {known.worse_than} when it was last told.")
    if known.recurred:
        lines.append(
            f"It came back {_count(known.recurred, 'time')} since it was told {_moment(known.told)}."
        )
    if audience := list(dict.fromkeys(name for row in rows for name in row["audience"])):
        lines.append(f"For: {_listed(audience)}")
    if worst["advice"]:
        lines.append(f"Next: {_shortened(worst['advice'], PARAGRAPH)}")
    more = f"reconcile explain {worst['key']}" if worst["kind"] else f"reconcile alerts {worst['reason']}"
    lines.append(f"More: {more}")
    return Message(level, _title(level, rows, worst), "\n".join(lines))


def resolution(rows: Sequence[Row]) -> Message:
    """Alerts that share one cause and are over."""
    worst = max(rows, key=lambda row: row["severity"])
    level = level_of(worst["severity"])
    began, ended = min(row["opened"] for row in rows), max(row["resolved"] for row in rows)
    lasted = datetime.fromisoformat(ended) - datetime.fromisoformat(began)
    lines = [f"Over: {_what(worst)}, {_moment(ended)}, after {_duration(lasted.total_seconds())}"]
    if worst["resolution"]:
        lines.append(f"How: {_shortened(worst['resolution'], PARAGRAPH)}")
    lines.append(f"It was: {_shortened(worst['detail'], PARAGRAPH)}")
    nodes = _nodes(rows)
    if len(nodes) > 1:
        lines.append(f"Nodes ({len(nodes)}): {_listed(nodes)}")
    return Message(level, _title(f"{level} resolved", rows, worst), "\n".join(lines))


def summary(rows: Sequence[Row]) -> Message:
    """Many alerts of many causes, beyond those that got a notification of their own."""
    ordered = sorted(rows, key=lambda row: (-row["severity"], row["id"]))
    level = level_of(ordered[0]["severity"])
    where = f" on {_count(len(nodes), 'node')}" if (nodes := _nodes(rows)) else ""
    lines = [
        f"{level_of(row['severity'])} {row['key']}: {_shortened(row['detail'], HEADLINE)}"
        for row in ordered[:LINES]
    ]
    if len(ordered) > LINES:
        lines.append(f"… and {len(ordered) - LINES} more")
    lines.append("More: reconcile alerts")
    return Message(level, f"[{level}] {_count(len(rows), 'more alert')}{where}", "\n".join(lines))


def _title(tag: str, rows: Sequence[Row], worst: Row) -> str:
    nodes = _nodes(rows)
    where = f"{len(nodes)} nodes" if len(nodes) > 1 else (nodes[0] if nodes else worst["key"])
    resource = f"{worst['kind']}/{worst['name']}: " if worst["kind"] else ""
    return f"[{tag}] {where}: {resource}{_shortened(worst['detail'], HEADLINE) or worst['reason']}"


def _what(row: Row) -> str:
    return f"{row['kind']}/{row['name']} {row['reason']}" if row["kind"] else str(row["reason"])


def _nodes(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["node"] for row in rows if row["node"]))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def _changes(changes: Sequence[Row]) -> str:
    shown = [
        f"{change['field']} {_shortened(change['observed'], 40)} → {_shortened(change['desired'], 40)}"
        for change in changes[:CHANGES]
    ]
    more = [f"and {len(changes) - CHANGES} more"] if len(changes) > CHANGES else []
    return "; ".join([*shown, *more])


def _shortened(value: Any, length: int) -> str:
    """One line of at most so many characters: control characters and line breaks would garble a message."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _moment(text: str) -> str:
    return f"{text[:16].replace('T', ' ')} UTC"


def _duration(seconds: float) -> str:
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return _count(int(seconds // size), unit)
    return "less than a minute"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
